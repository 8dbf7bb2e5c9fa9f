// The CPU engine: runs a formula (polar.h) over the rows of a problem.
//
// Every reduction goes over pieces of fixed size with fixed lanes inside a piece, and pieces are added in order in
// double. So the bits depend neither on the number of threads nor on the path taken:
//   rows     a row is contiguous (or `outer` contiguous segments): one row at a time through the cache;
//   split    the same, but too few rows to go around: pieces of rows in parallel, in three phases;
//   short    rows of a few elements, in a cache of up to a thousand: tiles of rows, the arithmetic per row side by side
//            in the lanes too;
//   columns  neighbouring elements belong to different rows (last dim, small inner): tiles of columns side by side in
//            the lanes.
#pragma once

#include <ATen/Parallel.h>
#include <unistd.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "../dispatch.h"
#include "../kernels.h"

#if defined(WN_ONE_VERSION) || !defined(__x86_64__) || !defined(__GNUC__) || defined(__clang__)
#define WN_MULTIVERSION
#else
#define WN_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif

// A version of a function for the processors that round to bfloat16 themselves, which `hardware_bf16` recognizes.
#if !defined(WN_ONE_VERSION) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WN_HARDWARE_BF16 __attribute__((target("arch=x86-64-v4")))
#endif

// For functions that only add up products, which are contracted to multiply-adds. Elsewhere compilers might contract two
// instantiations of one formula differently, and outputs must not depend on the path taken.
#if defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define WN_CONTRACTED __attribute__((optimize("fp-contract=fast")))
#else
#define WN_CONTRACTED
#endif

namespace wn::cpu {

constexpr int kLanes = 32;
constexpr int64_t kPiece = 4096;        // elements reduced in one accumulator before it goes to double
constexpr int64_t kColumnPiece = 256;   // the same along a column
constexpr int64_t kTile = 512;          // columns side by side, at most
constexpr int64_t kTileBytes = 1 << 18; // a tile and all its inputs stay in L2 between reading and writing
constexpr int64_t kShortSegment = 32;   // segments of rows below this length are handled as columns
constexpr int64_t kShortRows = 64;      // short rows side by side, at most
constexpr int64_t kShortBytes = 16384;  // and as many as stay in L1 between reading and writing,
constexpr int64_t kFewRows = 4;         // but so many at least, so that the arithmetic of one overlaps that of another
constexpr int64_t kSolved = 16;         // of them are solved at a time
constexpr int kKeptLanes = 4;           // of the sums over a short row, until all rows of a tile have theirs
constexpr int64_t kGrain = 32768;       // elements worth waking a thread for
constexpr int64_t kStepOfRow = 32;      // elements that take as long as the arithmetic of a step for one row
constexpr int64_t kLine = 64;           // bytes that memory delivers at once
constexpr int64_t kAhead = 2048;        // bytes between an element and what is asked of memory meanwhile,
constexpr int64_t kAheadInFirst = 3072; // and where that goes to the first cache
constexpr int64_t kCached = 1 << 20;    // bytes that need not be asked for: they are found in a cache
constexpr int64_t kLargeFirstCache = 48 << 10;  // has room for what is asked for beside the row in work

inline bool first_cache_is_large() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const bool large = sysconf(_SC_LEVEL1_DCACHE_SIZE) >= kLargeFirstCache;
  return large;
#else
  return false;
#endif
}

template <class... T> struct Types {
  static constexpr int64_t bytes = (int64_t(sizeof(T)) + ... + 0);
};

// Loop bodies are always_inline lambdas: `omp simd` would otherwise give a body's local arrays one copy per lane in
// memory, and baseline code would be called from the specialized versions.
// Everything below is instantiated per translation unit: function multiversioning needs internal linkage.
namespace {

template <class Formula> constexpr int kGram = Formula::gram_inputs * (Formula::gram_inputs + 1) / 2;
template <int n> constexpr int kAtLeastOne = n > 0 ? n : 1;
template <class Formula> constexpr int kOutputs = kAtLeastOne<Formula::outputs>;
template <class Formula> constexpr int kCoefficients = kAtLeastOne<Formula::coefficients>;
template <class Formula> constexpr int kResults = kAtLeastOne<Formula::results>;
// The second reduction of such a formula writes its outputs already, the first one up to a factor per row.
template <class Formula> constexpr bool kAdvances = requires { &Formula::template advance<float>; };
// Steps keep their rows in double whatever the elements are.
template <class Formula, class A> using Result = std::conditional_t<(Formula::residuals > 0), double, A>;

// As narrow::from; to bfloat16 by the processor, which takes subnormal numbers for 0.
template <int width, class A, class T> WN_INLINE void narrow_lanes(const A* from, T* to) {
#if defined(WN_HARDWARE_BF16)
  if constexpr (width == kLanes && std::is_same_v<A, float> && std::is_same_v<T, bf16>) {
    typedef float Floats __attribute__((vector_size(64)));
    typedef short Words __attribute__((vector_size(64)));
    static_assert(kLanes * sizeof(float) == 2 * sizeof(Floats) && kLanes * sizeof(bf16) == sizeof(Words));
    Floats low, high;
    std::memcpy(&low, from, sizeof(low));
    std::memcpy(&high, from + kLanes / 2, sizeof(high));
    uint16_t subnormal_low, subnormal_high;
    constexpr int is_subnormal = 0x20;
    asm("vfpclassps %2, %1, %0" : "=k"(subnormal_low) : "v"(low), "i"(is_subnormal));
    asm("vfpclassps %2, %1, %0" : "=k"(subnormal_high) : "v"(high), "i"(is_subnormal));
    if (__builtin_expect(!(subnormal_low | subnormal_high), 1)) {
      Words rounded;
      asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(rounded) : "v"(high), "v"(low));
      std::memcpy(to, &rounded, sizeof(rounded));
      return;
    }
  }
#endif
#pragma omp simd
  for (int lane = 0; lane < width; ++lane) to[lane] = narrow<T>::from(from[lane]);
}

// Typed access to the elements of a problem, in the accumulator type.
template <class Formula, class In, class Out> struct Elements;
template <class Formula, class... I, class... O> struct Elements<Formula, Types<I...>, Types<O...>> {
  static_assert(sizeof...(I) == Formula::inputs && sizeof...(O) == Formula::outputs, "one type per operand");
  using A = std::conditional_t<(std::is_same_v<I, double> || ...), double, float>;
  static constexpr int64_t bytes = Types<I...>::bytes, largest = std::max({int64_t(sizeof(I))...});
  static constexpr bool has_16_bits = ((sizeof(I) == 2) || ...) || ((sizeof(O) == 2) || ...);
  static constexpr bool stores_bf16 = (std::is_same_v<O, bf16> || ...);

  const void* in[Formula::inputs];
  void* out[kOutputs<Formula>];
  bool into_first_cache = first_cache_is_large();

  explicit WN_INLINE Elements(const Problem<Formula>& p) {
    for (int k = 0; k < Formula::inputs; ++k) in[k] = p.in[k];
    for (int l = 0; l < kOutputs<Formula>; ++l) out[l] = p.out[l];
  }
  template <class B> WN_INLINE void load(int64_t i, B* x) const { load(i, x, std::index_sequence_for<I...>{}); }
  template <class B> WN_INLINE void store(int64_t i, const B* y) const { store(i, y, std::index_sequence_for<O...>{}); }
  // y[l][lane] to element i + lane of output l, one output after the other: they need not be told apart then.
  template <int width> WN_INLINE void store_lanes(int64_t i, const A (*y)[width]) const {
    static_for<sizeof...(O)>([&](auto l) __attribute__((always_inline)) {
      narrow_lanes<width>(y[l], static_cast<std::tuple_element_t<l, std::tuple<O...>>*>(out[l]) + i);
    });
  }
  // Asks memory for the lines of `count` elements of the inputs from..to - 1 some way behind element i. They go to the
  // second cache where the first one is full of the row in work.
  template <int from, int to, int count> WN_INLINE void ask(int64_t i) const {
    static_for<to - from>([&](auto k) __attribute__((always_inline)) {
      constexpr int64_t size = sizeof(std::tuple_element_t<from + k, std::tuple<I...>>);
      const char* const at = static_cast<const char*>(in[from + k]) + i * size;
      if (into_first_cache)
        for (int64_t line = 0; line < count * size; line += kLine) __builtin_prefetch(at + kAheadInFirst + line, 0, 3);
      else
        for (int64_t line = 0; line < count * size; line += kLine) __builtin_prefetch(at + kAhead + line, 0, 2);
    });
  }
  // Output 0 := factor(output 0), and again in the last output where that is a rounded copy.
  template <class F> WN_INLINE void rescale(int64_t i, F&& factor) const {
    FirstOutput* const w = static_cast<FirstOutput*>(out[0]) + i;
    *w = narrow<FirstOutput>::from(factor(widen(*w)));
    if constexpr (Formula::with_rounded_copy) static_cast<LastOutput*>(out[last])[i] = narrow<LastOutput>::from(widen(*w));
  }
  // The same for the chunks from i and from j on, which may overlap.
  template <int width, class F> WN_INLINE void rescale_chunks(int64_t i, int64_t j, F&& factor) const {
    FirstOutput* const w = static_cast<FirstOutput*>(out[0]);
    FirstOutput of_i[width], of_j[width];
    const auto read = [&](const FirstOutput* from, FirstOutput* to) __attribute__((always_inline)) {
      const auto each = [&](int lane) __attribute__((always_inline)) {
        to[lane] = narrow<FirstOutput>::from(factor(widen(from[lane])));
      };
#pragma omp simd
      for (int lane = 0; lane < width; ++lane) each(lane);
    };
    read(w + i, of_i);
    read(w + j, of_j);
    std::copy_n(of_i, width, w + i);
    std::copy_n(of_j, width, w + j);
    if constexpr (Formula::with_rounded_copy) {
      narrow_lanes<width>(of_i, static_cast<LastOutput*>(out[last]) + i);
      narrow_lanes<width>(of_j, static_cast<LastOutput*>(out[last]) + j);
    }
  }

 private:
  static constexpr size_t last = std::max<size_t>(sizeof...(O), 1) - 1;
  using FirstOutput = std::tuple_element_t<0, std::tuple<O..., A>>;
  using LastOutput = std::tuple_element_t<last, std::tuple<O..., A>>;

  template <class B, size_t... k> WN_INLINE void load(int64_t i, B* x, std::index_sequence<k...>) const {
    ((x[k] = static_cast<B>(widen(static_cast<const I*>(in[k])[i]))), ...);
  }
  template <class B, size_t... l> WN_INLINE void store(int64_t i, const B* y, std::index_sequence<l...>) const {
    ((static_cast<O*>(out[l])[i] = narrow<O>::from(y[l])), ...);
  }
};

