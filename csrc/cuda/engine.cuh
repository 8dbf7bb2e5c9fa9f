// The CUDA engine: Gram matrix, coefficients, combination (polar.h), for every layout.
//
// The algorithm of a row (or of a tile of columns) is a device function of a problem, a plan and a row; it does not
// care where the problem came from. It is put together from
//   a walk    which packs of elements belong to this thread: RowWalk, ColumnWalk;
//   a store   where they stay until the combination: Registers, or Memory (shared, or read again: from L2 if it fits);
//   a team    the threads that reduce together: some of a warp, a block, a cluster of blocks.
// Reductions are fixed trees without atomics, so results do not depend on timing.
//
// A row that left the range of its accumulator is solved again in double, from memory and before anything of it is
// overwritten. That is rare: its function, redo_row, is not inlined, takes no registers from the main path, and looks
// up the types of the elements at run time, so that there is one per formula.
#pragma once

#include <algorithm>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "device.h"
#include "dispatch.h"
#include "heuristics.h"
#include "kernels.h"
#include "table.cuh"

namespace wn::cuda {

template <class... T> struct Types {
  template <int k> using at = std::tuple_element_t<k, std::tuple<T...>>;
  static constexpr int count = sizeof...(T);
  template <int k> static constexpr int64_t bytes = sizeof(at<k>);
  static constexpr int64_t size[] = {sizeof(T)..., 0};
  static constexpr int64_t largest = std::max({int64_t(0), int64_t(sizeof(T))...});
  static constexpr int64_t sum = (int64_t(0) + ... + int64_t(sizeof(T)));
};

template <int n> constexpr int at_least_one = n > 0 ? n : 1;  // the length of an array

// What reading takes: the types of the inputs, how many of them are in the Gram matrix, the elements of a pack.
template <class I, int gram, int elements> struct Reading {
  using In = I;
  using Sum = accumulator_t<typename In::template at<0>>;
  static constexpr int inputs = In::count, gram_inputs = gram, gram_size = gram * (gram + 1) / 2, pack = elements;
};

// One instantiation: a formula with the types of its inputs and outputs.
template <class F, class I, class O>
struct Signature : Reading<I, F::gram_inputs, 16 / std::max(I::largest, O::largest)> {
  using Formula = F;
  using Out = O;
  using Reads = Reading<I, F::gram_inputs, Signature::pack>;
  static constexpr int outputs = F::outputs;
  static constexpr int coefficients = at_least_one<F::coefficients>, results = at_least_one<F::results>;
};

template <int n> struct Index {
  WN_INLINE constexpr operator int() const { return n; }
};
template <class Body, int... k> WN_DEVICE void unrolled(std::integer_sequence<int, k...>, Body&& body) {
  (body(Index<k>{}), ...);
}
// body(0), body(1), … with constants, for what has one type per input.
template <int n, class Body> WN_DEVICE void unrolled(Body&& body) {
  unrolled(std::make_integer_sequence<int, n>{}, body);
}

// Blocks per multiprocessor that the registers of a row kernel leave room for, and packs that a thread loads at once:
// such that nothing is spilled. From sm_100 on the compiler keeps more loads in flight, in registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool hungry = true;
#else
constexpr bool hungry = false;
#endif
template <class S> constexpr int row_blocks = hungry || sizeof(typename S::Sum) == 8 ? 1 : 2;
template <class S> constexpr int row_packs = packs_in_flight(S::inputs);
template <class S>
constexpr int column_packs = hungry && S::pack == 8 && S::inputs == 1 ? 2 : packs_in_flight(S::inputs);

struct Plus {
  template <class A> WN_DEVICE A operator()(A a, A b) const { return a + b; }
};
struct Larger {
  template <class A> WN_DEVICE A operator()(A a, A b) const { return b > a ? b : a; }
};
struct Or {
  WN_DEVICE uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
};

// ---- packs ---------------------------------------------------------------------------------------------------------

// A pack of elements at the same place of every tensor. The elements outside of `lanes` are not ours.
struct Place {
  int64_t offset;
  unsigned lanes;
  int64_t stride = 1;  // between its elements, when they move one by one
};
template <int pack> constexpr unsigned all_lanes = (1u << pack) - 1;

template <class T> WN_DEVICE T element(const Words& words, int e) {
  if constexpr (sizeof(T) == 2) return bit_cast<T>(static_cast<uint16_t>(words.word[e / 2] >> (16 * (e % 2))));
  else if constexpr (sizeof(T) == 4) return bit_cast<T>(words.word[e]);
  else return bit_cast<T>(uint64_t(words.word[2 * e]) | uint64_t(words.word[2 * e + 1]) << 32);
}
template <class T> WN_DEVICE void insert(Words& words, int e, T x) {
  if constexpr (sizeof(T) == 2) words.word[e / 2] |= uint32_t(bit_cast<uint16_t>(x)) << (16 * (e % 2));
  else if constexpr (sizeof(T) == 4) words.word[e] = bit_cast<uint32_t>(x);
  else {
    words.word[2 * e] = static_cast<uint32_t>(bit_cast<uint64_t>(x));
    words.word[2 * e + 1] = static_cast<uint32_t>(bit_cast<uint64_t>(x) >> 32);
  }
}

// Elements outside of the lanes become zeros, which change no sum.
template <class T, int pack> WN_DEVICE Words load_pack(const void* tensor, const Place& place, bool vectors) {
  const T* from = static_cast<const T*>(tensor) + place.offset;
  if (vectors && place.lanes == all_lanes<pack>) return load<pack * sizeof(T)>(from);
  Words words{};
#pragma unroll
  for (int e = 0; e < pack; ++e)
    if (place.lanes >> e & 1) insert(words, e, from[e * place.stride]);
  return words;
}
template <class T, int pack>
WN_DEVICE void store_pack(void* tensor, const Place& place, bool vectors, const Words& words) {
  T* to = static_cast<T*>(tensor) + place.offset;
  if (vectors && place.lanes == all_lanes<pack>) return store_global<pack * sizeof(T)>(to, words);
#pragma unroll
  for (int e = 0; e < pack; ++e)
    if (place.lanes >> e & 1) to[e * place.stride] = element<T>(words, e);
}

// The bits of an element without its sign: zero where the element is.
template <class T> WN_DEVICE uint32_t nonzero_bits(const Words& words, int e) {
  if constexpr (sizeof(T) == 2) return bit_cast<uint16_t>(element<T>(words, e)) & 0x7fffu;
  else if constexpr (sizeof(T) == 4) return words.word[e] & 0x7fffffffu;
  else return words.word[2 * e] | (words.word[2 * e + 1] & 0x7fffffffu);
}

template <int n> using Pointers = const void* [n];

// The packs of all inputs at one place.
template <class S> struct Packs {
  static constexpr int pack = S::pack;
  Words in[S::inputs];

  WN_DEVICE void load(const Pointers<S::inputs>& from, const Place& place, bool vectors) {
    unrolled<S::inputs>([&](auto k) {
      in[k] = load_pack<typename S::In::template at<k>, pack>(from[k], place, vectors);
    });
  }
  template <class A> WN_DEVICE void elements(int e, A* x) const {
    unrolled<S::inputs>([&](auto k) { x[k] = widen(element<typename S::In::template at<k>>(in[k], e)); });
  }
  WN_DEVICE uint32_t nonzero(int k, int e) const {
    uint32_t bits = 0;
    unrolled<S::inputs>([&](auto i) { bits = i == k ? nonzero_bits<typename S::In::template at<i>>(in[i], e) : bits; });
    return bits;
  }
};

template <class F, class A> WN_DEVICE void add_products(const A* x, A* gram) {
#pragma unroll
  for (int j = 0; j < F::gram_inputs; ++j)
#pragma unroll
    for (int i = 0; i <= j; ++i) gram[j * (j + 1) / 2 + i] += x[i] * x[j];
}

// y = combination of x, stored where the place's lanes say. `coefficients(e)` are those of the row of lane e.
template <class S, class Coefficients>
WN_DEVICE void combine_pack(const Problem<typename S::Formula>& problem, const Place& place, bool vectors,
                            const Packs<S>& packs, Coefficients&& coefficients) {
  using A = typename S::Sum;
  constexpr int pack = S::pack;
  if constexpr (S::outputs > 0) {
    if (problem.out[0] == nullptr) return;
    Words out[S::outputs] = {};
#pragma unroll
    for (int e = 0; e < pack; ++e) {
      A x[S::inputs], y[S::outputs];
      packs.elements(e, x);
      S::Formula::combine(coefficients(e), x, y);
      unrolled<S::outputs>([&](auto l) {
        using T = typename S::Out::template at<l>;
        insert(out[l], e, narrow<T>::from(y[l]));
      });
    }
    unrolled<S::outputs>([&](auto l) {
      store_pack<typename S::Out::template at<l>, pack>(problem.out[l], place, vectors, out[l]);
    });
  }
}

// ---- walks ---------------------------------------------------------------------------------------------------------

// The packs of one row that belong to a thread. Every segment of the row lies on the grid of packs in memory, so that
// all packs but its first and last are whole and aligned, however the row begins.
template <int pack> struct RowWalk {
  template <class S> static constexpr int at_once = row_packs<S>;
  const Layout& layout;
  const Plan& plan;
  int64_t row, segment, next;

  WN_DEVICE RowWalk(const Layout& layout, const Plan& plan, int64_t row, int first)
      : layout(layout), plan(plan), row(row) {
    const bool in_first = plan.segments <= 1 || first < plan.segment_packs;
    segment = in_first ? 0 : first / static_cast<int>(plan.segment_packs);
    next = in_first ? first : first % static_cast<int>(plan.segment_packs);
  }
  WN_DEVICE bool more() const { return segment < plan.segments && next < plan.segment_packs; }
  WN_DEVICE Place place() const {
    const int64_t start = (segment * layout.rows + row) * layout.inner;
    const int shift = plan.vectors ? static_cast<int>((start + plan.misalignment) & (pack - 1)) : 0;
    const int64_t begin = next * pack - shift, rest = layout.inner - begin;
    unsigned lanes = all_lanes<pack>;
    if (begin < 0) lanes &= lanes << -begin;
    if (rest < pack) lanes &= rest > 0 ? (1u << rest) - 1 : 0u;
    return {start + begin, more() ? lanes : 0u};
  }
  WN_DEVICE void advance() {
    next += plan.step_packs;
    if (plan.segments <= 1) return;
    segment += plan.step_segments;
    if (next >= plan.segment_packs) {
      next -= plan.segment_packs;
      ++segment;
    }
  }
};

// One pack of a tile of columns, down the outer dimension.
struct ColumnWalk {
  template <class S> static constexpr int at_once = column_packs<S>;
  const Layout& layout;
  int64_t column, outer, step;
  unsigned lanes;
  int stride;

