// The device vocabulary of csrc/cuda/device.h for the CPU: a kernel runs cluster by cluster, every thread a fibre.
// The scheduler (simt.cpp) picks the next fibre at random, so that an order that happens to work proves nothing.
// It finds wrong indices, masks, tails, barriers and shared-memory sizes; not races within a warp, and no speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#define WN_KERNEL(threads, blocks) void
#define WN_PARAMETER const
#define WN_DEVICE inline
#define WN_OUTLINE __attribute__((noinline))

namespace wn::cuda {

namespace simt {

struct Fibre;
extern thread_local Fibre* current;

struct Where {
  int thread, block_threads, block, rank, cluster;
};
const Where& where();
void barrier(bool of_cluster);
bool barrier_any(bool condition);
void exchange(unsigned lanes, int distance, void* value, std::size_t bytes);
char* shared_memory();
char* peer_memory(const void* in_shared, int rank);
[[noreturn]] void fail(const std::string& message);
void count_vector_access();
void run(const char* what, const Shape& shape, const std::function<void()>& kernel);

}  // namespace simt

inline int tid() { return simt::where().thread; }
inline int block_threads() { return simt::where().block_threads; }
inline int bid() { return simt::where().block; }

template <class T> T shfl_xor(unsigned lanes, T x, int distance) {
  simt::exchange(lanes, distance, &x, sizeof(T));
  return x;
}
inline int64_t opaque(int64_t x) { return x; }
inline const void* in_global(const void* pointer) { return pointer; }
inline void block_sync() { simt::barrier(false); }
inline bool block_any(bool condition) { return simt::barrier_any(condition); }
inline void cluster_sync() { simt::barrier(true); }
inline int cluster_rank() { return simt::where().rank; }
inline int cluster_size() { return simt::where().cluster; }
template <class T> T* peer(T* in_shared, int rank) { return reinterpret_cast<T*>(simt::peer_memory(in_shared, rank)); }
template <class T> T* shared() { return reinterpret_cast<T*>(simt::shared_memory()); }

template <int bytes> Words load(const void* from) {
  static_assert(bytes == 8 || bytes == 16, "packs have 8 or 16 bytes");
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0) simt::fail("misaligned load");
  simt::count_vector_access();
  Words words{};
  std::memcpy(&words, from, bytes);
  return words;
}
template <int bytes> void store(void* to, const Words& words) {
  static_assert(bytes == 8 || bytes == 16, "packs have 8 or 16 bytes");
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0) simt::fail("misaligned store");
  simt::count_vector_access();
  std::memcpy(to, &words, bytes);
}

template <int bytes> void store_global(void* to, const Words& words) { store<bytes>(to, words); }

const Device& current_device();

template <class... Parameter, class... Argument>
void launch(const char* what, const Shape& shape, void*, void (*kernel)(Parameter...), const Argument&... argument) {
  simt::run(what, shape, [&] { kernel(argument...); });
}

}  // namespace wn::cuda