// Rows below kShortRow go in tiles. So do those below kLongRow as long as the call finds all its problems in a cache, and
// steps of two sweeps without 16-bit numbers from memory too: the others are quicker there one row after the other. The
// Gram matrices of a step are the same either way.
constexpr int64_t kShortRow = 256, kLongRow = 1024;
constexpr int64_t kLastCache = 8 << 20, kLastCacheOfSteps = 20 << 20;
template <class Formula, class E> bool in_tiles(const Layout& layout, int64_t bytes_of_call) {
  constexpr bool step = Formula::residuals > 0;
  if (layout.outer > 1 || layout.inner >= kLongRow + step) return false;
  if (layout.inner < kShortRow || (step && !kAdvances<Formula> && !E::has_16_bits)) return true;
  return bytes_of_call <= (step ? kLastCacheOfSteps : kLastCache);
}

// add(p, <x_i, x_j>) for the packed pairs p = (i, j) of the Gram matrix.
template <class Formula, class A, class F> WN_INLINE void for_products(const A* x, F&& add) {
  static_for<Formula::gram_inputs>([&](auto j) __attribute__((always_inline)) {
    static_for<j + 1>([&](auto i) __attribute__((always_inline)) {
      add(std::integral_constant<int, j * (j + 1) / 2 + i>{}, x[i] * x[j]);
    });
  });
}

// Calls piece(begin, end) with the offsets of each run of at most kPiece contiguous elements of a row, in order, or in
// the opposite order.
template <class F>
WN_INLINE void for_pieces(const Layout& layout, int64_t row, F&& piece, bool backwards = false) {
  const int64_t pieces = (layout.inner + kPiece - 1) / kPiece;
  const auto nth = [backwards](int64_t n, int64_t count) { return backwards ? count - 1 - n : n; };
  for (int64_t m = 0; m < layout.outer; ++m) {
    const int64_t base = (nth(m, layout.outer) * layout.rows + row) * layout.inner;
    for (int64_t n = 0; n < pieces; ++n) {
      const int64_t begin = nth(n, pieces) * kPiece;
      piece(base + begin, base + std::min(begin + kPiece, layout.inner));
    }
  }
}

// What the passes over a row ask memory for. Hardware fetches ahead too, but too late, anew on every page, and nothing
// while a pass works on what is in cache. The pass that meets elements first asks for those that it will meet soon; the
// others ask for the beginning of the next row, at a pace that leaves their own loads from the second cache room. One
// input alone is asked for by the first pass only, and left to the hardware where the first cache is small.
struct Ahead {
  int64_t next = 0;    // elements from a row to the next one, 0 to ask for nothing
  bool again = false;  // rows are too long for the cache: later passes meet the elements for the first time again
};
template <class Formula> constexpr Ahead kOfPieces = Formula::inputs > 1 ? Ahead{1, true} : Ahead{};
template <class Formula, class E> WN_INLINE Ahead ahead_of(const Problem<Formula>& problem) {
  const Layout& layout = problem.layout;
  if (layout.outer > 1 || layout.rows * layout.inner * E::bytes <= kCached) return {};
  if (Formula::inputs == 1 && !first_cache_is_large()) return {};
  return {layout.inner, 2 * layout.inner * E::bytes > kCached};
}

// SGD writes nothing but what it has just read: from the last element to the first it finds that in the nearest cache.
// (Outputs elsewhere must go forwards, where the hardware prefetches.)
template <class Formula> WN_INLINE bool backwards(Ahead ahead) {
  return Formula::residuals > 0 && Formula::outputs < Formula::inputs && !kAdvances<Formula> && !ahead.again;
}

// Asks for the row that follows the one from `begin` on, at a quarter of the pace of a pass that has `passed` elements behind
// it and is at the n-th of the others. Each line once: asked for again it takes as long as a new one.
template <class Formula, class E>
WN_INLINE void ask_for_next(const E& elements, Ahead ahead, int64_t begin, int64_t passed, int64_t n) {
  if (n % (4 * kLine / E::largest) == 0)
    elements.template ask<0, Formula::gram_inputs, 1>(ahead.next + begin + (passed + n) / 4);
}

// Adds the upper half of the lanes to the lower one until one is left. The widths are compile-time constants, so that no
// loop is left where the lanes fit into vectors.
template <int width, class A> WN_INLINE A tree(A* lanes) {
  if constexpr (width > 0) {
#pragma omp simd
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    return tree<width / 2>(lanes);
  }
  return lanes[0];
}

// f(i) for i from 0 to count - 1, in vectors of `width` elements, of half as many, and so on; count < 2 width.
template <int width, class F> WN_INLINE void for_rest(int count, F&& f, int i = 0) {
  if (count & width) {
#pragma omp simd
    for (int lane = 0; lane < width; ++lane) f(i + lane);
    i += width;
  }
  if constexpr (width > 1) for_rest<width / 2>(count, f, i);
}

// sums[p] = the sum over a piece of what terms(i, x, add) adds by add(p, term), for each element x, the i-th. On the way
// ask(i) is called for every kLanes of them.
template <int count, class Formula, class E, class F, class Ask>
WN_INLINE void reduce_piece(const E& elements, int64_t begin, int64_t end, typename E::A* sums, F&& terms, Ask&& ask) {
  using A = typename E::A;
  A lanes[count][kLanes];
  const auto load = [&](int64_t i, auto&& add) __attribute__((always_inline)) {
    A x[Formula::inputs];
    elements.load(i, x);
    terms(i, x, add);
  };
  const auto add = [&](int64_t i, int lane) __attribute__((always_inline)) {
    load(i, [&](auto p, A term) __attribute__((always_inline)) { lanes[p][lane] += term; });
  };
  int64_t i = begin;
  if (begin + kLanes <= end) {  // the first elements make the lanes, which need no zeros then
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane)
      load(i + lane, [&](auto p, A term) __attribute__((always_inline)) { lanes[p][lane] = term; });
    i += kLanes;
  } else {
    for (int p = 0; p < count; ++p)
      for (int lane = 0; lane < kLanes; ++lane) lanes[p][lane] = 0;
  }
  for (; i + kLanes <= end; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
    ask(i);  // behind the loads, which must not wait for it
  }
  for_rest<kLanes / 2>(end - i, [&](int lane) __attribute__((always_inline)) { add(i + lane, lane); });
  static_for<count>([&](auto p) __attribute__((always_inline)) { sums[p] = tree<kLanes / 2>(lanes[p]); });
}

