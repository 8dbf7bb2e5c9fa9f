// How a polar step goes over a weight.
#pragma once

#include "heuristics.h"

namespace wn::cuda {

constexpr int step_threads = 256;  // of a block
constexpr int step_blocks = 2;     // per multiprocessor, that registers leave room for
constexpr int step_packs = 4;      // loads that a thread of a short row makes one after the other: while one thread
                                   // of each row turns sums into coefficients, many rows should be at it together
constexpr int step_tiles[] = {32, 16, 8};  // columns side by side, widest first

struct StepFacts : Facts {
  int residuals, results;
};

// Shared memory of a block of `rows` rows, in bytes from its start. A tile of columns is `tile` wide, rows have none.
struct StepScratch {
  int64_t gram, residual, coefficient, result, nonzero, redo, end;
  WN_INLINE StepScratch(int warps, int tile, int rows, int gram_size, int residuals, int coefficients, int results,
                        int inputs) {
    int most = gram_size > residuals ? gram_size : residuals;
    if (inputs > most) most = inputs;
    const int64_t team = scratch_values * most, tiles = int64_t(most) * warps * tile, number = sizeof(double);
    gram = (team > tiles ? team : tiles) * number;
    residual = gram + rows * gram_size * number;
    coefficient = residual + rows * residuals * number;
    result = coefficient + rows * coefficients * number;
    nonzero = result + rows * results * number;
    redo = nonzero + rows * inputs * int64_t(sizeof(uint32_t));
    end = (redo + rows + 15) / 16 * 16;
  }
};

// The rest of a plan, and whether as many blocks of it fit into the shared memory as into the registers.
inline bool finish_step(Plan& plan, const StepFacts& facts, const Device& device, Path path, int pieces) {
  plan.path = path;
  plan.pieces = pieces;
  plan.held = path == Path::row_shared || path == Path::column_shared;
  plan.store_at = StepScratch(step_threads / warp, plan.tile_threads, plan.per_block, facts.gram, facts.residuals,
                              facts.coefficients, facts.results, facts.inputs).end;
  const int lines = plan.tile_threads > 0 ? step_threads / plan.tile_threads : plan.width;  // threads of a row
  const int64_t packs = plan.segments * plan.segment_packs;
  const int64_t slots = ceil_div(packs, int64_t(pieces) * lines);  // packs of a thread
  const int64_t held = plan.held ? slots * step_threads * facts.pack * facts.input_bytes : 0;
  plan.shape = {ceil_div(facts.layout.rows, plan.per_block) * pieces, step_threads, plan.held ? pieces : 1,
                plan.store_at + held};
  const int64_t step = int64_t(lines) * pieces;
  plan.step_segments = plan.segments > 1 ? step / plan.segment_packs : 0;
  plan.step_packs = plan.segments > 1 ? step % plan.segment_packs : step;
  return plan.shape.shared_bytes <= device.shared_bytes / step_blocks;
}

// Rows stay in shared memory between the passes, in that of a cluster if need be, and are read again if nothing else is
// left. Few long rows are split over the whole GPU, in four launches. No path holds rows in registers: shared memory
// moves eight times what DRAM does, of which these formulas need less than half, and one path is one launch.
inline Plan plan_step_rows(const StepFacts& facts, const Device& device) {
  const Tuning& tuning = tuning_for(device);
  Plan plan = on_packs(facts);
  const int64_t packs = plan.segments * plan.segment_packs, rows = facts.layout.rows;
  const int64_t row_bytes = packs * facts.pack * facts.input_bytes;
  const int slots = packs_in_flight(facts.inputs);
  const auto finish = [&](Path path, int64_t width, int64_t pieces) {
    plan.width = static_cast<int>(width);
    plan.per_block = step_threads / plan.width;
    return finish_step(plan, facts, device, path, static_cast<int>(pieces));
  };
  const auto bytes = [&](int64_t blocks) {
    finish(Path::row_shared, step_threads, blocks);
    return plan.shape.shared_bytes;
  };

  const bool spread = rows < device.multiprocessors && row_bytes > tuning.spread_bytes;
  const int64_t wanted = power_of_two_from(ceil_div(packs, step_packs * slots));
  int64_t width = std::clamp<int64_t>(wanted, fewest_row_threads, step_threads);
  for (; !spread && width <= step_threads; width *= 2)
    if (finish(Path::row_shared, width, 1)) return plan;

  int64_t cluster = 1;
  while (cluster < tuning.cluster_blocks && bytes(cluster) > tuning.cluster_block_bytes) cluster *= 2;
  while (spread && 2 * cluster <= tuning.cluster_blocks && cluster * rows < device.multiprocessors) cluster *= 2;
  const bool cluster_fits = cluster > 1 && bytes(cluster) <= device.shared_bytes;
  const int64_t pieces = std::min(ceil_div(int64_t(tuning.split_blocks) * device.multiprocessors, rows),
                                  packs / (step_threads * slots));
  const bool split = spread && facts.workspace && pieces > 1;
  if (split && !(cluster_fits && 2 * cluster * rows >= device.multiprocessors)) {
    finish(Path::row_split, step_threads, pieces);
  } else if (cluster_fits || bytes(1) <= device.shared_bytes) {
    finish(Path::row_shared, step_threads, cluster_fits ? cluster : 1);
  } else {
    finish(Path::row_streamed, step_threads, 1);
  }
  return plan;
}

// Neighbouring threads have neighbouring columns, and a thread's packs go down the outer dimension.
inline Plan plan_step_columns(const StepFacts& facts, const Device& device) {
  const Layout& layout = facts.layout;
  Plan plan{};
  plan.width = step_threads;
  plan.segments = 1;
  plan.segment_packs = ceil_div(layout.outer, facts.pack);
  for (const int tile : step_tiles) {
    const int threads = std::max<int>(tile, static_cast<int>(power_of_two_from(layout.inner)));
    plan.tile_threads = threads;
    plan.per_block = threads / static_cast<int>(layout.inner);
    plan.tiles = ceil_div(layout.rows, plan.per_block);
    const bool small = finish_step(plan, facts, device, Path::column_shared, 1);
    if (small && plan.tiles >= device.multiprocessors) break;
  }
  if (plan.shape.shared_bytes > device.shared_bytes)
    finish_step(plan, facts, device, Path::column_streamed, 1);
  return plan;
}

// Columns that are long and too few for the GPU are split as rows are.
inline Plan plan_step(const StepFacts& facts, const Device& device) {
  const bool columns = facts.layout.outer > 1 && facts.layout.inner > 0 && facts.layout.inner < narrow_inner;
  if (!columns) return plan_step_rows(facts, device);
  const Plan plan = plan_step_columns(facts, device);
  if (2 * plan.tiles >= device.multiprocessors) return plan;
  const Plan rows = plan_step_rows(facts, device);
  return rows.path == Path::row_split ? rows : plan;
}

}  // namespace wn::cuda
