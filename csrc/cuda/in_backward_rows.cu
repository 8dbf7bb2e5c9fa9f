#include "in_backward_rows.h"

#include "engine.cuh"

namespace wn::cuda {
namespace {

// A block has `warp` neighbouring rows, one for each thread of a warp, and its warps share the batch. Large batches are
// split over blocks too, in pieces of at least `least_piece`, until a multiprocessor has `wanted_blocks` of them.
constexpr int threads = 512, lanes = threads / warp;
constexpr int64_t least_piece = 512, wanted_blocks = 4;

enum Sum { of_bias, inner, square, sums };  // of dy, dy z and dy (x x^T dy) over the batch
enum class Phase { whole, sums, rows, outputs };

int64_t tiles(int64_t rows) { return ceil_div(rows, warp); }
int64_t pieces_of(int64_t batch, int64_t rows) {
  if (rows == 0) return 1;
  const int64_t wanted = ceil_div(wanted_blocks * current_device().multiprocessors, tiles(rows));
  return std::max<int64_t>(1, std::min(wanted, batch / least_piece));
}

struct Scratch {
  RowStep* step;   // [rows]
  double* length;  // [rows]
  double* sum;     // [pieces, sums, rows], only where there are several pieces
  explicit WN_INLINE Scratch(const RowsInBackward& job)
      : step(static_cast<RowStep*>(job.scratch)), length(reinterpret_cast<double*>(step + job.rows)),
        sum(length + job.rows) {}
};

// The rows of a block.
struct BlockOf {
  int64_t first;
  int count;
  WN_DEVICE BlockOf(int64_t tile, int64_t rows)
      : first(tile * warp), count(rows - first < warp ? static_cast<int>(rows - first) : warp) {}
};

template <class T>
WN_DEVICE void add_elements(const RowsInBackward& job, int64_t row, int64_t begin, int64_t end, double (&sum)[sums]) {
  const T *dy = static_cast<const T*>(job.dy), *z = static_cast<const T*>(job.z);
  const T* of_weight = static_cast<const T*>(job.of_weight);
  const bool polar = job.state.rho != nullptr;
#pragma unroll 4
  for (int64_t b = begin; b < end; b += lanes) {
    const int64_t at = b * job.rows + row;
    const double g = dy[at];
    sum[of_bias] += g;
    if (polar) sum[inner] += g * z[at];
    if (job.known) sum[square] += g * of_weight[at];
  }
}

template <class T> WN_DEVICE void step_row(const RowsInBackward& job, int64_t row, const double (&sum)[sums]) {
  if (job.bias != nullptr) {
    T& bias = static_cast<T*>(job.bias)[row];
    bias -= static_cast<T>(job.bias_lr * (job.sign * sum[of_bias] + job.bias_weight_decay * bias));
  }
  if (job.state.rho == nullptr) return;
  const RowStep step =
      RowStep::of(job.state, job.state.at(row), job.sign * sum[inner], job.known ? sum[square] : double(INFINITY));
  job.state.radius[row] = step.radius;
  Scratch(job).step[row] = step;
}

template <class T>
WN_DEVICE void write_elements(const RowsInBackward& job, int64_t row, int64_t begin, int64_t end) {
  const T* __restrict__ dy = static_cast<const T*>(job.dy);
  T* __restrict__ of_x = static_cast<T*>(job.of_x);
  T* __restrict__ of_weight = static_cast<T*>(job.of_weight);
  const T scale = static_cast<const T*>(job.scale)[row];
  const T factor = static_cast<T>(job.sign * Scratch(job).step[row].factor);
#pragma unroll 4
  for (int64_t b = begin; b < end; b += lanes) {
    const int64_t at = b * job.rows + row;
    const T g = dy[at];
    if (of_x != nullptr) of_x[at] = g * scale;
    of_weight[at] = g * factor;
  }
}

// In one launch where the batch is whole; otherwise the sums of the pieces, the rows, and the outputs are one each.
template <class T>
WN_KERNEL(threads, 1)
prepare_kernel(WN_PARAMETER RowsInBackward job, int64_t pieces, Phase phase) {
  const bool by_piece = phase == Phase::sums || phase == Phase::outputs;
  const BlockOf block(by_piece ? bid() / pieces : bid(), job.rows);
  const int64_t piece = by_piece ? bid() % pieces : 0, size = by_piece ? ceil_div(job.batch, pieces) : job.batch;
  const int64_t begin = piece * size + tid() / warp, end = job.batch - piece * size < size ? job.batch : (piece + 1) * size;
  const int64_t row = block.first + tid() % warp;
  const bool own = tid() % warp < block.count;
  if (phase != Phase::outputs) {
    const Scratch scratch(job);
    double sum[sums] = {};
    if (own && phase != Phase::rows) add_elements<T>(job, row, begin, end, sum);
    if (own && phase == Phase::rows)
      for (int64_t p = tid() / warp; p < pieces; p += lanes)
        for (int i = 0; i < sums; ++i) sum[i] += scratch.sum[(p * sums + i) * job.rows + row];
    double* partial = shared<double>();
    for (int i = 0; i < sums; ++i) partial[i * threads + tid()] = sum[i];
    block_sync();
    if (own && tid() < warp) {
      for (int i = 0; i < sums; ++i)
        for (int lane = 1; lane < lanes; ++lane) sum[i] += partial[i * threads + lane * warp + tid()];
      if (phase == Phase::sums)
        for (int i = 0; i < sums; ++i) scratch.sum[(piece * sums + i) * job.rows + row] = sum[i];
      else
        step_row<T>(job, row, sum);
    }
    block_sync();
  }
  const bool writes = phase == Phase::whole || phase == Phase::outputs;
  if (writes && own && job.state.rho != nullptr) write_elements<T>(job, row, begin, end);
}

template <class T> WN_KERNEL(threads, 1) fold_kernel(WN_PARAMETER RowsInBackward job) {
  const BlockOf block(bid(), job.rows);
  const RowStep* step = Scratch(job).step + block.first;
  if (!block_any(tid() < block.count && step[tid()].fold != 1)) return;
  for (int r = 0; r < block.count; ++r) {
    const T factor = static_cast<T>(step[r].fold);
    T* u = static_cast<T*>(job.weight) + (block.first + r) * job.width;
    if (factor != 1)
      for (int64_t j = tid(); j < job.width; j += block_threads()) u[j] *= factor;
  }
}

// Rows whose n' left the range are measured here, if nobody has.
template <class T>
WN_KERNEL(threads, 1)
finish_kernel(WN_PARAMETER RowsInBackward job, WN_PARAMETER Problem<RowNorm> norm, WN_PARAMETER Plan plan, bool measured) {
  const BlockOf block(bid(), job.rows);
  const Scratch scratch(job);
  const int64_t row = block.first + tid();
  const bool own = tid() < block.count, unknown = own && !scratch.step[row].norm_known();
  if (!measured && block_any(unknown)) {
    for (int64_t r = block.first; r < block.first + block.count; ++r)
      if (!scratch.step[r].norm_known()) redo_row(norm, plan, r);
    block_sync();
  }
  if (own)
    static_cast<T*>(job.scale)[row] =
        static_cast<T>(scratch.step[row].finish(job.state, row, measured || unknown ? scratch.length[row] : -1));
}

template <class Body> void dispatch_type(DType type, Body&& body) {
  if (type == DType::f32) body(type_tag<float>{});
  else body(type_tag<double>{});
}

}  // namespace

int64_t scratch_bytes(int64_t batch, int64_t rows) {
  const int64_t pieces = pieces_of(batch, rows), doubles = 1 + (pieces > 1 ? sums * pieces : 0);
  return rows * int64_t(sizeof(RowStep) + doubles * sizeof(double));
}

double* lengths(const RowsInBackward& rows) { return Scratch(rows).length; }

void prepare(const RowsInBackward& rows, void* stream) {
  if (rows.rows == 0) return;
  const int64_t pieces = pieces_of(rows.batch, rows.rows), reduction = threads * sums * sizeof(double);
  const Shape by_tile{tiles(rows.rows), threads, 1, reduction}, by_piece{tiles(rows.rows) * pieces, threads, 1, reduction};
  dispatch_type(rows.type, [&](auto tag) {
    const auto kernel = prepare_kernel<typename decltype(tag)::type>;
    if (pieces == 1) return launch("in backward: rows", by_tile, stream, kernel, rows, pieces, Phase::whole);
    launch("in backward, split: sums", by_piece, stream, kernel, rows, pieces, Phase::sums);
    launch("in backward, split: rows", by_tile, stream, kernel, rows, pieces, Phase::rows);
    if (rows.state.rho != nullptr)
      launch("in backward, split: outputs", by_piece, stream, kernel, rows, pieces, Phase::outputs);
  });
}

void fold(const RowsInBackward& rows, void* stream) {
  if (rows.rows == 0) return;
  dispatch_type(rows.type, [&](auto tag) {
    launch("in backward: fold", {tiles(rows.rows), threads, 1, 0}, stream, fold_kernel<typename decltype(tag)::type>, rows);
  });
}

void finish(const RowsInBackward& rows, bool measured, void* stream) {
  if (rows.rows == 0) return;
  const Problem<RowNorm> norm{{{lengths(rows), DType::f64}}, {1, rows.rows, rows.width}, {rows.weight}, {rows.type}, {}, {}};
  Plan plan{};
  plan.width = threads;
  plan.shape = {tiles(rows.rows), threads, 1, scratch_values * int64_t(sizeof(double))};
  dispatch_type(rows.type, [&](auto tag) {
    launch("in backward: finish", plan.shape, stream, finish_kernel<typename decltype(tag)::type>, rows, norm, plan, measured);
  });
}

}  // namespace wn::cuda