template <class Formula, class E>
WN_INLINE void gram_of_piece(const E& elements, int64_t begin, int64_t end, Ahead ahead, typename E::A* gram) {
  reduce_piece<kGram<Formula>, Formula>(
      elements, begin, end, gram,
      [](int64_t, const auto* x, auto&& add) __attribute__((always_inline)) { for_products<Formula>(x, add); },
      [&](int64_t i) __attribute__((always_inline)) {
        if (ahead.next != 0) elements.template ask<0, Formula::gram_inputs, kLanes>(i);
      });
}

template <class Formula, class E>
WN_CONTRACTED WN_MULTIVERSION void contracted_gram(const E& elements, int64_t begin, int64_t end, Ahead ahead,
                                                   typename E::A* gram) {
  gram_of_piece<Formula>(elements, begin, end, ahead, gram);
}

// A call takes 10 ns a row: little beside the arithmetic of a step and that of a long row of two inputs, much otherwise.
template <class Formula, class E>
WN_INLINE void reduce_gram(const E& elements, int64_t begin, int64_t end, Ahead ahead, typename E::A* gram) {
  if constexpr (Formula::gram_inputs > 1)
    if (Formula::residuals > 0 || end - begin >= kLongRow)
      return contracted_gram<Formula>(elements, begin, end, ahead, gram);
  if constexpr (Formula::residuals == 0) gram_of_piece<Formula>(elements, begin, end, ahead, gram);
}

template <class Formula, class A, class F> WN_INLINE void for_residuals(const A* c, const A* x, F&& add) {
  A term[Formula::residuals];
  Formula::residual(c, x, term);
  static_for<Formula::residuals>([&](auto p) __attribute__((always_inline)) { add(p, term[p]); });
}

template <class Formula, bool advance, class E>
WN_MULTIVERSION void residuals_of_range(const E& elements, int64_t begin, int64_t end, Ahead ahead,
                                        const typename E::A* coefficients, typename E::A* sums) {
  using A = typename E::A;
  A c[kCoefficients<Formula>];
  static_for<kCoefficients<Formula>>([&](auto q) __attribute__((always_inline)) { c[q] = coefficients[q]; });
  const auto terms = [&](int64_t i, const A* x, auto&& add) __attribute__((always_inline)) {
    if constexpr (advance) {
      A y[kOutputs<Formula>], term[Formula::residuals];
      Formula::advance(c, x, y, term);
      elements.store(i, y);
      static_for<Formula::residuals>([&](auto p) __attribute__((always_inline)) { add(p, term[p]); });
    } else {
      for_residuals<Formula>(c, x, add);
    }
  };
  reduce_piece<Formula::residuals, Formula>(elements, begin, end, sums, terms, [&](int64_t i) __attribute__((always_inline)) {
    if (ahead.next == 0) return;
    if (ahead.again) elements.template ask<0, Formula::inputs, kLanes>(i);
    else if (advance) {  // meets the state for the first time
      elements.template ask<Formula::gram_inputs, Formula::inputs, kLanes>(i);
      ask_for_next<Formula>(elements, ahead, begin, 0, i - begin);
    }
  });
}

// lanes(i) for every kLanes elements of a piece from i on and ask(n) before them, the n-th; each(i) for those left over.
template <class Lanes, class F, class Ask>
WN_INLINE void for_elements(int64_t begin, int64_t end, bool backwards, Lanes&& lanes, F&& each, Ask&& ask) {
  const int64_t blocks = (end - begin) / kLanes, rest = backwards ? begin : begin + blocks * kLanes;
  const int64_t first = backwards ? end - kLanes : begin, step = backwards ? -kLanes : kLanes;
  for (int64_t n = 0; n < blocks; ++n) {
    ask(n * kLanes);
    lanes(first + n * step);
  }
  for_rest<kLanes / 2>((end - begin) % kLanes, [&](int i) __attribute__((always_inline)) { each(rest + i); });
}

template <class Formula, bool hardware, class E>
WN_INLINE void combine_piece(const E& elements, int64_t begin, int64_t end, Ahead ahead,
                             const typename E::A* coefficients) {
  using A = typename E::A;
  A c[kCoefficients<Formula>];
  static_for<kCoefficients<Formula>>([&](auto q) __attribute__((always_inline)) { c[q] = coefficients[q]; });
  const auto each = [&](int64_t i) __attribute__((always_inline)) {
    A x[Formula::inputs], y[kOutputs<Formula>];
    elements.load(i, x);
    Formula::combine(c, x, y);
    elements.store(i, y);
  };
  const auto staged = [&](int64_t i, int lane, auto& lanes) __attribute__((always_inline)) {
    A x[Formula::inputs], y[kOutputs<Formula>];
    elements.load(i + lane, x);
    Formula::combine(c, x, y);
    static_for<kOutputs<Formula>>([&](auto l) __attribute__((always_inline)) { lanes[l][lane] = y[l]; });
  };
  for_elements(begin, end, backwards<Formula>(ahead), [&](int64_t i) __attribute__((always_inline)) {
    if constexpr (hardware) {
      A lanes[kOutputs<Formula>][kLanes];
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) staged(i, lane, lanes);
      elements.template store_lanes<kLanes>(i, lanes);
    } else {
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) each(i + lane);
    }
  }, each, [&](int64_t n) __attribute__((always_inline)) {
    if (ahead.again) elements.template ask<0, Formula::inputs, kLanes>(begin + n);
    else if (Formula::inputs > 1 && ahead.next != 0) ask_for_next<Formula>(elements, ahead, begin, 0, n);
  });
}

// The factor that an advanced row still lacks; of its outputs the first has it, and the rounded copy of that.
template <class Formula, class E>
WN_INLINE void rescale_piece(const E& elements, int64_t begin, int64_t end, Ahead ahead,
                             const typename E::A* coefficients) {
  using A = typename E::A;
  A c[kCoefficients<Formula>];
  static_for<kCoefficients<Formula>>([&](auto q) __attribute__((always_inline)) { c[q] = coefficients[q]; });
  const auto each = [&](int64_t i) __attribute__((always_inline)) {
    elements.rescale(i, [&](A y) __attribute__((always_inline)) { return Formula::rescale(c, y); });
  };
  for_elements(begin, end, false, [&](int64_t i) __attribute__((always_inline)) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) each(i + lane);
  }, each, [&](int64_t n) __attribute__((always_inline)) {
    if (ahead.again) elements.template ask<0, 1, kLanes>(begin + n);
    else if (ahead.next != 0) ask_for_next<Formula>(elements, ahead, begin, end - begin, n);
  });
}

template <class Formula, class E>
WN_MULTIVERSION void raise_to_largest(const E& elements, int64_t begin, int64_t end, typename E::A* largest) {
  using A = typename E::A;
  A lanes[Formula::inputs][kLanes] = {};
  const auto raise = [&](int64_t i, int lane) __attribute__((always_inline)) {
    A x[Formula::inputs];
    elements.load(i, x);
    static_for<Formula::inputs>([&](auto k) __attribute__((always_inline)) {
      const A m = magnitude(x[k]);
      lanes[k][lane] = m > lanes[k][lane] ? m : lanes[k][lane];
    });
  };
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) raise(i + lane, lane);
  }
  for (int lane = 0; i + lane < end; ++lane) raise(i + lane, lane);
  for (int k = 0; k < Formula::inputs; ++k)
    for (int lane = 0; lane < kLanes; ++lane) largest[k] = std::max(largest[k], lanes[k][lane]);
}

// Whether input k is 0 there. Its callers are cold code, in which loops would not be vectorized.
template <class Formula, int k, class E>
WN_MULTIVERSION __attribute__((noinline, hot)) bool is_zero(const E& elements, int64_t begin, int64_t end) {
  typename E::A sum;
  const auto add_magnitude = [](int64_t, const auto* x, auto&& add) __attribute__((always_inline)) {
    add(std::integral_constant<int, 0>{}, magnitude(x[k]));
  };
  reduce_piece<1, Formula>(elements, begin, end, &sum, add_magnitude, [](int64_t) {});
  return sum == 0;
}

