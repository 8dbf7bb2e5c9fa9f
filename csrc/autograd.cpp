// Derivatives. First order goes through the kernels; higher orders, forward mode and functorch transforms through
// at:: formulas, which torch differentiates itself.
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops.h"

namespace wn {

using at::ScalarType;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

bool transforming() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}
bool has_tangent(const Tensor& t) { return t.defined() && t._fw_grad(/*level=*/0).defined(); }

namespace {

template <class... Tensors> bool differentiable(const Tensors&... tensors) {
  return c10::GradMode::is_enabled() && ((tensors.defined() && tensors.requires_grad()) || ...);
}

// What a node keeps besides tensors, as one entry: each entry of saved_data costs two allocations.
struct RowSettings {
  Dim dim;
  Kind kind;

  void save(AutogradContext* ctx) const {
    ctx->saved_data["rows"] = 2 * dim.value_or(-1) + (kind == Kind::ewn);
  }
  static RowSettings load(AutogradContext* ctx) {
    const int64_t code = ctx->saved_data["rows"].toInt(), dim = code >> 1;
    return {dim < 0 ? Dim() : Dim(dim), code & 1 ? Kind::ewn : Kind::swn};
  }
  string_view kind_name() const { return kind == Kind::ewn ? "ewn" : "swn"; }
};

struct WeightNorm : Function<WeightNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& v, const Tensor& g, Dim dim, string_view kind,
                        std::optional<ScalarType> out_dtype) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({v, g});
    RowSettings{wrap_dim(v, dim), parse_kind(kind)}.save(ctx);
    const at::AutoDispatchBelowADInplaceOrView below;
    return op::weight_norm(v, g, dim, kind, out_dtype);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    Tensor dv, dg;
    if (grads[0].defined()) {
      const auto saved = ctx->get_saved_variables();
      const RowSettings rows = RowSettings::load(ctx);
      if (ctx->needs_input_grad(0))
        std::tie(dv, dg) = op::weight_norm_backward(grads[0], saved[0], saved[1], rows.dim, rows.kind_name());
      else
        dg = op::radius_backward(grads[0], saved[0], saved[1], rows.dim, rows.kind_name());
    }
    return {dv, dg, Tensor(), Tensor(), Tensor()};
  }
};

Tensor weight_norm(const Tensor& v, const Tensor& g, Dim dim, string_view kind, std::optional<ScalarType> out_dtype) {
  if (needs_formula(v, g)) return formula::weight_norm(v, g, dim, kind, out_dtype);
  if (!differentiable(v, g)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return op::weight_norm(v, g, dim, kind, out_dtype);
  }
  return WeightNorm::apply(v, g, dim, kind, out_dtype);
}

// Inside a backward pass grad mode is off, and the kernel runs; with create_graph=True the formula takes over.
std::tuple<Tensor, Tensor> weight_norm_backward(const Tensor& grad, const Tensor& v, const Tensor& g, Dim dim,
                                                string_view kind) {
  if (differentiable(grad, v, g) || needs_formula(grad, v, g))
    return formula::weight_norm_backward(grad, v, g, dim, kind);
  const at::AutoDispatchBelowADInplaceOrView below;
  return op::weight_norm_backward(grad, v, g, dim, kind);
}

Tensor radius_backward(const Tensor& grad, const Tensor& v, const Tensor& g, Dim dim, string_view kind) {
  if (differentiable(grad, v, g) || needs_formula(grad, v, g))
    return formula::radius_backward(grad, v, g, dim, kind);
  const at::AutoDispatchBelowADInplaceOrView below;
  return op::radius_backward(grad, v, g, dim, kind);
}

struct RowNormFunction : Function<RowNormFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& v, Dim dim) {
    ctx->save_for_backward({v});
    RowSettings{wrap_dim(v, dim), Kind::swn}.save(ctx);
    const at::AutoDispatchBelowADInplaceOrView below;
    return op::row_norm(v, dim);
  }

  // d|v| = <v/|v|, dv>, so the gradient is the weight of direction v and radius `grad`.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor v = ctx->get_saved_variables()[0];
    return {op::weight_norm(v, grads[0], RowSettings::load(ctx).dim, "swn", std::nullopt), Tensor()};
  }
};

Tensor row_norm(const Tensor& v, Dim dim) {
  if (needs_formula(v)) return formula::row_norm(v, dim);
  return RowNormFunction::apply(v, dim);
}

