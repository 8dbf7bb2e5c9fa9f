// Rows one after the other, each through the cache as a whole: contiguous, or as `outer` contiguous segments. `rows_in_range`
// is for a thread with rows of its own, `split_rows` for too few rows to go around.
#pragma once

#include <ATen/Parallel.h>
#include <sys/mman.h>

#include <vector>

#include "elements.h"

namespace wn::cpu {
namespace {

constexpr int64_t kPiece = 4096;     // elements reduced in one accumulator before it goes to double
constexpr int64_t kGrain = 32768;    // elements worth waking a thread for
constexpr int64_t kCached = 1 << 20;  // bytes that need not be asked for: they are found in a cache
constexpr int64_t kLongRow = 1024;   // such rows never go in tiles
constexpr int64_t kAround = 32 << 20;  // bytes of an output that no cache would keep until it is read

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
                             const typename E::A* coefficients, bool around = false) {
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
      elements.template store_lanes<kLanes>(i, lanes, around);
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
WN_INLINE void each_row(const Problem<Formula>& problem, int64_t first, int64_t last, bool around = false) {
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
          combine_piece<Formula, hardware>(elements, begin, end, ahead, c, around);
      }, backwards<Formula>(ahead));
    }
  }
}

template <class Formula, class E>
WN_MULTIVERSION void rows_in_any_range(const Problem<Formula>& problem, int64_t first, int64_t last) {
  each_row<Formula, false, E>(problem, first, last);
}

#if defined(WN_HARDWARE)
inline bool hardware_bf16() {
  static const bool has = __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
  return has;
}

// Whether memory is there: the operating system makes it in the cache when it is written for the first time.
inline bool is_resident(const char* address) {
  static const uintptr_t page = sysconf(_SC_PAGESIZE);
  unsigned char resident = 0;
  return mincore(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(address) / page * page), 1, &resident) == 0 && resident & 1;
}

// Whether the output of a problem is too large for a cache, is none of its inputs, and its rows begin with a line; asked
// before these rows are written.
template <class Formula, class E> bool goes_around(const Problem<Formula>& problem, int64_t first, int64_t last) {
  if constexpr (Formula::outputs != 1 || Formula::residuals > 0) return false;
  const Layout& layout = problem.layout;
  const int64_t bytes = layout.rows * layout.row_length() * E::out_bytes;
  if (problem.out[0] == nullptr || bytes < kAround || layout.inner * E::out_bytes % kLine != 0) return false;
  const char* const out = static_cast<const char*>(problem.out[0]);
  return reinterpret_cast<uintptr_t>(out) % kLine == 0 &&
         std::find(std::begin(problem.in), std::end(problem.in), out) == std::end(problem.in) &&
         is_resident(out + (first + last) / 2 * layout.inner * E::out_bytes);
}

template <class Formula, class E>
WN_HARDWARE void rows_by_hardware(const Problem<Formula>& problem, int64_t first, int64_t last, bool around) {
  each_row<Formula, true, E>(problem, first, last, around);
  if (around) asm volatile("sfence" ::: "memory");  // before another thread reads
}
#endif

template <class Formula, class E> void rows_in_range(const Problem<Formula>& problem, int64_t first, int64_t last) {
#if defined(WN_HARDWARE)
  const bool around = goes_around<Formula, E>(problem, first, last);
  if constexpr (E::stores_bf16 && !kAdvances<Formula>)
    if (hardware_bf16()) return rows_by_hardware<Formula, E>(problem, first, last, around);
  if constexpr (E::stores_as_computed && Formula::outputs == 1 && Formula::residuals == 0)
    if (around && __builtin_cpu_supports("x86-64-v4")) return rows_by_hardware<Formula, E>(problem, first, last, around);
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

}  // namespace
}  // namespace wn::cpu