// A row that leaves the range of its accumulator: solved in double on scaled inputs (see polar.h).
// Returns false, and does nothing, where scaling cannot help: non-finite inputs, or inputs that are exactly zero.
template <class Formula, class E, class A>
__attribute__((noinline)) bool scaled_row(const Problem<Formula>& problem, const E& elements, int64_t row,
                                          const A* gram, bool exact) {
  const Layout& layout = problem.layout;
  const auto for_row = [&](auto&& element) {
    for (int64_t o = 0; o < layout.outer; ++o)
      for (int64_t i = 0; i < layout.inner; ++i) element((o * layout.rows + row) * layout.inner + i);
  };
  const auto zero = [&](auto k) {
    bool all = true;
    for_pieces(layout, row, [&](int64_t begin, int64_t end) { all &= is_zero<Formula, k>(elements, begin, end); });
    return all;
  };
  bool helps = !exact;
  static_for<Formula::gram_inputs>([&](auto k) { helps |= !safe_square(gram[k * (k + 1) / 2 + k]) && !zero(k); });
  if (!helps) return false;
  A largest[Formula::inputs] = {};
  for_pieces(layout, row, [&](int64_t begin, int64_t end) { raise_to_largest<Formula>(elements, begin, end, largest); });
  for (int k = 0; k < Formula::gram_inputs; ++k)
    if (std::isnan(gram[k * (k + 1) / 2 + k]) || std::isinf(largest[k])) return false;

  int e[Formula::inputs];
  PowerOfTwo scale[Formula::inputs];
  for (int k = 0; k < Formula::inputs; ++k) {
    e[k] = k < Formula::gram_inputs && largest[k] > 0 ? std::ilogb(largest[k]) : 0;
    scale[k] = PowerOfTwo(-e[k]);
  }
  const auto load = [&](int64_t at, double* x) {
    elements.load(at, x);
    for (int k = 0; k < Formula::inputs; ++k) x[k] = scale[k] * x[k];
  };
  double wide[kGram<Formula>] = {}, c[kCoefficients<Formula>] = {}, result[kResults<Formula>];
  for_row([&](int64_t at) {
    double x[Formula::inputs];
    load(at, x);
    for_products<Formula>(x, [&](int p, double product) { wide[p] += product; });
  });
  if constexpr (Formula::residuals > 0) {
    double sums[Formula::residuals] = {};
    const bool needed = problem.formula.prepare(row, wide, e, c);
    if (needed)
      for_row([&](int64_t at) {
        double x[Formula::inputs];
        load(at, x);
        for_residuals<Formula>(c, x, [&](int p, double term) { sums[p] += term; });
      });
    problem.formula.solve(row, wide, e, needed ? sums : nullptr, c, result);
  } else {
    problem.formula.solve(row, wide, e, c, result);
  }
  for (double& q : c) q = finite(q);
  problem.formula.finish(row, result);
  if constexpr (Formula::outputs > 0) {
    if (problem.out[0] == nullptr) return true;
    for_row([&](int64_t at) {
      double x[Formula::inputs], y[kOutputs<Formula>];
      load(at, x);
      Formula::combine(c, x, y);
      elements.store(at, y);
    });
  }
  return true;
}

// From a row's Gram matrix to its coefficients; true when the row still has to be combined with them, or, if it has been
// advanced, to be rescaled.
template <bool advance, class Formula, class E>
WN_INLINE bool solve_row(const Problem<Formula>& problem, const E& elements, int64_t row, Ahead ahead,
                         const double* sums, typename E::A* c) {
  using A = typename E::A;
  constexpr int unscaled[Formula::inputs] = {};
  A gram[kGram<Formula>];
  Result<Formula, A> result[kResults<Formula>];
  for (int p = 0; p < kGram<Formula>; ++p) gram[p] = static_cast<A>(sums[p]);
  const auto redone = [&] {
    const bool exact = problem.formula.exact(c);
    bool safe = exact;
    for (int k = 0; k < Formula::gram_inputs; ++k) safe &= safe_square(gram[k * (k + 1) / 2 + k]);
    return __builtin_expect(!safe, 0) && scaled_row(problem, elements, row, gram, exact);
  };
  if constexpr (Formula::residuals > 0) {
    A residuals[Formula::residuals];
    const bool needed = problem.formula.prepare(row, gram, unscaled, c);
    if (advance && redone()) return false;  // afterwards the inputs are overwritten
    if (needed) {
      double totals[Formula::residuals] = {};
      for_pieces(problem.layout, row, [&](int64_t begin, int64_t end) {
        residuals_of_range<Formula, advance>(elements, begin, end, ahead, c, residuals);
        for (int p = 0; p < Formula::residuals; ++p) totals[p] += residuals[p];
      });
      for (int p = 0; p < Formula::residuals; ++p) residuals[p] = static_cast<A>(totals[p]);
    }
    problem.formula.solve(row, gram, unscaled, needed ? residuals : nullptr, c, result);
    if (advance) {
      problem.formula.finish(row, result);
      return needed;
    }
  } else {
    problem.formula.solve(row, gram, unscaled, c, result);
  }
  if (redone()) return false;
  problem.formula.finish(row, result);
  return Formula::outputs > 0 && problem.out[0] != nullptr;
}

template <class Formula, bool hardware, class E>
WN_INLINE void each_row(const Problem<Formula>& problem, int64_t first, int64_t last) {
  using A = typename E::A;
  const E elements(problem);
  const Ahead ahead = ahead_of<Formula, E>(problem);
  for (int64_t row = first; row < last; ++row) {
    double sums[kGram<Formula>] = {};
    for_pieces(problem.layout, row, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
      A gram[kGram<Formula>];
      reduce_gram<Formula>(elements, begin, end, ahead, gram);
      for (int p = 0; p < kGram<Formula>; ++p) sums[p] += gram[p];
    });
    A c[kCoefficients<Formula>];
    if (solve_row<kAdvances<Formula>>(problem, elements, row, ahead, sums, c)) {
      for_pieces(problem.layout, row, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
        if constexpr (kAdvances<Formula>)
          rescale_piece<Formula>(elements, begin, end, ahead, c);
        else if constexpr (Formula::outputs > 0)
          combine_piece<Formula, hardware>(elements, begin, end, ahead, c);
      }, backwards<Formula>(ahead));
    }
  }
}

template <class Formula, class E>
WN_MULTIVERSION void rows_in_any_range(const Problem<Formula>& problem, int64_t first, int64_t last) {
  each_row<Formula, false, E>(problem, first, last);
}

#if defined(WN_HARDWARE_BF16)
inline bool hardware_bf16() {
  static const bool has = __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
  return has;
}

template <class Formula, class E>
WN_HARDWARE_BF16 void rows_by_hardware(const Problem<Formula>& problem, int64_t first, int64_t last) {
  each_row<Formula, true, E>(problem, first, last);
}
#endif

template <class Formula, class E> void rows_in_range(const Problem<Formula>& problem, int64_t first, int64_t last) {
#if defined(WN_HARDWARE_BF16)
  if constexpr (E::stores_bf16 && !kAdvances<Formula>)
    if (hardware_bf16()) return rows_by_hardware<Formula, E>(problem, first, last);
#endif
  rows_in_any_range<Formula, E>(problem, first, last);
}

template <class Formula, class E>
WN_MULTIVERSION void reduce_range(const E& elements, int64_t begin, int64_t end, typename E::A* gram) {
  reduce_gram<Formula>(elements, begin, end, kOfPieces<Formula>, gram);
}

template <class Formula, class E>
WN_MULTIVERSION void combine_range(const E& elements, int64_t begin, int64_t end, const typename E::A* c) {
  combine_piece<Formula, false>(elements, begin, end, kOfPieces<Formula>, c);
}

template <class Formula, class E> void split_rows(const Problem<Formula>& problem) {
  using A = typename E::A;
  const E elements(problem);
  const Layout& layout = problem.layout;
  struct Piece { int64_t row, begin, end; };
  std::vector<Piece> pieces;
  for (int64_t row = 0; row < layout.rows; ++row)
    for_pieces(layout, row, [&](int64_t begin, int64_t end) { pieces.push_back({row, begin, end}); });
  const int64_t count = static_cast<int64_t>(pieces.size()), grain = std::max<int64_t>(1, kGrain / kPiece);

  struct Gram { A sum[kGram<Formula>]; };
  std::vector<Gram> grams(count);
  at::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) reduce_range<Formula>(elements, pieces[i].begin, pieces[i].end, grams[i].sum);
  });

  struct Row { A c[kCoefficients<Formula>]; bool combine; };
  std::vector<Row> rows(layout.rows);
  for (int64_t row = 0, i = 0; row < layout.rows; ++row) {
    double sums[kGram<Formula>] = {};
    for (; i < count && pieces[i].row == row; ++i)
      for (int p = 0; p < kGram<Formula>; ++p) sums[p] += grams[i].sum[p];
    rows[row].combine = solve_row<false>(problem, elements, row, Ahead{}, sums, rows[row].c);
  }
  if constexpr (Formula::outputs > 0)
    at::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const Row& row = rows[pieces[i].row];
        if (row.combine) combine_range<Formula>(elements, pieces[i].begin, pieces[i].end, row.c);
      }
    });
}

