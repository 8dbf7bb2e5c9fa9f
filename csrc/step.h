// The polar-coordinate gradient steps: the step that torch's optimizer would take on (radius, v), taken on w itself.
//
// A row w = s t of length |s| has direction t = sign(s) w/|w|; beside w it keeps its radius parameter r (g with s = g, or
// alpha with s = e^alpha) and n, the length of v = n t. From G = dL/dw:
//   p = <G, t>,  dr = p | s p,  dv = (s/n)(G - p t),  then weight decay, momentum or Adam on (dr, dv),
//   v' = n t - lr d,  n' = |v'|,  w' = s' v'/n'.
// Everything per row is computed in double: n grows by parts in 1e9 a step, which float would round away. The formulas of
// a row are free of branches, which would keep loops over rows from being vectorized.
#pragma once

#include "polar.h"

namespace wn {

// Not fmax, which is a function call on a CPU.
WN_INLINE double larger(double a, double b) { return a > b ? a : b; }

enum class Retraction : int {
  project,      // v' as above: what torch does
  renormalize,  // as project, but n stays
  geodesic,     // along the great circle by the angle lr (s/n) |G - p t| / n; n stays
};

// What every polar step knows of a row besides w and G.
struct PolarRow {
  Kind kind;
  Retraction retraction;
  double gradient_sign;       // -1 to maximize
  RowValues grad_scale;       // the gradient comes multiplied by it (loss scaling)
  RowValues lr, radius_lr, weight_decay, radius_weight_decay;
  double edit_tolerance;
  double edit_floor;          // and by more than this, which rounding of subnormal numbers may do
  bool one_column;            // a row of one element has no tangent: G - p t is 0, whatever rounding leaves of it
  double* radius;             // [R] r
  double* norm;               // [R] n
  double* telemetry;          // [R, 4] or null: p, |G - p t|, and of v' the part across t, squared, and the one along it

  static constexpr int arrays = 7;
  template <class F> WN_INLINE void for_arrays(F&& f) {
    f(grad_scale), f(lr), f(radius_lr), f(weight_decay), f(radius_weight_decay), f(radius), f(norm);
  }
  WN_INLINE void simplify(bool ewn) {
    kind = ewn ? Kind::ewn : kind == Kind::unit ? Kind::unit : Kind::swn;
    retraction = retraction == Retraction::project ? Retraction::project : Retraction::renormalize;
  }

  // The row before the step, from the first three Gram entries <w,w>, <w,G>, <G,G> of inputs scaled by 2^-e.
  struct State {
    double length;  // |w|, 0 where the row has lost its direction
    double sign;    // w = sign * |w| * t
    double r, s, n;
    double k;             // s/n, the factor from G - p t to dv
    double G_scale;       // the true gradient is G_scale times the G that was read
    double p;             // <true gradient, t>
    double G_perp_square; // |G - p t|^2 of the G that was read over 2^(2 e_1), subject to cancellation
    double G_square;
  };

  template <class A> WN_INLINE State before(int64_t row, const A* gram, const int* e) const {
    State x;
    const double root = ::sqrt(static_cast<double>(gram[0]));
    x.length = shifted(root, e[0]);
    x.r = radius[row];
    x.s = signed_radius(kind, x.r);
    x.n = norm[row];
    x.sign = x.s < 0 ? -1 : 1;
    const double size = larger(x.length, ::fabs(x.s));
    const bool edited = (x.length > 0) & (::fabs(x.length - ::fabs(x.s)) > edit_tolerance * size + edit_floor);
    x.s = pick(edited, x.sign * x.length, x.s);
    x.r = pick(edited, kind == Kind::ewn ? logarithm(x.length) : x.s, x.r);
    x.k = zero_unless(!one_column, x.s / x.n);
    x.G_scale = gradient_sign / grad_scale.at<double>(row);
    const double along = along_t(root, gram[1]);
    x.p = x.G_scale * x.sign * shifted(along, e[1]);
    x.G_square = gram[2];
    x.G_perp_square = zero_unless(!one_column, larger(0.0, x.G_square - along * along));
    return x;
  }
  // <x, t> up to sign, from |w| and <x, w>.
  static WN_INLINE double along_t(double length, double inner) { return zero_unless(length > 0, inner / length); }
  WN_INLINE double radius_gradient(const State& x, int64_t row) const {
    return (kind == Kind::ewn ? x.s * x.p : x.p) + radius_weight_decay.at<double>(row) * x.r;
  }