struct Linear : Function<Linear> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& v, const Tensor& g,
                               const std::optional<Tensor>& bias, string_view kind) {
    ctx->set_materialize_grads(false);
    RowSettings{0, parse_kind(kind)}.save(ctx);
    ctx->saved_data["bias"] = bias.has_value();
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, scale] = op::linear_forward(x, v, g, bias, kind);
    ctx->save_for_backward({x, v, g, scale});
    ctx->mark_non_differentiable({scale});
    return {y, scale};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    Tensor dx, dv, dg, db;
    if (grads[0].defined()) {
      const auto saved = ctx->get_saved_variables();
      const bool need_x = ctx->needs_input_grad(0), need_v = ctx->needs_input_grad(1),
                 need_g = ctx->needs_input_grad(2);
      if (need_x || need_v || need_g) {
        std::tie(dx, dv, dg) = op::linear_backward(grads[0], saved[0], saved[1], saved[2], saved[3],
                                                   RowSettings::load(ctx).kind_name(), need_x, need_v || need_g);
        if (!need_x) dx = Tensor();
        if (!need_v) dv = Tensor();
        if (!need_g) dg = Tensor();
      }
      if (ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(3))
        db = grads[0].reshape_symint({-1, grads[0].sym_size(-1)}).sum(0);
    }
    return {dx, dv, dg, db, Tensor()};
  }
};

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& v, const Tensor& g,
                                          const std::optional<Tensor>& bias, string_view kind) {
  const auto outputs = Linear::apply(x, v, g, bias, kind);
  return {outputs[0], outputs[1]};
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x, const Tensor& v,
                                                   const Tensor& g, const Tensor& scale, string_view kind, bool need_x,
                                                   bool need_weight) {
  if (!differentiable(grad, x, v, g) && !needs_formula(grad, x, v, g)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return op::linear_backward(grad, x, v, g, scale, kind, need_x, need_weight);
  }
  const Tensor dy = grad.reshape_symint({-1, v.sym_size(0)});
  Tensor dx, dv, dg;
  if (need_x) dx = dy.matmul(op::weight_norm(v, g, 0, kind, std::nullopt)).reshape_symint(x.sym_sizes());
  if (need_weight)
    std::tie(dv, dg) =
        op::weight_norm_backward(dy.t().matmul(x.reshape_symint({-1, v.sym_size(1)})), v, g, 0, kind);
  return {dx, dv, dg};
}

Tensor project_(Tensor grad, const Tensor& v, const Tensor& g, Dim dim, string_view kind) {
  TORCH_CHECK(!differentiable(grad),
              "project_ overwrites grad and is not differentiable: call it under torch.no_grad() or on a grad that does "
              "not require gradients");
  const at::AutoDispatchBelowADInplaceOrView below;
  return op::project_(std::move(grad), v, g, dim, kind);
}

void normalize_(Tensor w, Dim dim, const std::optional<Tensor>& norm, double value) {
  TORCH_CHECK(!differentiable(w),
              "normalize_ overwrites w and is not differentiable: call it under torch.no_grad(), or use weight_norm");
  const at::AutoDispatchBelowADInplaceOrView below;
  op::normalize_(std::move(w), dim, norm, value);
}

}  // namespace

TORCH_LIBRARY_IMPL(wnkernels, Autograd, m) {
  m.impl("weight_norm", TORCH_FN(weight_norm));
  m.impl("weight_norm_backward", TORCH_FN(weight_norm_backward));
  m.impl("radius_backward", TORCH_FN(radius_backward));
  m.impl("row_norm", TORCH_FN(row_norm));
  m.impl("linear_forward", TORCH_FN(linear_forward));
  m.impl("linear_backward", TORCH_FN(linear_backward));
  m.impl("project_", TORCH_FN(project_));
  m.impl("normalize_", TORCH_FN(normalize_));
}

// vmap decomposes into the formula, whose operations all have batching rules.
TORCH_LIBRARY_IMPL(wnkernels, FuncTorchBatchedDecomposition, m) {
  m.impl("weight_norm", TORCH_FN(formula::weight_norm));
  m.impl("weight_norm_backward", TORCH_FN(formula::weight_norm_backward));
  m.impl("radius_backward", TORCH_FN(formula::radius_backward));
  m.impl("row_norm", TORCH_FN(formula::row_norm));
}

}  // namespace wn
