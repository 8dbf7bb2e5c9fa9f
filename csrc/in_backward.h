// A linear layer that takes its SGD step inside the backward, without a gradient of its weight.
//
// The weight's buffer holds rows u that are v up to a scale, v = rho u, so that w = s v/n = (s rho/n) u = scale u. With
// G = dy^T x, p = <G, v>/n and k = s/n the step of SGD on v, v' = (1 - lr decay) v - lr k (G - p v/n), is
//   rho' = c rho, c = 1 - lr decay + lr k p/n;   u' = u - (lr k/rho') G,
// one in-place product u += e^T x with e = -(lr k/rho') dy. Nothing else of the weight's size is read or written:
//   z = x u^T, which the forward makes anyway, gives <G, u> = sum_b dy z;
//   |G|^2 = sum_b dy (x x^T dy) gives n'^2 = ((1 - lr decay) n)^2 + (lr k)^2 (|G|^2 - p^2).
// A row whose |rho'| leaves [1/2, 2] is multiplied by it first, and has rho' = 1 then; c may be anything, 0 too.
#pragma once

#include "polar.h"

namespace wn {

// What the step keeps of the rows; null pointers where the layer is plain.
struct RowState {
  double *rho, *radius, *norm, *telemetry;
  Kind kind;
  bool keep_norm, one_column;
  double lr, radius_lr, weight_decay, radius_weight_decay;
};

// A row between the product that needs its old state and the norm that completes its new one.
struct RowStep {
  double s, n;      // s', and n' by |G|^2, or infinite where that left the range
  double along;     // of v' along v
  double fold;      // u is multiplied by it first
  double rho;       // rho'
  double factor;    // of dy in e

  WN_INLINE bool norm_known() const { return ::fabs(n) <= limits<double>::largest; }

  // inner = <G, u>, square = |G|^2, infinite or not a number where it left the range
  static WN_INLINE RowStep of(const RowState& state, int64_t row, double inner, double square) {
    const double rho = state.rho[row], n = state.norm[row], r = state.radius[row];
    RowStep x{0, n, n, 1, rho, 0};
    if (rho == 0) return x;  // the row was zero when it was last taken from the weight: it has no direction
    const double s = signed_radius(state.kind, r), k = state.one_column ? 0 : s / n, p = rho / n * inner;
    const double r_new =
        state.kind == Kind::unit
            ? r
            : r - state.radius_lr * ((state.kind == Kind::ewn ? s * p : p) + state.radius_weight_decay * r);
    const double kept = 1 - state.lr * state.weight_decay, rate = state.lr * k;
    const double rest = square - p * p, tangential = rest <= 0 ? 0 : rest > 0 ? rest : INFINITY;  // |G - p v/n|^2
    state.radius[row] = r_new;
    x.s = signed_radius(state.kind, r_new);
    x.along = kept * n;
    x.n = ::sqrt(x.along * x.along + rate * tangential * rate);
    x.rho = (kept + rate * p / n) * rho;
    if (!(::fabs(x.rho) >= 0.5 && ::fabs(x.rho) <= 2)) {
      x.fold = x.rho;
      x.rho = 1;
    }
    x.factor = -rate / x.rho;
    if (state.telemetry != nullptr) {
      double* const t = state.telemetry + 5 * row;
      t[0] = x.s;
      t[2] = p;
      t[3] = ::sqrt(tangential);
      t[4] = ::atan2(::fabs(rate * t[3]), x.along);
    }
    return x;
  }

  // length = |u'| where it was measured, or negative. Returns the new scale.
  WN_INLINE double finish(const RowState& state, int64_t row, double length) const {
    if (state.rho[row] == 0) return 0;
    const double free = norm_known() ? n : ::fabs(rho) * length;
    const double n_new = state.keep_norm ? state.norm[row] : free;
    const bool measured = length >= 0, lost = !((measured ? length : free) > 0) || n_new == 0;
    const double size = measured ? n_new / length : state.keep_norm ? ::fabs(rho) * (n_new / free) : ::fabs(rho);
    state.rho[row] = lost ? 0 : ::copysign(size, rho);
    state.norm[row] = n_new;
    if (state.telemetry != nullptr) state.telemetry[5 * row + 1] = n_new;
    return lost ? 0 : s * state.rho[row] / n_new;
  }
};

}  // namespace wn