  WN_DEVICE bool more() const { return outer < layout.outer; }
  WN_DEVICE Place place() const { return {outer * layout.rows * layout.inner + column, more() ? lanes : 0u, stride}; }
  WN_DEVICE void advance() { outer += step; }
};

// ---- stores --------------------------------------------------------------------------------------------------------
// first() reads every pack of a walk once and shows it to a visitor; again() shows the same packs with their places;
// look() is again() where it is rare.

template <class S> struct Registers {
  Packs<S> held[row_packs<S>];

  template <class Walk, class Visit>
  WN_DEVICE void first(const Pointers<S::inputs>& in, const Plan& plan, Walk walk, Visit&& visit) {
#pragma unroll
    for (int i = 0; i < row_packs<S>; ++i, walk.advance()) held[i].load(in, walk.place(), plan.vectors);
#pragma unroll
    for (int i = 0; i < row_packs<S>; ++i) visit(held[i]);
  }
  template <class Walk, class Visit>
  WN_DEVICE void again(const Pointers<S::inputs>&, const Plan&, Walk walk, Visit&& visit) const {
#pragma unroll
    for (int i = 0; i < row_packs<S>; ++i, walk.advance()) visit(walk.place(), held[i]);
  }
  template <class Walk, class Visit>
  WN_DEVICE void look(const Pointers<S::inputs>& in, const Plan& plan, Walk walk, Visit&& visit) const {
    again(in, plan, walk, visit);
  }
};

// In shared memory where the plan says so, and read again otherwise.
template <class S> struct Memory {
  // Input k of this thread's pack i; neighbouring threads have neighbouring packs, so that the banks do not conflict.
  template <int k> WN_DEVICE static char* slot(const Plan& plan, int64_t i) {
    int64_t before = 0;
    unrolled<k>([&](auto j) { before += S::In::template bytes<j>; });
    return shared<char>() + plan.store_at +
           S::pack * (block_threads() * (i * S::In::sum + before) + tid() * S::In::template bytes<k>);
  }
  template <class Walk, class Visit>
  WN_DEVICE void first(const Pointers<S::inputs>& in, const Plan& plan, Walk walk, Visit&& visit) const {
    int64_t i = 0;
    stream(in, plan, walk, [&](const Place& place, const Packs<S>& packs) {
      visit(packs);
      if (plan.held && place.lanes != 0)
        unrolled<S::inputs>([&](auto k) { store<S::pack * S::In::template bytes<k>>(slot<k>(plan, i), packs.in[k]); });
      ++i;
    });
  }
  template <class Walk, class Visit>
  WN_DEVICE void again(const Pointers<S::inputs>& in, const Plan& plan, Walk walk, Visit&& visit) const {
    if (!plan.held) return stream(in, plan, walk, visit);
    for (int64_t i = 0; walk.more(); ++i, walk.advance()) {
      const Place place = walk.place();
      Packs<S> packs{};
      if (place.lanes != 0)
        unrolled<S::inputs>([&](auto k) { packs.in[k] = load<S::pack * S::In::template bytes<k>>(slot<k>(plan, i)); });
      visit(place, packs);
    }
  }
  template <class Walk, class Visit>
  WN_DEVICE void look(const Pointers<S::inputs>& in, const Plan& plan, Walk walk, Visit&& visit) const {
    stream(in, plan, walk, visit);
  }
  template <class Walk, class Visit>
  WN_DEVICE static void stream(const Pointers<S::inputs>& in, const Plan& plan, Walk walk, Visit&& visit) {
    constexpr int at_once = Walk::template at_once<S>;
    while (walk.more()) {
      Packs<S> packs[at_once];
      Place place[at_once];
#pragma unroll
      for (int b = 0; b < at_once; ++b, walk.advance()) packs[b].load(in, place[b] = walk.place(), plan.vectors);
#pragma unroll
      for (int b = 0; b < at_once; ++b) visit(place[b], packs[b]);
    }
  }
};

// ---- teams ---------------------------------------------------------------------------------------------------------

// The threads that share a row: `width` threads of a block, a power of two, and the same of the other blocks of the
// cluster. Teams wider than a warp wait for the whole block, so that all of its teams have to reduce together.
struct Team {
  int width, rank;
  int blocks, block;

