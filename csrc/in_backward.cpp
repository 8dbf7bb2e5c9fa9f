// A linear layer that takes its SGD step inside the backward, without a gradient of its weight.
//
// The weight's buffer holds rows u that are v up to a scale, v = rho u, so that w = s v/n = (s rho/n) u = scale u. With
// G = dy^T x, p = <G, v>/n and k = s/n the step of SGD on v, v' = (1 - lr decay) v - lr k (G - p v/n), is
//   rho' = c rho, c = 1 - lr decay + lr k p/n;   u' = u - (lr k/rho') G,
// one in-place product u += e^T x with e = -(lr k/rho') dy. Nothing else of the weight's size is read or written:
//   z = u x^T, which the forward makes anyway, gives <G, u> = sum_b dy z;
//   |G|^2 = sum_b dy (x x^T dy) gives n'^2 = ((1 - lr decay) n)^2 + (lr k)^2 (|G|^2 - p^2).
// A row whose |rho'| leaves [1/2, 2] is multiplied by it first, and has rho' = 1 then; c may be anything, 0 too.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ops.h"
#include "tensors.h"

namespace wn {
namespace {

enum : size_t { kLr, kRadiusLr, kWeightDecay, kRadiusWeightDecay, kBiasLr, kBiasWeightDecay, kNumbers };

// Rows of one tile are worked on together, element by element.
constexpr int64_t kTile = 16;

// Batches up to this size leave a weight's block of rows in cache between the product that reads it for dx and the one
// that updates it: blocks save a pass over the weight. Larger ones are bound by arithmetic, and want large products.
constexpr int64_t kBlockBatch = 32, kBlockRows = 64, kBlockElements = 1 << 18;

// |G|^2 by the Gram matrix of the batch costs batch^2 (rows + width) multiplications, |u'| one pass over the weight.
bool gram_is_cheaper(int64_t batch, int64_t rows, int64_t width) {
  return batch * batch * (rows + width) <= 8 * rows * width;
}

int64_t batch_of(const Tensor& x) {
  int64_t batch = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) batch *= x.size(d);
  return batch;
}
Tensor as_matrix(const Tensor& x) { return x.reshape({batch_of(x), x.size(-1)}).contiguous(); }

void check_layer(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                 const std::optional<Tensor>& bias) {
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kDouble,
                   "weight must be float32 or float64, got ", weight.scalar_type());
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.is_contiguous(), "weight must be contiguous of shape (rows, width), got "
                    "shape ", weight.sizes(), " with strides ", weight.strides());
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == weight.size(1), "x must have shape (..., ", weight.size(1),
                    ") for a weight of shape ", weight.sizes(), ", got ", x.sizes());
  const auto check = [&](const char* name, const Tensor& t) {
    TORCH_CHECK_TYPE(t.scalar_type() == weight.scalar_type(), name, " must have the weight's dtype ",
                     weight.scalar_type(), ", got ", t.scalar_type());
    check_device(name, t, weight);
  };
  check("x", x);
  for (const auto& [name, t] : {std::make_pair("scale", scale), std::make_pair("bias", bias)}) {
    if (!t) continue;
    check(name, *t);
    TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == weight.size(0) && t->is_contiguous(), name,
                      " must be contiguous of shape (", weight.size(0), ",), got ", t->sizes());
  }
}

