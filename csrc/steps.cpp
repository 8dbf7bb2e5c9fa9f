// Operators of the polar-coordinate steps: lists of weights in, everything updated in place.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/core/GradMode.h>
#include <torch/library.h>

#include <algorithm>

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

  RowValues at(size_t index, const Layout& layout, const char* name, c10::Device device) const {
    if (tensors.size() == 0 || !tensors.get(index).has_value()) return {nullptr, DType::f32, values[index]};
    const Tensor t = *tensors.get(index);
    check_weight_dtype(name, t.scalar_type());
    if (t.is_cpu() && t.numel() == 1) return {nullptr, DType::f32, values_of(t).at<double>(0)};
    TORCH_CHECK(t.device() == device, name, " must be a number, or on the weight's device ", device,
                ", or one element on the CPU; got ", t.sizes(), " on ", t.device());
    TORCH_CHECK_VALUE(t.is_contiguous() && (t.numel() == 1 || t.numel() == layout.rows), name,
                      " must be a number or a contiguous tensor of 1 or ", layout.rows, " elements, got shape ", t.sizes());
    RowValues row = values_of(t);
    row.stride = t.numel() == 1 ? 0 : 1;
    return row;
  }
};

enum : size_t { kLr, kRadiusLr, kWeightDecay, kRadiusWeightDecay };              // of every step
enum : size_t { kMomentum = 4, kGradientWeight, kSgdNumbers };
enum : size_t { kBeta1 = 4, kBeta2, kEps, kStep, kAdamNumbers };

// The lists of a call. `state` and `row_state` differ by optimizer; each holds lists with one tensor per weight.
struct Arguments {
  TensorList weights, grads, radius, norm, copies, telemetry;
  std::vector<std::pair<const char*, TensorList>> state, row_state;
  at::IntArrayRef dims;
  Numbers numbers;
};

PolarRow row_of(size_t i, const Arguments& a, const Layout& layout, Kind kind, Retraction retraction, bool maximize,
                const std::optional<Tensor>& grad_scale) {
  const bool f64 = a.weights[i].scalar_type() == at::kDouble;
  const c10::Device device = a.weights[i].device();
  PolarRow row;
  row.kind = kind;
  row.retraction = retraction;
  row.gradient_sign = maximize ? -1 : 1;
  row.grad_scale = {nullptr, DType::f32, 1};
  if (grad_scale) {
    check_device("grad_scale", *grad_scale, a.weights[i]);
    row.grad_scale = values_of(*grad_scale);
    row.grad_scale.stride = 0;
  }
  row.lr = a.numbers.at(kLr, layout, "lr", device);
  row.radius_lr = a.numbers.at(kRadiusLr, layout, "radius_lr", device);
  row.weight_decay = a.numbers.at(kWeightDecay, layout, "weight_decay", device);
  row.radius_weight_decay = a.numbers.at(kRadiusWeightDecay, layout, "radius_weight_decay", device);
  row.edit_tolerance = edit_tolerance(f64);
  row.edit_floor = f64 ? limits<double>::smallest_normal : limits<float>::smallest_normal;
  row.one_column = layout.row_length() == 1;
  row.radius = a.radius[i].mutable_data_ptr<double>();
  row.norm = a.norm[i].mutable_data_ptr<double>();
  row.telemetry = a.telemetry.empty() ? nullptr : a.telemetry[i].mutable_data_ptr<double>();
  return row;
}

void check_counts(const Arguments& a, size_t numbers) {
  const size_t count = a.weights.size();
  check_count("grads", a.grads.size(), count, false);
  check_count("radius", a.radius.size(), count, false);
  check_count("norm", a.norm.size(), count, false);
  check_count("dims", a.dims.size(), count, false);
  for (const auto& [name, list] : a.state) check_count(name, list.size(), count, false);
  for (const auto& [name, list] : a.row_state) check_count(name, list.size(), count, false);
  check_count("copies", a.copies.size(), count, true);
  check_count("telemetry", a.telemetry.size(), count, true);
  const size_t tensors = a.numbers.tensors.size();
  TORCH_CHECK_VALUE(a.numbers.values.size() == numbers && (tensors == 0 || tensors == numbers), "numbers must have ",
                    numbers, " entries, and number_tensors as many or none; got ", a.numbers.values.size(), " and ",
                    tensors);
}