  WN_DEVICE explicit Team(const Plan& plan)
      : width(plan.width), rank(tid() & (plan.width - 1)), blocks(1), block(0) {
    if (plan.shape.cluster > 1) {
      blocks = cluster_size();
      block = cluster_rank();
    }
  }
  WN_DEVICE int64_t threads() const { return int64_t(width) * blocks; }
  WN_DEVICE int64_t thread() const { return int64_t(block) * width + rank; }
  WN_DEVICE bool leader() const { return thread() == 0; }

  // Reduces every x[i] over the team, in the same tree for every thread. Zero must be neutral for the operation.
  template <class A, int n, class Operation> WN_DEVICE void reduce(A (&x)[n], Operation operation) const {
    butterfly(x, width < warp ? width : warp, operation);
    if (width <= warp) return;
    A* partial = shared<A>();
    A* total = partial + n * most_warps;
    const int lane = tid() % warp, warps = width / warp, first = (tid() - rank) / warp;
    block_sync();  // the results of the last reduction have been read
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (lane == 0) partial[i * most_warps + tid() / warp] = x[i];
    block_sync();
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = lane < warps ? partial[i * most_warps + first + lane] : A(0);
    butterfly(x, warp, operation);
    if (blocks == 1) return;
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (tid() == 0) total[i] = x[i];
    cluster_sync();
#pragma unroll
    for (int i = 0; i < n; ++i) {
      x[i] = peer(total, 0)[i];
#pragma unroll 1
      for (int b = 1; b < blocks; ++b) x[i] = operation(x[i], peer(total, b)[i]);
    }
    cluster_sync();  // a block may neither overwrite its total nor end before the others have read it
  }