// Adds the upper half of the lanes to the lower one until `kept` are left.
template <int width, int kept, class A> WN_INLINE void fold(const A* lanes, A* to) {
  if constexpr (width == kept) {
    std::copy_n(lanes, kept, to);
  } else {
    A half[width / 2];
#pragma omp simd
    for (int lane = 0; lane < width / 2; ++lane) half[lane] = lanes[lane] + lanes[lane + width / 2];
    fold<width / 2, kept>(half, to);
  }
}

// sums[r] = the sum of the `width` lanes of row r, for kSolved rows.
template <int width, class A> WN_INLINE void sum_lanes(const A* lanes, A* sums) {
  if constexpr (width == 1) {
    std::copy_n(lanes, kSolved, sums);
  } else {
    A pairs[kSolved * width / 2];
#pragma omp simd
    for (int i = 0; i < kSolved * width / 2; ++i) pairs[i] = lanes[2 * i] + lanes[2 * i + 1];
    sum_lanes<width / 2>(pairs, sums);
  }
}

// Of a row of chunks of `width` elements, the lanes of whose sums are kept until those of the tile's rows are added up.
template <int width> constexpr int kKept = std::min(width, kKeptLanes);

WN_INLINE int64_t whole(int64_t rows) { return (rows + kSolved - 1) / kSolved * kSolved; }

// sums[p][lane] = what terms(x, add) adds by add(p, term) in that lane, over the elements x of a short row from `begin` on.
// A row is read in chunks of `width` elements, of which the last one ends where the row does: what it shares with the one
// before counts once. Where there are at most two chunks, the sums stay in registers.
template <int width, bool two_chunks, class Formula, class E, class F>
WN_INLINE void sum_short_row(const E& elements, Ahead ahead, int64_t begin, int64_t length, typename E::A (*sums)[width],
                             F&& terms) {
  using A = typename E::A;
  const int rest = length % width;
  const auto at = [&](int64_t i, auto&& add) __attribute__((always_inline)) {
    A x[Formula::inputs];
    elements.load(i, x);
    terms(x, add);
  };
  const auto ends = [&](int lane) __attribute__((always_inline)) {
    at(begin + lane, [&](auto p, A term) __attribute__((always_inline)) { sums[p][lane] = term; });
    at(begin + length - width + lane, [&](auto p, A term) __attribute__((always_inline)) {
      sums[p][lane] += zero_unless(lane >= width - rest, term);
    });
  };
  const auto between = [&](int64_t i, int lane) __attribute__((always_inline)) {
    at(i + lane, [&](auto p, A term) __attribute__((always_inline)) { sums[p][lane] += term; });
  };
#pragma omp simd
  for (int lane = 0; lane < width; ++lane) ends(lane);
  if constexpr (!two_chunks)
    for (int64_t i = width; i + width <= length; i += width) {
      if (ahead.next != 0) elements.template ask<0, Formula::gram_inputs, width>(begin + i);
#pragma omp simd
      for (int lane = 0; lane < width; ++lane) between(begin + i, lane);
    }
}

// The same for the rows of a tile, from what `fold` left of each.
template <int kept, class A> WN_INLINE void sum_rows(const A* lanes, int64_t rows, A* sums) {
  for (int64_t r = 0; r < rows; r += kSolved) sum_lanes<kept>(lanes + r * kept, sums + r);
}

// The Gram matrices of the short rows from element `begin` on. Rows that the last kSolved lack are zero.
template <int width, bool two_chunks, class Formula, class E>
WN_INLINE void gram_of_short_rows(const E& elements, Ahead ahead, int64_t begin, int64_t length, int64_t rows,
                                  typename E::A (*gram)[kShortRows]) {
  using A = typename E::A;
  constexpr int kept = kKept<width>;
  A lanes[kGram<Formula>][kShortRows * kept];
  for (int64_t r = 0; r < rows; ++r, begin += length) {
    // For all sweeps over a row that is too short for each of them to ask for its own.
    if constexpr (two_chunks && Formula::residuals > 0)
      elements.template ask<0, Formula::inputs, 2 * width>(begin);
    A sums[kGram<Formula>][width];
    sum_short_row<width, two_chunks, Formula>(
        elements, ahead, begin, length, sums,
        [](const A* x, auto&& add) __attribute__((always_inline)) { for_products<Formula>(x, add); });
    static_for<kGram<Formula>>([&](auto p) __attribute__((always_inline)) {
      fold<width, kept>(sums[p], lanes[p] + r * kept);
    });
  }
  for (int p = 0; p < kGram<Formula>; ++p) {
    std::fill(lanes[p] + rows * kept, lanes[p] + whole(rows) * kept, A(0));
    sum_rows<kept>(lanes[p], rows, gram[p]);
  }
}

// Outputs of `width` elements from i on, before what they are computed from is overwritten.
template <int width, class Formula, class A> struct Chunk {
  A y[kOutputs<Formula>][width];

  template <class E> WN_INLINE void store(const E& elements, int64_t i) const {
    elements.template store_lanes<width>(i, y);
  }
};

// formula(x, y, lane) from the inputs to the outputs of each element of a chunk.
template <int width, class Formula, class E, class F>
WN_INLINE void fill_chunk(const E& elements, int64_t i, Chunk<width, Formula, typename E::A>& chunk, F&& formula) {
  using A = typename E::A;
  const auto each = [&](int lane) __attribute__((always_inline)) {
    A x[Formula::inputs], y[kOutputs<Formula>];
    elements.load(i + lane, x);
    formula(x, y, lane);
    static_for<kOutputs<Formula>>([&](auto l) __attribute__((always_inline)) { chunk.y[l][lane] = y[l]; });
  };
#pragma omp simd
  for (int lane = 0; lane < width; ++lane) each(lane);
}

template <int width, class Formula, class E>
WN_INLINE void combine_short_row(const E& elements, Ahead ahead, int64_t tile, int64_t begin, int64_t length,
                                 const typename E::A* coefficients) {
  using A = typename E::A;
  A c[kCoefficients<Formula>];
  static_for<kCoefficients<Formula>>([&](auto q) __attribute__((always_inline)) { c[q] = coefficients[q]; });
  const auto combine = [&](const A* x, A* y, int) __attribute__((always_inline)) { Formula::combine(c, x, y); };
  Chunk<width, Formula, A> chunk, last;
  const bool rest = length % width > 0;
  if (rest) fill_chunk(elements, begin + length - width, last, combine);
  for (int64_t i = 0; i + width <= length; i += width) {
    if (ahead.next != 0) ask_for_next<Formula>(elements, ahead, tile, begin - tile, i);
    fill_chunk(elements, begin + i, chunk, combine);
    chunk.store(elements, begin + i);
  }
  if (rest) last.store(elements, begin + length - width);
}

// A row of one or two chunks: fill(i, from, chunk) for the one at element i, of which the lanes below `from` belong to the
// other one too.
template <int width, class Formula, class E, class F>
WN_INLINE void for_two_chunks(const E& elements, int64_t begin, int64_t length, F&& fill) {
  Chunk<width, Formula, typename E::A> first, last;
  const int rest = length % width;
  fill(begin, 0, first);
  if (rest > 0) {
    fill(begin + length - width, width - rest, last);
    last.store(elements, begin + length - width);
  }
  first.store(elements, begin);
}

template <int width, class Formula, class E>
WN_INLINE void combine_two_chunks(const E& elements, int64_t begin, int64_t length, const typename E::A* c) {
  for_two_chunks<width, Formula>(elements, begin, length, [&](int64_t i, int, auto& chunk) __attribute__((always_inline)) {
    fill_chunk(elements, i, chunk, [&](const auto* x, auto* y, int) __attribute__((always_inline)) {
      Formula::combine(c, x, y);
    });
  });
}

