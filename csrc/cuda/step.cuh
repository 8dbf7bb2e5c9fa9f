// The polar steps: formulas with residuals, over the rows of many weights in one launch.
//
// There is one kernel per formula and accumulator, for rows and columns alike, because nvcc's time goes into the double
// arithmetic between the passes, once per kernel. So what differs little is decided at run time: the dtype of the
// gradient, whether there is a 16-bit copy, the layout. That arithmetic is hundreds of dependent instructions; one thread
// of each row does it, for all rows of a block at once, out of line, between arrays in shared memory.
#pragma once

#include <memory>
#include <vector>

#include "engine.cuh"
#include "step_plan.h"

namespace wn::cuda {

// A row split over blocks goes through phases in launches of their own.
enum class Phase { whole, sums, residuals, coefficients, outputs };

template <class F> struct StepTable : Table<F> {
  const float* skip;  // nothing is done where it is not 0
  Phase phase;

  WN_DEVICE bool skipped() const { return skip != nullptr && *skip != 0; }
};

// A formula with the type that it computes in. All inputs and outputs are of this type in memory too, but the gradient,
// input 1, which may have 16 bits, and the last output, a copy of the weight in the gradient's type, or null.
template <class F, class A> struct Step {
  using Formula = F;
  using Sum = A;
  static constexpr int pack = 16 / sizeof(A);
  static constexpr int inputs = F::inputs, outputs = F::outputs, gram_size = F::gram_inputs * (F::gram_inputs + 1) / 2;
  static constexpr int residuals = F::residuals, coefficients = F::coefficients, results = F::results;
  static constexpr int copy = outputs - 1, at_once = packs_in_flight(inputs);
};

// What the blocks of a split row tell each other, through the workspace.
template <class S> struct StepWorkspace {
  struct Row {
    double coefficient[S::coefficients];
    bool redone;
  };
  struct Piece {
    double gram[S::gram_size], residual[S::residuals];
    uint32_t nonzero[S::inputs];
  };
  Row* row;
  Piece* piece;  // [rows, pieces]

  static int64_t bytes(const Layout& layout, const Plan& plan) {
    return (layout.rows * int64_t(sizeof(Row) + plan.pieces * sizeof(Piece)) + 15) / 16 * 16;
  }
  WN_INLINE StepWorkspace(void* memory, const Layout& layout)
      : row(static_cast<Row*>(memory)), piece(reinterpret_cast<Piece*>(row + layout.rows)) {}
};

// ---- packs ---------------------------------------------------------------------------------------------------------

template <class S> using StepPacks = Words[S::inputs];

template <class S> WN_DEVICE Words load_gradient(const void* tensor, DType type, const Place& place, bool vectors) {
  using A = typename S::Sum;
  if constexpr (sizeof(A) == 4)
    if (type != DType::f32) {
      const Words halves = load_pack<bf16, S::pack>(tensor, place, vectors);
      Words words{};
#pragma unroll
      for (int e = 0; e < S::pack; ++e) {
        const bf16 x = element<bf16>(halves, e);
        insert(words, e, type == DType::bf16 ? widen(x) : widen(f16{x.bits}));
      }
      return words;
    }
  return load_pack<A, S::pack>(tensor, place, vectors);
}

template <class S>
WN_DEVICE void store_copy(void* tensor, DType type, const Place& place, bool vectors, const Words& words) {
  Words halves{};
#pragma unroll
  for (int e = 0; e < S::pack; ++e) {
    const auto x = element<typename S::Sum>(words, e);
    insert(halves, e, type == DType::bf16 ? narrow<bf16>::from(x) : bf16{narrow<f16>::from(x).bits});
  }
  store_pack<bf16, S::pack>(tensor, place, vectors, halves);
}

template <class S> WN_DEVICE void elements(const StepPacks<S>& packs, int e, typename S::Sum* x) {
#pragma unroll
  for (int k = 0; k < S::inputs; ++k) x[k] = element<typename S::Sum>(packs[k], e);
}

// ---- the rows of a block -------------------------------------------------------------------------------------------

// Rows: each has a team of threads, in one block, in a cluster, or in each of the blocks that split it. Columns: the
// threads of a tile are side by side, again and again down the outer dimension.
template <class S> struct BlockRows {
  using A = typename S::Sum;
  using F = typename S::Formula;
  const Problem<F>& problem;
  const Plan& plan;
  bool columns;
  Team team;
  int64_t row0;
  int rows, mine;  // how many, and which of them is this thread's
  double *gram, *residual, *coefficient, *result;  // [rows, …], in shared memory
  uint32_t* nonzero;
  char* redo;

  WN_DEVICE BlockRows(const Entry<F>& entry, int64_t block, bool by_row)
      : problem(entry.problem), plan(entry.plan), columns(plan.tile_threads > 0), team(plan) {
    const int64_t group = by_row || plan.pieces == 1 ? block : block / plan.pieces;
    row0 = group * plan.per_block;
    const int64_t rest = problem.layout.rows - row0;
    rows = rest < plan.per_block ? static_cast<int>(rest) : plan.per_block;
    mine = columns ? lane() / static_cast<int>(problem.layout.inner) : tid() / plan.width;
    const StepScratch at(block_threads() / warp, plan.tile_threads, plan.per_block, S::gram_size, S::residuals,
                         S::coefficients, S::results, S::inputs);
    char* memory = shared<char>();
    gram = reinterpret_cast<double*>(memory + at.gram);
    residual = reinterpret_cast<double*>(memory + at.residual);
    coefficient = reinterpret_cast<double*>(memory + at.coefficient);
    result = reinterpret_cast<double*>(memory + at.result);
    nonzero = reinterpret_cast<uint32_t*>(memory + at.nonzero);
    redo = memory + at.redo;
  }
  WN_DEVICE int lane() const { return tid() & (plan.tile_threads - 1); }
  WN_DEVICE bool leads() const { return team.block == 0; }
  WN_DEVICE Team whole() const {
    Team all = team;
    all.width = block_threads();
    all.rank = tid();
    return all;
  }

  // A condition of any thread of the block; in a cluster that of its first block, with the coefficients found there.
  WN_DEVICE bool share(bool condition) const {
    condition = block_any(condition);
    if (team.blocks == 1) return condition;
    if (tid() == 0 && leads()) redo[0] = condition;
    cluster_sync();
    condition = peer(redo, 0)[0];
    if (!leads())
      for (int i = tid(); i < S::coefficients; i += block_threads()) coefficient[i] = peer(coefficient, 0)[i];
    cluster_sync();
    if (tid() == 0) redo[0] = condition;
    return condition;
  }

  template <class T> WN_DEVICE void load_coefficients(T (&c)[S::coefficients], int row) const {
#pragma unroll
    for (int i = 0; i < S::coefficients; ++i) c[i] = static_cast<T>(coefficient[row * S::coefficients + i]);
  }
  WN_DEVICE bool exact(int row) const {
    A c[S::coefficients];
    load_coefficients(c, row);
    return problem.formula.exact(c);
  }
  // As all_safe and must_redo.
  WN_DEVICE bool safe(int row) const {
    A sum[S::gram_size];
    load_gram(sum, row);
    return all_safe<F>(sum);
  }
  WN_DEVICE bool must_redo_row(int row) const {
    A sum[S::gram_size];
    load_gram(sum, row);
    return must_redo<F>(sum, nonzero + row * S::inputs, exact(row));
  }
  WN_DEVICE void load_gram(A (&sum)[S::gram_size], int row) const {
#pragma unroll
    for (int i = 0; i < S::gram_size; ++i) sum[i] = static_cast<A>(gram[row * S::gram_size + i]);
  }

  // Of a split row: what its pieces found, added up by one thread for each number.
  template <class T, int n, class Total, class Operation>
  WN_DEVICE void total(const StepWorkspace<S>& workspace, T (StepWorkspace<S>::Piece::*member)[n], Total* sum,
                       Operation operation) const {
    for (int i = tid(); i < n; i += block_threads()) {
      T x = 0;
      for (int p = 0; p < plan.pieces; ++p) x = operation(x, (workspace.piece[row0 * plan.pieces + p].*member)[i]);
      sum[i] = x;
    }
    block_sync();
  }
};

// ---- passes over the rows ------------------------------------------------------------------------------------------

// total[row, i] = the reduction of x[i], i < count, over the threads of a row in this block or cluster.
template <class S, class T, int n, class Total, class Operation>
WN_DEVICE void reduce_rows(const BlockRows<S>& rows, T (&x)[n], int count, Total* total, Operation operation) {
  const Plan& plan = rows.plan;
  if (!rows.columns) {
    rows.team.reduce(x, operation);
    if (rows.team.rank == 0 && rows.mine < rows.rows)
#pragma unroll
      for (int i = 0; i < n; ++i)
        if (i < count) total[rows.mine * count + i] = x[i];
    return block_sync();
  }
  T* partial = shared<T>();
  const int tile = plan.tile_threads, warps = block_threads() / warp;
  const int inner = static_cast<int>(rows.problem.layout.inner);
#pragma unroll 1
  for (int distance = warp / 2; distance >= tile; distance /= 2)
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = operation(x[i], shfl_xor(~0u, x[i], distance));
  block_sync();
  if (tid() % warp < tile)
#pragma unroll
    for (int i = 0; i < n; ++i) partial[(i * warps + tid() / warp) * tile + rows.lane()] = x[i];
  block_sync();
#pragma unroll 1
  for (int t = tid(); t < rows.rows * count; t += block_threads()) {
    const int row = t / count;
    T sum = 0;
    for (int w = 0; w < warps; ++w)
      for (int j = 0; j < inner; ++j)
        sum = operation(sum, partial[((t - row * count) * warps + w) * tile + row * inner + j]);
    total[t] = sum;
  }
  block_sync();
}

enum class Pass { gram, residual, nonzero, combine };

// Every pass is this loop, out of line: loads of every type and alignment are most of its code. Sums go to the arrays of
// the rows; `redo` tells that some rows are not to be combined.
template <class S>
WN_OUTLINE void pass_over(const Entry<typename S::Formula>& entry, int64_t block, bool by_row, Pass pass,
                          bool redo = false) {
  using A = typename S::Sum;
  using F = typename S::Formula;
  constexpr int most = S::gram_size > S::residuals ? S::gram_size : S::residuals;
  const BlockRows<S> rows(entry, block, by_row);
  const Problem<F>& problem = entry.problem;
  const Plan plan = entry.plan;  // in registers, where no store can change it
  const Layout layout = problem.layout;
  const bool columns = rows.columns, own = rows.mine < rows.rows && !(redo && rows.redo[rows.mine]);
  const bool from_held = plan.held && (pass == Pass::residual || pass == Pass::combine);
  const int64_t step = layout.rows * layout.inner;
  A c[S::coefficients] = {}, sum[most] = {};
  uint32_t nonzero[S::inputs] = {};
  if (own && (pass == Pass::residual || pass == Pass::combine)) rows.load_coefficients(c, rows.mine);

  const int piece = plan.pieces == 1 ? 0 : static_cast<int>(block % plan.pieces);
  RowWalk<S::pack> walk(layout, plan, rows.row0 + rows.mine,
                        columns ? tid() / plan.tile_threads : piece * plan.width + rows.team.rank);
  if (!own) walk.segment = plan.segments;  // nothing to do
  Words* held = reinterpret_cast<Words*>(shared<char>() + plan.store_at) + tid();
  while (walk.more()) {
    StepPacks<S> packs[S::at_once];
    Place place[S::at_once];
#pragma unroll
    for (int b = 0; b < S::at_once; ++b, walk.advance()) {
      if (columns) {
        const int64_t outer = walk.next * S::pack, rest = layout.outer - outer;
        place[b] = {outer * step + rows.row0 * layout.inner + rows.lane(), walk.more() ? all_lanes<S::pack> : 0u, step};
        if (rest < S::pack) place[b].lanes &= rest > 0 ? (1u << rest) - 1 : 0u;
      } else {
        place[b] = walk.place();
      }
#pragma unroll
      for (int k = 0; k < S::inputs; ++k) {
        if (place[b].lanes == 0) packs[b][k] = {};
        else if (from_held) packs[b][k] = held[(b * S::inputs + k) * block_threads()];
        else if (k == 1) packs[b][k] = load_gradient<S>(in_global(problem.in[k]), problem.in_type[k], place[b], plan.vectors);
        else packs[b][k] = load_pack<A, S::pack>(in_global(problem.in[k]), place[b], plan.vectors);
      }
    }
#pragma unroll
    for (int b = 0; b < S::at_once; ++b) {
      if (pass == Pass::gram && plan.held && place[b].lanes != 0)
#pragma unroll
        for (int k = 0; k < S::inputs; ++k) held[(b * S::inputs + k) * block_threads()] = packs[b][k];
      A of_pack[most] = {};  // first: shorter chains of additions lose less
      Words out[S::outputs] = {};
#pragma unroll
      for (int e = 0; e < S::pack; ++e) {
        A x[S::inputs], term[S::residuals], y[S::outputs];
        elements<S>(packs[b], e, x);
        if (pass == Pass::gram) {
          add_products<F>(x, of_pack);
        } else if (pass == Pass::residual) {
          F::residual(c, x, term);
#pragma unroll
          for (int i = 0; i < S::residuals; ++i) of_pack[i] += term[i];
        } else if (pass == Pass::nonzero) {
#pragma unroll
          for (int k = 0; k < S::inputs; ++k) nonzero[k] |= nonzero_bits<A>(packs[b][k], e);
        } else {
          F::combine(c, x, y);
#pragma unroll
          for (int l = 0; l < S::outputs; ++l) insert(out[l], e, y[l]);
        }
      }
#pragma unroll
      for (int i = 0; i < most; ++i) sum[i] += of_pack[i];
      if (pass != Pass::combine) continue;
#pragma unroll
      for (int l = 0; l < S::copy; ++l) store_pack<A, S::pack>(problem.out[l], place[b], plan.vectors, out[l]);
      if constexpr (sizeof(A) == 4)
        if (problem.out[S::copy] != nullptr)
          store_copy<S>(problem.out[S::copy], problem.out_type[S::copy], place[b], plan.vectors, out[S::copy]);
    }
    held += S::at_once * S::inputs * block_threads();
  }
  if (pass == Pass::combine) return;
  if (pass == Pass::nonzero) return reduce_rows(rows, nonzero, S::inputs, rows.nonzero, Or{});
  reduce_rows(rows, sum, pass == Pass::gram ? S::gram_size : S::residuals,
              pass == Pass::gram ? rows.gram : rows.residual, Plus{});
}

// ---- between the passes --------------------------------------------------------------------------------------------

// By one thread of a row. Without exponents the inputs are unscaled.
template <class F>
WN_OUTLINE bool prepare_row(const F& formula, int64_t row, const double* gram, const int* exponent, double* c) {
  const int unscaled[F::inputs] = {};
  return formula.prepare(row, gram, exponent != nullptr ? exponent : unscaled, c);
}
template <class F>
WN_OUTLINE void solve_row(const F& formula, int64_t row, const double* gram, const int* exponent, const double* sums,
                          double* c, double* result) {
  const int unscaled[F::inputs] = {};
  formula.solve(row, gram, exponent != nullptr ? exponent : unscaled, sums, c, result);
}

// As redo_row of redo.cuh, by all threads of the block or cluster: element by element, in double, the inputs of the
// Gram matrix scaled by 2^-exponent. Everything is in shared memory, so that it takes few registers.
template <class S> WN_DEVICE void redo_row(const BlockRows<S>& rows, int r) {
  using F = typename S::Formula;
  const Problem<F>& problem = rows.problem;
  const Layout& layout = problem.layout;
  const Team team = rows.whole();
  const int64_t row = rows.row0 + r;
  const bool leader = team.leader();
  double *gram = rows.gram + r * S::gram_size, *residual = rows.residual + r * S::residuals;
  double *c = rows.coefficient + r * S::coefficients, *result = rows.result + r * S::results;
  int* exponent = reinterpret_cast<int*>(rows.nonzero + r * S::inputs);
  constexpr int most = S::gram_size > S::residuals ? S::gram_size : S::residuals;
  bool needed = false, wanted = false;
  enum : int { kLargest, kGram, kResidual, kCombine };
#pragma unroll 1
  for (int pass = kLargest; pass <= kCombine; ++pass) {
    double sum[most] = {}, largest[F::gram_inputs] = {};
    if (pass != kResidual || wanted)
#pragma unroll 1
      for (int64_t j = team.thread(); j < layout.row_length(); j += team.threads()) {
        const int64_t o = j / layout.inner, offset = (o * layout.rows + row) * layout.inner + (j - o * layout.inner);
        double x[S::inputs];
#pragma unroll
        for (int k = 0; k < S::inputs; ++k) {
          x[k] = RowValues{problem.in[k], problem.in_type[k], 0}.template at<double>(offset);
          if (k < F::gram_inputs && pass != kLargest) x[k] = shifted(x[k], -exponent[k]);
        }
        if (pass == kLargest) {
#pragma unroll
          for (int k = 0; k < F::gram_inputs; ++k) {
            const double m = magnitude(x[k]);
            largest[k] = Larger{}(largest[k], m == m ? m : INFINITY);
          }
        } else if (pass == kGram) {
          add_products<F>(x, sum);
        } else if (pass == kResidual) {
          double term[S::residuals];
          F::residual(c, x, term);
#pragma unroll
          for (int i = 0; i < S::residuals; ++i) sum[i] += term[i];
        } else {
          double y[S::outputs];
          F::combine(c, x, y);
#pragma unroll
          for (int l = 0; l < S::outputs; ++l) RowResults{problem.out[l], problem.out_type[l]}.set(offset, y[l]);
        }
      }
    if (pass == kLargest) {
      team.reduce(largest, Larger{});
      if (tid() == 0)
#pragma unroll
        for (int k = 0; k < F::gram_inputs; ++k)  // inputs that are not finite stay unscaled: they give what they give
          exponent[k] = largest[k] > 0 && largest[k] <= limits<double>::largest ? ::ilogb(largest[k]) : 0;
      block_sync();
    } else if (pass == kGram) {
      team.reduce(sum, Plus{});
      if (leader) {
#pragma unroll
        for (int i = 0; i < S::gram_size; ++i) gram[i] = sum[i];
        needed = prepare_row(problem.formula, row, gram, exponent, c);
      }
      wanted = rows.share(needed);
    } else if (pass == kResidual) {
      team.reduce(sum, Plus{});
      if (leader) {
#pragma unroll
        for (int i = 0; i < S::residuals; ++i) residual[i] = sum[i];
        solve_row(problem.formula, row, gram, exponent, needed ? residual : nullptr, c, result);
        for (int i = 0; i < S::coefficients; ++i) c[i] = finite(c[i]);
        problem.formula.finish(row, result);
      }
      rows.share(false);
    }
  }
}

template <class S> WN_OUTLINE void redo_rows(const Entry<typename S::Formula>& entry, int64_t block, bool by_row) {
  const BlockRows<S> rows(entry, block, by_row);
#pragma unroll 1
  for (int r = 0; r < rows.rows; ++r)
    if (rows.redo[r]) redo_row(rows, r);
}

// ---- the kernel ----------------------------------------------------------------------------------------------------

// Double takes more registers than two blocks leave it.
template <class S> constexpr int blocks_of_step = sizeof(typename S::Sum) == 8 ? 1 : step_blocks;

// Every stage makes the rows of its block anew, so that few registers are in use across the calls.
template <class S>
WN_KERNEL(step_threads, blocks_of_step<S>) step_kernel(WN_PARAMETER StepTable<typename S::Formula> table) {
  if (table.skipped()) return;
  const int64_t index = table.first + bid();
  const auto& entry = table.of_block(index);
  const auto& formula = entry.problem.formula;
  const Phase phase = table.phase;
  const bool whole = phase == Phase::whole, by_row = phase == Phase::coefficients;
  int64_t block = index - entry.begin;
  const auto of_block = [&] { return BlockRows<S>(entry, block = opaque(block), by_row); };
  const StepWorkspace<S> workspace(entry.workspace, entry.problem.layout);

  if (whole || phase == Phase::sums) {
    pass_over<S>(entry, block, by_row, Pass::gram);
    if (phase == Phase::sums) {
      const auto rows = of_block();
      auto& piece = workspace.piece[block];
      for (int i = tid(); i < S::gram_size; i += block_threads()) piece.gram[i] = rows.gram[i];
      if (rows.safe(0))  // then nothing of this piece is all zeros
        for (int k = tid(); k < S::inputs; k += block_threads()) rows.nonzero[k] = 1;
    }
  }

  bool needed = false, wanted = false;  // the residuals, of this thread's row and of any
  if (phase != Phase::sums && phase != Phase::outputs) {
    const auto rows = of_block();
    if (!whole) rows.total(workspace, &StepWorkspace<S>::Piece::gram, rows.gram, Plus{});
    const int r = tid();
    if (r < rows.rows && rows.leads())
      needed = prepare_row(formula, rows.row0 + r, rows.gram + r * S::gram_size, nullptr,
                           rows.coefficient + r * S::coefficients);
    wanted = rows.share(needed);
  }
  if (wanted && !by_row) {
    pass_over<S>(entry, block, by_row, Pass::residual);
    const auto rows = of_block();
    if (!whole)
      for (int i = tid(); i < S::residuals; i += block_threads()) workspace.piece[block].residual[i] = rows.residual[i];
  }
  if (phase == Phase::residuals) return;

  bool uncertain = false;  // whether a row has left the range of its accumulator
  if (whole || by_row) {
    const auto rows = of_block();
    if (by_row && wanted) rows.total(workspace, &StepWorkspace<S>::Piece::residual, rows.residual, Plus{});
    const int r = tid();
    if (r < rows.rows && rows.leads()) {
      solve_row(formula, rows.row0 + r, rows.gram + r * S::gram_size, nullptr,
                needed ? rows.residual + r * S::residuals : nullptr, rows.coefficient + r * S::coefficients,
                rows.result + r * S::results);
      uncertain = !rows.exact(r) || !rows.safe(r);
      rows.redo[r] = uncertain;
      if (!uncertain) formula.finish(rows.row0 + r, rows.result + r * S::results);
    }
    uncertain = rows.share(uncertain);
  }
  if (phase == Phase::sums ? !of_block().safe(0) : whole && uncertain)
    pass_over<S>(entry, block, by_row, Pass::nonzero);
  if (phase == Phase::sums) {
    const auto rows = of_block();
    for (int k = tid(); k < S::inputs; k += block_threads()) workspace.piece[block].nonzero[k] = rows.nonzero[k];
    return;
  }
  if (uncertain) {
    const auto rows = of_block();
    if (by_row) rows.total(workspace, &StepWorkspace<S>::Piece::nonzero, rows.nonzero, Or{});
    const int r = tid();
    if (r < rows.rows && rows.redo[r]) {
      rows.redo[r] = rows.must_redo_row(r);
      if (rows.leads() && !rows.redo[r]) formula.finish(rows.row0 + r, rows.result + r * S::results);
    }
    block_sync();
  }

  if (by_row || phase == Phase::outputs) {
    const auto rows = of_block();
    auto& row = workspace.row[rows.row0];
    if (by_row) {
      for (int i = tid(); i < S::coefficients; i += block_threads()) row.coefficient[i] = rows.coefficient[i];
      if (tid() == 0) row.redone = uncertain && rows.redo[0];
    } else {
      if (row.redone) return;
      for (int i = tid(); i < S::coefficients; i += block_threads()) rows.coefficient[i] = row.coefficient[i];
      block_sync();
    }
  }
  if (!by_row) pass_over<S>(entry, block, by_row, Pass::combine, uncertain);
  if (uncertain) redo_rows<S>(entry, block, by_row);
}

// ---- plans and launches --------------------------------------------------------------------------------------------

template <class S> Plan step_plan(const Problem<typename S::Formula>& problem, bool workspace) {
  StepFacts facts{};
  facts.layout = problem.layout;
  facts.inputs = S::inputs;
  facts.outputs = S::outputs;
  facts.gram = S::gram_size;
  facts.residuals = S::residuals;
  facts.coefficients = S::coefficients;
  facts.results = S::results;
  facts.pack = S::pack;
  facts.input_bytes = S::inputs * int64_t(sizeof(typename S::Sum));
  facts.workspace = workspace;
  const auto off_grid = [](const void* tensor, DType type) {
    const int64_t element = type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2;
    return static_cast<int>(reinterpret_cast<uintptr_t>(tensor) / element % S::pack);
  };
  facts.misalignment = off_grid(problem.in[0], problem.in_type[0]);
  facts.aligned = true;
  for (int k = 0; k < S::inputs; ++k)
    facts.aligned = facts.aligned && off_grid(problem.in[k], problem.in_type[k]) == facts.misalignment;
  for (int l = 0; l < S::outputs; ++l)
    facts.aligned = facts.aligned && (problem.out[l] == nullptr ||
                                      off_grid(problem.out[l], problem.out_type[l]) == facts.misalignment);
  return plan_step(facts, current_device());
}

// Weights in blocks of one shape, as many as a kernel's arguments hold.
template <class S> class Batch {
 public:
  Batch(const Plan& plan, const float* skip)
      : shape(plan.shape), split(plan.path == Path::row_split), big(is_big(plan)) {
    table.skip = skip;
    table.count = 0;
    shape.blocks = 0;
  }
  bool takes(const Plan& plan) const {
    return table.count < table.most && plan.shape.cluster == shape.cluster && is_big(plan) == big &&
           (plan.path == Path::row_split) == split;
  }
  void add(const Problem<typename S::Formula>& problem, const Plan& plan, void* workspace) {
    table.entry[table.count++] = {problem, plan, shape.blocks, workspace};
    shape.blocks += plan.shape.blocks;
    shape.shared_bytes = std::max(shape.shared_bytes, plan.shape.shared_bytes);
  }
  void run(void* stream) {
    if (!split)
      return launch_phase(shape.cluster > 1 ? "steps, clusters" : big ? "steps, big blocks" : "steps", Phase::whole,
                          stream);
    launch_phase("steps, split: sums", Phase::sums, stream);
    launch_phase("steps, split: residuals", Phase::residuals, stream);
    Batch rows = *this;
    rows.shape.blocks = 0;
    for (int i = 0; i < table.count; ++i) {
      rows.table.entry[i].begin = rows.shape.blocks;
      rows.shape.blocks += table.entry[i].problem.layout.rows;
    }
    rows.launch_phase("steps, split: coefficients", Phase::coefficients, stream);
    launch_phase("steps, split: outputs", Phase::outputs, stream);
  }

 private:
  StepTable<typename S::Formula> table;
  Shape shape;
  bool split, big;

  // Blocks that leave room for no others on their multiprocessor are not mixed with those that do.
  static bool is_big(const Plan& plan) { return plan.shape.shared_bytes > current_device().shared_bytes / step_blocks; }

  // More blocks than a grid can have take several launches.
  void launch_phase(const char* what, Phase phase, void* stream) {
    const int64_t most = current_device().blocks / shape.cluster * shape.cluster;
    table.phase = phase;
    for (table.first = 0; table.first < shape.blocks; table.first += most) {
      Shape part = shape;
      part.blocks = std::min(shape.blocks - table.first, most);
      launch(what, part, stream, step_kernel<S>, table);
    }
  }
};

// Calls body(Step of the problems' accumulator).
template <class F, class Body> void with_step(const Problem<F>& problem, Body&& body) {
  if (problem.in_type[0] == DType::f64) body(Step<F, double>{});
  else body(Step<F, float>{});
}

template <class F> int64_t workspace_bytes(const std::vector<Problem<F>>& problems) {
  int64_t bytes = 0;
  for (const Problem<F>& given : problems)
    with_step(given, [&](auto step) {
      using S = decltype(step);
      if (given.layout.rows == 0) return;
      const Problem<F> problem = simplified(given);
      const Plan plan = step_plan<S>(problem, true);
      if (plan.path == Path::row_split) bytes += StepWorkspace<S>::bytes(problem.layout, plan);
    });
  return bytes;
}

template <class F>
void run(const std::vector<Problem<F>>& problems, void* stream, void* workspace, const float* skip) {
  if (problems.empty()) return;
  with_step(problems.front(), [&](auto step) {
    using S = decltype(step);
    char* memory = static_cast<char*>(workspace);
    std::vector<std::unique_ptr<Batch<S>>> batches;
    for (const Problem<F>& given : problems) {
      if (given.layout.rows == 0) continue;
      const Problem<F> problem = simplified(given);
      const Plan plan = step_plan<S>(problem, workspace != nullptr);
      auto batch = std::find_if(batches.begin(), batches.end(), [&](const auto& b) { return b->takes(plan); });
      if (batch == batches.end()) batch = batches.insert(batch, std::make_unique<Batch<S>>(plan, skip));
      (*batch)->add(problem, plan, memory);
      if (plan.path == Path::row_split) memory += StepWorkspace<S>::bytes(problem.layout, plan);
    }
    for (const auto& batch : batches) batch->run(stream);
  });
}

}  // namespace wn::cuda
