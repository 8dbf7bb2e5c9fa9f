// The CUDA engine: Gram matrix, coefficients, combination (polar.h), for every layout.
//
// The algorithm of a row (rows.cuh) or of a tile of columns (columns.cuh) is a device function of a problem, a plan and a
// row; it does not care where the problem came from. It is put together from
//   a walk    which packs of elements belong to this thread: RowWalk, ColumnWalk (packs.cuh);
//   a store   where they stay until the combination: Registers, or Memory (shared, or read again: from L2 if it fits);
//   a team    the threads that reduce together (team.cuh).
// Reductions are fixed trees without atomics, so results do not depend on timing. Here is the host's part: facts, plan,
// launches.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "columns.cuh"
#include "rows.cuh"

namespace wn::cuda {

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
