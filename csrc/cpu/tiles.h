// Short rows in tiles: rows of a few elements, in a cache of up to a thousand, whose arithmetic per row goes side by side in
// the lanes too.
#pragma once

#include "rows.h"

namespace wn::cpu {
namespace {

constexpr int64_t kShortRows = 64;      // short rows side by side, at most
constexpr int64_t kShortBytes = 16384;  // and as many as stay in L1 between reading and writing,
constexpr int64_t kFewRows = 4;         // but so many at least, so that the arithmetic of one overlaps that of another
constexpr int64_t kSolved = 16;         // of them are solved at a time
constexpr int kKeptLanes = 4;           // of the sums over a short row, until all rows of a tile have theirs
constexpr int64_t kStepOfRow = 32;      // elements that take as long as the arithmetic of a step for one row

// Rows below kShortRow go in tiles. So do those below kLongRow as long as the call finds all its problems in a cache, and
// steps of two sweeps without 16-bit numbers from memory too: the others are quicker there one row after the other. The
// Gram matrices of a step are the same either way.
constexpr int64_t kShortRow = 256;
constexpr int64_t kLastCache = 8 << 20, kLastCacheOfSteps = 20 << 20;
template <class Formula, class E> bool in_tiles(const Layout& layout, int64_t bytes_of_call) {
  constexpr bool step = Formula::residuals > 0;
  if (layout.outer > 1 || layout.inner >= kLongRow + step) return false;
  if (layout.inner < kShortRow || (step && !kAdvances<Formula> && !E::has_16_bits)) return true;
  return bytes_of_call <= (step ? kLastCacheOfSteps : kLastCache);
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

}  // namespace
}  // namespace wn::cpu