 private:
  template <class A, int n, class Operation>
  WN_DEVICE static void butterfly(A (&x)[n], int size, Operation operation) {
    const unsigned all = ~0u >> (warp - size);
    const unsigned lanes = all << (tid() % warp & ~(size - 1));
#pragma unroll 1
    for (int distance = size / 2; distance > 0; distance /= 2)
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] = operation(x[i], shfl_xor(lanes, x[i], distance));
  }
};

// ---- leaving the range of the accumulator --------------------------------------------------------------------------

template <class F, class A> WN_DEVICE bool all_safe(const A* gram) {
  bool safe = true;
#pragma unroll
  for (int k = 0; k < F::gram_inputs; ++k) safe = safe && safe_square(gram[k * (k + 1) / 2 + k]);
  return safe;
}

// Whether a row must be solved again. The square of an input of zeros is not safe, but exact.
template <class F, class A> WN_DEVICE bool must_redo(const A* gram, const uint32_t* nonzero, bool exact) {
  bool redo = !exact;
#pragma unroll
  for (int k = 0; k < F::gram_inputs; ++k)
    redo = redo || (!safe_square(gram[k * (k + 1) / 2 + k]) && nonzero[k] != 0);
  return redo;
}

// One by one, for any layout and types; three times over the row: largest elements, Gram matrix, combination.
// Inputs that are not finite stay unscaled: they give what they give.
template <class F> WN_OUTLINE void redo_row(const Problem<F>& problem, const Plan& plan, int64_t row) {
  const Layout& layout = problem.layout;
  const Team team(plan);
  int exponent[F::inputs] = {};
  PowerOfTwo scale[F::inputs];
  double largest[F::inputs] = {}, gram[F::gram_inputs * (F::gram_inputs + 1) / 2] = {};
  double coefficient[at_least_one<F::coefficients>], result[at_least_one<F::results>];
#pragma unroll 1
  for (int pass = 0; pass < (F::outputs > 0 ? 3 : 2); ++pass) {
#pragma unroll 1
    for (int64_t j = team.thread(); j < layout.row_length(); j += team.threads()) {
      const int64_t o = j / layout.inner, offset = (o * layout.rows + row) * layout.inner + (j - o * layout.inner);
      double x[F::inputs];
#pragma unroll
      for (int k = 0; k < F::inputs; ++k)
        x[k] = scale[k] * RowValues{problem.in[k], problem.in_type[k], 0}.template at<double>(offset);
      if (pass == 0) {
#pragma unroll
        for (int k = 0; k < F::inputs; ++k) {
          const double m = magnitude(x[k]);
          largest[k] = Larger{}(largest[k], m == m ? m : INFINITY);
        }
      } else if (pass == 1) {
        add_products<F>(x, gram);
      } else if constexpr (F::outputs > 0) {
        double y[F::outputs];
        F::combine(coefficient, x, y);
#pragma unroll
        for (int l = 0; l < F::outputs; ++l) RowResults{problem.out[l], problem.out_type[l]}.set(offset, y[l]);
      }
    }
    if (pass == 0) {
      team.reduce(largest, Larger{});
#pragma unroll
      for (int k = 0; k < F::inputs; ++k) {
        if (!(largest[k] > 0 && largest[k] <= limits<double>::largest)) continue;
        exponent[k] = ::ilogb(largest[k]);
        scale[k] = PowerOfTwo(-exponent[k]);
      }
    } else if (pass == 1) {
      team.reduce(gram, Plus{});
      problem.formula.solve(row, gram, exponent, coefficient, result);
#pragma unroll
      for (int i = 0; i < F::coefficients; ++i) coefficient[i] = finite(coefficient[i]);
      if (team.leader()) problem.formula.finish(row, result);
    }
  }
}

// ---- rows ----------------------------------------------------------------------------------------------------------

template <class S> WN_DEVICE void add_pack(const Packs<S>& packs, typename S::Sum* gram) {
  typename S::Sum sum[S::gram_size] = {};  // of the pack first: shorter chains of additions lose less
#pragma unroll
  for (int e = 0; e < S::pack; ++e) {
    typename S::Sum x[S::inputs];
    packs.elements(e, x);
    add_products<S>(x, sum);
  }
#pragma unroll
  for (int i = 0; i < S::gram_size; ++i) gram[i] += sum[i];
}

template <class S> WN_DEVICE void collect_nonzero(const Packs<S>& packs, uint32_t* nonzero) {
#pragma unroll
  for (int k = 0; k < S::inputs; ++k)
#pragma unroll
    for (int e = 0; e < S::pack; ++e) nonzero[k] |= packs.nonzero(k, e);
}

template <class S, template <class> class Store>
WN_DEVICE void process_row(const Problem<typename S::Formula>& problem, const Plan& plan, int64_t row) {
  using F = typename S::Formula;
  using A = typename S::Sum;
  const Team team(plan);
  const RowWalk<S::pack> walk(problem.layout, plan, row, team.thread());
  Store<S> store;

  A gram[S::gram_size] = {};
  store.first(problem.in, plan, walk, [&](const Packs<S>& packs) { add_pack<S>(packs, gram); });
  team.reduce(gram, Plus{});

  const int unscaled[S::inputs] = {};
  A coefficient[S::coefficients], result[S::results];
  problem.formula.solve(row, gram, unscaled, coefficient, result);
  const bool exact = problem.formula.exact(coefficient);
  if (!exact || !all_safe<F>(gram)) {
    uint32_t nonzero[S::inputs] = {};
    store.look(problem.in, plan, walk,
               [&](const Place&, const Packs<S>& packs) { collect_nonzero<S>(packs, nonzero); });
    team.reduce(nonzero, Or{});
    if (must_redo<F>(gram, nonzero, exact)) return redo_row(problem, plan, row);
  }

  if constexpr (S::outputs > 0)
    store.again(problem.in, plan, walk, [&](const Place& place, const Packs<S>& packs) {
      combine_pack<S>(problem, place, plan.vectors, packs, [&](int) { return coefficient; });
    });
  if (team.leader()) problem.formula.finish(row, result);
}

