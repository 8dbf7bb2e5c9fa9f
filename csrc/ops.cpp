// Operators: argument checks, output allocation, dispatch to the engines.
#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include "run.h"

namespace wn {

Kind parse_kind(string_view kind) {
  if (kind == "swn") return Kind::swn;
  TORCH_CHECK_VALUE(kind == "ewn", "kind must be 'swn' (w = g v/|v|) or 'ewn' (w = exp(alpha) v/|v|), got '",
                    std::string(kind), "'");
  return Kind::ewn;
}

Dim wrap_dim(const Tensor& v, Dim dim) {
  if (!dim) return dim;
  const int64_t dims = v.dim();
  TORCH_CHECK_VALUE(dims > 0 && *dim >= -dims && *dim < dims, "dim must be None or in [", -dims, ", ", dims - 1,
                    "] for a tensor of ", dims, " dimensions, got ", *dim);
  return *dim < 0 ? *dim + dims : *dim;
}

ScalarType accumulate_type(ScalarType weight) { return weight == at::kDouble ? at::kDouble : at::kFloat; }

namespace {

// ---- one function per operator, for CPU, CUDA and Meta -----------------------------------------------------------

Tensor weight_norm(const Tensor& v, const Tensor& g, Dim dim, string_view kind, std::optional<ScalarType> out_dtype) {
  const Rows rows = check_rows(v, g, dim, kind);
  const ScalarType out = out_dtype.value_or(v.scalar_type());
  check_pair("out_dtype", out, v.scalar_type());
  const Tensor x = dense(v);
  Tensor w = at::empty_strided_symint(x.sym_sizes(), x.sym_strides(), x.options().dtype(out));
  if (!v.is_meta()) {
    const Tensor radius = g.contiguous();
    run(problem_of(Forward{rows.kind, values_of(radius)}, layout_of(x, rows.dim), {&x}, {&w}), v);
  }
  return w;
}

void run_backward(const Tensor& G, const Tensor& x, const Tensor& g, const Rows& rows, const Tensor& dr,
                  at::ArrayRef<const Tensor*> out) {
  const Tensor radius = g.contiguous();
  run(problem_of(Backward{rows.kind, values_of(radius), results_of(dr)}, layout_of(x, rows.dim), {&x, &G}, out), x);
}

Tensor like_radius(const Tensor& g) { return at::empty_like(g, at::MemoryFormat::Contiguous); }

std::tuple<Tensor, Tensor> weight_norm_backward(const Tensor& grad, const Tensor& v, const Tensor& g, Dim dim,
                                                string_view kind) {
  const Rows rows = check_rows(v, g, dim, kind);
  check_gradient("grad", grad, v);
  const Tensor x = dense(v);
  Tensor dv = at::empty_like(x), dr = like_radius(g);
  if (!v.is_meta()) run_backward(in_layout_of(grad, x), x, g, rows, dr, {&dv});
  return {dv, dr};
}

Tensor radius_backward(const Tensor& grad, const Tensor& v, const Tensor& g, Dim dim, string_view kind) {
  const Rows rows = check_rows(v, g, dim, kind);
  check_gradient("grad", grad, v);
  const Tensor x = dense(v);
  Tensor dr = like_radius(g);
  if (!v.is_meta()) run_backward(in_layout_of(grad, x), x, g, rows, dr, {});
  return dr;
}

Tensor row_norm(const Tensor& v, Dim dim) {
  check_weight_dtype("v", v.scalar_type());
  dim = wrap_dim(v, dim);
  const auto options = v.options().dtype(accumulate_type(v.scalar_type()));
  Tensor n = dim ? at::empty_symint({v.sym_size(*dim)}, options) : at::empty({}, options);
  if (!v.is_meta()) {
    const Tensor x = dense(v);
    run(problem_of(RowNorm{results_of(n)}, layout_of(x, dim), {&x}, at::ArrayRef<const Tensor*>()), v);
  }
  return n;
}

Tensor row_scale(const Tensor& v, const Tensor& g, string_view kind) {
  const Rows rows = check_rows(v, g, 0, kind);
  Tensor scale = at::empty_symint({v.sym_size(0)}, v.options().dtype(accumulate_type(v.scalar_type())));
  if (!v.is_meta()) {
    const Tensor x = dense(v), radius = g.contiguous();
    RowScale formula;
    formula.kind = rows.kind;
    formula.radius = values_of(radius);
    formula.scale = results_of(scale);
    run(problem_of(formula, layout_of(x, rows.dim), {&x}, at::ArrayRef<const Tensor*>()), v);
  }
  return scale;
}

Tensor project_(Tensor grad, const Tensor& v, const Tensor& g, Dim dim, string_view kind) {
  const Rows rows = check_rows(v, g, dim, kind);
  check_gradient("grad", grad, v);
  TORCH_CHECK(!v.is_alias_of(grad), "grad must not share memory with v: it is overwritten while v is read");
  Tensor dr = like_radius(g);
  if (!v.is_meta()) {
    TORCH_CHECK_VALUE(grad.is_non_overlapping_and_dense(),
                      "grad must be dense without overlap to be projected in place, got strides ", grad.strides(),
                      " for shape ", grad.sizes());
    run_backward(grad, in_layout_of(v, grad), g, rows, dr, {&grad});
    grad.unsafeGetTensorImpl()->bump_version();
  }
  return dr;
}

void normalize_(Tensor w, Dim dim, const std::optional<Tensor>& norm, double value) {
  check_weight_dtype("w", w.scalar_type());
  dim = wrap_dim(w, dim);
  if (norm) {
    check_device("norm", *norm, w);
    check_weight_dtype("norm", norm->scalar_type());
    const c10::SymInt rows = dim ? w.sym_size(*dim) : c10::SymInt(1);
    TORCH_CHECK_VALUE(norm->sym_numel() == rows && norm->dim() <= 1, "norm must be a number or a tensor of shape (",
                      rows, ",), got shape ", norm->sym_sizes());
  }
  if (w.is_meta()) return;
  TORCH_CHECK_VALUE(w.is_non_overlapping_and_dense(),
                    "w must be dense without overlap to be normalized in place, got strides ", w.strides(),
                    " for shape ", w.sizes());
  const Tensor target = norm ? norm->contiguous() : Tensor();
  const RowValues radius = norm ? values_of(target) : RowValues{nullptr, DType::f32, value};
  run(problem_of(Forward{Kind::swn, radius}, layout_of(w, dim), {&w}, {&w}), w);
  w.unsafeGetTensorImpl()->bump_version();
}

void register_kernels(torch::Library& m) {
  m.impl("weight_norm", TORCH_FN(weight_norm));
  m.impl("weight_norm_backward", TORCH_FN(weight_norm_backward));
  m.impl("radius_backward", TORCH_FN(radius_backward));
  m.impl("row_norm", TORCH_FN(row_norm));
  m.impl("row_scale", TORCH_FN(row_scale));
  m.impl("project_", TORCH_FN(project_));
  m.impl("normalize_", TORCH_FN(normalize_));
}

}  // namespace

// ---- the dispatcher's view ---------------------------------------------------------------------------------------

TORCH_LIBRARY(wnkernels, m) {
  m.def("weight_norm(Tensor v, Tensor g, int? dim=0, str kind='swn', ScalarType? out_dtype=None) -> Tensor");
  m.def("weight_norm_backward(Tensor grad, Tensor v, Tensor g, int? dim, str kind) -> (Tensor, Tensor)");
  m.def("radius_backward(Tensor grad, Tensor v, Tensor g, int? dim, str kind) -> Tensor");
  m.def("row_norm(Tensor v, int? dim=0) -> Tensor");
  m.def("row_scale(Tensor v, Tensor g, str kind) -> Tensor");
  m.def("project_(Tensor(a!) grad, Tensor v, Tensor g, int? dim=0, str kind='swn') -> Tensor");
  m.def("normalize_(Tensor(a!) w, int? dim=0, Tensor? norm=None, float value=1.0) -> ()");
  m.def("linear_forward(Tensor x, Tensor v, Tensor g, Tensor? bias, str kind) -> (Tensor, Tensor)");
  m.def("linear_backward(Tensor grad, Tensor x, Tensor v, Tensor g, Tensor scale, str kind, bool need_x, "
        "bool need_weight) -> (Tensor, Tensor, Tensor)");
  m.def("weight_norm_linear(Tensor x, Tensor v, Tensor g, Tensor? bias=None, str kind='swn', "
        "bool? materialize=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(wnkernels, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(wnkernels, Meta, m) { register_kernels(m); }
#if defined(WN_WITH_CUDA)
TORCH_LIBRARY_IMPL(wnkernels, CUDA, m) { register_kernels(m); }
#endif

// Devices without kernels: the formula, and one warning.
namespace fallback {
namespace {

void warn(const Tensor& on) {
  TORCH_WARN_ONCE("wnkernels has no kernels for ", on.device().type(),
                  " tensors in this build and computes in torch operations there, which is slower.");
}

Tensor weight_norm(const Tensor& v, const Tensor& g, Dim dim, string_view kind, std::optional<ScalarType> out_dtype) {
  warn(v);
  return formula::weight_norm(v, g, dim, kind, out_dtype);
}
std::tuple<Tensor, Tensor> weight_norm_backward(const Tensor& grad, const Tensor& v, const Tensor& g, Dim dim,
                                                string_view kind) {
  warn(v);
  return formula::weight_norm_backward(grad, v, g, dim, kind);
}
Tensor radius_backward(const Tensor& grad, const Tensor& v, const Tensor& g, Dim dim, string_view kind) {
  warn(v);
  return formula::radius_backward(grad, v, g, dim, kind);
}
Tensor row_norm(const Tensor& v, Dim dim) {
  warn(v);
  return formula::row_norm(v, dim);
}
Tensor project_(Tensor grad, const Tensor& v, const Tensor& g, Dim dim, string_view kind) {
  warn(v);
  const auto [dv, dr] = formula::weight_norm_backward(grad, v, g, dim, kind);
  grad.copy_(dv);
  return dr;
}
void normalize_(Tensor w, Dim dim, const std::optional<Tensor>& norm, double value) {
  warn(w);
  const Dim rows = wrap_dim(w, dim);
  const Tensor target = at::full_symint(rows ? c10::SymDimVector{w.sym_size(*rows)} : c10::SymDimVector{}, value,
                                        w.options().dtype(accumulate_type(w.scalar_type())));
  w.copy_(formula::weight_norm(w, norm ? target.copy_(*norm) : target, dim, "swn", std::nullopt));
}

}  // namespace
}  // namespace fallback

TORCH_LIBRARY_IMPL(wnkernels, CompositeExplicitAutograd, m) {
  m.impl("weight_norm", TORCH_FN(fallback::weight_norm));
  m.impl("weight_norm_backward", TORCH_FN(fallback::weight_norm_backward));
  m.impl("radius_backward", TORCH_FN(fallback::radius_backward));
  m.impl("row_norm", TORCH_FN(fallback::row_norm));
  m.impl("project_", TORCH_FN(fallback::project_));
  m.impl("normalize_", TORCH_FN(fallback::normalize_));
}

namespace op {

// The lookup is made once per operator and process.
#define WN_CALL(name, ...)                                                                                \
  static const auto handle = c10::Dispatcher::singleton()                                                 \
                                 .findSchemaOrThrow("wnkernels::" #name, "")                              \
                                 .typed<decltype(op::name)>();                                            \
  return handle.call(__VA_ARGS__)

Tensor weight_norm(const Tensor& v, const Tensor& g, Dim dim, string_view kind, std::optional<ScalarType> out_dtype) {
  WN_CALL(weight_norm, v, g, dim, kind, out_dtype);
}
std::tuple<Tensor, Tensor> weight_norm_backward(const Tensor& grad, const Tensor& v, const Tensor& g, Dim dim,
                                                string_view kind) {
  WN_CALL(weight_norm_backward, grad, v, g, dim, kind);
}
Tensor radius_backward(const Tensor& grad, const Tensor& v, const Tensor& g, Dim dim, string_view kind) {
  WN_CALL(radius_backward, grad, v, g, dim, kind);
}
Tensor row_norm(const Tensor& v, Dim dim) { WN_CALL(row_norm, v, dim); }
Tensor row_scale(const Tensor& v, const Tensor& g, string_view kind) { WN_CALL(row_scale, v, g, kind); }
Tensor project_(Tensor grad, const Tensor& v, const Tensor& g, Dim dim, string_view kind) {
  WN_CALL(project_, std::move(grad), v, g, dim, kind);
}
void normalize_(Tensor w, Dim dim, const std::optional<Tensor>& norm, double value) {
  WN_CALL(normalize_, std::move(w), dim, norm, value);
}
std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& v, const Tensor& g,
                                          const std::optional<Tensor>& bias, string_view kind) {
  WN_CALL(linear_forward, x, v, g, bias, kind);
}
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x, const Tensor& v,
                                                   const Tensor& g, const Tensor& scale, string_view kind, bool need_x,
                                                   bool need_weight) {
  WN_CALL(linear_backward, grad, x, v, g, scale, kind, need_x, need_weight);
}
Tensor weight_norm_linear(const Tensor& x, const Tensor& v, const Tensor& g, const std::optional<Tensor>& bias,
                          string_view kind, std::optional<bool> materialize) {
  WN_CALL(weight_norm_linear, x, v, g, bias, kind, materialize);
}

#undef WN_CALL

}  // namespace op
}  // namespace wn
