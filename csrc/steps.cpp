// Operators of the polar-coordinate steps: lists of weights in, everything updated in place.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "tensors.h"

namespace wn {
namespace {

using at::TensorList;
using TensorOptions = c10::List<std::optional<Tensor>>;

Kind parse_step_kind(string_view kind) {
  TORCH_CHECK_VALUE(kind == "swn" || kind == "ewn" || kind == "unit", "kind must be 'swn', 'ewn' or 'unit', got '",
                    std::string(kind), "'");
  return kind == "unit" ? Kind::unit : parse_kind(kind);
}

Retraction parse_retraction(string_view retraction) {
  if (retraction == "project") return Retraction::project;
  if (retraction == "renormalize") return Retraction::renormalize;
  TORCH_CHECK_VALUE(retraction == "geodesic", "retraction must be 'project', 'renormalize' or 'geodesic', got '",
                    std::string(retraction), "'");
  return Retraction::geodesic;
}

void check_count(const char* name, size_t count, size_t weights, bool optional) {
  TORCH_CHECK_VALUE(count == weights || (optional && count == 0), name, " must have one tensor per weight (", weights,
                    ")", optional ? ", or none" : "", ", got ", count);
}

void check_row_state(const char* name, const Tensor& t, const Tensor& w, const Layout& layout, int64_t columns = 1) {
  check_device(name, t, w);
  TORCH_CHECK_TYPE(t.scalar_type() == at::kDouble, name, " must be float64, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.is_contiguous() && t.numel() == layout.rows * columns, name, " must be contiguous with ",
                    layout.rows * columns, " elements for a weight of ", layout.rows, " rows, got shape ", t.sizes());
}

void check_like_weight(const char* name, const Tensor& t, const Tensor& w) {
  check_device(name, t, w);
  TORCH_CHECK_VALUE(t.sizes() == w.sizes() && t.strides() == w.strides(), name,
                    " must have the weight's shape and strides ", w.sizes(), " ", w.strides(), ", got ", t.sizes(), " ",
                    t.strides());
}

// Numbers of a step: from `values`, or from a tensor in its place ([R], or one element for all rows).
struct Numbers {
  at::ArrayRef<double> values;
  const TensorOptions& tensors;