template <class S, template <class> class Store>
WN_KERNEL(most_threads, row_blocks<S>)
row_kernel(WN_PARAMETER Problem<typename S::Formula> problem, WN_PARAMETER Plan plan) {
  const int teams = block_threads() / plan.width;
  const int64_t row = plan.first + int64_t(bid() / plan.pieces) * teams + tid() / plan.width;
  if (row < problem.layout.rows) process_row<S, Store>(problem, plan, row);
}

// The rows of many problems whose blocks have one size; each block has rows of one of them.
template <class S>
WN_KERNEL(most_threads, 1) row_table_kernel(WN_PARAMETER Table<typename S::Formula> table) {
  const int64_t block = table.first + bid();
  const auto& entry = table.of_block(block);
  const int64_t row = (block - entry.begin) * entry.plan.per_block + tid() / entry.plan.width;
  if (row < entry.problem.layout.rows) process_row<S, Registers>(entry.problem, entry.plan, row);
}

// ---- rows split over blocks: partial Gram matrices, then coefficients, then the combination ------------------------

// What one block knows of a row.
template <class R> struct Partial {
  typename R::Sum gram[R::gram_size];
  uint32_t nonzero[R::inputs];
};
template <class F, class R> struct Workspace {
  struct Row {
    typename R::Sum coefficient[at_least_one<F::coefficients>];
    bool redone;
  };
  Row* row;
  Partial<R>* partial;  // [rows, pieces]

  static int64_t bytes(const Layout& layout, const Plan& plan) {
    return layout.rows * int64_t(sizeof(Row) + plan.pieces * sizeof(Partial<R>));
  }
  WN_INLINE Workspace(void* memory, const Layout& layout)
      : row(static_cast<Row*>(memory)), partial(reinterpret_cast<Partial<R>*>(row + layout.rows)) {}
};
template <class S> using WorkspaceOf = Workspace<typename S::Formula, typename S::Reads>;

template <int inputs> struct Source {
  Layout layout;
  const void* in[inputs];
};

template <class R>
WN_KERNEL(most_threads, row_blocks<R>)
row_partial_kernel(WN_PARAMETER Source<R::inputs> source, WN_PARAMETER Plan plan, Partial<R>* to) {
  const int row = bid() / plan.pieces, piece = bid() % plan.pieces;
  const Team team(plan);
  const RowWalk<R::pack> walk(source.layout, plan, row, piece * team.width + team.rank);
  Partial<R> partial{};
  Memory<R>::stream(source.in, plan, walk, [&](const Place&, const Packs<R>& packs) {
    add_pack<R>(packs, partial.gram);
    collect_nonzero<R>(packs, partial.nonzero);
  });
  team.reduce(partial.gram, Plus{});
  team.reduce(partial.nonzero, Or{});
  if (team.leader()) to[bid()] = partial;
}

// A block per row. One block alone redoes a row; that it is slow is the price of its being rare.
template <class F, class R>
WN_KERNEL(most_threads, 1)
solve_kernel(WN_PARAMETER Problem<F> problem, WN_PARAMETER Plan plan, void* memory) {
  const Workspace<F, R> workspace(memory, problem.layout);
  const Team team(plan);
  const int row = bid();
  Partial<R> sum{};
  for (int piece = team.rank; piece < plan.pieces; piece += team.width) {
    const Partial<R>& partial = workspace.partial[row * plan.pieces + piece];
    for (int i = 0; i < R::gram_size; ++i) sum.gram[i] += partial.gram[i];
    for (int k = 0; k < R::inputs; ++k) sum.nonzero[k] |= partial.nonzero[k];
  }
  team.reduce(sum.gram, Plus{});
  team.reduce(sum.nonzero, Or{});

  const int unscaled[F::inputs] = {};
  typename Workspace<F, R>::Row solved{};
  typename R::Sum result[at_least_one<F::results>] = {};
  problem.formula.solve(row, sum.gram, unscaled, solved.coefficient, result);
  solved.redone = must_redo<F>(sum.gram, sum.nonzero, problem.formula.exact(solved.coefficient));
  if (team.leader()) workspace.row[row] = solved;
  if (solved.redone) return redo_row(problem, plan, row);
  if (team.leader()) problem.formula.finish(row, result);
}

template <class S>
WN_KERNEL(most_threads, row_blocks<S>)
row_combine_kernel(WN_PARAMETER Problem<typename S::Formula> problem, WN_PARAMETER Plan plan, void* memory) {
  const WorkspaceOf<S> workspace(memory, problem.layout);
  const int row = bid() / plan.pieces, piece = bid() % plan.pieces;
  const auto solved = workspace.row[row];
  if (solved.redone) return;
  const RowWalk<S::pack> walk(problem.layout, plan, row, piece * plan.width + tid());
  Memory<S>::stream(problem.in, plan, walk, [&](const Place& place, const Packs<S>& packs) {
    combine_pack<S>(problem, place, plan.vectors, packs, [&](int) { return solved.coefficient; });
  });
}

