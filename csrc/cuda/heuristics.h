// Which path a problem takes, and with how many threads: numbers as data, apart from the kernels.
// No GPU has measured these numbers yet. They follow from sizes: 16-byte loads, about 64 bytes in flight per thread,
// 32 KiB of registers per block of 512 threads, at most half a multiprocessor's shared memory so that two blocks
// overlap their loads and stores.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "device.h"
#include "kernels.h"

namespace wn::cuda {

constexpr int warp = 32;
constexpr int most_threads = 512;               // of a block
constexpr int most_warps = most_threads / warp;
constexpr int packs_in_flight(int inputs) { return inputs < 4 ? 4 / inputs : 1; }  // per input and thread
constexpr int64_t scratch_values = most_warps + 1;  // per reduced quantity: one of each warp, one of the block

// Several threads of a warp for a short row, a block or a cluster of blocks for a longer one.
enum class Path { row_registers, row_shared, row_streamed, row_split, column_shared, column_streamed, column_split };

struct Tuning {
  int capability;              // this line is for GPUs from here on
  int cluster_blocks;          // at most; 1 where there are no clusters
  int64_t cluster_block_bytes; // of a row that one block of a cluster should hold
  int64_t spread_bytes;        // rows longer than this are spread over blocks when they are few
  int split_blocks;            // per multiprocessor, when rows are split
};
constexpr Tuning tunings[] = {
    {0, 1, 0, 32 << 10, 2},
    {90, 8, 100 << 10, 32 << 10, 2},
    {120, 1, 0, 32 << 10, 2},
};
constexpr int fewest_row_threads = 8;
constexpr int short_rows_block = 128;       // threads of a block of several short rows
constexpr int64_t narrow_inner = 32;        // interior dims with fewer inner elements go by columns
constexpr int64_t column_tile_bytes[] = {128, 64, 32};  // of contiguous memory, widest first

// All that the choice depends on, free of types.
struct Facts {
  Layout layout;
  int inputs, outputs, gram, coefficients;
  int pack;             // elements of a pack
  int64_t input_bytes;  // of one element of every input
  int64_t sum_bytes;    // of an accumulator
  bool aligned;         // every pointer is off the grid of packs by the same `misalignment` elements
  int misalignment;
  bool workspace;       // there is one, so that rows can be split

