// A linear layer that takes its SGD step inside the backward, without a gradient of its weight.
//
// The weight's buffer holds rows u that are v up to a scale, v = rho u, so that w = s v/n = (s rho/n) u = scale u. With
// G = dy^T x, p = <G, v>/n and k = s/n the step of SGD on v, v' = (1 - lr decay) v - lr k (G - p v/n), is
//   rho' = c rho, c = 1 - lr decay + lr k p/n;   u' = u - (lr k/rho') G,
// one in-place product u += e^T x with e = -(lr k/rho') dy. Nothing else of the weight's size is read or written:
//   z = x u^T, which the forward makes anyway, gives <G, u> = sum_b dy z;
//   |G|^2 = sum_b dy (x x^T dy) gives n'^2 = ((1 - lr decay) n)^2 + (lr k)^2 (|G|^2 - p^2).
// A row whose |rho'| leaves [1/2, 2] is multiplied by it first, and has rho' = 1 then; c may be anything, 0 too.
//
// With momentum m, which is that of v, all rows are rewritten anyway, so that u' = v':
//   dv = k G + (decay - k p/n) v;   m' = mu m + weight dv;   v' = v - lr (f dv + c m),
// and n' is measured where v' is written. G is still that product, which is not stored: w, m in, w', m' out.
#pragma once

#include "polar.h"

namespace wn {

// A row of what the step keeps.
struct Row {
  double rho, norm, radius, s;  // s: the signed radius
  WN_INLINE double scale() const { return zero_unless(rho != 0, s * rho / norm); }
};

// What the step keeps of the rows; null pointers where the layer is plain.
struct RowState {
  double *rho, *radius, *norm, *telemetry;
  Kind kind;
  bool keep_norm, one_column;
  double lr, radius_lr, weight_decay, radius_weight_decay;

  WN_INLINE Row at(int64_t row) const {
    return {rho[row], norm[row], radius[row], signed_radius(kind, radius[row])};
  }
};

// d = of_gradient g + of_buffer m is what a step of gradient g goes along, and m' = mu m + weight g.
struct Momentum {
  double mu, weight;  // weight: 1 on the first step, then 1 - dampening
  double of_gradient, of_buffer;

  Momentum(double mu, double weight, bool nesterov)
      : mu(mu), weight(weight), of_gradient(nesterov ? 1 + mu * weight : weight), of_buffer(nesterov ? mu * mu : mu) {}

  struct Step { double direction, buffer; };
  WN_INLINE Step of(double gradient, double buffer) const {
    return {of_gradient * gradient + of_buffer * buffer, mu * buffer + weight * gradient};
  }
};

// A row between the product that needs its old state and the norm that completes its new one. Its formulas are free of
// branches, which would keep loops over rows from being vectorized.
struct RowStep {
  double radius;     // g' or alpha'
  double n;          // n' by |G|^2, or infinite where that left the range
  double along;      // of v' along v
  double fold;       // u is multiplied by it first
  double rho;        // rho'
  double factor;     // of dy in e
  double p, across;  // <G, v>/n and |G - p v/n|^2

  WN_INLINE bool norm_known() const { return ::fabs(n) <= limits<double>::largest; }

  static WN_INLINE bool exists(const Row& row) { return row.rho != 0; }
  static WN_INLINE bool moves(const RowState& state, const Row& row) {
    return exists(row) & (state.kind != Kind::unit);
  }
  // <G, v>/n from inner = <G, u>.
  static WN_INLINE double along_v(const Row& row, double inner) {
    return zero_unless(exists(row), row.rho / row.norm * inner);
  }
  static WN_INLINE double radius_gradient(const RowState& state, const Row& row, double p) {
    return (state.kind == Kind::ewn ? row.s * p : p) + state.radius_weight_decay * row.radius;
  }