void check(const Arguments& a, size_t i, const Layout& layout) {
  const Tensor& w = a.weights[i];
  TORCH_CHECK_TYPE(w.scalar_type() == at::kFloat || w.scalar_type() == at::kDouble,
                   "weights must be float32 or float64 (the float32 master copy of a 16-bit parameter), got ",
                   w.scalar_type());
  TORCH_CHECK_VALUE(w.is_non_overlapping_and_dense(), "weights must be dense without overlap, got strides ", w.strides(),
                    " for shape ", w.sizes());
  check_device("grads", a.grads[i], w);
  TORCH_CHECK_VALUE(a.grads[i].sizes() == w.sizes(), "grads must have the weight's shape ", w.sizes(), ", got ",
                    a.grads[i].sizes());
  TORCH_CHECK_TYPE(a.copies.empty() ? a.grads[i].scalar_type() == w.scalar_type()
                                    : w.scalar_type() == at::kFloat && is_16bit(a.copies[i].scalar_type()) &&
                                          (a.grads[i].scalar_type() == a.copies[i].scalar_type() ||
                                           a.grads[i].scalar_type() == at::kFloat),
                   "grads must have the weight's dtype; with copies the weight is float32, the copy 16-bit, and the grad "
                   "of either dtype; got grad ", a.grads[i].scalar_type(), " for ", w.scalar_type());
  check_row_state("radius", a.radius[i], w, layout);
  check_row_state("norm", a.norm[i], w, layout);
  for (const auto& [name, list] : a.state) {
    check_like_weight(name, list[i], w);
    TORCH_CHECK_TYPE(list[i].scalar_type() == w.scalar_type(), name, " must have the weight's dtype ", w.scalar_type(),
                     ", got ", list[i].scalar_type());
  }
  for (const auto& [name, list] : a.row_state) check_row_state(name, list[i], w, layout);
  if (!a.copies.empty()) check_like_weight("copies", a.copies[i], w);
  if (!a.telemetry.empty()) check_row_state("telemetry", a.telemetry[i], w, layout, 4);
  const auto same_types = [&](const Tensor& t, const Tensor& first) { return t.scalar_type() == first.scalar_type(); };
  TORCH_CHECK_TYPE(same_types(w, a.weights[0]) && same_types(a.grads[i], a.grads[0]) &&
                       (a.copies.empty() || same_types(a.copies[i], a.copies[0])),
                   "weights of one call must share a dtype, and so must grads and copies");
  TORCH_CHECK(w.device() == a.weights[0].device(), "weights of one call must be on one device, got ",
              a.weights[0].device(), " and ", w.device());
}

// Nothing is done where found_inf is not 0, which only the device knows on a GPU.
template <class Formula>
void run_on(const Tensor& first, const std::vector<Problem<Formula>>& problems, const std::optional<Tensor>& found_inf) {
  if (found_inf) {
    check_device("found_inf", *found_inf, first);
    TORCH_CHECK_TYPE(found_inf->scalar_type() == at::kFloat, "found_inf must be float32, got ", found_inf->scalar_type());
  }
  const float* skip = found_inf ? found_inf->const_data_ptr<float>() : nullptr;
  if (first.is_cpu()) {
    if (skip == nullptr || *skip == 0) cpu::run(problems);
    return;
  }
#if defined(WN_WITH_CUDA)
  if constexpr (Formula::outputs == Formula::inputs) {  // with room for a copy
    const c10::DeviceGuard guard(first.device());
    const c10::impl::VirtualGuardImpl device(c10::DeviceType::CUDA);
    const int64_t bytes = cuda::workspace_bytes(problems);
    const Tensor workspace = bytes > 0 ? at::empty({bytes}, first.options().dtype(at::kByte)) : Tensor();
    cuda::run(problems, device.getStream(first.device()).native_handle(),
              bytes > 0 ? workspace.mutable_data_ptr() : nullptr, skip);
  }
#else
  TORCH_CHECK(false, "this build of wnkernels has no kernels for ", first.device());
#endif
}