// The second reduction over row r of a tile for a formula that writes its outputs in it.
template <int width, class Formula, class E>
WN_INLINE void advance_two_chunks(const E& elements, int64_t begin, int64_t length, const typename E::A* c, int64_t r,
                                  typename E::A (*sums)[kShortRows * kKept<width>]) {
  using A = typename E::A;
  A lanes[Formula::residuals][width] = {};
  for_two_chunks<width, Formula>(elements, begin, length, [&](int64_t i, int from, auto& chunk) __attribute__((always_inline)) {
    fill_chunk(elements, i, chunk, [&](const A* x, A* y, int lane) __attribute__((always_inline)) {
      A term[Formula::residuals];
      Formula::advance(c, x, y, term);
      static_for<Formula::residuals>([&](auto p) __attribute__((always_inline)) {
        lanes[p][lane] += zero_unless(lane >= from, term[p]);
      });
    });
  });
  static_for<Formula::residuals>([&](auto p) __attribute__((always_inline)) {
    fold<width, kKept<width>>(lanes[p], sums[p] + r * kKept<width>);
  });
}

// Values and results of the rows of a tile, so that loops over them need not ask for the dtype. One value for all rows is
// written once, for all tiles; rows that the last kSolved lack have any values.
template <class A> void fill_rows(const RowValues& from, A* to) {
  std::fill_n(to, kShortRows, static_cast<A>(from.data == nullptr ? from.value : 0));
}
inline void fill_rows(const double*, double* to) { std::fill_n(to, kShortRows, 0.0); }
template <class A> void read_rows(const RowValues& from, int64_t first, int64_t rows, A* to) {
  if (from.data == nullptr) return;
  dispatch(from.type, [&](auto tag) {
    const auto* const values = static_cast<const typename decltype(tag)::type*>(from.data) + first * from.stride;
    for (int64_t r = 0; r < rows; ++r) to[r] = static_cast<A>(widen(values[r * from.stride]));
  });
}
inline void read_rows(const double* from, int64_t first, int64_t rows, double* to) {
  // asks for those of the next tile
  for (int64_t r = 0; r < kShortRows; r += kLine / sizeof(double)) __builtin_prefetch(from + first + kShortRows + r);
  std::copy_n(from + first, rows, to);
}
template <class A> void write_rows(const RowResults& to, int64_t first, int64_t rows, const A* values) {
  if (to.data == nullptr) return;
  dispatch(to.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t r = 0; r < rows; ++r) static_cast<T*>(to.data)[first + r] = narrow<T>::from(values[r]);
  });
}

// The rows of a tile between their Gram matrices and their coefficients, side by side.
template <class Formula, class A> struct RowTile {
  using R = Result<Formula, A>;
  const Formula& formula;
  int64_t first, rows;
  R arrays[kAtLeastOne<Formula::arrays>][kShortRows];  // the formula's, of the rows of this tile
  A gram[kGram<Formula>][kShortRows], c[kCoefficients<Formula>][kShortRows];
  A sums[kAtLeastOne<Formula::residuals>][kShortRows];
  int zero[Formula::gram_inputs][kShortRows];  // where an input's square is 0 because all its elements are
  int apart[kShortRows];  // rows that may have to be scaled, or need sums that the others do not: nothing is stored

  explicit RowTile(const Formula& of) : formula(of) {
    with_arrays([&](auto& values, R* to) { fill_rows(values, to); });
  }
  void begin(int64_t row, int64_t count) {
    first = row;
    rows = count;
    with_arrays([&](auto& values, R* to) { read_rows(values, first, rows, to); });
  }

  // f(values, array) for each of the formula's arrays. Returns the formula as f leaves it.
  template <class F> WN_INLINE Formula with_arrays(F&& f) {
    Formula local = formula;
    int array = 0;
    local.for_arrays([&](auto& values) __attribute__((always_inline)) { f(values, arrays[array++]); });
    return local;
  }

  // Calls f(formula, r) for each row r, where the formula's arrays begin with the tile's first row.
  template <class F> WN_INLINE void for_rows(F&& f) {
    Formula local = with_arrays([&](auto& values, R* to) __attribute__((always_inline)) {
      if constexpr (std::is_pointer_v<std::remove_reference_t<decltype(values)>>) values = to;
      else values = {to, std::is_same_v<R, double> ? DType::f64 : DType::f32};
    });
    const auto vectors = [&](auto ewn) __attribute__((always_inline)) {
      local.simplify(ewn);
      for (int64_t r = 0; r < rows; r += kSolved) {
#pragma omp simd
        for (int64_t lane = 0; lane < kSolved; ++lane) f(local, r + lane);
      }
    };
    if (local.one_by_one())
      for (int64_t r = 0; r < rows; ++r) f(local, r);
    else if (local.is_ewn())
      vectors(std::true_type{});
    else
      vectors(std::false_type{});
  }

  bool all_together() const { return std::count(apart, apart + rows, 0) == rows; }

  template <int count, class T> static WN_INLINE void load(const T (*from)[kShortRows], int64_t r, T* to) {
    static_for<count>([&](auto i) __attribute__((always_inline)) { to[i] = from[i][r]; });
  }
  template <int count, class T> static WN_INLINE void store(const T* from, int64_t r, T (*to)[kShortRows]) {
    static_for<count>([&](auto i) __attribute__((always_inline)) { to[i][r] = from[i]; });
  }
  WN_INLINE bool safe(const Formula& f, int64_t r, const A* row_gram, const A* row_c) const {
    bool all = f.exact(row_c);
    static_for<Formula::gram_inputs>([&](auto k) __attribute__((always_inline)) {
      all &= safe_square(row_gram[k * (k + 1) / 2 + k]) | (zero[k][r] != 0);
    });
    return all;
  }
};

// Gradients and first momenta of 0 are common: embeddings that a batch did not use. They need no scaling.
template <class Formula, class E, class A>
WN_INLINE void find_zeros(const E& elements, int64_t length, RowTile<Formula, A>& tile) {
  static_for<Formula::gram_inputs>([&](auto k) __attribute__((always_inline)) {
    const A* const squares = tile.gram[k * (k + 1) / 2 + k];
    int any = 0;
    for (int64_t r = 0; r < whole(tile.rows); ++r) any |= tile.zero[k][r] = squares[r] == 0;
    for (int64_t r = 0; any && r < tile.rows; ++r) {
      const int64_t begin = (tile.first + r) * length;
      if (tile.zero[k][r]) tile.zero[k][r] = is_zero<Formula, k>(elements, begin, begin + length);
    }
  });
}

// For a formula that needs its sums in all rows.
template <class Formula, class A> WN_MULTIVERSION void prepare_rows(RowTile<Formula, A>& tile) {
  constexpr int unscaled[Formula::inputs] = {};
  tile.for_rows([&](const Formula& f, int64_t r) __attribute__((always_inline)) {
    A gram[kGram<Formula>], c[kCoefficients<Formula>];
    tile.template load<kGram<Formula>>(tile.gram, r, gram);
    const bool exists = f.prepare(r, gram, unscaled, c);
    tile.apart[r] = !(exists & tile.safe(f, r, gram, c));
    tile.template store<Formula::coefficients>(c, r, tile.c);
  });
}

// To coefficients, and the results are stored.
template <class Formula, class A> WN_MULTIVERSION void solve_rows(RowTile<Formula, A>& tile) {
  constexpr int unscaled[Formula::inputs] = {};
  typename RowTile<Formula, A>::R results[kResults<Formula>][kShortRows];
  tile.for_rows([&](const Formula& f, int64_t r) __attribute__((always_inline)) {
    A gram[kGram<Formula>], c[kCoefficients<Formula>];
    typename RowTile<Formula, A>::R result[kResults<Formula>];
    tile.template load<kGram<Formula>>(tile.gram, r, gram);
    if constexpr (kAdvances<Formula>) {
      A sums[Formula::residuals];
      tile.template load<Formula::residuals>(tile.sums, r, sums);
      tile.template load<Formula::coefficients>(tile.c, r, c);
      f.solve(r, gram, unscaled, sums, c, result);
    } else {
      bool alone = true;
      if constexpr (Formula::residuals > 0) {
        alone = !f.prepare(r, gram, unscaled, c);
        f.solve(r, gram, unscaled, static_cast<const A*>(nullptr), c, result);
      } else {
        f.solve(r, gram, unscaled, c, result);
      }
      tile.apart[r] = !(alone & tile.safe(f, r, gram, c));
    }
    tile.template store<Formula::coefficients>(c, r, tile.c);
    tile.template store<Formula::results>(result, r, results);
  });
  if constexpr (Formula::residuals > 0) {
    const auto finish = [&](int64_t r) __attribute__((always_inline)) {
      double result[Formula::results];
      tile.template load<Formula::results>(results, r, result);
      tile.formula.finish(tile.first + r, result);
    };
    if (tile.all_together()) {
#pragma omp simd
      for (int64_t r = 0; r < tile.rows; ++r) finish(r);
    } else {
      for (int64_t r = 0; r < tile.rows; ++r)
        if (!tile.apart[r]) finish(r);
    }
  } else if constexpr (Formula::results > 0) {
    write_rows(tile.formula.stored(), tile.first, tile.rows, results[0]);
  }
}