  // inner = <G, u>, square = |G|^2, infinite or not a number where it left the range. A row that was zero when it was last
  // taken from the weight, with rho = 0, has no direction and stays as it is.
  static WN_INLINE RowStep of(const RowState& state, const Row& old, double inner, double square) {
    const double kept = 1 - state.lr * state.weight_decay;
    const double rate = zero_unless(exists(old) & !state.one_column, state.lr * (old.s / old.norm));
    RowStep x;
    x.p = along_v(old, inner);
    x.radius = old.radius - zero_unless(moves(state, old), state.radius_lr * radius_gradient(state, old, x.p));
    const double rest = square - x.p * x.p;
    x.across = rest <= 0 ? 0 : rest > 0 ? rest : INFINITY;
    x.along = kept * old.norm;
    x.n = ::sqrt(x.along * x.along + rate * x.across * rate);
    const double rho = (kept + rate * x.p / old.norm) * old.rho;
    const bool folds = exists(old) & !((::fabs(rho) >= 0.5) & (::fabs(rho) <= 2));
    x.fold = folds ? rho : 1;
    x.rho = folds ? 1 : zero_unless(exists(old), rho);
    x.factor = zero_unless(exists(old), -rate / x.rho);
    return x;
  }

  // The new state of `old`, whose radius is the new one. length = |u'| where it was measured, or negative.
  WN_INLINE Row finished(const RowState& state, const Row& old, double length) const {
    const bool measured = length >= 0;
    const double free = norm_known() ? n : ::fabs(rho) * length, norm = state.keep_norm ? old.norm : free;
    const double relative = state.keep_norm ? ::fabs(rho) * (norm / free) : ::fabs(rho);
    const bool exists = (old.rho != 0) & ((measured ? length : free) > 0) & (norm != 0);
    const double left = ::copysign(measured ? norm / length : relative, rho);
    return {zero_unless(exists, left), old.rho != 0 ? norm : old.norm, old.radius, old.s};
  }

  // Writes what a row is now, its new radius aside, and its telemetry, that of step.h; returns its scale. A row without a
  // direction keeps its telemetry.
  WN_INLINE double write(const RowState& state, int64_t row, const Row& now) const {
    state.rho[row] = now.rho;
    state.norm[row] = now.norm;
    if (state.telemetry != nullptr && rho != 0) {
      double* const t = state.telemetry + 4 * row;
      t[0] = p;
      t[1] = ::sqrt(across);
      t[2] = factor * rho * t[1] * (factor * rho * t[1]);
      t[3] = along;
    }
    return now.scale();
  }
  WN_INLINE double finish(const RowState& state, int64_t row, double length) const {
    return write(state, row, finished(state, state.at(row), length));
  }
};

// The same with momentum: u' = v' before `finish`, which knows its length.
struct MomentumStep {
  double radius, radius_buffer;
  double rho;        // v = rho u
  double factor;     // of dy in e; dv = e^T x + of_u u
  double of_u, mu;

  static WN_INLINE MomentumStep of(const RowState& state, const Momentum& momentum, const Row& old, double inner,
                                   double radius_buffer) {
    const bool exists = RowStep::exists(old), moves = RowStep::moves(state, old);
    const double p = RowStep::along_v(old, inner);
    const Momentum::Step radius = momentum.of(RowStep::radius_gradient(state, old, p), radius_buffer);
    MomentumStep x;
    x.radius = old.radius - zero_unless(moves, state.radius_lr * radius.direction);
    x.radius_buffer = pick(moves, radius.buffer, radius_buffer);
    x.rho = pick(exists, old.rho, 1.0);
    x.factor = zero_unless(exists & !state.one_column, old.s / old.norm);
    x.of_u = zero_unless(exists, (state.weight_decay - x.factor * p / old.norm) * old.rho);
    x.mu = zero_unless(exists, momentum.mu);
    return x;
  }

  // Writes what a row is now that |u'| = length, its radius aside; returns its scale.
  static WN_INLINE double finish(const RowState& state, int64_t row, double length) {
    Row now = state.at(row);
    if (now.rho == 0) return 0;
    if (!state.keep_norm) now.norm = length;
    now.rho = zero_unless((length > 0) & (now.norm != 0), now.norm / length);
    state.rho[row] = now.rho;
    state.norm[row] = now.norm;
    return now.scale();
  }
};

}  // namespace wn