// Construction checks everything; `run` then builds one problem per weight, completed by fill(formula, i, layout), and
// runs them.
struct Call {
  const Arguments& a;
  std::vector<Layout> layouts;
  std::vector<PolarRow> rows;

  Call(const Arguments& arguments, string_view kind, Retraction retraction, bool maximize,
       const std::optional<Tensor>& grad_scale)
      : a(arguments) {
    const Kind k = parse_step_kind(kind);
    layouts.reserve(a.weights.size());
    rows.reserve(a.weights.size());
    for (size_t i = 0; i < a.weights.size(); ++i) {
      layouts.push_back(layout_of(a.weights[i], wrap_dim(a.weights[i], a.dims[i] < 0 ? Dim() : Dim(a.dims[i]))));
      check(a, i, layouts[i]);
      rows.push_back(row_of(i, a, layouts[i], k, retraction, maximize, grad_scale));
    }
  }

  // Formula<option, copy>: on a GPU the kernels with room for a copy serve without one too.
  template <template <bool, bool> class Formula, bool option, class F>
  void run(const std::optional<Tensor>& found_inf, F&& fill) const {
    if (a.copies.empty() && a.weights[0].is_cpu()) run<Formula<option, false>>(found_inf, fill);
    else run<Formula<option, true>>(found_inf, fill);
  }

  template <class Formula, class F> void run(const std::optional<Tensor>& found_inf, F&& fill) const {
    std::vector<Problem<Formula>> problems;
    problems.reserve(a.weights.size());
    std::vector<Tensor> grads(a.weights.size());  // kept until the kernels are done
    for (size_t i = 0; i < a.weights.size(); ++i) {
      if (layouts[i].rows == 0) continue;
      grads[i] = in_layout_of(a.grads[i], a.weights[i]);
      Formula formula{};
      formula.rows = rows[i];
      fill(formula, i, layouts[i]);
      c10::SmallVector<const Tensor*, 6> in{&a.weights[i], &grads[i]}, out{&a.weights[i]};
      for (const auto& [name, list] : a.state) {
        in.push_back(&list[i]);
        out.push_back(&list[i]);
      }
      if (!a.copies.empty()) out.push_back(&a.copies[i]);
      problems.push_back(problem_of(formula, layouts[i], in, out));
    }
    if (!problems.empty()) run_on(a.weights[0], problems, found_inf);
    const auto written = [](TensorList list) {
      for (const Tensor& t : list) t.unsafeGetTensorImpl()->bump_version();
    };
    for (const auto& lists : {a.state, a.row_state})
      for (const auto& [name, list] : lists) written(list);
    for (const TensorList list : {a.weights, a.radius, a.norm, a.copies, a.telemetry}) written(list);
  }
};