// y = (x u^T) scale + bias, and z = u x^T, (rows, batch). In this orientation the product of a small batch is the
// quicker one, and turning it around costs no pass of its own.
std::tuple<Tensor, Tensor> in_backward_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                                              const std::optional<Tensor>& bias) {
  check_layer(x, weight, scale, bias);
  const int64_t rows = weight.size(0), batch = batch_of(x);
  at::DimVector shape(x.sizes().begin(), x.sizes().end());
  shape.back() = rows;
  Tensor y = at::empty(shape, x.options());
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Tensor z = at::mm(weight, as_matrix(x).t());
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "in_backward_linear", [&] {
    const scalar_t* const from = z.const_data_ptr<scalar_t>();
    const scalar_t* const s = scale ? scale->const_data_ptr<scalar_t>() : nullptr;
    const scalar_t* const a = bias ? bias->const_data_ptr<scalar_t>() : nullptr;
    scalar_t* const to = y.mutable_data_ptr<scalar_t>();
    const int64_t tiles = (rows + kTile - 1) / kTile;
    at::parallel_for(0, tiles, 1 + 32768 / (kTile * (batch + 1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t u = i * kTile, count = std::min(kTile, rows - u);
        scalar_t factor[kTile], shift[kTile];
        for (int64_t j = 0; j < count; ++j) {
          factor[j] = s ? s[u + j] : scalar_t(1);
          shift[j] = a ? a[u + j] : scalar_t(0);
        }
        for (int64_t b = 0; b < batch; ++b)
          for (int64_t j = 0; j < count; ++j)
            to[b * rows + u + j] = from[(u + j) * batch + b] * factor[j] + shift[j];
      }
    });
  });
  return {y, z};
}

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

  // inner = <G, u>, square = |G|^2
  static RowStep of(const RowState& state, int64_t row, double inner, double square) {
    const double rho = state.rho[row], n = state.norm[row], r = state.radius[row];
    RowStep x{0, n, n, 1, rho, 0};
    if (rho == 0) return x;  // the row was zero when it was last taken from the weight: it has no direction
    const double s = signed_radius(state.kind, r), k = state.one_column ? 0 : s / n, p = rho / n * inner;
    const double r_new =
        state.kind == Kind::unit
            ? r
            : r - state.radius_lr * ((state.kind == Kind::ewn ? s * p : p) + state.radius_weight_decay * r);
    const double kept = 1 - state.lr * state.weight_decay, rate = state.lr * k;
    const double perp = rate * std::sqrt(std::max(0.0, square - p * p));
    state.radius[row] = r_new;
    x.s = signed_radius(state.kind, r_new);
    x.along = kept * n;
    x.n = std::sqrt(x.along * x.along + perp * perp);
    x.rho = (kept + rate * p / n) * rho;
    if (!(std::fabs(x.rho) >= 0.5 && std::fabs(x.rho) <= 2)) {
      x.fold = x.rho;
      x.rho = 1;
    }
    x.factor = -rate / x.rho;
    if (state.telemetry != nullptr) {
      double* const t = state.telemetry + 5 * row;
      t[0] = x.s;
      t[2] = p;
      t[3] = std::sqrt(std::max(0.0, square - p * p));
      t[4] = std::atan2(std::fabs(perp), x.along);
    }
    return x;
  }

  // length = |u'| where it was measured, or negative. Returns the new scale.
  double finish(const RowState& state, int64_t row, double length) const {
    if (state.rho[row] == 0) return 0;
    const double free = std::isfinite(n) ? n : std::fabs(rho) * length;
    const double n_new = state.keep_norm ? state.norm[row] : free;
    const double u = length >= 0 ? length : free / std::fabs(rho);
    const bool lost = !(u > 0) || n_new == 0;
    state.rho[row] = lost ? 0 : std::copysign(n_new / u, rho);
    state.norm[row] = n_new;
    if (state.telemetry != nullptr) state.telemetry[5 * row + 1] = n_new;
    return lost ? 0 : s * state.rho[row] / n_new;
  }
};

struct Arguments {
  Tensor dy, x, z, weight, scale, bias;  // dy (batch, rows) and x (batch, width) contiguous; undefined where absent
  RowState state;
  double bias_lr, bias_weight_decay, sign;
  bool polar, need_x, measure, refresh;
};