template <int width, bool two_chunks, class Formula, class E>
WN_MULTIVERSION void short_rows_in_range(const Problem<Formula>& problem, Ahead ahead, int64_t first, int64_t last) {
  using A = typename E::A;
  constexpr bool several_chunks = !two_chunks && width > 1, advance = kAdvances<Formula> && width > 1;
  constexpr bool step = Formula::residuals > 0;
  const E elements(problem);
  const int64_t length = problem.layout.inner;
  // A step has too much to solve for each row to do so for fewer than kSolved of them.
  const int64_t bytes = step || !first_cache_is_large() ? kShortBytes : kShortBytes * 3 / 2;
  const int64_t most = std::clamp<int64_t>(bytes / (length * E::bytes), step ? kSolved : kFewRows, kShortRows);
  ahead.next *= most;  // from a tile to the next one
  const Ahead while_combining = step && length >= kShortRow ? ahead : Ahead{};
  RowTile<Formula, A> tile(problem.formula);
  for (int64_t begin = first; begin < last; begin += most) {
    const int64_t rows = std::min(most, last - begin);
    tile.begin(begin, rows);
    if (several_chunks && step && length >= kShortRow) {
      for (int64_t r = 0; r < rows; ++r) {
        A gram[kGram<Formula>];
        const int64_t at = (begin + r) * length;
        reduce_gram<Formula>(elements, at, at + length, ahead, gram);
        tile.template store<kGram<Formula>>(gram, r, tile.gram);
      }
    } else {
      gram_of_short_rows<width, two_chunks, Formula>(elements, ahead, begin * length, length, rows, tile.gram);
    }
    find_zeros(elements, length, tile);
    if constexpr (kAdvances<Formula>) {
      prepare_rows(tile);
      [[maybe_unused]] A lanes_of_rows[Formula::residuals][two_chunks ? kShortRows * kKept<width> : 1];
      for (int64_t r = 0; r < rows; ++r) {
        if (tile.apart[r]) continue;
        A c[kCoefficients<Formula>], sums[Formula::residuals];
        tile.template load<Formula::coefficients>(tile.c, r, c);
        const int64_t at = (begin + r) * length;
        if constexpr (two_chunks) {
          advance_two_chunks<width, Formula>(elements, at, length, c, r, lanes_of_rows);
          continue;
        } else if constexpr (advance) {
          residuals_of_range<Formula, true>(elements, at, at + length, ahead, c, sums);
        } else {
          A lanes[Formula::residuals][width];
          sum_short_row<width, two_chunks, Formula>(
              elements, Ahead{}, at, length, lanes,
              [&](const A* x, auto&& add) __attribute__((always_inline)) { for_residuals<Formula>(c, x, add); });
          for (int p = 0; p < Formula::residuals; ++p) sums[p] = lanes[p][0];
        }
        tile.template store<Formula::residuals>(sums, r, tile.sums);
      }
      if constexpr (two_chunks)
        for (int p = 0; p < Formula::residuals; ++p) sum_rows<kKept<width>>(lanes_of_rows[p], rows, tile.sums[p]);
    }
    solve_rows(tile);
    bool done[kShortRows] = {};
    if (!tile.all_together())  // a loop of its own: beside it the next one would spill
      for (int64_t r = 0; r < rows; ++r) {
        if (!tile.apart[r]) continue;
        double sums[kGram<Formula>];
        A c[kCoefficients<Formula>] = {};
        for (int p = 0; p < kGram<Formula>; ++p) sums[p] = tile.gram[p][r];
        done[r] = !solve_row<advance>(problem, elements, begin + r, Ahead{}, sums, c);
        tile.template store<Formula::coefficients>(c, r, tile.c);
      }
    if constexpr (Formula::outputs > 0) {
      if (problem.out[0] == nullptr) continue;
      for (int64_t r = 0; r < rows; ++r) {
        if (done[r]) continue;
        A c[kCoefficients<Formula>];
        tile.template load<Formula::coefficients>(tile.c, r, c);
        const int64_t at = (begin + r) * length;
        if constexpr (advance && two_chunks)
          elements.template rescale_chunks<width>(at, at + length - width, [&](A y) __attribute__((always_inline)) {
            return Formula::rescale(c, y);
          });
        else if constexpr (advance) rescale_piece<Formula>(elements, at, at + length, Ahead{}, c);
        else if constexpr (two_chunks) combine_two_chunks<width, Formula>(elements, at, length, c);
        else combine_short_row<width, Formula>(elements, while_combining, begin * length, at, length, c);
      }
    }
  }
}

template <class Formula, class E> void run_short_rows(const Problem<Formula>& problem, int64_t bytes_of_call) {
  const int64_t length = problem.layout.inner;
  // In 16 bits smaller chunks take longer than single elements; but a step has the bits of any type of its gradient.
  constexpr bool small = Formula::residuals > 0 || !E::has_16_bits;
  const Ahead ahead = bytes_of_call > kLastCacheOfSteps ? ahead_of<Formula, E>(problem) : Ahead{};
  const int64_t row = length + (Formula::residuals > 0 ? kStepOfRow : 0);
  at::parallel_for(0, problem.layout.rows, std::max<int64_t>(1, kGrain / row), [&](int64_t first, int64_t last) {
    if (length >= 32) short_rows_in_range<16, false, Formula, E>(problem, ahead, first, last);
    else if (length >= 16) short_rows_in_range<16, true, Formula, E>(problem, ahead, first, last);
    else if (length >= 8) short_rows_in_range<8, true, Formula, E>(problem, ahead, first, last);
    else if (small && length >= 4) short_rows_in_range<small ? 4 : 1, small, Formula, E>(problem, ahead, first, last);
    else if (small && length >= 2) short_rows_in_range<small ? 2 : 1, small, Formula, E>(problem, ahead, first, last);
    else short_rows_in_range<1, false, Formula, E>(problem, ahead, first, last);
  });
}

// How a problem reads as a matrix of columns: element `o` of column `c` lies at c + o * stride, and row u owns the columns
// [u * width, (u + 1) * width).
struct Columns {
  int64_t length, count, width, stride;
};

template <class Formula, class E>
WN_MULTIVERSION void reduce_columns(const E& elements, Columns m, int64_t c0, int64_t c1, int64_t o0, int64_t o1,
                                    typename E::A (*gram)[kTile]) {
  using A = typename E::A;
  const int64_t width = c1 - c0;
  for (int p = 0; p < kGram<Formula>; ++p)
    for (int64_t c = 0; c < width; ++c) gram[p][c] = 0;
  // Eight elements of a column are added as a tree before they meet its sum: less rounding, and one access for eight.
  const auto add = [&](auto count, int64_t c, int64_t o) __attribute__((always_inline)) {
    A products[kGram<Formula>][count];
    static_for<count>([&](auto r) __attribute__((always_inline)) {
      A x[Formula::inputs];
      elements.load(c0 + c + (o + r) * m.stride, x);
      for_products<Formula>(x, [&](auto p, A product) __attribute__((always_inline)) { products[p][r] = product; });
    });
    static_for<kGram<Formula>>([&](auto p) __attribute__((always_inline)) {
      if constexpr (count == 8)
        gram[p][c] += ((products[p][0] + products[p][1]) + (products[p][2] + products[p][3])) +
                      ((products[p][4] + products[p][5]) + (products[p][6] + products[p][7]));
      else
        gram[p][c] += products[p][0];
    });
  };
  int64_t o = o0;
  for (; o + 8 <= o1; o += 8) {
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) add(std::integral_constant<int, 8>{}, c, o);
  }
  for (; o < o1; ++o) {
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) add(std::integral_constant<int, 1>{}, c, o);
  }
}