  int64_t reduced() const { return std::max(gram, inputs); }
  int64_t row_scratch() const { return (scratch_values * reduced() * int64_t(sizeof(double)) + 15) / 16 * 16; }
};

// What a kernel needs to know beside the problem.
struct Plan {
  Path path;
  Shape shape;
  bool vectors;      // whole packs may be moved by one instruction
  int misalignment;
  int width;         // threads of one block that share a row
  int pieces;        // blocks that share a row, or a tile of columns
  int per_block;     // rows, or tiles of columns, that a block or a cluster works on
  int64_t first;     // row, or tile, of this launch
  bool held;         // in shared memory between the two passes
  int64_t store_at;  // where in shared memory the rows are held, after the scratch space
  // Rows: `segments` contiguous pieces, each covered by `segment_packs` packs on the aligned grid; a thread's next pack
  // is `step_segments` and `step_packs` further.
  int64_t segments, segment_packs, step_segments, step_packs;
  // Columns: a tile of `tile_rows` rows is `tile_threads` packs wide.
  int64_t tiles;
  int tile_rows, tile_threads;
};

WN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t power_of_two_from(int64_t x) {
  int64_t p = 1;
  while (p < x) p *= 2;
  return p;
}
inline const Tuning& tuning_for(const Device& device) {
  const Tuning* best = tunings;
  for (const Tuning& t : tunings)
    if (t.capability <= device.capability) best = &t;
  return *best;
}

// The threads of a row stride over its packs together.
inline void set_stride(Plan& plan) {
  const int64_t step = int64_t(plan.width) * plan.pieces;
  const bool one_segment = plan.segments <= 1;
  plan.step_segments = one_segment ? 0 : step / plan.segment_packs;
  plan.step_packs = one_segment ? step : step % plan.segment_packs;
}

// How rows lie on the grid of packs.
inline Plan on_packs(const Facts& facts) {
  const Layout& layout = facts.layout;
  Plan plan{};
  plan.vectors = facts.aligned;
  plan.misalignment = facts.misalignment;
  // A segment may begin anywhere on the grid of packs, unless all of them begin on it.
  const bool on_grid = !facts.aligned || (facts.misalignment == 0 && layout.inner % facts.pack == 0);
  plan.segment_packs = ceil_div(layout.inner + (on_grid ? 0 : facts.pack - 1), facts.pack);
  plan.segments = layout.outer;
  if (layout.row_length() == 0) plan.segments = 1, plan.segment_packs = 0;
  return plan;
}

inline Plan plan_rows(const Facts& facts, const Device& device) {
  const Tuning& tuning = tuning_for(device);
  const Layout& layout = facts.layout;
  Plan plan = on_packs(facts);
  plan.store_at = facts.row_scratch();

  const int64_t packs = plan.segments * plan.segment_packs, rows = layout.rows;
  const int64_t pack_bytes = facts.pack * facts.input_bytes, row_bytes = packs * pack_bytes;
  const int slots = packs_in_flight(facts.inputs);
  const auto held_bytes = [&](int64_t blocks) {
    return facts.row_scratch() + ceil_div(packs, blocks * most_threads) * most_threads * pack_bytes;
  };
  const auto finish = [&](Path path, int64_t width, int64_t pieces, int64_t shared_bytes) {
    plan.path = path;
    plan.width = static_cast<int>(width);
    plan.pieces = static_cast<int>(pieces);
    const bool cluster = path == Path::row_shared && pieces > 1;
    const int64_t threads = width > warp ? width : short_rows_block;
    plan.per_block = static_cast<int>(threads / width);
    plan.held = path == Path::row_shared;
    plan.shape = {ceil_div(rows, plan.per_block) * pieces, static_cast<int>(threads), cluster ? plan.pieces : 1,
                  shared_bytes};
    set_stride(plan);
    return plan;
  };
  const auto width_for = [&](int64_t packs_per_thread) {
    return std::clamp<int64_t>(power_of_two_from(ceil_div(packs, packs_per_thread)), fewest_row_threads, most_threads);
  };

  const bool spread = rows < device.multiprocessors && row_bytes > tuning.spread_bytes;
  const int64_t pieces = std::min(ceil_div(int64_t(tuning.split_blocks) * device.multiprocessors, rows),
                                  packs / (most_threads / 2 * slots));
  const bool can_split = facts.workspace && pieces > 1;
  if (facts.outputs == 0) {
    if (spread && can_split) return finish(Path::row_split, most_threads / 2, pieces, facts.row_scratch());
    return finish(Path::row_streamed, width_for(2 * slots), 1, facts.row_scratch());
  }

  int64_t cluster = 1;
  while (cluster < tuning.cluster_blocks && held_bytes(cluster) > tuning.cluster_block_bytes) cluster *= 2;
  while (spread && 2 * cluster <= tuning.cluster_blocks && cluster * rows < device.multiprocessors) cluster *= 2;
  const bool cluster_fits = cluster > 1 && held_bytes(cluster) <= device.shared_bytes;
  if (spread && cluster_fits && (2 * cluster * rows >= device.multiprocessors || !can_split))
    return finish(Path::row_shared, most_threads, cluster, held_bytes(cluster));
  if (spread && can_split) return finish(Path::row_split, most_threads / 2, pieces, facts.row_scratch());
  if (packs <= int64_t(slots) * most_threads)
    return finish(Path::row_registers, width_for(slots), 1, facts.row_scratch());
  if (cluster_fits) return finish(Path::row_shared, most_threads, cluster, held_bytes(cluster));
  if (held_bytes(1) <= device.shared_bytes) return finish(Path::row_shared, most_threads, 1, held_bytes(1));
  return finish(Path::row_streamed, most_threads, 1, facts.row_scratch());
}

// Shared memory of a column kernel, in bytes from its start.
struct ColumnScratch {
  int64_t sums, nonzero, redo, coefficients;
  WN_INLINE ColumnScratch(int warps, int tile, int rows, int gram, int inputs, int64_t sum_bytes) {
    const int64_t team = scratch_values * (gram > inputs ? gram : inputs) * int64_t(sizeof(double));
    const int64_t partial = warps * tile * sum_bytes;
    sums = ((team > partial ? team : partial) + 15) / 16 * 16;
    nonzero = sums + rows * gram * sum_bytes;
    redo = nonzero + rows * inputs * int64_t(sizeof(uint32_t));
    coefficients = (redo + rows + 15) / 16 * 16;
  }
  int64_t end(int rows, int count, int64_t sum_bytes) const {
    return (coefficients + rows * count * sum_bytes + 15) / 16 * 16;
  }
};

inline Plan plan_columns(const Facts& facts, const Device& device) {
  const Tuning& tuning = tuning_for(device);
  const Layout& layout = facts.layout;
  const int slots = packs_in_flight(facts.inputs);
  Plan plan{};
  plan.vectors = facts.aligned && facts.misalignment == 0 && layout.rows * layout.inner % facts.pack == 0;

  // A tile holds whole rows, and begins on the grid of packs.
  const int rows_step = plan.vectors ? facts.pack / std::gcd<int>(layout.inner, facts.pack) : 1;
  const auto set_tile = [&](int64_t bytes) {
    const int64_t needed = ceil_div(rows_step * layout.inner, facts.pack);
    const int64_t wanted = bytes * facts.inputs / (facts.input_bytes * facts.pack);
    plan.tile_threads = static_cast<int>(std::clamp<int64_t>(power_of_two_from(std::max(wanted, needed)), 1, warp));
    const int fits = static_cast<int>(int64_t(plan.tile_threads) * facts.pack / layout.inner);
    plan.tile_rows = fits / rows_step * rows_step;
    plan.tiles = ceil_div(layout.rows, plan.tile_rows);
    plan.width = static_cast<int>(std::clamp<int64_t>(
        power_of_two_from(plan.tile_threads * ceil_div(layout.outer, slots)), warp, most_threads));
    plan.store_at = ColumnScratch(plan.width / warp, plan.tile_threads * facts.pack, plan.tile_rows, facts.gram,
                                  facts.inputs, facts.sum_bytes)
                        .end(plan.tile_rows, facts.coefficients, facts.sum_bytes);
  };
  const auto held_bytes = [&] {
    const int64_t slots = ceil_div(layout.outer, plan.width / plan.tile_threads);
    return plan.store_at + slots * plan.width * facts.pack * facts.input_bytes;
  };
  const auto finish = [&](Path path, int64_t pieces, int64_t shared_bytes) {
    plan.path = path;
    plan.pieces = static_cast<int>(pieces);
    plan.per_block = 1;
    plan.held = path == Path::column_shared;
    plan.shape = {plan.tiles * pieces, plan.width, 1, shared_bytes};
    return plan;
  };

  set_tile(*std::rbegin(column_tile_bytes));
  const bool few = 2 * plan.tiles < device.multiprocessors;  // even as narrow tiles
  const bool fits = facts.outputs > 0 && held_bytes() <= device.shared_bytes;

  set_tile(*std::begin(column_tile_bytes));
  const int64_t pieces = std::min(ceil_div(int64_t(tuning.split_blocks) * device.multiprocessors, plan.tiles),
                                  layout.outer / (int64_t(plan.width) / plan.tile_threads * slots));
  const bool split = facts.workspace && pieces > 1 && (fits ? few : plan.tiles < device.multiprocessors);
  if (split) return finish(Path::column_split, pieces, plan.store_at);
  if (!fits) return finish(Path::column_streamed, 1, plan.store_at);
  for (const int64_t bytes : column_tile_bytes) {
    set_tile(bytes);
    if (held_bytes() <= device.shared_bytes && plan.tiles >= device.multiprocessors) break;
  }
  return finish(Path::column_shared, 1, held_bytes());
}

inline Plan choose(const Facts& facts, const Device& device) {
  const bool by_columns = facts.layout.outer > 1 && facts.layout.inner > 0 && facts.layout.inner < narrow_inner;
  return by_columns ? plan_columns(facts, device) : plan_rows(facts, device);
}

}  // namespace wn::cuda
