#include "cuda/device.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace wn::cuda {

namespace simt {

constexpr int warp_size = 32, most_threads = 1024, most_cluster = 8;
constexpr std::size_t stack_bytes = 128 << 10;

struct Block {
  std::unique_ptr<char[]> shared;
  int64_t shared_bytes = 0;
};

// Threads that wait for each other: at a barrier of a block or a cluster, or in a shuffle.
enum class Wait { none, block, block_any, cluster, shuffle };

// It lives on from block to block, unless a fault has left it in the middle of a kernel.
struct Fibre {
  ucontext_t context;
  jmp_buf place;
  char* stack = nullptr;
  bool started = false;
  Where where{};
  Wait wait = Wait::none;
  bool done = false;
  bool condition = false;  // contributed to, and returned by, barrier_any
  unsigned lanes = 0;
  int distance = 0;
  std::size_t bytes = 0;
  unsigned char value[16] = {};
  void* fake_stack = nullptr;
};

thread_local Fibre* current = nullptr;

struct State {
  Device device{4, 90, 227 << 10, 2147483647};
  uint64_t seed = 0;
  std::string log;
  int64_t vector_accesses = 0;

  std::vector<Block> blocks;
  std::unique_ptr<Fibre[]> fibres{new Fibre[most_threads * most_cluster]};
  int threads = 0;  // of the present cluster
  std::vector<Fibre*> ready;
  ucontext_t scheduler{};
  jmp_buf scheduler_place;
  const std::function<void()>* kernel = nullptr;
  std::string error;
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
#endif
};
State state;

// Under the address sanitizer, which must know of every change of stack, contexts are swapped; otherwise jumps do the
// same without a system call.
void to_fibre(Fibre& fibre) {
  current = &fibre;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fibre.stack, stack_bytes);
  swapcontext(&state.scheduler, &fibre.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  if (_setjmp(state.scheduler_place) != 0) return;
  if (fibre.started) _longjmp(fibre.place, 1);
  fibre.started = true;
  setcontext(&fibre.context);
#endif
}

void to_scheduler() {
  Fibre& fibre = *current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fibre.fake_stack, state.scheduler_stack, state.scheduler_stack_bytes);
  swapcontext(&fibre.context, &state.scheduler);
  __sanitizer_finish_switch_fiber(fibre.fake_stack, &state.scheduler_stack, &state.scheduler_stack_bytes);
#else
  if (_setjmp(fibre.place) == 0) _longjmp(state.scheduler_place, 1);
#endif
}

void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &state.scheduler_stack, &state.scheduler_stack_bytes);
#endif
  while (true) {
    (*state.kernel)();
    current->done = true;
    to_scheduler();
  }
}

void prepare(Fibre& fibre) {
  if (fibre.started) return;
  if (fibre.stack == nullptr) {
    void* stack =
        mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("simt: no memory for the stack of a fibre");
    fibre.stack = static_cast<char*>(stack);
  }
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack;
  fibre.context.uc_stack.ss_size = stack_bytes;
  makecontext(&fibre.context, enter, 0);
#if defined(__SANITIZE_ADDRESS__)
  fibre.started = true;
#endif
}

std::string name(const Fibre& fibre) {
  return "thread " + std::to_string(fibre.where.thread) + " of block " + std::to_string(fibre.where.block);
}

void fail(const std::string& message) {
  if (state.error.empty()) state.error = name(*current) + ": " + message;
  current->done = true;
  to_scheduler();
  __builtin_unreachable();
}

const Where& where() { return current->where; }
void count_vector_access() { ++state.vector_accesses; }

bool together(const Fibre& a, const Fibre& b, Wait wait) {
  return wait == Wait::cluster || a.where.block == b.where.block;
}

void wait_for_all(Wait wait) {
  Fibre& self = *current;
  self.wait = wait;
  bool any = false;
  for (int i = 0; i < state.threads; ++i) {
    const Fibre& other = state.fibres[i];
    if (!together(self, other, wait)) continue;
    if (other.done) fail("waits at a barrier that " + name(other) + " left out");
    if (other.wait != wait) return to_scheduler();
    any = any || other.condition;
  }
  for (int i = 0; i < state.threads; ++i) {
    Fibre& other = state.fibres[i];
    if (!together(self, other, wait)) continue;
    other.wait = Wait::none;
    other.condition = any;
    if (&other != &self) state.ready.push_back(&other);
  }
}

void barrier(bool of_cluster) {
  current->condition = false;
  wait_for_all(of_cluster ? Wait::cluster : Wait::block);
}

bool barrier_any(bool condition) {
  current->condition = condition;
  wait_for_all(Wait::block_any);
  return current->condition;
}

