// y = x w^T + b for w = (s/n) v, without w where w would cost more than it saves.
#include <ATen/Parallel.h>
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

// Layers of up to this many elements stay in a core's cache.
constexpr int64_t kSmallLayer = 1 << 18;

// The rule, in one place. Without w, y takes a second pass (batch x rows); with it, w is written and read (rows x width)
// and, on a CPU, the page faults of a fresh w are paid. So w is materialized where the batch is large against the width,
// and where the layer is small enough that the one fused call is the quickest.
// 16-bit weights are materialized too: x v^T could leave the range of float16, and rounding it before it is scaled costs
// accuracy in either type. Figures: bench/NOTES.md.
bool materialize_is_faster(const Tensor& x, const Tensor& v) {
  if (!(v.is_cpu() || v.is_cuda() || v.is_meta())) return true;
  if (v.scalar_type() != at::kFloat && v.scalar_type() != at::kDouble) return true;
  const c10::SymInt width = v.sym_size(1), batch_elements = x.sym_numel();
  return v.sym_numel() <= kSmallLayer || batch_elements > width * width;
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
// the norms without waiting for them; elsewhere float16 is always normalized first, and float32 rows of norm beyond
// 1e+-18 need materialize=True.
bool in_range(const Tensor& scale, at::ScalarType type) {
  if (type == at::kDouble) return true;
  if (!scale.is_cpu()) return type != at::kHalf;
  const float largest = type == at::kHalf ? 16.f : 1e18f;
  const float* s = scale.const_data_ptr<float>();
  bool good = true;
  for (int64_t u = 0; u < scale.numel(); ++u) {
    const float size = std::fabs(s[u]);
    good = good && (size == 0 || (size >= 1 / largest && size <= largest));
  }
  return good;
}

// On a CPU the passes over v (its norm and the product; the gradient and its projection) go block by block of rows, each
// block in one thread from beginning to end: it is read from memory once and found in cache by whoever comes second,
// and the whole costs one parallel region. Small layers are in cache anyway and leave the threads to the product.
constexpr int64_t kBlockRows = 64;

template <class F> void for_blocks(const Tensor& v, int64_t batch, F&& block) {
  const int64_t rows = v.size(0), step = std::max(kBlockRows, batch / 2);
  if (!v.is_cpu() || v.numel() <= kSmallLayer || rows < 2 * step * at::get_num_threads())
    return block(0, rows);
  at::parallel_for(0, (rows + step - 1) / step, 1, [&](int64_t first, int64_t last) {
    const at::AutoDispatchBelowADInplaceOrView below;  // dispatch state is the thread's
    for (int64_t i = first; i < last; ++i) block(i * step, std::min(step, rows - i * step));
  });
}

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& v, const Tensor& g,
                                          const std::optional<Tensor>& bias, string_view kind) {
  check(x, v, bias);
  const auto scale_options = v.options().dtype(accumulate_type(v.scalar_type()));
  if (x.is_meta())
    return {at::empty_symint(output_shape(x, v), x.options()), at::empty_symint({v.sym_size(0)}, scale_options)};
  const Tensor x2 = as_matrix(x, v.sym_size(1)), radius = g.reshape({-1});
  Tensor y = at::empty({x2.size(0), v.size(0)}, x.options()), scale = at::empty({v.size(0)}, scale_options);
  for_blocks(v, x2.size(0), [&](int64_t first, int64_t rows) {
    const Tensor v_rows = v.narrow(0, first, rows), g_rows = radius.narrow(0, first, rows);
    const Tensor scale_rows = scale.narrow(0, first, rows).copy_(op::row_scale(v_rows, g_rows, kind));
    Tensor y_rows = y.narrow(1, first, rows);
    if (in_range(scale_rows, v.scalar_type())) {
      at::mm_out(y_rows, x2, v_rows.t());
      if (bias && scale.scalar_type() == v.scalar_type())
        at::addcmul_out(y_rows, bias->narrow(0, first, rows), y_rows, scale_rows);
      else
        y_rows.mul_(scale_rows);
      if (bias && scale.scalar_type() != v.scalar_type()) y_rows.add_(bias->narrow(0, first, rows));
    } else {
      at::mm_out(y_rows, x2, op::weight_norm(v_rows, g_rows, 0, kind, std::nullopt).t());
      if (bias) y_rows.add_(bias->narrow(0, first, rows));
    }
  });
  return {x.dim() == 2 ? y : y.reshape_symint(output_shape(x, v)), scale};
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x, const Tensor& v,
                                                   const Tensor& g, const Tensor& scale, string_view kind, bool need_x,
                                                   bool need_weight) {
  const auto empty_if = [](bool needed, const Tensor& like) {
    return needed ? at::empty_symint(like.sym_sizes(), like.options()) : at::empty({0}, like.options());
  };
  Tensor dx = empty_if(need_x, x), dv = empty_if(need_weight, v), dg = empty_if(need_weight, g);
  if (x.is_meta()) return {dx, dv, dg};
  const Tensor dy = as_matrix(grad, v.sym_size(0)), x2 = as_matrix(x, v.sym_size(1)), radius = g.reshape({-1});
  const Tensor dg_rows = dg.view({-1});
  if (need_weight)
    for_blocks(v, x2.size(0), [&](int64_t first, int64_t rows) {
      Tensor dv_rows = dv.narrow(0, first, rows);
      at::mm_out(dv_rows, dy.narrow(1, first, rows).t(), x2);
      dg_rows.narrow(0, first, rows)
          .copy_(op::project_(dv_rows, v.narrow(0, first, rows), radius.narrow(0, first, rows), 0, kind));
    });
  if (need_x) {
    Tensor dx2 = as_matrix(dx, v.sym_size(1));
    if (in_range(scale, v.scalar_type()))
      at::mm_out(dx2, (dy * scale).to(v.scalar_type()), v);
    else
      at::mm_out(dx2, dy, op::weight_norm(v, g, 0, kind, std::nullopt));
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
TORCH_LIBRARY_IMPL(wnkernels, FuncTorchBatchedDecomposition, m) { m.impl("weight_norm_linear", TORCH_FN(weight_norm_linear)); }
TORCH_LIBRARY_IMPL(wnkernels, AutocastCPU, m) { m.impl("weight_norm_linear", TORCH_FN(weight_norm_linear_autocast)); }
TORCH_LIBRARY_IMPL(wnkernels, AutocastCUDA, m) { m.impl("weight_norm_linear", TORCH_FN(weight_norm_linear_autocast)); }

}  // namespace wn
