// Rows whose elements are neighbours in memory: a team for each, or the blocks of a grid for one.
#pragma once

#include "packs.cuh"
#include "redo.cuh"
#include "table.cuh"
#include "team.cuh"

namespace wn::cuda {

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

}  // namespace wn::cuda