// ---- columns -------------------------------------------------------------------------------------------------------

// A tile of whole rows whose elements are neighbours in memory: each thread owns a pack of columns (an inner element of
// a row each) and goes down the outer dimension. Columns that cannot move as packs are dealt out one by one, so that
// neighbouring threads still touch neighbouring memory.
template <class S> struct Tile {
  using A = typename S::Sum;
  const Layout& layout;
  const Plan& plan;
  int64_t row0;
  int rows, lane, line, lines;
  A *sums, *coefficients;
  uint32_t* nonzero;
  char* redo;

  WN_DEVICE Tile(const Layout& layout, const Plan& plan, int64_t tile)
      : layout(layout), plan(plan), row0(tile * plan.tile_rows) {
    const int64_t rest = layout.rows - row0;
    rows = rest < plan.tile_rows ? static_cast<int>(rest) : plan.tile_rows;
    lane = tid() & (plan.tile_threads - 1);
    line = tid() / plan.tile_threads;
    lines = block_threads() / plan.tile_threads;
    const ColumnScratch at(block_threads() / warp, plan.tile_threads * S::pack, plan.tile_rows, S::gram_size, S::inputs,
                           sizeof(A));
    char* memory = shared<char>();
    sums = reinterpret_cast<A*>(memory + at.sums);
    nonzero = reinterpret_cast<uint32_t*>(memory + at.nonzero);
    coefficients = reinterpret_cast<A*>(memory + at.coefficients);
    redo = memory + at.redo;
  }

  WN_DEVICE int inner() const { return static_cast<int>(layout.inner); }
  WN_DEVICE int column(int e) const { return plan.vectors ? lane * S::pack + e : lane + e * plan.tile_threads; }
  WN_DEVICE ColumnWalk walk(int piece, int pieces) const {
    unsigned lanes = 0;
#pragma unroll
    for (int e = 0; e < S::pack; ++e) lanes |= unsigned(column(e) < rows * inner()) << e;
    return {layout, row0 * layout.inner + column(0), piece * lines + line, pieces * lines, lanes,
            plan.vectors ? 1 : plan.tile_threads};
  }

  // total[row, i] = reduction of x[i, e] over the threads and lanes that have elements of the row.
  template <class T, int n, class Operation>
  WN_DEVICE void reduce(T (&x)[n][S::pack], T* total, Operation operation) const {
    T* partial = shared<T>();
    const int width = plan.tile_threads * S::pack, warps = block_threads() / warp;
#pragma unroll
    for (int i = 0; i < n; ++i) {
#pragma unroll
      for (int e = 0; e < S::pack; ++e) {
#pragma unroll 1  // these loops cost registers when they are unrolled
        for (int distance = warp / 2; distance >= plan.tile_threads; distance /= 2)
          x[i][e] = operation(x[i][e], shfl_xor(~0u, x[i][e], distance));
        if (tid() % warp < plan.tile_threads) partial[tid() / warp * width + column(e)] = x[i][e];
      }
      block_sync();
      for (int row = tid(); row < rows; row += block_threads()) {
        T sum = 0;
        for (int w = 0; w < warps; ++w)
          for (int j = 0; j < inner(); ++j) sum = operation(sum, partial[w * width + row * inner() + j]);
        total[row * n + i] = sum;
      }
      block_sync();
    }
  }
};

template <class S> WN_DEVICE void add_columns(const Packs<S>& packs, typename S::Sum (&gram)[S::gram_size][S::pack]) {
#pragma unroll
  for (int e = 0; e < S::pack; ++e) {
    typename S::Sum x[S::inputs], sum[S::gram_size] = {};
    packs.elements(e, x);
    add_products<S>(x, sum);
#pragma unroll
    for (int i = 0; i < S::gram_size; ++i) gram[i][e] += sum[i];
  }
}

template <class S> WN_DEVICE void collect_columns(const Packs<S>& packs, uint32_t (&nonzero)[S::inputs][S::pack]) {
#pragma unroll
  for (int k = 0; k < S::inputs; ++k)
#pragma unroll
    for (int e = 0; e < S::pack; ++e) nonzero[k][e] |= packs.nonzero(k, e);
}

