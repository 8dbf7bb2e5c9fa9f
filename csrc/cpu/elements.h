// Typed access to the elements of a problem, in vectors too, and what a formula (polar.h) makes of single elements.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "../dispatch.h"
#include "../kernels.h"

#if defined(WN_ONE_VERSION) || !defined(__x86_64__) || !defined(__GNUC__) || defined(__clang__)
#define WN_MULTIVERSION
#else
#define WN_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif

// A version of a function for processors of that level, which stores around the caches, and which rounds to bfloat16 by the
// instruction that `hardware_bf16` looks for.
#if !defined(WN_ONE_VERSION) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WN_HARDWARE __attribute__((target("arch=x86-64-v4")))
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
constexpr int64_t kLine = 64;            // bytes that memory delivers at once
constexpr int64_t kAhead = 2048;         // bytes between an element and what is asked of memory meanwhile,
constexpr int64_t kAheadInFirst = 3072;  // and where that goes to the first cache
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

#if defined(WN_HARDWARE)
// To memory, around the caches: a line is not fetched before it is written. `to` lies on the grid of such vectors.
template <class V> WN_INLINE void stream(const V& vector, void* to) {
  static_assert(sizeof(V) == kLine);
  asm volatile("vmovntdq %1, %0" : "=m"(*static_cast<V*>(to)) : "v"(vector));
}
#endif

// As narrow::from; to bfloat16 by the processor, which takes subnormal numbers for 0. Around the caches where `around` says
// so.
template <int width, class A, class T> WN_INLINE void narrow_lanes(const A* from, T* to, bool around = false) {
#if defined(WN_HARDWARE)
  if constexpr (width == kLanes && std::is_same_v<A, T>) {
    if (around) {
      typedef T Line __attribute__((vector_size(kLine)));
      constexpr int lanes = kLine / sizeof(T);
      for (int lane = 0; lane < width; lane += lanes) {
        Line line;
        std::memcpy(&line, from + lane, sizeof(line));
        stream(line, to + lane);
      }
      return;
    }
  }
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
      if (around) stream(rounded, to);
      else std::memcpy(to, &rounded, sizeof(rounded));
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
  static constexpr bool stores_bf16 = (std::is_same_v<O, bf16> || ...), stores_as_computed = (std::is_same_v<O, A> && ...);
  static constexpr int64_t out_bytes = Types<O...>::bytes;

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
  template <int width> WN_INLINE void store_lanes(int64_t i, const A (*y)[width], bool around = false) const {
    static_for<sizeof...(O)>([&](auto l) __attribute__((always_inline)) {
      narrow_lanes<width>(y[l], static_cast<std::tuple_element_t<l, std::tuple<O...>>*>(out[l]) + i, around);
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

// add(p, <x_i, x_j>) for the packed pairs p = (i, j) of the Gram matrix.
template <class Formula, class A, class F> WN_INLINE void for_products(const A* x, F&& add) {
  static_for<Formula::gram_inputs>([&](auto j) __attribute__((always_inline)) {
    static_for<j + 1>([&](auto i) __attribute__((always_inline)) {
      add(std::integral_constant<int, j * (j + 1) / 2 + i>{}, x[i] * x[j]);
    });
  });
}

}  // namespace
}  // namespace wn::cpu
