// Rows whose elements lie apart: tiles of columns, side by side in the threads.
#pragma once

#include "rows.cuh"

namespace wn::cuda {

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

}  // namespace wn::cuda
