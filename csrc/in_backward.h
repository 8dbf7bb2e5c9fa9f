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
// Where the optimizer keeps buffers of the weight's size, momentum or Adam's averages, which are those of v, all rows are
// rewritten anyway, so that u' = v': the formula of step.h combines u, e^T x = k G and the buffers element by element, of
//   dv = k G + (decay - k p/n) v,
// and n' is measured where v' is written. G is still that product, which is not stored.
#pragma once

#include "step.h"

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

  // inner = <G, u>, square = |G|^2, infinite or not a number where it left the range. A row that was zero when it was last
  // taken from the weight, with rho = 0, has no direction and stays as it is.
  static WN_INLINE RowStep of(const RowState& state, const Row& old, double inner, double square) {
    const double kept = 1 - state.lr * state.weight_decay;
    const double rate = zero_unless(exists(old) & !state.one_column, state.lr * (old.s / old.norm));
    RowStep x;
    x.p = along_v(old, inner);
    const double gradient = (state.kind == Kind::ewn ? old.s * x.p : x.p) + state.radius_weight_decay * old.radius;
    x.radius = old.radius - zero_unless(moves(state, old), state.radius_lr * gradient);
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

// What a step with buffers makes of a row, or of the bias, which is like a row with k = 1 and no p: the coefficients of the
// formula's combine(), and the radius with its own buffers, one number of each.
struct WithMomentum {
  using Formula = PolarSgd<true, false>;
  static constexpr int buffers = 1;
  Momentum momentum;
  double lr, decay;

  // v = rho u; turned = -k p/n; a row that has lost its direction, and is zero, stays.
  template <class T> WN_INLINE void coefficients(bool exists, double rho, double turned, T* c) const {
    const auto set = [&](int i, double of_existing) { c[i] = static_cast<T>(zero_unless(exists, of_existing)); };
    const double along = (decay + turned) * rho;
    c[0] = static_cast<T>(pick(exists, rho - lr * momentum.of_gradient * along, 1.0));
    set(1, -lr * momentum.of_gradient);
    set(2, -lr * momentum.of_buffer);
    set(3, momentum.weight * along);
    set(4, momentum.weight);
    set(5, momentum.mu);
  }
  // The radius after its step, by its rate and decay.
  WN_INLINE double radius(double r, double gradient, double rate, double r_decay, double* buffer) const {
    gradient += r_decay * r;
    r -= rate * momentum.direction(gradient, buffer[0]);
    buffer[0] = momentum.next(gradient, buffer[0]);
    return r;
  }
};

struct WithAverages {
  using Formula = PolarAdam<false, false>;
  static constexpr int buffers = 2;
  double lr, decay, beta1, beta2, eps, correction1, correction2_root;
  bool decoupled;

  template <class T> WN_INLINE void coefficients(bool exists, double rho, double turned, T* c) const {
    const auto set = [&](int i, double of_existing) { c[i] = static_cast<T>(zero_unless(exists, of_existing)); };
    set(Formula::kW, (zero_unless(!decoupled, decay) + turned) * rho);
    set(Formula::kG, 1);
    set(Formula::kAlong, 0);
    set(Formula::kOneMinusBeta1, 1 - beta1);
    c[Formula::kBeta2] = static_cast<T>(pick(exists, beta2, 1.0));
    set(Formula::kOneMinusBeta2, 1 - beta2);
    c[Formula::kCorrection] = static_cast<T>(1 / correction2_root);
    c[Formula::kEps] = static_cast<T>(eps);
    c[Formula::kDecayed] = static_cast<T>(pick(exists, (1 - zero_unless(decoupled, lr * decay)) * rho, 1.0));
    set(Formula::kRate, lr / correction1);
    c[Formula::kScale] = T(1);
  }
  WN_INLINE double radius(double r, double gradient, double rate, double r_decay, double* buffers_of_r) const {
    AdamNumber x{r, buffers_of_r[0], buffers_of_r[1], 0};
    x.step<false>(gradient, rate, r_decay, decoupled, beta1, beta2, eps, correction1, correction2_root);
    buffers_of_r[0] = x.average, buffers_of_r[1] = x.square;
    return x.value;
  }
};

// A row of such a step: u' = v' before `finish`, which knows its length.
template <class With> struct RowWith {
  double radius, radius_buffers[With::buffers];
  double factor;  // of dy in e
  double turned;  // -k p/n

  static WN_INLINE RowWith of(const RowState& state, const With& with, const Row& old, double inner,
                              const double* radius_buffers) {
    const double p = RowStep::along_v(old, inner);
    const bool moves = RowStep::moves(state, old);
    RowWith x;
    for (int i = 0; i < With::buffers; ++i) x.radius_buffers[i] = radius_buffers[i];
    x.radius = with.radius(old.radius, state.kind == Kind::ewn ? old.s * p : p, state.radius_lr, state.radius_weight_decay,
                           x.radius_buffers);
    x.radius = pick(moves, x.radius, old.radius);
    for (int i = 0; i < With::buffers; ++i) x.radius_buffers[i] = pick(moves, x.radius_buffers[i], radius_buffers[i]);
    x.factor = zero_unless(RowStep::exists(old) & !state.one_column, old.s / old.norm);
    x.turned = -x.factor * p / old.norm;
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
