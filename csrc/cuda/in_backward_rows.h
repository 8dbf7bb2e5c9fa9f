// The row work of a step inside the backward (csrc/in_backward.h) on a GPU, between the products of torch. The host waits
// for nothing: what only the device knows, which rows are to be folded or measured, is decided there.
#pragma once

#include "in_backward.h"

namespace wn::cuda {

// Arrays of (batch, rows), row-major, of (rows, width), and of rows. Without state.rho the layer is plain: there is
// nothing but the bias to step.
struct RowsInBackward {
  RowState state;
  DType type;  // of all arrays: float32 or float64
  int64_t batch, rows, width;
  const void *dy, *z;
  void* of_x;       // becomes dy scale, what is multiplied by u for dx; null if not needed
  void* of_weight;  // x x^T dy where known, and becomes e, what is multiplied by x for u'
  void *weight, *scale, *bias;
  double bias_lr, bias_weight_decay, sign;
  bool known;  // |G|^2
  void* scratch;
};

// On the current device, of memory that belongs to the step until the stream has passed `finish`.
int64_t scratch_bytes(int64_t batch, int64_t rows);

// In this order: the rows' steps, dy scale and e, before the product for dx; rows of u that leave the range are multiplied
// by their factor, after it and before u += e^T x; the rows' new state and scale. In between the caller may write the
// lengths of all rows of u' into `lengths` and say so by `measured`.
void prepare(const RowsInBackward& rows, void* stream);
void fold(const RowsInBackward& rows, void* stream);
double* lengths(const RowsInBackward& rows);
void finish(const RowsInBackward& rows, bool measured, void* stream);

}  // namespace wn::cuda
