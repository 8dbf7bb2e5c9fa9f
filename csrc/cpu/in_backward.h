// The products of a linear layer that steps inside its backward, for batches that leave a library's waiting for memory.
#pragma once

#include <cstdint>

namespace wn::cpu {

// Whether these are quicker than the library's.
bool small_products(int64_t batch);

// z = x u^T and y = z scale + bias. x (batch, width), u (rows, width), y and z (batch, rows); z, scale and bias may be null.
template <class T> struct LinearForward {
  const T *x, *u, *scale, *bias;
  T *z, *y;
  int64_t batch, rows, width;

  void run() const;
};

// dx = a u, and updated = diag(kept) u + e^T x, where u is read once for both; squares = the squared lengths of the rows of
// updated, out of the range of T where they are out of its. x, dx (batch, width); u, updated, which may be u, (rows, width);
// a^T, e^T (rows, batch); kept, squares (rows,). dx, with a, and squares may be null.
//
// With a formula of step.h, updated and the buffers (rows, width) are its combination of u, e^T x and the buffers, by
// coefficients (rows, its number of them), in place of kept.
template <class T, class Formula = void> struct LinearStep {
  const T *x, *a, *e, *kept, *u;
  T *updated, *dx;
  double* squares;
  int64_t batch, rows, width;
  T *const* buffers = nullptr;
  const T* coefficients = nullptr;

  void run() const;
};

// What a step multiplies by: a^T = diag(of_a) dy^T and e^T = diag(of_e) dy^T for rows first..last - 1; of_a and of_e begin
// with the row `first`. dy (batch, rows); a^T, e^T (rows, batch). a may be null.
template <class T> struct LinearFactors {
  const T *dy, *of_a, *of_e;
  T *a, *e;
  int64_t batch, rows;

  void run(int64_t first, int64_t last) const;
};

// The lower triangle of x x^T, doubled off the diagonal: <y, x x^T y> is <y, gram y>. What gram has above the diagonal is
// zeros, or not written where LinearSums does not read it. x (batch, width), gram (batch, batch).
template <class T> struct LinearGram {
  const T* x;
  T* gram;
  int64_t batch, width;

  void run() const;
};

// The sums over the batch of dy, dy z and dy (gram dy) for rows first..last - 1, into arrays that begin with the row
// `first`. dy, z (batch, rows), gram (batch, batch) as above; z and gram may be null, and their sums are zero then.
template <class T> struct LinearSums {
  const T *dy, *z, *gram;
  int64_t batch, rows;
  double *of_dy, *of_dy_z, *of_form;

  void run(int64_t first, int64_t last) const;
};

}  // namespace wn::cpu
