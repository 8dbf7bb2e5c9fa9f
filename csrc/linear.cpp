// y = x w^T + b for w = (s/n) v, without w where w would cost more than it saves.
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <torch/library.h>

#include "ops.h"

namespace wn {

using at::Tensor;

namespace {

// The rule, in one place. Scaling y costs a pass over y (batch x rows), materializing w costs a write and a read of w
// (rows x width) and, on a CPU, the page faults of a fresh w. So w is materialized only where the batch is large
// against the width, or w is so small that it stays in cache and one fused call is quicker than a scaled product.
// 16-bit weights always take the materialized path: x v^T could leave the range of float16, and rounding x v^T before
// it is scaled would cost accuracy in either type. Figures: bench/NOTES.md.
bool materialize_is_faster(const Tensor& x, const Tensor& v) {
  if (!(v.is_cpu() || v.is_cuda() || v.is_meta())) return true;
  if (v.scalar_type() != at::kFloat && v.scalar_type() != at::kDouble) return true;
  const c10::SymInt width = v.sym_size(1), batch = x.sym_numel();  // batch x width elements
  return v.sym_numel() <= 1 << 16 || batch >= 4 * width * width;
}

void check(const Tensor& x, const Tensor& v, const std::optional<Tensor>& bias) {
  TORCH_CHECK_VALUE(v.dim() == 2, "v must have 2 dimensions (rows, width), got shape ", v.sym_sizes());
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.sym_size(-1) == v.sym_size(1), "x must have shape (..., ", v.sym_size(1),
                    ") for v of shape ", v.sym_sizes(), ", got ", x.sym_sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == v.scalar_type(), "x must have v's dtype ", v.scalar_type(), ", got ",
                   x.scalar_type());
  TORCH_CHECK(x.device() == v.device(), "x must be on v's device ", v.device(), ", got ", x.device());
  if (bias)
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == v.sym_size(0), "bias must have shape (", v.sym_size(0),
                      ",), got ", bias->sym_sizes());
}

c10::SymDimVector output_shape(const Tensor& x, const Tensor& v) {
  c10::SymDimVector shape(x.sym_sizes().begin(), x.sym_sizes().end() - 1);
  shape.push_back(v.sym_size(0));
  return shape;
}

Tensor as_matrix(const Tensor& x, const c10::SymInt& width) {
  return x.dim() == 2 ? x : x.reshape_symint({x.sym_numel() / (width == 0 ? 1 : width), width});
}

// Where x v^T could leave the range of the type although y does not, v is not used unnormalized. Only a CPU can look at
// the norms without waiting for them; elsewhere rows beyond 1e+-18 need materialize=True.
bool in_range(const Tensor& scale) {
  if (!scale.is_cpu() || scale.scalar_type() == at::kDouble) return true;
  const float* s = scale.const_data_ptr<float>();
  bool good = true;
  for (int64_t u = 0; u < scale.numel(); ++u) good = good && (s[u] == 0 || (std::fabs(s[u]) > 1e-18f && std::fabs(s[u]) < 1e18f));
  return good;
}

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& v, const Tensor& g,
                                          const std::optional<Tensor>& bias, string_view kind) {
  check(x, v, bias);
  if (x.is_meta()) return {at::empty_symint(output_shape(x, v), x.options()), op::row_norm(v, 0)};
  const Tensor scale = op::row_scale(v, g, kind);
  if (!in_range(scale)) return {at::linear(x, op::weight_norm(v, g, 0, kind, std::nullopt), bias), scale};
  Tensor y = at::mm(as_matrix(x, v.sym_size(1)), v.t());
  if (bias)
    at::addcmul_out(y, *bias, y, scale);
  else
    y.mul_(scale);
  return {x.dim() == 2 ? y : y.reshape_symint(output_shape(x, v)), scale};
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x, const Tensor& v,
                                                   const Tensor& g, const Tensor& scale, string_view kind, bool need_x,
                                                   bool need_weight) {
  const Tensor none = at::empty({0}, v.options());
  if (x.is_meta())
    return {need_x ? at::empty_symint(x.sym_sizes(), x.options()) : none,
            need_weight ? at::empty_symint(v.sym_sizes(), v.options()) : none,
            need_weight ? at::empty_like(g, at::MemoryFormat::Contiguous) : none};
  const Tensor dy = as_matrix(grad, v.sym_size(0));
  Tensor dx = none, dv = none, dg = none;
  if (need_x) {
    dx = in_range(scale) ? at::mm(dy * scale, v) : at::mm(dy, op::weight_norm(v, g, 0, kind, std::nullopt));
    if (x.dim() != 2) dx = dx.reshape_symint(x.sym_sizes());
  }
  if (need_weight) {
    dv = at::mm(dy.t(), as_matrix(x, v.sym_size(1)));
    dg = op::project_(dv, v, g, 0, kind);
  }
  return {dx, dv, dg};
}

Tensor weight_norm_linear(const Tensor& x, const Tensor& v, const Tensor& g, const std::optional<Tensor>& bias,
                          string_view kind, std::optional<bool> materialize) {
  check(x, v, bias);
  const bool transformed = needs_formula(x, v, g, bias.value_or(Tensor()));
  if (transformed || materialize.value_or(materialize_is_faster(x, v)))
    return at::linear(x, op::weight_norm(v, g, 0, kind, std::nullopt), bias);
  return std::get<0>(op::linear_forward(x, v, g, bias, kind));
}

// Under autocast a plain layer copies its weight to the lower type; here the same pass normalizes it.
Tensor weight_norm_linear_autocast(const Tensor& x, const Tensor& v, const Tensor& g, const std::optional<Tensor>& bias,
                                   string_view kind, std::optional<bool> materialize) {
  const auto device = v.device().type();
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto low = at::autocast::get_autocast_dtype(device);
  if (v.scalar_type() != at::kFloat || low == at::kFloat)
    return op::weight_norm_linear(x, v, g, bias, kind, materialize);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(low, t, device); };
  const Tensor w = op::weight_norm(v, g, 0, kind, low);
  return at::linear(cast(x), w, bias ? std::make_optional(cast(*bias)) : std::nullopt);
}

void register_kernels(torch::Library& m) {
  m.impl("linear_forward", TORCH_FN(linear_forward));
  m.impl("linear_backward", TORCH_FN(linear_backward));
}

}  // namespace

TORCH_LIBRARY_IMPL(wnkernels, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(wnkernels, Meta, m) { register_kernels(m); }
#if defined(WN_WITH_CUDA)
TORCH_LIBRARY_IMPL(wnkernels, CUDA, m) { register_kernels(m); }
#endif
TORCH_LIBRARY_IMPL(wnkernels, CompositeImplicitAutograd, m) { m.impl("weight_norm_linear", TORCH_FN(weight_norm_linear)); }
TORCH_LIBRARY_IMPL(wnkernels, AutocastCPU, m) { m.impl("weight_norm_linear", TORCH_FN(weight_norm_linear_autocast)); }
TORCH_LIBRARY_IMPL(wnkernels, AutocastCUDA, m) { m.impl("weight_norm_linear", TORCH_FN(weight_norm_linear_autocast)); }

}  // namespace wn