void polar_sgd_(TensorList weights, TensorList grads, TensorList radius, TensorList norm, TensorList momentum_buffers,
                TensorList radius_momentum, TensorList copies, TensorList telemetry, string_view kind,
                at::IntArrayRef dims, at::ArrayRef<double> numbers, const TensorOptions& number_tensors, bool nesterov,
                bool maximize, string_view retraction, const std::optional<Tensor>& grad_scale,
                const std::optional<Tensor>& found_inf) {
  Arguments a{weights, grads, radius, norm, copies, telemetry, {}, {}, dims, {numbers, number_tensors}};
  if (!momentum_buffers.empty() || !radius_momentum.empty()) {
    a.state = {{"momentum_buffers", momentum_buffers}};
    a.row_state = {{"radius_momentum", radius_momentum}};
  }
  check_counts(a, kSgdNumbers);
  const Retraction r = parse_retraction(retraction);
  TORCH_CHECK_VALUE(r != Retraction::geodesic || (a.state.empty() && numbers[kWeightDecay] == 0),
                    "retraction 'geodesic' keeps the norm and follows one gradient: it goes without momentum and without "
                    "weight_decay");
  if (weights.empty() || weights[0].is_meta()) return;
  const Call call(a, kind, r, maximize, grad_scale);
  const auto fill = [&](auto& formula, size_t i, const Layout& layout) {
    formula.nesterov = nesterov;
    if (a.state.empty()) return;
    formula.momentum = a.numbers.at(kMomentum, layout, "momentum", weights[i].device());
    formula.gradient_weight = a.numbers.at(kGradientWeight, layout, "gradient_weight", weights[i].device());
    formula.radius_momentum = radius_momentum[i].mutable_data_ptr<double>();
  };
  if (a.state.empty()) call.run<PolarSgd, false>(found_inf, fill);
  else call.run<PolarSgd, true>(found_inf, fill);
}

void polar_adam_(TensorList weights, TensorList grads, TensorList radius, TensorList norm, TensorList exp_avg,
                 TensorList exp_avg_sq, TensorList max_exp_avg_sq, TensorList radius_exp_avg,
                 TensorList radius_exp_avg_sq, TensorList radius_max_exp_avg_sq, TensorList copies, TensorList telemetry,
                 string_view kind, at::IntArrayRef dims, at::ArrayRef<double> numbers,
                 const TensorOptions& number_tensors, bool decoupled, bool maximize, string_view retraction,
                 const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  Arguments a{weights, grads, radius, norm, copies, telemetry, {}, {}, dims, {numbers, number_tensors}};
  a.state = {{"exp_avg", exp_avg}, {"exp_avg_sq", exp_avg_sq}};
  a.row_state = {{"radius_exp_avg", radius_exp_avg}, {"radius_exp_avg_sq", radius_exp_avg_sq}};
  const bool amsgrad = !max_exp_avg_sq.empty() || !radius_max_exp_avg_sq.empty();
  if (amsgrad) {
    a.state.emplace_back("max_exp_avg_sq", max_exp_avg_sq);
    a.row_state.emplace_back("radius_max_exp_avg_sq", radius_max_exp_avg_sq);
  }
  check_counts(a, kAdamNumbers);
  const Retraction r = parse_retraction(retraction);
  TORCH_CHECK_VALUE(r != Retraction::geodesic, "retraction 'geodesic' follows one gradient: it does not go with Adam");
  if (weights.empty() || weights[0].is_meta()) return;
  const Call call(a, kind, r, maximize, grad_scale);
  const auto fill = [&](auto& formula, size_t i, const Layout& layout) {
    const auto number = [&](size_t index, const char* name) {
      return a.numbers.at(index, layout, name, weights[i].device());
    };
    formula.decoupled = decoupled;
    formula.beta1 = number(kBeta1, "beta1");
    formula.beta2 = number(kBeta2, "beta2");
    formula.eps = number(kEps, "eps");
    formula.step = number(kStep, "step");
    const auto known = [&](const RowValues& x) { return x.data == nullptr; };
    formula.counted = known(formula.step) && known(formula.beta1) && known(formula.beta2);
    if (formula.counted) {
      formula.correction1 = 1 - std::pow(formula.beta1.value, formula.step.value);
      formula.correction2_root = std::sqrt(1 - std::pow(formula.beta2.value, formula.step.value));
    }
    formula.radius_average = radius_exp_avg[i].mutable_data_ptr<double>();
    formula.radius_square = radius_exp_avg_sq[i].mutable_data_ptr<double>();
    formula.radius_largest = amsgrad ? radius_max_exp_avg_sq[i].mutable_data_ptr<double>() : nullptr;
  };
  if (amsgrad) call.run<PolarAdam, true>(found_inf, fill);
  else call.run<PolarAdam, false>(found_inf, fill);
}