  // result[0..1] = r', n'; result[2..5] = telemetry. Whoever reads it gets the angular update from the last two, s and n
  // from the state: a step on short rows should not wait for what nobody may look at. A row that has lost its direction
  // stays as it is.
  WN_INLINE void report(const State& x, double r, double n, double G_perp, double perp_square, double along,
                        double* result) const {
    const bool exists = x.length != 0;
    result[0] = r;
    result[1] = pick(exists, n, x.n);
    result[2] = x.p;
    result[3] = zero_unless(exists, ::fabs(x.G_scale) * G_perp);
    result[4] = zero_unless(exists, perp_square);
    result[5] = pick(exists, along, 1.0);
  }
  static constexpr int results = 6;
  template <class A> WN_INLINE void store(int64_t row, const A* result) const {
    radius[row] = result[0];
    norm[row] = result[1];
    if (telemetry == nullptr) return;
    for (int i = 0; i < 4; ++i) telemetry[4 * row + i] = result[2 + i];
  }
};

// |w| and |s| of a row differ by more than this part: somebody else has written w. Rounding moves the norm of a row by a few
// units in the last place; an edit that small changes nothing either.
constexpr double edit_tolerance(bool f64) { return f64 ? 1e-12 : 1e-5; }

// A step of gradient g goes along of_gradient g + of_buffer m, and m' = mu m + weight g.
struct Momentum {
  double mu, weight;  // weight: 1 on the first step, then 1 - dampening
  double of_gradient, of_buffer;

  static WN_INLINE Momentum of(double mu, double weight, bool nesterov) {
    return {mu, weight, pick(nesterov, 1 + mu * weight, weight), pick(nesterov, mu * mu, mu)};
  }
  WN_INLINE double direction(double gradient, double buffer) const { return of_gradient * gradient + of_buffer * buffer; }
  WN_INLINE double next(double gradient, double buffer) const { return mu * buffer + weight * gradient; }
};

// Adam of one number, by the corrections 1 - beta1^step and sqrt(1 - beta2^step).
struct AdamNumber {
  double value, average, square, largest;