// The step of the rows first..first+rows-1; adds their part of dx to `dx`.
template <class T> void step_rows(const Arguments& a, const Tensor& gram, int64_t first, int64_t rows, Tensor& dx) {
  const int64_t batch = a.dy.size(0), stride = a.dy.size(1);
  Tensor weight = a.weight.narrow(0, first, rows);
  const Tensor dy = a.dy.narrow(1, first, rows);
  Tensor of_x = dy, of_weight;  // what is multiplied by u for dx, by x for u'
  std::vector<RowStep> steps(a.polar ? rows : 0);
  Tensor squares;
  if (a.polar) {
    of_x = a.need_x ? at::empty({batch, rows}, dy.options()) : Tensor();
    of_weight = at::empty({batch, rows}, dy.options());
    if (gram.defined()) squares = at::mm(gram, dy);
  }
  T* const scale = a.polar ? a.scale.mutable_data_ptr<T>() + first : nullptr;
  const T* const d = a.dy.const_data_ptr<T>() + first;
  if (a.polar || a.bias.defined()) {
    const T* const z = a.polar ? a.z.const_data_ptr<T>() + first * batch : nullptr;
    const T* const h = squares.defined() ? squares.const_data_ptr<T>() : nullptr;
    T* const ex = a.polar && a.need_x ? of_x.mutable_data_ptr<T>() : nullptr;
    T* const ew = a.polar ? of_weight.mutable_data_ptr<T>() : nullptr;
    T* const bias = a.bias.defined() ? a.bias.mutable_data_ptr<T>() + first : nullptr;
    at::parallel_for(0, (rows + kTile - 1) / kTile, 1 + 16384 / (kTile * (batch + 1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t u = i * kTile, count = std::min(kTile, rows - u);
        double inner[kTile] = {}, square[kTile] = {}, sum[kTile] = {};
        for (int64_t b = 0; b < batch; ++b)
          for (int64_t j = 0; j < count; ++j) {
            const double g = d[b * stride + u + j];
            sum[j] += g;
            if (z != nullptr) inner[j] += g * z[(u + j) * batch + b];
            if (h != nullptr) square[j] += g * h[b * rows + u + j];
          }
        if (bias != nullptr)
          for (int64_t j = 0; j < count; ++j)
            bias[u + j] -= static_cast<T>(a.bias_lr * (a.sign * sum[j] + a.bias_weight_decay * bias[u + j]));
        if (!a.polar) continue;
        T old[kTile], factor[kTile];
        for (int64_t j = 0; j < count; ++j) {
          const double known = h != nullptr ? square[j] : std::numeric_limits<double>::infinity();
          steps[u + j] = RowStep::of(a.state, first + u + j, a.sign * inner[j], known);
          old[j] = scale[u + j];
          factor[j] = static_cast<T>(a.sign * steps[u + j].factor);
        }
        for (int64_t b = 0; b < batch; ++b)
          for (int64_t j = 0; j < count; ++j) {
            const T g = d[b * stride + u + j];
            if (ex != nullptr) ex[b * rows + u + j] = g * old[j];
            ew[b * rows + u + j] = g * factor[j];
          }
      }
    });
  }
  if (a.need_x) dx.addmm_(of_x, weight);
  if (!a.polar) {
    weight.addmm_(dy.t(), a.x, 1 - a.state.lr * a.state.weight_decay, -a.sign * a.state.lr);
    return;
  }
  bool measured = a.measure || a.refresh;
  for (int64_t u = 0; u < rows; ++u) {
    measured = measured || !std::isfinite(steps[u].n);
    if (steps[u].fold != 1) weight.select(0, u).mul_(steps[u].fold);
  }
  weight.addmm_(of_weight.t(), a.x);
  const Tensor length = measured ? op::row_norm(weight, 0).to(at::kDouble) : Tensor();
  for (int64_t u = 0; u < rows; ++u)
    scale[u] = static_cast<T>(
        steps[u].finish(a.state, first + u, measured ? length.const_data_ptr<double>()[u] : -1));
}