  RowValues at(size_t index, const Layout& layout, const char* name) const {
    if (tensors.size() == 0 || !tensors.get(index).has_value()) return {nullptr, DType::f32, values[index]};
    const Tensor t = *tensors.get(index);
    check_weight_dtype(name, t.scalar_type());
    TORCH_CHECK_VALUE(t.is_contiguous() && (t.numel() == 1 || t.numel() == layout.rows), name,
                      " must be a number or a contiguous tensor of 1 or ", layout.rows, " elements, got shape ", t.sizes());
    RowValues row = values_of(t);
    row.stride = t.numel() == 1 ? 0 : 1;
    return row;
  }
};

enum : size_t { kLr, kRadiusLr, kWeightDecay, kRadiusWeightDecay, kMomentum, kGradientWeight, kNumbers };

struct Arguments {
  TensorList weights, grads, radius, norm, momentum_buffers, radius_momentum, copies, telemetry;
};

PolarRow row_of(size_t i, const Arguments& a, const Layout& layout, Kind kind, Retraction retraction, bool maximize,
                const Numbers& numbers, const std::optional<Tensor>& grad_scale) {
  const bool f64 = a.weights[i].scalar_type() == at::kDouble;
  PolarRow row;
  row.kind = kind;
  row.retraction = retraction;
  row.gradient_sign = maximize ? -1 : 1;
  row.grad_scale = {nullptr, DType::f32, 1};
  if (grad_scale) {
    row.grad_scale = values_of(*grad_scale);
    row.grad_scale.stride = 0;
  }
  row.lr = numbers.at(kLr, layout, "lr");
  row.radius_lr = numbers.at(kRadiusLr, layout, "radius_lr");
  row.weight_decay = numbers.at(kWeightDecay, layout, "weight_decay");
  row.radius_weight_decay = numbers.at(kRadiusWeightDecay, layout, "radius_weight_decay");
  // Rounding moves the norm of a row by a few units in the last place; an edit that small changes nothing either.
  row.edit_tolerance = f64 ? 1e-12 : 1e-5;
  row.edit_floor = f64 ? limits<double>::smallest_normal : limits<float>::smallest_normal;
  row.radius = a.radius[i].mutable_data_ptr<double>();
  row.norm = a.norm[i].mutable_data_ptr<double>();
  row.telemetry = a.telemetry.empty() ? nullptr : a.telemetry[i].mutable_data_ptr<double>();
  return row;
}

void check(const Arguments& a, size_t i, const Layout& layout) {
  const Tensor& w = a.weights[i];
  TORCH_CHECK_TYPE(w.scalar_type() == at::kFloat || w.scalar_type() == at::kDouble,
                   "weights must be float32 or float64 (the float32 master copy of a 16-bit parameter), got ",
                   w.scalar_type());
  TORCH_CHECK_VALUE(w.is_non_overlapping_and_dense(), "weights must be dense without overlap, got strides ", w.strides(),
                    " for shape ", w.sizes());
  check_gradient("grads", a.grads[i], w);
  TORCH_CHECK_TYPE(a.copies.empty() ? a.grads[i].scalar_type() == w.scalar_type()
                                    : w.scalar_type() == at::kFloat && is_16bit(a.copies[i].scalar_type()) &&
                                          a.grads[i].scalar_type() == a.copies[i].scalar_type(),
                   "grads must have the weight's dtype; with copies the weight is float32, and grad and copy share a "
                   "16-bit dtype; got grad ", a.grads[i].scalar_type(), " for ", w.scalar_type());
  check_row_state("radius", a.radius[i], w, layout);
  check_row_state("norm", a.norm[i], w, layout);
  if (!a.momentum_buffers.empty()) {
    check_like_weight("momentum_buffers", a.momentum_buffers[i], w);
    TORCH_CHECK_TYPE(a.momentum_buffers[i].scalar_type() == w.scalar_type(), "momentum_buffers must have the weight's "
                     "dtype ", w.scalar_type(), ", got ", a.momentum_buffers[i].scalar_type());
    check_row_state("radius_momentum", a.radius_momentum[i], w, layout);
  }
  if (!a.copies.empty()) check_like_weight("copies", a.copies[i], w);
  if (!a.telemetry.empty()) check_row_state("telemetry", a.telemetry[i], w, layout, 5);
  const auto same_types = [&](const Tensor& t, const Tensor& first) { return t.scalar_type() == first.scalar_type(); };
  TORCH_CHECK_TYPE(same_types(w, a.weights[0]) && same_types(a.grads[i], a.grads[0]),
                   "weights of one call must share a dtype, and so must grads");
}

template <bool momentum, bool copy>
void run_sgd(const Arguments& a, const std::vector<Layout>& layouts, const std::vector<PolarRow>& rows,
             const Numbers& numbers, bool nesterov) {
  std::vector<Problem<PolarSgd<momentum, copy>>> problems;
  std::vector<Tensor> grads;  // kept alive until the kernels are done
  for (size_t i = 0; i < a.weights.size(); ++i) {
    if (layouts[i].rows == 0) continue;
    grads.push_back(in_layout_of(a.grads[i], a.weights[i]));
    PolarSgd<momentum, copy> formula;
    formula.rows = rows[i];
    formula.nesterov = nesterov;
    formula.radius_momentum = nullptr;
    std::vector<const Tensor*> in{&a.weights[i], &grads.back()}, out{&a.weights[i]};
    if constexpr (momentum) {
      formula.momentum = numbers.at(kMomentum, layouts[i], "momentum");
      formula.gradient_weight = numbers.at(kGradientWeight, layouts[i], "gradient_weight");
      formula.radius_momentum = a.radius_momentum[i].mutable_data_ptr<double>();
      in.push_back(&a.momentum_buffers[i]);
      out.push_back(&a.momentum_buffers[i]);
    }
    if constexpr (copy) out.push_back(&a.copies[i]);
    problems.push_back(problem_of(formula, layouts[i], in, out));
  }
  if (!problems.empty()) cpu::run(problems);
}

void polar_sgd_(TensorList weights, TensorList grads, TensorList radius, TensorList norm, TensorList momentum_buffers,
                TensorList radius_momentum, TensorList copies, TensorList telemetry, string_view kind,
                at::IntArrayRef dims, at::ArrayRef<double> numbers, const TensorOptions& number_tensors, bool nesterov,
                bool maximize, string_view retraction, const std::optional<Tensor>& grad_scale,
                const std::optional<Tensor>& found_inf) {
  const Arguments a{weights, grads, radius, norm, momentum_buffers, radius_momentum, copies, telemetry};
  const Kind k = parse_step_kind(kind);
  const Retraction r = parse_retraction(retraction);
  const size_t count = weights.size();
  check_count("grads", grads.size(), count, false);
  check_count("radius", radius.size(), count, false);
  check_count("norm", norm.size(), count, false);
  check_count("dims", dims.size(), count, false);
  check_count("momentum_buffers", momentum_buffers.size(), count, true);
  check_count("radius_momentum", radius_momentum.size(), momentum_buffers.size(), false);
  check_count("copies", copies.size(), count, true);
  check_count("telemetry", telemetry.size(), count, true);
  TORCH_CHECK_VALUE(numbers.size() == kNumbers && (number_tensors.size() == 0 || number_tensors.size() == kNumbers),
                    "numbers must have ", size_t(kNumbers), " entries, got ", numbers.size());
  TORCH_CHECK_VALUE(r != Retraction::geodesic || (momentum_buffers.empty() && numbers[kWeightDecay] == 0),
                    "retraction 'geodesic' keeps the norm and follows one gradient: it goes without momentum and without "
                    "weight_decay");
  if (count == 0 || weights[0].is_meta()) return;
  const Numbers n{numbers, number_tensors};
  std::vector<Layout> layouts;
  std::vector<PolarRow> rows;
  for (size_t i = 0; i < count; ++i) {
    layouts.push_back(layout_of(weights[i], wrap_dim(weights[i], dims[i] < 0 ? Dim() : Dim(dims[i]))));
    check(a, i, layouts[i]);
    rows.push_back(row_of(i, a, layouts[i], k, r, maximize, n, grad_scale));
  }
  if (found_inf && found_inf->item<float>() != 0) return;

  if (momentum_buffers.empty())
    copies.empty() ? run_sgd<false, false>(a, layouts, rows, n, nesterov) : run_sgd<false, true>(a, layouts, rows, n, nesterov);
  else
    copies.empty() ? run_sgd<true, false>(a, layouts, rows, n, nesterov) : run_sgd<true, true>(a, layouts, rows, n, nesterov);
  for (const TensorList list : {weights, momentum_buffers, copies, radius, norm, radius_momentum, telemetry})
    for (const Tensor& t : list) t.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wnkernels, m) {
  m.def("polar_sgd_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] radius, Tensor(c!)[] norm, "
        "Tensor(d!)[] momentum_buffers, Tensor(e!)[] radius_momentum, Tensor(f!)[] copies, Tensor(g!)[] telemetry, "
        "str kind, int[] dims, float[] numbers, Tensor?[] number_tensors, bool nesterov, bool maximize, "
        "str retraction, Tensor? grad_scale, Tensor? found_inf) -> ()");
}

TORCH_LIBRARY_IMPL(wnkernels, CPU, m) { m.impl("polar_sgd_", TORCH_FN(polar_sgd_)); }
TORCH_LIBRARY_IMPL(wnkernels, Meta, m) { m.impl("polar_sgd_", TORCH_FN(polar_sgd_)); }

namespace op {
void polar_sgd_(TensorList weights, TensorList grads, TensorList radius, TensorList norm, TensorList momentum_buffers,
                TensorList radius_momentum, TensorList copies, TensorList telemetry, string_view kind,
                at::IntArrayRef dims, at::ArrayRef<double> numbers, const TensorOptions& number_tensors, bool nesterov,
                bool maximize, string_view retraction, const std::optional<Tensor>& grad_scale,
                const std::optional<Tensor>& found_inf) {
  static const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow("wnkernels::polar_sgd_", "").typed<decltype(op::polar_sgd_)>();
  handle.call(weights, grads, radius, norm, momentum_buffers, radius_momentum, copies, telemetry, kind, dims, numbers,
              number_tensors, nesterov, maximize, retraction, grad_scale, found_inf);
}
}  // namespace op
}  // namespace wn