template <class S>
WN_KERNEL(most_threads, 1)
column_kernel(WN_PARAMETER Problem<typename S::Formula> problem, WN_PARAMETER Plan plan) {
  using F = typename S::Formula;
  using A = typename S::Sum;
  const Tile<S> tile(problem.layout, plan, plan.first + bid());
  const ColumnWalk walk = tile.walk(0, 1);
  const Memory<S> store;

  A gram[S::gram_size][S::pack] = {};
  store.first(problem.in, plan, walk, [&](const Packs<S>& packs) { add_columns<S>(packs, gram); });
  tile.reduce(gram, tile.sums, Plus{});

  const int unscaled[S::inputs] = {};
  bool uncertain = false;
  for (int r = tid(); r < tile.rows; r += block_threads()) {
    A result[S::results];
    const A* sums = tile.sums + r * S::gram_size;
    A* coefficient = tile.coefficients + r * S::coefficients;
    problem.formula.solve(tile.row0 + r, sums, unscaled, coefficient, result);
    tile.redo[r] = !problem.formula.exact(coefficient) || !all_safe<F>(sums);
    uncertain = uncertain || tile.redo[r];
    problem.formula.finish(tile.row0 + r, result);
  }
  uncertain = block_any(uncertain);
  if (uncertain) {
    uint32_t nonzero[S::inputs][S::pack] = {};
    store.look(problem.in, plan, walk,
               [&](const Place&, const Packs<S>& packs) { collect_columns<S>(packs, nonzero); });
    tile.reduce(nonzero, tile.nonzero, Or{});
    for (int r = tid(); r < tile.rows; r += block_threads())
      tile.redo[r] = tile.redo[r] && must_redo<F>(tile.sums + r * S::gram_size, tile.nonzero + r * S::inputs,
                                                  problem.formula.exact(tile.coefficients + r * S::coefficients));
    block_sync();
  }

  if constexpr (S::outputs > 0) {
    A coefficient[S::pack][S::coefficients];
    unsigned fast = 0;
#pragma unroll
    for (int e = 0; e < S::pack; ++e) {
      const int r = tile.column(e) / tile.inner();
      if (r >= tile.rows || tile.redo[r]) continue;
      fast |= 1u << e;
#pragma unroll
      for (int i = 0; i < S::coefficients; ++i) coefficient[e][i] = tile.coefficients[r * S::coefficients + i];
    }
    store.again(problem.in, plan, walk, [&](Place place, const Packs<S>& packs) {
      place.lanes &= fast;
      combine_pack<S>(problem, place, plan.vectors, packs, [&](int e) { return coefficient[e]; });
    });
  }
  if (uncertain)
    for (int r = 0; r < tile.rows; ++r)
      if (tile.redo[r]) redo_row(problem, plan, tile.row0 + r);
}

template <class R>
WN_KERNEL(most_threads, 1)
column_partial_kernel(WN_PARAMETER Source<R::inputs> source, WN_PARAMETER Plan plan, Partial<R>* to) {
  const int piece = bid() % plan.pieces;
  const Tile<R> tile(source.layout, plan, bid() / plan.pieces);
  typename R::Sum gram[R::gram_size][R::pack] = {};
  uint32_t nonzero[R::inputs][R::pack] = {};
  Memory<R>::stream(source.in, plan, tile.walk(piece, plan.pieces), [&](const Place&, const Packs<R>& packs) {
    add_columns<R>(packs, gram);
    collect_columns<R>(packs, nonzero);
  });
  tile.reduce(gram, tile.sums, Plus{});
  tile.reduce(nonzero, tile.nonzero, Or{});
  for (int r = tid(); r < tile.rows; r += block_threads()) {
    Partial<R>& partial = to[(tile.row0 + r) * plan.pieces + piece];
    for (int i = 0; i < R::gram_size; ++i) partial.gram[i] = tile.sums[r * R::gram_size + i];
    for (int k = 0; k < R::inputs; ++k) partial.nonzero[k] = tile.nonzero[r * R::inputs + k];
  }
}

template <class S>
WN_KERNEL(most_threads, 1)
column_combine_kernel(WN_PARAMETER Problem<typename S::Formula> problem, WN_PARAMETER Plan plan, void* memory) {
  const WorkspaceOf<S> workspace(memory, problem.layout);
  const Tile<S> tile(problem.layout, plan, bid() / plan.pieces);
  typename S::Sum coefficient[S::pack][S::coefficients];
  unsigned fast = 0;
#pragma unroll
  for (int e = 0; e < S::pack; ++e) {
    const int r = tile.column(e) / tile.inner();
    if (r >= tile.rows) continue;
    const auto& solved = workspace.row[tile.row0 + r];
    fast |= unsigned(!solved.redone) << e;
#pragma unroll
    for (int i = 0; i < S::coefficients; ++i) coefficient[e][i] = solved.coefficient[i];
  }
  Memory<S>::stream(problem.in, plan, tile.walk(bid() % plan.pieces, plan.pieces),
                    [&](Place place, const Packs<S>& packs) {
                      place.lanes &= fast;
                      combine_pack<S>(problem, place, plan.vectors, packs, [&](int e) { return coefficient[e]; });
                    });
}

// ---- host: facts, plan, launches -----------------------------------------------------------------------------------

template <class S> Facts facts_of(const Problem<typename S::Formula>& problem, bool workspace) {
  Facts facts{};
  facts.layout = problem.layout;
  facts.inputs = S::inputs;
  facts.outputs = problem.out[0] == nullptr ? 0 : S::outputs;
  facts.gram = S::gram_size;
  facts.coefficients = S::coefficients;
  facts.pack = S::pack;
  facts.input_bytes = S::In::sum;
  facts.sum_bytes = sizeof(typename S::Sum);
  facts.workspace = workspace;
  const auto off_grid = [](const void* tensor, int64_t element) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(tensor) / element % S::pack);
  };
  facts.misalignment = off_grid(problem.in[0], S::In::size[0]);
  facts.aligned = true;
  for (int k = 0; k < S::inputs; ++k)
    facts.aligned = facts.aligned && off_grid(problem.in[k], S::In::size[k]) == facts.misalignment;
  for (int l = 0; l < facts.outputs; ++l)
    facts.aligned = facts.aligned && off_grid(problem.out[l], S::Out::size[l]) == facts.misalignment;
  return facts;
}