// Without a kernel of its own for Autograd, torch boxes every tensor of the lists on the way.
template <auto step> struct UnderAutograd;
template <class... Arguments, void (*step)(TensorList, Arguments...)> struct UnderAutograd<step> {
  static void call(TensorList weights, Arguments... arguments) {
    TORCH_CHECK(!c10::GradMode::is_enabled() ||
                    std::none_of(weights.begin(), weights.end(), [](const Tensor& w) { return w.requires_grad(); }),
                "a polar step overwrites weights and is not differentiable: call it under torch.no_grad()");
    const at::AutoDispatchBelowADInplaceOrView below;
    step(weights, arguments...);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(wnkernels, m) {
  m.def("polar_sgd_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] radius, Tensor(c!)[] norm, "
        "Tensor(d!)[] momentum_buffers, Tensor(e!)[] radius_momentum, Tensor(f!)[] copies, Tensor(g!)[] telemetry, "
        "str kind, int[] dims, float[] numbers, Tensor?[] number_tensors, bool nesterov, bool maximize, "
        "str retraction, Tensor? grad_scale, Tensor? found_inf) -> ()");
  m.def("polar_adam_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] radius, Tensor(c!)[] norm, "
        "Tensor(d!)[] exp_avg, Tensor(e!)[] exp_avg_sq, Tensor(f!)[] max_exp_avg_sq, Tensor(g!)[] radius_exp_avg, "
        "Tensor(h!)[] radius_exp_avg_sq, Tensor(i!)[] radius_max_exp_avg_sq, Tensor(j!)[] copies, "
        "Tensor(k!)[] telemetry, str kind, int[] dims, float[] numbers, Tensor?[] number_tensors, bool decoupled, "
        "bool maximize, str retraction, Tensor? grad_scale, Tensor? found_inf) -> ()");
}

static void register_steps(torch::Library& m) {
  m.impl("polar_sgd_", TORCH_FN(polar_sgd_));
  m.impl("polar_adam_", TORCH_FN(polar_adam_));
}

TORCH_LIBRARY_IMPL(wnkernels, CPU, m) { register_steps(m); }
TORCH_LIBRARY_IMPL(wnkernels, Meta, m) { register_steps(m); }
#if defined(WN_WITH_CUDA)
TORCH_LIBRARY_IMPL(wnkernels, CUDA, m) { register_steps(m); }
#endif
TORCH_LIBRARY_IMPL(wnkernels, Autograd, m) {
  m.impl("polar_sgd_", TORCH_FN(UnderAutograd<&op::polar_sgd_>::call));
  m.impl("polar_adam_", TORCH_FN(UnderAutograd<&op::polar_adam_>::call));
}

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
void polar_adam_(TensorList weights, TensorList grads, TensorList radius, TensorList norm, TensorList exp_avg,
                 TensorList exp_avg_sq, TensorList max_exp_avg_sq, TensorList radius_exp_avg,
                 TensorList radius_exp_avg_sq, TensorList radius_max_exp_avg_sq, TensorList copies, TensorList telemetry,
                 string_view kind, at::IntArrayRef dims, at::ArrayRef<double> numbers,
                 const TensorOptions& number_tensors, bool decoupled, bool maximize, string_view retraction,
                 const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  static const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow("wnkernels::polar_adam_", "").typed<decltype(op::polar_adam_)>();
  handle.call(weights, grads, radius, norm, exp_avg, exp_avg_sq, max_exp_avg_sq, radius_exp_avg, radius_exp_avg_sq,
              radius_max_exp_avg_sq, copies, telemetry, kind, dims, numbers, number_tensors, decoupled, maximize,
              retraction, grad_scale, found_inf);
}
}  // namespace op
}  // namespace wn
