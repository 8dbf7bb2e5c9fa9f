// Every formula of weight normalization, once, for all backends.
//
// A weight has rows u with direction parameter v, norm n = |v|, direction t = v/n, and a radius parameter r:
// SWN r = g, w = g t; EWN r = alpha, w = e^alpha t. s is the signed radius: g, or e^alpha.
// For the gradient G = dL/dw: p = <G, t> is its radial part, G - p t its tangential part.
//
// A formula is what an engine needs to know of one kernel. Per row:
//   1. the engine reads the `inputs` input rows x_0.. and reduces the Gram matrix of the first `gram_inputs` of them,
//      packed as gram[j (j + 1) / 2 + i] = <x_i, x_j>, i <= j;
//   2. `solve` turns the Gram matrix and the row's parameters into `coefficients` numbers c for the elements and
//      `results` numbers for the row; `exact` tells whether these c lost nothing to over- or underflow;
//   3. `combine` turns the elements x into the elements y of the `outputs` output rows;
//   4. `finish` stores the row's results, once per row.
// A formula with `residuals` asks for a second reduction over the row, before `solve`: `prepare` turns the Gram matrix
// into `coefficients` numbers and says whether the sums are needed, `residual` are the terms of the sums, and `solve`
// gets the sums, or null where `prepare` could do without, and finds in c what `prepare` left there.
// For rows side by side, `for_arrays` visits the arrays that `solve` reads of a row, `arrays` of them; `one_by_one` tells
// whether it calls a function, which keeps a loop over rows from being vectorized, and `simplify` lets the compiler know
// that it does not, and whether rows are EWN.
// A row whose Gram matrix or coefficients leave the range of the accumulator A is solved again in double with
// x_i scaled by 2^-e_i to a largest magnitude in [1, 2); elsewhere all e_i are 0. So `solve` never under- or overflows
// before its result does.
#pragma once

#include "numeric.h"

namespace wn {

enum class Kind : int { swn, ewn, unit };  // unit: the radius is fixed; of steps only

WN_INLINE float square_root(float x) { return ::sqrtf(x); }
WN_INLINE double square_root(double x) { return ::sqrt(x); }
WN_INLINE float shifted(float x, int e) { return e == 0 ? x : ::ldexpf(x, e); }
WN_INLINE double shifted(double x, int e) { return e == 0 ? x : ::ldexp(x, e); }

#if defined(__CUDA_ARCH__)
WN_INLINE float exponential(float x) { return ::expf(x); }
#else
WN_INLINE float exponential(float x) { return static_cast<float>(exponential(static_cast<double>(x))); }
#endif

// s, the signed length of the row of w. In float it may overflow, which `exact` sees; in double it saturates.
WN_INLINE float signed_radius(Kind kind, float r) { return kind == Kind::ewn ? exponential(r) : r; }
WN_INLINE double signed_radius(Kind kind, double r) { return kind == Kind::ewn ? finite(exponential(r)) : r; }

// The length of a row from its square. A zero row has no direction: its length is taken as 1, and what is divided by it
// as 0, by `of`. Without branches, which would keep loops over rows from being vectorized.
template <class A> struct Direction {
  A length;
  bool exists;
  explicit WN_INLINE Direction(A square) : length(square_root(square)), exists(length != A(0)) {
    length += zero_unless(!exists, A(1));
  }
  WN_INLINE A of(A x) const { return zero_unless(exists, x); }
};

// n = |x_0|
struct RowNorm {
  static constexpr int inputs = 1, gram_inputs = 1, outputs = 0, coefficients = 0, residuals = 0, results = 1;
  static constexpr int arrays = 0;
  RowResults norm;

  template <class F> WN_INLINE void for_arrays(F&&) {}
  WN_INLINE bool one_by_one() const { return false; }
  WN_INLINE bool is_ewn() const { return false; }
  WN_INLINE void simplify(bool) {}

  template <class A> WN_INLINE void solve(int64_t, const A* gram, const int* e, A*, A* result) const {
    result[0] = shifted(square_root(gram[0]), e[0]);
  }
  template <class A> WN_INLINE bool exact(const A*) const { return true; }
  template <class A> static WN_INLINE void combine(const A*, const A*, A*) {}
  WN_INLINE const RowResults& stored() const { return norm; }
  template <class A> WN_INLINE void finish(int64_t row, const A* result) const { stored().set(row, result[0]); }
};

// What a formula with a kind and a radius knows of a row.
struct Radius {
  static constexpr int arrays = 1;
  Kind kind;
  RowValues radius;

  template <class F> WN_INLINE void for_arrays(F&& f) { f(radius); }
  WN_INLINE bool one_by_one() const { return false; }
  WN_INLINE bool is_ewn() const { return kind == Kind::ewn; }
  WN_INLINE void simplify(bool ewn) { kind = ewn ? Kind::ewn : Kind::swn; }
};

// w = (s/n) v. A zero row has no direction: w = 0.
struct Forward : Radius {
  static constexpr int inputs = 1, gram_inputs = 1, outputs = 1, coefficients = 1, residuals = 0, results = 0;

  template <class A> WN_INLINE void solve(int64_t row, const A* gram, const int*, A* c, A*) const {
    const Direction<A> v(gram[0]);
    c[0] = v.of(signed_radius(kind, radius.at<A>(row))) / v.length;
  }
  template <class A> WN_INLINE bool exact(const A* c) const { return full_precision(c[0]); }
  template <class A> static WN_INLINE void combine(const A* c, const A* x, A* y) { y[0] = c[0] * x[0]; }
  template <class A> WN_INLINE void finish(int64_t, const A*) const {}
};

// s/n alone, for a layer that scales its output instead of its weight.
struct RowScale : Forward {
  static constexpr int outputs = 0, results = 1;
  RowResults scale;

  template <class A> WN_INLINE void solve(int64_t row, const A* gram, const int* e, A* c, A* result) const {
    Forward::solve(row, gram, e, c, result);
    result[0] = shifted(c[0], -e[0]);
  }
  template <class A> static WN_INLINE void combine(const A*, const A*, A*) {}
  WN_INLINE const RowResults& stored() const { return scale; }
  template <class A> WN_INLINE void finish(int64_t row, const A* result) const { stored().set(row, result[0]); }
};

// From v and G: dL/dv = (s/n)(G - p t), and dL/dr = p (SWN) or s p (EWN). A zero row has zero gradients. Without an output
// dL/dr alone, for a v that needs no gradient.
struct Backward : Radius {
  static constexpr int inputs = 2, gram_inputs = 2, outputs = 1, coefficients = 2, residuals = 0, results = 1;
  RowResults radius_gradient;

  template <class A> WN_INLINE void solve(int64_t row, const A* gram, const int* e, A* c, A* result) const {
    const Direction<A> v(gram[0]);
    const A s = v.of(signed_radius(kind, radius.at<A>(row))), p = v.of(gram[1]) / v.length;
    c[0] = shifted(s / v.length, e[1] - e[0]);
    c[1] = p / v.length;
    result[0] = shifted(kind == Kind::ewn ? s * p : p, e[1]);
  }
  template <class A> WN_INLINE bool exact(const A* c) const { return full_precision(c[0]); }
  template <class A> static WN_INLINE void combine(const A* c, const A* x, A* y) { y[0] = c[0] * (x[1] - c[1] * x[0]); }
  WN_INLINE const RowResults& stored() const { return radius_gradient; }
  template <class A> WN_INLINE void finish(int64_t row, const A* result) const { stored().set(row, result[0]); }
};

}  // namespace wn
