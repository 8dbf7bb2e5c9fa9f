// Columns side by side in the lanes, in tiles: where neighbouring elements belong to different rows (last dim, small inner).
#pragma once

#include "rows.h"

namespace wn::cpu {
namespace {

constexpr int64_t kColumnPiece = 256;    // elements of a column in one accumulator before it goes to double
constexpr int64_t kTile = 512;           // columns side by side, at most
constexpr int64_t kTileBytes = 1 << 18;  // a tile and all its inputs stay in L2 between reading and writing

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

}  // namespace
}  // namespace wn::cpu
