// How a thread reads and writes: packs of elements at one place of every tensor, the walks over them, and the stores in which
// they stay until the combination.
#pragma once

#include <algorithm>
#include <tuple>
#include <utility>

#include "device.h"
#include "dispatch.h"
#include "heuristics.h"
#include "kernels.h"

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

}  // namespace wn::cuda