template <class S>
void launch_split(const Problem<typename S::Formula>& problem, const Plan& plan, void* memory, void* stream) {
  using R = typename S::Reads;
  const bool columns = plan.path == Path::column_split;
  const WorkspaceOf<S> workspace(memory, problem.layout);
  Source<S::inputs> source = {problem.layout, {}};
  std::copy(std::begin(problem.in), std::end(problem.in), source.in);
  const Shape per_row = {problem.layout.rows, plan.width, 1, plan.shape.shared_bytes};
  launch(columns ? "columns, split: sums" : "rows, split: sums", plan.shape, stream,
         columns ? column_partial_kernel<R> : row_partial_kernel<R>, source, plan, workspace.partial);
  launch("split: coefficients", per_row, stream, solve_kernel<typename S::Formula, R>, problem, plan, memory);
  if constexpr (S::outputs > 0)
    if (problem.out[0] != nullptr)
      launch(columns ? "columns, split: outputs" : "rows, split: outputs", plan.shape, stream,
             columns ? column_combine_kernel<S> : row_combine_kernel<S>, problem, plan, memory);
}

// More blocks than a grid can have take several launches.
template <class S, class Kernel>
void launch_whole(const char* what, const Problem<typename S::Formula>& problem, Plan plan, void* stream,
                  Kernel* kernel) {
  const int64_t blocks = plan.shape.blocks, most = current_device().blocks / plan.pieces * plan.pieces;
  for (int64_t done = 0; done < blocks; done += most) {
    plan.shape.blocks = std::min(blocks - done, most);
    plan.first = done / plan.pieces * plan.per_block;
    launch(what, plan.shape, stream, kernel, problem, plan);
  }
}

template <class S>
void launch_path(const Problem<typename S::Formula>& problem, const Plan& plan, void* workspace, void* stream) {
  switch (plan.path) {
    case Path::row_registers:
      if constexpr (S::outputs > 0)
        launch_whole<S>("rows, registers", problem, plan, stream, row_kernel<S, Registers>);
      return;
    case Path::row_shared: return launch_whole<S>("rows, shared", problem, plan, stream, row_kernel<S, Memory>);
    case Path::row_streamed: return launch_whole<S>("rows, streamed", problem, plan, stream, row_kernel<S, Memory>);
    case Path::column_shared: return launch_whole<S>("columns, shared", problem, plan, stream, column_kernel<S>);
    case Path::column_streamed: return launch_whole<S>("columns, streamed", problem, plan, stream, column_kernel<S>);
    case Path::row_split:
    case Path::column_split: return launch_split<S>(problem, plan, workspace, stream);
  }
}

// Calls body(Signature) with the types of the problem; defined beside the instantiations of each formula.
template <class F, class Body> void with_signature(const Problem<F>& problem, Body&& body);

// A row that is the whole tensor is contiguous, whatever its dims.
template <class F> Problem<F> simplified(Problem<F> problem) {
  if (problem.layout.rows == 1) problem.layout = {1, 1, problem.layout.row_length()};
  return problem;
}

template <class F> int64_t workspace_bytes(const Problem<F>& problem) {
  int64_t bytes = 0;
  if (problem.layout.rows > 0)
    with_signature(problem, [&](auto signature) {
      using S = decltype(signature);
      const Plan plan = choose(facts_of<S>(simplified(problem), true), current_device());
      if (plan.path == Path::row_split || plan.path == Path::column_split)
        bytes = WorkspaceOf<S>::bytes(problem.layout, plan);
    });
  return bytes;
}

template <class F> void run(const Problem<F>& given, void* stream, void* workspace) {
  if (given.layout.rows == 0) return;
  const Problem<F> problem = simplified(given);
  with_signature(problem, [&](auto signature) {
    using S = decltype(signature);
    launch_path<S>(problem, choose(facts_of<S>(problem, workspace != nullptr), current_device()), workspace, stream);
  });
}

// Problems that share launches: a launch as soon as the table is full.
template <class S> class RowBatch {
 public:
  explicit RowBatch(int threads) : shape{0, threads, 1, 0} { table.count = 0; }
  bool takes(const Plan& plan) const { return plan.shape.threads == shape.threads; }
  void add(const Problem<typename S::Formula>& problem, const Plan& plan, void* stream) {
    if (table.count == table.most) run(stream);
    table.entry[table.count++] = {problem, plan, shape.blocks, nullptr};
    shape.blocks += plan.shape.blocks;
    shape.shared_bytes = std::max(shape.shared_bytes, plan.shape.shared_bytes);
  }
  void run(void* stream) {
    const int64_t blocks = shape.blocks, most = current_device().blocks;
    for (table.first = 0; table.first < blocks; table.first += most) {
      shape.blocks = std::min(blocks - table.first, most);
      launch("rows, table", shape, stream, row_table_kernel<S>, table);
    }
    shape.blocks = 0;
    table.count = 0;
  }

 private:
  Table<typename S::Formula> table;
  Shape shape;
};

// Rows that fit into the registers of a block, in the blocks that they have alone, so that the bits are the same.
template <class F> void run_short_rows(std::vector<Problem<F>>& problems, void* stream) {
  if (problems.empty()) return;
  with_signature(problems.front(), [&](auto signature) {
    using S = decltype(signature);
    std::vector<std::unique_ptr<RowBatch<S>>> batches;
    std::vector<Problem<F>> left;
    for (const Problem<F>& given : problems) {
      const Problem<F> problem = simplified(given);
      const Plan plan = choose(facts_of<S>(problem, true), current_device());
      if (plan.path != Path::row_registers) {
        left.push_back(given);
        continue;
      }
      auto batch = std::find_if(batches.begin(), batches.end(), [&](const auto& b) { return b->takes(plan); });
      if (batch == batches.end()) batch = batches.insert(batch, std::make_unique<RowBatch<S>>(plan.shape.threads));
      (*batch)->add(problem, plan, stream);
    }
    for (const auto& batch : batches) batch->run(stream);
    problems = std::move(left);
  });
}

}  // namespace wn::cuda