  template <bool amsgrad>
  WN_INLINE void step(double gradient, double lr, double decay, bool decoupled, double beta1, double beta2, double eps,
                      double correction1, double correction2_root) {
    gradient += zero_unless(!decoupled, decay * value);
    average += (1 - beta1) * (gradient - average);
    square = beta2 * square + (1 - beta2) * gradient * gradient;
    largest = larger(largest, square);
    value *= 1 - zero_unless(decoupled, lr * decay);
    value -= lr / correction1 * average / (::sqrt(amsgrad ? largest : square) / correction2_root + eps);
  }
};

// A difference of squares keeps less than this part of its terms: its rounding error could reach a part in 1e4.
constexpr double kCancellation = 1e-3;

// x_0 = w, x_1 = G, with momentum x_2 = m; y_0 = w', with momentum y_1 = m', with a copy y_last = w' again, rounded.
template <bool with_momentum, bool with_copy> struct PolarSgd {
  static constexpr int inputs = 2 + with_momentum, gram_inputs = inputs, outputs = 1 + with_momentum + with_copy;
  static constexpr int coefficients = with_momentum ? 6 : 2, residuals = 2, results = PolarRow::results + 1;
  static constexpr int arrays = PolarRow::arrays + (with_momentum ? 3 : 0);
  PolarRow rows;
  bool nesterov;
  RowValues momentum;         // mu
  RowValues gradient_weight;  // of the new gradient in the momentum: 1 on the first step, then 1 - dampening
  double* radius_momentum;    // [R], with momentum

  template <class F> WN_INLINE void for_arrays(F&& f) {
    rows.for_arrays(f);
    if constexpr (with_momentum) f(momentum), f(gradient_weight), f(radius_momentum);
  }
  WN_INLINE bool geodesic() const { return !with_momentum && rows.retraction == Retraction::geodesic; }
  WN_INLINE bool one_by_one() const { return geodesic(); }
  WN_INLINE bool is_ewn() const { return rows.kind == Kind::ewn; }
  WN_INLINE void simplify(bool ewn) { rows.simplify(ewn); }

  // d = A t + B G + C m for the G that was read, of which A + B p + C q = d_along lies along t.
  struct Update {
    Momentum momentum;
    double A, B, C;
    double q;            // <m, t>
    double d_along;
    double d_perp_square, terms;  // subject to cancellation, and the size of what cancels
  };
  template <class A_>
  WN_INLINE Update update(int64_t row, const PolarRow::State& x, const A_* gram, const int* e) const {
    Update u;
    u.momentum = {0, 1, 1, 0};
    u.q = 0;
    if constexpr (with_momentum) {
      u.momentum = Momentum::of(momentum.at<double>(row), gradient_weight.at<double>(row), nesterov);
      const double root = ::sqrt(static_cast<double>(gram[0]));
      u.q = x.sign * shifted(PolarRow::along_t(root, gram[3]), e[2]);
    }
    const double decay = rows.weight_decay.at<double>(row) * x.n, factor = u.momentum.of_gradient;
    u.A = factor * (decay - x.k * x.p);
    u.B = factor * x.k * x.G_scale;
    u.C = u.momentum.of_buffer;
    u.d_along = factor * decay + u.C * u.q;
    const double b = shifted(u.B, e[1]);
    u.d_perp_square = b * b * x.G_perp_square;
    u.terms = b * b * x.G_square;
    if constexpr (with_momentum) {
      const double c = shifted(u.C, e[2]), root = ::sqrt(static_cast<double>(gram[0]));
      const double g_along = PolarRow::along_t(root, gram[1]), m_along = PolarRow::along_t(root, gram[3]);
      u.d_perp_square += 2 * b * c * (gram[4] - g_along * m_along) + c * c * (gram[5] - m_along * m_along);
      u.d_perp_square = zero_unless(!rows.one_column, u.d_perp_square);
      u.terms += c * c * gram[5];
    }
    return u;
  }

  // Terms: the squares of d and of G without their parts along t, from c = (of w in each), B, C.
  template <class A> WN_INLINE bool prepare(int64_t row, const A* gram, const int* e, A* c) const {
    const PolarRow::State x = rows.before(row, gram, e);
    const Update u = update(row, x, gram, e);
    const double g_along = gram[1] / gram[0];
    c[0] = static_cast<A>(g_along);
    if constexpr (with_momentum) {
      const double b = shifted(u.B, e[1]), m = shifted(u.C, e[2]), largest = larger(::fabs(b), ::fabs(m));
      c[1] = static_cast<A>(zero_unless(largest > 0, b / largest));
      c[2] = static_cast<A>(zero_unless(largest > 0, m / largest));
      c[3] = static_cast<A>(gram[3] / gram[0]);
    }
    return (x.length > 0) & !rows.one_column &
           ((u.d_perp_square < kCancellation * u.terms) | (x.G_perp_square < kCancellation * x.G_square));
  }
  template <class A> static WN_INLINE void residual(const A* c, const A* x, A* term) {
    const A g = x[1] - c[0] * x[0];
    term[1] = g * g;
    term[0] = term[1];
    if constexpr (with_momentum) {
      const A d = c[1] * g + c[2] * (x[2] - c[3] * x[0]);
      term[0] = d * d;
    }
  }

  template <class A>
  WN_INLINE void solve(int64_t row, const A* gram, const int* e, const A* sums, A* c, double* result) const {
    const PolarRow::State x = rows.before(row, gram, e);
    const Update u = update(row, x, gram, e);
    double G_perp_square = x.G_perp_square, d_perp_square = larger(0.0, u.d_perp_square);
    if (sums != nullptr) {
      G_perp_square = sums[1];
      double unit = ::fabs(shifted(u.B, e[1]));
      if constexpr (with_momentum) unit = larger(unit, ::fabs(shifted(u.C, e[2])));
      d_perp_square = unit * unit * sums[0];
    }
    const double G_perp = shifted(::sqrt(G_perp_square), e[1]);

    const bool exists = x.length != 0, moves = exists & (rows.kind != Kind::unit);
    double mr = 0, dr = rows.radius_gradient(x, row);
    if constexpr (with_momentum) {
      const double gradient = dr, before = radius_momentum[row];
      dr = u.momentum.direction(gradient, before);
      mr = pick(moves, u.momentum.next(gradient, before), before);
    }
    const double r = x.r - zero_unless(moves, rows.radius_lr.at<double>(row) * dr);
    const double s = signed_radius(rows.kind, r), lr = rows.lr.at<double>(row);
    double along = x.n - lr * u.d_along, perp_square = lr * lr * d_perp_square;
    const double n = ::sqrt(along * along + perp_square);
    double of_t = x.n - lr * u.A, of_G = -lr * u.B, of_m = -lr * u.C;
    double scale = zero_unless(n > 0, s / n);
    if (geodesic()) {
      const double tangential = ::fabs(x.G_scale) * G_perp, rate = lr * x.k / x.n, angle = rate * tangential;
      const double sine = tangential > 0 ? ::sin(angle) / tangential : rate;
      along = ::cos(angle);
      perp_square = sine * sine * tangential * tangential;
      of_t = along + sine * x.p;
      of_G = -sine * x.G_scale;
      scale = s;
    }
    const double unit_w = x.sign / x.length;
    const auto coefficient = [exists](double y) { return static_cast<A>(zero_unless(exists, finite(y))); };
    c[0] = coefficient(shifted(scale * of_t * unit_w, e[0]));
    c[1] = coefficient(shifted(scale * of_G, e[1]));
    if constexpr (with_momentum) {
      c[2] = coefficient(shifted(scale * of_m, e[2]));
      const double decay = rows.weight_decay.at<double>(row) * x.n;
      c[3] = coefficient(shifted(u.momentum.weight * (decay - x.k * x.p) * unit_w, e[0]));
      c[4] = coefficient(shifted(u.momentum.weight * x.k * x.G_scale, e[1]));
      c[5] = coefficient(shifted(u.momentum.mu, e[2]));
    }
    rows.report(x, r, pick(rows.retraction == Retraction::project, n, x.n), G_perp, perp_square, along, result);
    result[PolarRow::results] = mr;
  }
  template <class A> WN_INLINE bool exact(const A* c) const {
    bool all = true;
    for (int i = 0; i < coefficients; ++i) all &= full_precision(c[i]);
    return all;
  }
  template <class A> static WN_INLINE void combine(const A* c, const A* x, A* y) {
    if constexpr (with_momentum) {
      y[0] = c[0] * x[0] + c[1] * x[1] + c[2] * x[2];
      y[1] = c[3] * x[0] + c[4] * x[1] + c[5] * x[2];
    } else {
      y[0] = c[0] * x[0] + c[1] * x[1];
    }
    if constexpr (with_copy) y[outputs - 1] = y[0];
  }
  WN_INLINE void finish(int64_t row, const double* result) const {
    rows.store(row, result);
    if constexpr (with_momentum) radius_momentum[row] = result[PolarRow::results];
  }
};

// x_0 = w, x_1 = G, x_2, x_3 = the averages of dv and dv^2, with amsgrad x_4 = the largest of the latter;
// y_0 = w', then the averages again, with a copy y_last = w' again, rounded. The update of v is element by element, so
// its length is known only after a second reduction; elements of v' are over n, so that they stay in range.
template <bool amsgrad, bool with_copy> struct PolarAdam {
  static constexpr int inputs = 4 + amsgrad, gram_inputs = 2, outputs = 3 + amsgrad + with_copy;
  static constexpr int coefficients = 11, residuals = 3, results = PolarRow::results + 3;
  static constexpr int arrays = PolarRow::arrays + 6 + amsgrad;
  static constexpr bool with_rounded_copy = with_copy;
  PolarRow rows;
  bool decoupled;  // decay of v and r themselves (AdamW), not of their gradients (Adam)
  bool counted;    // the count of steps with this one is known, elsewhere only the device does
  RowValues beta1, beta2, eps;
  double correction1, correction2_root;  // 1 - beta1^step, sqrt(1 - beta2^step), where it is
  RowValues step;                        // the count, where it is not
  double *radius_average, *radius_square, *radius_largest;  // [R], the last with amsgrad

  template <class F> WN_INLINE void for_arrays(F&& f) {
    rows.for_arrays(f);
    f(beta1), f(beta2), f(eps), f(step), f(radius_average), f(radius_square);
    if constexpr (amsgrad) f(radius_largest);
  }
  WN_INLINE bool one_by_one() const { return !counted; }
  WN_INLINE bool is_ewn() const { return rows.kind == Kind::ewn; }
  WN_INLINE void simplify(bool ewn) {
    rows.simplify(ewn);
    counted = true;
  }

  enum : int { kW, kG, kAlong, kOneMinusBeta1, kBeta2, kOneMinusBeta2, kCorrection, kEps, kDecayed, kRate, kScale };

  // The averages after the step, and U, the direction that Adam subtracts from v.
  template <class A> struct Moments { A average, square, largest, U, v; };  // v' over n
  template <class A> static WN_INLINE Moments<A> moments(const A* c, const A* x) {
    Moments<A> m;
    const A dv = c[kW] * x[0] + c[kG] * x[1];
    m.average = x[2] + c[kOneMinusBeta1] * (dv - x[2]);
    m.square = c[kBeta2] * x[3] + c[kOneMinusBeta2] * dv * dv;
    m.largest = m.square;
    if constexpr (amsgrad) m.largest = x[4] > m.square ? x[4] : m.square;
    m.U = m.average / (square_root(m.largest) * c[kCorrection] + c[kEps]);
    m.v = c[kDecayed] * x[0] - c[kRate] * m.U;
    return m;
  }

  struct Corrections { double first, second_root; };
  WN_INLINE Corrections corrections(int64_t row) const {
    if (counted) return {correction1, correction2_root};
    const double count = step.at<double>(row);
    return {1 - ::pow(beta1.at<double>(row), count), ::sqrt(1 - ::pow(beta2.at<double>(row), count))};
  }

  // Terms: |U|^2, <U, w>, and the square of G without its part along w.
  template <class A> WN_INLINE bool prepare(int64_t row, const A* gram, const int* e, A* c) const {
    const PolarRow::State x = rows.before(row, gram, e);
    const bool exists = x.length != 0;
    const double unit_w = x.sign / x.length, decay = rows.weight_decay.at<double>(row);
    const double b1 = beta1.at<double>(row), b2 = beta2.at<double>(row), lr = rows.lr.at<double>(row);
    const auto coefficient = [exists](double y) { return static_cast<A>(zero_unless(exists, finite(y))); };
    c[kW] = coefficient(shifted((zero_unless(!decoupled, decay * x.n) - x.k * x.p) * unit_w, e[0]));
    c[kG] = coefficient(shifted(x.k * x.G_scale, e[1]));
    c[kAlong] = zero_unless(exists, gram[1] / gram[0]);
    c[kOneMinusBeta1] = coefficient(1 - b1);
    c[kBeta2] = static_cast<A>(pick(exists, b2, 1.0));
    c[kOneMinusBeta2] = coefficient(1 - b2);
    const Corrections correction = corrections(row);
    c[kCorrection] = static_cast<A>(1 / correction.second_root);
    c[kEps] = static_cast<A>(eps.at<double>(row));
    c[kDecayed] = coefficient(shifted((1 - zero_unless(decoupled, lr * decay)) * unit_w, e[0]));
    c[kRate] = static_cast<A>(lr / correction.first / x.n);
    c[kScale] = A(0);
    return exists;
  }
  template <class A> static WN_INLINE void add_terms(const A* c, const A* x, const Moments<A>& m, A* term) {
    const A g = x[1] - c[kAlong] * x[0];
    term[0] = m.U * m.U;
    term[1] = m.U * x[0];
    term[2] = g * g;
  }
  template <class A> static WN_INLINE void residual(const A* c, const A* x, A* term) {
    add_terms(c, x, moments(c, x), term);
  }
  // The same, and everything but the factor that w' still lacks.
  template <class A> static WN_INLINE void advance(const A* c, const A* x, A* y, A* term) {
    const Moments<A> m = moments(c, x);
    add_terms(c, x, m, term);
    store(m, m.v, y);
  }
  template <class A> static WN_INLINE A rescale(const A* c, A y) { return c[kScale] * y; }

  template <class A>
  WN_INLINE void solve(int64_t row, const A* gram, const int* e, const A* sums, A* c, double* result) const {
    const PolarRow::State x = rows.before(row, gram, e);
    AdamNumber radius{x.r, radius_average[row], radius_square[row], 0};
    if constexpr (amsgrad) radius.largest = radius_largest[row];
    double n = x.n, G_perp = 0, perp_square = 0, along = 1;
    if (sums != nullptr) {
      const Corrections correction = corrections(row);
      const double lr = rows.lr.at<double>(row), rate = lr / correction.first, decay = rows.weight_decay.at<double>(row);
      AdamNumber moved = radius;
      moved.step<amsgrad>(rows.kind == Kind::ewn ? x.s * x.p : x.p, rows.radius_lr.at<double>(row),
                          rows.radius_weight_decay.at<double>(row), decoupled, beta1.at<double>(row), beta2.at<double>(row),
                          eps.at<double>(row), correction.first, correction.second_root);
      const bool moves = rows.kind != Kind::unit;
      radius.value = pick(moves, moved.value, radius.value);
      radius.average = pick(moves, moved.average, radius.average);
      radius.square = pick(moves, moved.square, radius.square);
      radius.largest = pick(moves, moved.largest, radius.largest);
      const double s = signed_radius(rows.kind, radius.value);
      const double U_along = x.sign * sums[1] / ::sqrt(static_cast<double>(gram[0]));
      perp_square = rate * rate * larger(0.0, static_cast<double>(sums[0]) - U_along * U_along);
      along = x.n * (1 - zero_unless(decoupled, lr * decay)) - rate * U_along;
      n = ::sqrt(along * along + perp_square);
      G_perp = shifted(::sqrt(static_cast<double>(sums[2])), e[1]);
      c[kScale] = static_cast<A>(zero_unless(n > 0, finite(s * (x.n / n))));
      n = pick(rows.retraction == Retraction::renormalize, x.n, n);
    }
    rows.report(x, radius.value, n, G_perp, perp_square, along, result);
    result[PolarRow::results] = radius.average;
    result[PolarRow::results + 1] = radius.square;
    result[PolarRow::results + 2] = radius.largest;
  }
  template <class A> WN_INLINE bool exact(const A* c) const {
    return full_precision(c[kW]) & full_precision(c[kG]) & full_precision(c[kDecayed]) & full_precision(c[kScale]) &
           !(c[kRate] > A(1e15));
  }
  template <class A> static WN_INLINE void combine(const A* c, const A* x, A* y) {
    const Moments<A> m = moments(c, x);
    store(m, rescale(c, m.v), y);
  }
  template <class A> static WN_INLINE void store(const Moments<A>& m, A w, A* y) {
    y[0] = w;
    y[1] = m.average;
    y[2] = m.square;
    if constexpr (amsgrad) y[3] = m.largest;
    if constexpr (with_copy) y[outputs - 1] = w;
  }
  WN_INLINE void finish(int64_t row, const double* result) const {
    rows.store(row, result);
    radius_average[row] = result[PolarRow::results];
    radius_square[row] = result[PolarRow::results + 1];
    if constexpr (amsgrad) radius_largest[row] = result[PolarRow::results + 2];
  }
};

}  // namespace wn