template <class Formula, class E>
WN_MULTIVERSION void combine_columns(const E& elements, Columns m, int64_t c0, int64_t c1, int64_t o0, int64_t o1,
                                     const typename E::A (*coefficients)[kTile]) {
  using A = typename E::A;
  const int64_t width = c1 - c0;
  const auto combine = [&](int64_t c, int64_t o) __attribute__((always_inline)) {
    A x[Formula::inputs], y[kOutputs<Formula>], k[kCoefficients<Formula>];
    const int64_t at = c0 + c + o * m.stride;
    elements.load(at, x);
    static_for<kCoefficients<Formula>>([&](auto q) __attribute__((always_inline)) { k[q] = coefficients[q][c]; });
    Formula::combine(k, x, y);
    elements.store(at, y);
  };
  for (int64_t o = o0; o < o1; ++o) {
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) combine(c, o);
  }
}

template <class Formula, class E>
void run_columns(const Problem<Formula>& problem, Columns m) {
  using A = typename E::A;
  const E elements(problem);
  struct Grams { A sum[kGram<Formula>][kTile]; };
  struct Tile { A c[kCoefficients<Formula>][kTile]; };

  // The width of a tile depends on the shape alone; columns of one row stay together.
  const int64_t fitting = kTileBytes / std::max<int64_t>(1, m.length * E::bytes);
  const int64_t wanted = std::min(kTile, std::max<int64_t>(64, fitting));
  const int64_t tile = std::max<int64_t>(1, wanted / m.width) * m.width;
  const int64_t tiles = (m.count + tile - 1) / tile, pieces = (m.length + kColumnPiece - 1) / kColumnPiece;
  const auto reduce = [&](int64_t t, int64_t piece, Grams& g) {
    reduce_columns<Formula, E>(elements, m, t * tile, std::min(m.count, (t + 1) * tile), piece * kColumnPiece,
                               std::min(m.length, (piece + 1) * kColumnPiece), g.sum);
  };
  // Coefficients of all columns of a tile; a row that had to be scaled keeps its (already written) output, which is
  // possible only row by row, so then the tile is combined here and false is returned.
  const auto solve = [&](int64_t t, const double (*sums)[kTile], Tile& out) {
    const int64_t c0 = t * tile, c1 = std::min(m.count, c0 + tile);
    bool to_combine[kTile], all = true;
    for (int64_t c = c0; c < c1; c += m.width) {
      double row_sums[kGram<Formula>] = {};
      for (int p = 0; p < kGram<Formula>; ++p)
        for (int64_t i = 0; i < m.width; ++i) row_sums[p] += sums[p][c - c0 + i];
      A coefficient[kCoefficients<Formula>];
      to_combine[c - c0] = solve_row<false>(problem, elements, c / m.width, Ahead{}, row_sums, coefficient);
      all &= to_combine[c - c0];
      for (int q = 0; q < Formula::coefficients; ++q)
        for (int64_t i = 0; i < m.width; ++i) out.c[q][c - c0 + i] = coefficient[q];
    }
    if constexpr (Formula::outputs > 0) {
      for (int64_t c = c0; c < c1 && !all; c += m.width) {
        if (!to_combine[c - c0]) continue;
        A coefficient[kCoefficients<Formula>];
        for (int q = 0; q < Formula::coefficients; ++q) coefficient[q] = out.c[q][c - c0];
        for (int64_t o = 0; o < m.length; ++o)
          for (int64_t i = 0; i < m.width; ++i) {
            A x[Formula::inputs], y[kOutputs<Formula>];
            const int64_t at = c + i + o * m.stride;
            elements.load(at, x);
            Formula::combine(coefficient, x, y);
            elements.store(at, y);
          }
      }
    }
    return all;
  };
  const auto combine = [&](int64_t t, int64_t o0, int64_t o1, const Tile& in) {
    if constexpr (Formula::outputs > 0)
      combine_columns<Formula, E>(elements, m, t * tile, std::min(m.count, (t + 1) * tile), o0, o1, in.c);
  };
  const auto add = [&](int64_t t, double (*sums)[kTile], const Grams& g, bool first_piece) {
    const int64_t width = std::min(m.count, (t + 1) * tile) - t * tile;
    for (int p = 0; p < kGram<Formula>; ++p)
      for (int64_t c = 0; c < width; ++c) sums[p][c] = (first_piece ? 0 : sums[p][c]) + g.sum[p][c];
  };

  if (tiles >= 2 * at::get_num_threads() || pieces <= 1 || m.count * m.length <= kGrain) {
    at::parallel_for(0, tiles, std::max<int64_t>(1, kGrain / (tile * std::max<int64_t>(1, m.length))),
                     [&](int64_t first, int64_t last) {
      Grams grams;
      Tile coefficients;
      double sums[kGram<Formula>][kTile];
      for (int64_t t = first; t < last; ++t) {
        for (int64_t piece = 0; piece < pieces; ++piece) {
          reduce(t, piece, grams);
          add(t, sums, grams, piece == 0);
        }
        if (solve(t, sums, coefficients)) combine(t, 0, m.length, coefficients);
      }
    });
    return;
  }
  std::vector<Grams> grams(tiles * pieces);
  at::parallel_for(0, tiles * pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) reduce(i / pieces, i % pieces, grams[i]);
  });
  std::vector<Tile> coefficients(tiles);
  std::vector<char> ready(tiles);
  for (int64_t t = 0; t < tiles; ++t) {
    double sums[kGram<Formula>][kTile];
    for (int64_t piece = 0; piece < pieces; ++piece) add(t, sums, grams[t * pieces + piece], piece == 0);
    ready[t] = solve(t, sums, coefficients[t]);
  }
  at::parallel_for(0, tiles * pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t piece = i % pieces;
      if (ready[i / pieces])
        combine(i / pieces, piece * kColumnPiece, std::min(m.length, (piece + 1) * kColumnPiece), coefficients[i / pieces]);
    }
  });
}

template <class Formula, class In> int64_t bytes_of(const Problem<Formula>& problem) {
  return problem.layout.rows * problem.layout.row_length() * In::bytes;
}

template <class Formula, class In, class Out> void run_typed(const Problem<Formula>& problem, int64_t bytes_of_call) {
  using E = Elements<Formula, In, Out>;
  const Layout& layout = problem.layout;
  const int64_t length = layout.row_length();
  if (length == 0) return rows_in_range<Formula, E>(problem, 0, layout.rows);
  if (in_tiles<Formula, E>(layout, bytes_of_call)) return run_short_rows<Formula, E>(problem, bytes_of_call);
  if (layout.outer > 1 && layout.inner < kShortSegment)
    return run_columns<Formula, E>(problem, {layout.outer, layout.rows * layout.inner, layout.inner,
                                             layout.rows * layout.inner});
  if (layout.rows < 2 * at::get_num_threads() && layout.rows * length > kGrain) return split_rows<Formula, E>(problem);
  at::parallel_for(0, layout.rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, length)),
                   [&](int64_t first, int64_t last) { rows_in_range<Formula, E>(problem, first, last); });
}

template <class Formula, class In, class Out> void run_typed(const Problem<Formula>& problem) {
  run_typed<Formula, In, Out>(problem, bytes_of<Formula, In>(problem));
}

// Several problems of the same types: small ones side by side in one parallel region, large ones one after the other.
template <class Formula, class In, class Out> void run_typed(const std::vector<Problem<Formula>>& problems) {
  std::vector<const Problem<Formula>*> small;
  int64_t elements = 0, bytes = 0;
  for (const Problem<Formula>& problem : problems) bytes += bytes_of<Formula, In>(problem);
  // Rows of a kernel that is no step differ in their last bits by path: there each problem is on its own.
  const auto bytes_of_call = [bytes](const Problem<Formula>& problem) {
    return Formula::residuals > 0 ? bytes : bytes_of<Formula, In>(problem);
  };
  for (const Problem<Formula>& problem : problems) {
    const int64_t size = problem.layout.rows * problem.layout.row_length();
    if (size > kGrain) {
      run_typed<Formula, In, Out>(problem, bytes_of_call(problem));
    } else {
      small.push_back(&problem);
      elements += size;
    }
  }
  const int64_t count = static_cast<int64_t>(small.size());
  if (count > 0)
    at::parallel_for(0, count, std::max<int64_t>(1, kGrain * count / std::max<int64_t>(1, elements)),
                     [&](int64_t first, int64_t last) {
                       for (int64_t i = first; i < last; ++i) run_typed<Formula, In, Out>(*small[i], bytes_of_call(*small[i]));
                     });
}

}  // namespace
}  // namespace wn::cpu