void exchange(unsigned lanes, int distance, void* value, std::size_t bytes) {
  Fibre& self = *current;
  const int lane = self.where.thread % warp_size;
  Fibre* warp = &self - lane;
  const int size = std::min(warp_size, self.where.block_threads - (self.where.thread - lane));
  if (!(lanes >> lane & 1)) fail("shuffles without being in its own mask");
  if (!(lanes >> (lane ^ distance) & 1)) fail("shuffles with a lane outside of its mask");
  self.wait = Wait::shuffle;
  self.lanes = lanes;
  self.distance = distance;
  self.bytes = bytes;
  std::memcpy(self.value, value, bytes);
  bool complete = true;
  for (int l = 0; l < warp_size; ++l) {
    if (!(lanes >> l & 1)) continue;
    if (l >= size || warp[l].done) fail("shuffles with a thread that has ended");
    if (warp[l].wait != Wait::shuffle) complete = false;
    else if (warp[l].lanes != lanes || warp[l].distance != distance || warp[l].bytes != bytes)
      fail("shuffles in another way than " + name(warp[l]));
  }
  if (complete) {
    unsigned char values[warp_size][16];
    for (int l = 0; l < size; ++l) std::memcpy(values[l], warp[l].value, bytes);
    for (int l = 0; l < size; ++l)
      if (lanes >> l & 1) {
        std::memcpy(warp[l].value, values[l ^ distance], bytes);
        warp[l].wait = Wait::none;
        if (&warp[l] != &self) state.ready.push_back(&warp[l]);
      }
  } else {
    to_scheduler();
  }
  std::memcpy(value, self.value, bytes);
}

char* shared_memory() { return state.blocks[current->where.rank].shared.get(); }

char* peer_memory(const void* in_shared, int rank) {
  const Block& own = state.blocks[current->where.rank];
  const int64_t offset = static_cast<const char*>(in_shared) - own.shared.get();
  if (offset < 0 || offset >= own.shared_bytes) fail("asks for a peer of memory that is not shared");
  if (rank < 0 || rank >= current->where.cluster) fail("asks for a peer outside of its cluster");
  return state.blocks[rank].shared.get() + offset;
}

void run_cluster(const Shape& shape, int64_t first_block, std::mt19937_64& random) {
  state.blocks.clear();
  state.blocks.resize(shape.cluster);
  for (Block& block : state.blocks) {
    block.shared_bytes = shape.shared_bytes;
    block.shared.reset(static_cast<char*>(::operator new[](shape.shared_bytes)));
    std::memset(block.shared.get(), 0xff, shape.shared_bytes);  // NaN in every floating-point type
  }
  state.threads = shape.cluster * shape.threads;
  state.ready.clear();
  for (int i = 0; i < state.threads; ++i) {
    Fibre& fibre = state.fibres[i];
    const int rank = i / shape.threads;
    fibre.where = {i % shape.threads, shape.threads, static_cast<int>(first_block) + rank, rank, shape.cluster};
    fibre.wait = Wait::none;
    fibre.done = false;
    prepare(fibre);
    state.ready.push_back(&fibre);
  }
  int done = 0;
  while (!state.ready.empty() && state.error.empty()) {
    std::swap(state.ready[random() % state.ready.size()], state.ready.back());
    Fibre& fibre = *state.ready.back();
    state.ready.pop_back();
    to_fibre(fibre);
    done += fibre.done;
  }
  for (int i = 0; i < state.threads && done < state.threads && state.error.empty(); ++i)
    if (!state.fibres[i].done) state.error = name(state.fibres[i]) + ": waits for ever";
  if (!state.error.empty())
    for (int i = 0; i < state.threads; ++i) state.fibres[i].started = false;
}

void run(const char* what, const Shape& shape, const std::function<void()>& kernel) {
  const std::string prefix = std::string("simt: ") + what + ": ";
  const auto require = [&](bool condition, const char* message) {
    if (!condition) throw std::runtime_error(prefix + message);
  };
  require(shape.blocks >= 1 && shape.blocks <= state.device.blocks, "wrong number of blocks");
  require(shape.threads >= 1 && shape.threads <= most_threads, "wrong number of threads");
  require(shape.cluster >= 1 && shape.cluster <= most_cluster && shape.blocks % shape.cluster == 0,
          "wrong size of clusters");
  require(shape.cluster == 1 || state.device.capability >= 90, "no clusters on this device");
  require(shape.shared_bytes >= 0 && shape.shared_bytes <= state.device.shared_bytes, "wrong size of shared memory");
  std::mt19937_64 random(state.seed);
  const int64_t vector_accesses = state.vector_accesses;
  state.kernel = &kernel;
  state.error.clear();
  for (int64_t block = 0; block < shape.blocks && state.error.empty(); block += shape.cluster)
    run_cluster(shape, block, random);
  if (!state.error.empty()) throw std::runtime_error(prefix + state.error);
  state.log += std::string(what) + "; blocks " + std::to_string(shape.blocks) + "; threads " +
               std::to_string(shape.threads) + "; cluster " + std::to_string(shape.cluster) + "; shared " +
               std::to_string(shape.shared_bytes) + "; vectors " +
               std::to_string(state.vector_accesses - vector_accesses) + "\n";
}

}  // namespace simt

const Device& current_device() { return simt::state.device; }

}  // namespace wn::cuda

extern "C" {

void simt_device(int multiprocessors, int capability, int64_t shared_bytes, int64_t blocks) {
  wn::cuda::simt::state.device = {multiprocessors, capability, shared_bytes, blocks};
}
void simt_seed(uint64_t seed) { wn::cuda::simt::state.seed = seed; }

// What was launched since the last call, a line each.
const char* simt_log() {
  static std::string log;
  log.swap(wn::cuda::simt::state.log);
  wn::cuda::simt::state.log.clear();
  return log.c_str();
}
}