template <class T> Tensor run(const Arguments& a) {
  const int64_t batch = a.dy.size(0), rows = a.weight.size(0), threads = at::get_num_threads();
  const Tensor gram = a.polar && !a.measure ? at::mm(a.x, a.x.t()) : Tensor();
  const bool blocks = batch <= kBlockBatch && a.weight.numel() >= kBlockElements && rows >= 2 * kBlockRows * threads;
  Tensor parts = a.need_x ? at::zeros({blocks ? threads : 1, batch, a.weight.size(1)}, a.x.options()) : Tensor();
  Tensor dx = a.need_x ? parts[0] : Tensor();
  if (!blocks) {
    step_rows<T>(a, gram, 0, rows, dx);
    return dx;
  }
  at::parallel_for(0, (rows + kBlockRows - 1) / kBlockRows, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below;  // dispatch state is the thread's
    Tensor part = a.need_x ? parts[at::get_thread_num()] : Tensor();
    for (int64_t i = begin; i < end; ++i)
      step_rows<T>(a, gram, i * kBlockRows, std::min(kBlockRows, rows - i * kBlockRows), part);
  });
  for (int64_t t = 1; a.need_x && t < threads; ++t) dx.add_(parts[t]);
  return dx;
}

Tensor in_backward_sgd_(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& z, const Tensor& weight,
                        const std::optional<Tensor>& scale, const std::optional<Tensor>& rho,
                        const std::optional<Tensor>& radius, const std::optional<Tensor>& norm,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& telemetry, string_view kind,
                        at::ArrayRef<double> numbers, bool maximize, bool keep_norm, bool refresh, bool need_x) {
  check_layer(x, weight, scale, bias);
  const int64_t rows = weight.size(0), batch = batch_of(x);
  check_device("grad", grad, weight);
  TORCH_CHECK_TYPE(grad.scalar_type() == weight.scalar_type(), "grad must have the weight's dtype ",
                   weight.scalar_type(), ", got ", grad.scalar_type());
  TORCH_CHECK_VALUE(grad.dim() >= 1 && grad.size(-1) == rows && batch_of(grad) == batch, "grad must have shape (..., ",
                    rows, ") with the batch of x ", x.sizes(), ", got ", grad.sizes());
  TORCH_CHECK_VALUE(numbers.size() == kNumbers, "numbers must have ", static_cast<size_t>(kNumbers), " entries, got ",
                    numbers.size());
  const bool polar = scale.has_value();
  const auto check_state = [&](const char* name, const std::optional<Tensor>& t, int64_t columns) {
    TORCH_CHECK_VALUE(t.has_value() == polar || (columns > 1 && !t), name, " must be given with scale, and only then");
    if (!t) return;
    check_device(name, *t, weight);
    TORCH_CHECK_TYPE(t->scalar_type() == at::kDouble, name, " must be float64, got ", t->scalar_type());
    TORCH_CHECK_VALUE(t->is_contiguous() && t->numel() == rows * columns, name, " must be contiguous with ",
                      rows * columns, " elements for a weight of ", rows, " rows, got shape ", t->sizes());
  };
  check_state("rho", rho, 1);
  check_state("radius", radius, 1);
  check_state("norm", norm, 1);
  check_state("telemetry", telemetry, 5);
  if (z)
    TORCH_CHECK_VALUE(z->dim() == 2 && z->size(0) == rows && z->size(1) == batch && z->is_contiguous() &&
                          z->scalar_type() == weight.scalar_type(),
                      "z must be contiguous of the weight's dtype and of shape (", rows, ", ", batch, "), got ",
                      z->scalar_type(), " of ", z->sizes());
  const Kind k = !polar || kind == "swn" ? Kind::swn : kind == "unit" ? Kind::unit : parse_kind(kind);

  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto pointer = [](const std::optional<Tensor>& t) { return t ? t->mutable_data_ptr<double>() : nullptr; };
  Arguments a{as_matrix(grad), as_matrix(x), {}, weight, scale.value_or(Tensor()), bias.value_or(Tensor()), {}, numbers[kBiasLr],
              numbers[kBiasWeightDecay], maximize ? -1.0 : 1.0, polar, need_x, false, refresh};
  a.state = {pointer(rho), pointer(radius), pointer(norm), pointer(telemetry), k, keep_norm, weight.size(1) == 1,
             numbers[kLr], numbers[kRadiusLr], numbers[kWeightDecay], numbers[kRadiusWeightDecay]};
  a.measure = polar && !telemetry && !gram_is_cheaper(batch, rows, weight.size(1));
  if (polar) a.z = z ? *z : at::mm(weight, a.x.t());
  Tensor dx;
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "in_backward_sgd_", [&] { dx = run<scalar_t>(a); });
  weight.unsafeGetTensorImpl()->bump_version();
  for (const auto& t : {scale, rho, radius, norm, bias, telemetry})
    if (t) t->unsafeGetTensorImpl()->bump_version();
  return need_x ? dx.view(x.sizes()) : at::empty({0}, x.options());
}

std::tuple<Tensor, Tensor> in_backward_linear_meta(const Tensor& x, const Tensor& weight, const std::optional<Tensor>&,
                                                   const std::optional<Tensor>&) {
  c10::SymDimVector shape(x.sym_sizes().begin(), x.sym_sizes().end() - 1);
  c10::SymInt batch = 1;
  for (const auto& size : shape) batch = batch * size;
  shape.push_back(weight.sym_size(0));
  return {at::empty_symint(shape, x.options()), at::empty_symint({weight.sym_size(0), batch}, x.options())};
}

Tensor in_backward_sgd_meta(const Tensor&, const Tensor& x, const std::optional<Tensor>&, const Tensor&,
                            const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                            const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                            string_view, at::ArrayRef<double>, bool, bool, bool, bool need_x) {
  return need_x ? at::empty_symint(x.sym_sizes(), x.options()) : at::empty({0}, x.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wnkernels, m) {
  m.def("in_backward_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias) -> (Tensor, Tensor)");
  m.def("in_backward_sgd_(Tensor grad, Tensor x, Tensor? z, Tensor(a!) weight, Tensor(b!)? scale, Tensor(c!)? rho, "
        "Tensor(d!)? radius, Tensor(e!)? norm, Tensor(f!)? bias, Tensor(g!)? telemetry, str kind, float[] numbers, "
        "bool maximize, bool keep_norm, bool refresh, bool need_x) -> Tensor");
}

TORCH_LIBRARY_IMPL(wnkernels, CPU, m) {
  m.impl("in_backward_linear", TORCH_FN(in_backward_linear));
  m.impl("in_backward_sgd_", TORCH_FN(in_backward_sgd_));
}
TORCH_LIBRARY_IMPL(wnkernels, Meta, m) {
  m.impl("in_backward_linear", TORCH_FN(in_backward_linear_meta));
  m.impl("in_backward_sgd_", TORCH_FN(in_backward_sgd_meta));
}

namespace op {
std::tuple<Tensor, Tensor> in_backward_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                                              const std::optional<Tensor>& bias) {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("wnkernels::in_backward_linear", "")
                                 .typed<decltype(op::in_backward_linear)>();
  return handle.call(x, weight, scale, bias);
}
Tensor in_backward_sgd_(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& z, const Tensor& weight,
                        const std::optional<Tensor>& scale, const std::optional<Tensor>& rho,
                        const std::optional<Tensor>& radius, const std::optional<Tensor>& norm,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& telemetry, string_view kind,
                        at::ArrayRef<double> numbers, bool maximize, bool keep_norm, bool refresh, bool need_x) {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("wnkernels::in_backward_sgd_", "")
                                 .typed<decltype(op::in_backward_sgd_)>();
  return handle.call(grad, x, z, weight, scale, rho, radius, norm, bias, telemetry, kind, numbers, maximize, keep_norm,
                     refresh, need_x);
}
}  // namespace op
}  // namespace wn
