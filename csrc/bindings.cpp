// wnkernels._C: the functions that Python calls outside of torch.compile, with the overhead of torch's own.
#include <ATen/core/List.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>

#include "cpu/in_backward.h"
#include "ops.h"
#include "shared_weights.h"
#include "step.h"

namespace wn {
namespace {

using at::Tensor;
namespace py = pybind11;

template <class F> void define(py::module_& m, const char* name, F function) {
  // Errors of torch become Python's (ValueError, TypeError, RuntimeError), and the GIL is released around the call.
  m.def(name, torch::wrap_pybind_function_no_gil(function));
}

using Tensors = std::vector<Tensor>;

c10::List<std::optional<Tensor>> as_list(const std::vector<std::optional<Tensor>>& tensors) {
  c10::List<std::optional<Tensor>> list;
  for (const auto& t : tensors) list.push_back(t);
  return list;
}

Tensors foreach_weight_norm(const Tensors& v, const Tensors& g, const std::vector<int64_t>& dims,
                            const std::vector<int64_t>& kinds, std::optional<at::ScalarType> out_dtype) {
  return op::foreach_weight_norm(v, g, dims, kinds, out_dtype);
}

void polar_sgd_(const Tensors& weights, const Tensors& grads, const Tensors& radius, const Tensors& norm,
                const Tensors& momentum_buffers, const Tensors& radius_momentum, const Tensors& copies,
                const Tensors& telemetry, string_view kind, const std::vector<int64_t>& dims,
                const std::vector<double>& numbers, const std::vector<std::optional<Tensor>>& number_tensors,
                bool nesterov, bool maximize, string_view retraction, const std::optional<Tensor>& grad_scale,
                const std::optional<Tensor>& found_inf) {
  op::polar_sgd_(weights, grads, radius, norm, momentum_buffers, radius_momentum, copies, telemetry, kind, dims, numbers,
                 as_list(number_tensors), nesterov, maximize, retraction, grad_scale, found_inf);
}

void polar_adam_(const Tensors& weights, const Tensors& grads, const Tensors& radius, const Tensors& norm,
                 const Tensors& exp_avg, const Tensors& exp_avg_sq, const Tensors& max_exp_avg_sq,
                 const Tensors& radius_exp_avg, const Tensors& radius_exp_avg_sq, const Tensors& radius_max_exp_avg_sq,
                 const Tensors& copies, const Tensors& telemetry, string_view kind, const std::vector<int64_t>& dims,
                 const std::vector<double>& numbers, const std::vector<std::optional<Tensor>>& number_tensors,
                 bool decoupled, bool maximize, string_view retraction, const std::optional<Tensor>& grad_scale,
                 const std::optional<Tensor>& found_inf) {
  op::polar_adam_(weights, grads, radius, norm, exp_avg, exp_avg_sq, max_exp_avg_sq, radius_exp_avg, radius_exp_avg_sq,
                  radius_max_exp_avg_sq, copies, telemetry, kind, dims, numbers, as_list(number_tensors), decoupled,
                  maximize, retraction, grad_scale, found_inf);
}

// Parameters as Python's objects: torch.utils.swap_tensors, which modules may be moved by, wants to be the only one that
// holds what is behind them.
class Parameters {
 public:
  explicit Parameters(std::vector<py::object> given) : objects(std::move(given)) {
    for (const py::object& o : objects)
      TORCH_CHECK_TYPE(THPVariable_Check(o.ptr()), "parameters must be tensors, got ", Py_TYPE(o.ptr())->tp_name);
  }
  Tensors tensors() const {
    Tensors tensors;
    tensors.reserve(objects.size());
    for (const py::object& o : objects) tensors.push_back(THPVariable_Unpack(o.ptr()));
    return tensors;
  }
  Tensors grads() const {
    Tensors grads = tensors();
    for (Tensor& t : grads) t = t.grad();
    return grads;
  }

 private:
  std::vector<py::object> objects;
};

// The lists of a step, which an optimizer keeps from step to step: to convert them from Python costs more than to step
// small weights. The gradients are those that the parameters have.
struct StepLists {
  Parameters params, weights;
  Tensors radius, norm;
  std::vector<Tensors> state, row_state;  // three: of SGD the momentum, of Adam the averages; the others are empty
  Tensors telemetry;
  std::string kind;
  std::vector<int64_t> dims;
};

void lists_sgd_(const StepLists& l, const Tensors& copies, const std::vector<double>& numbers,
                const std::vector<std::optional<Tensor>>& number_tensors, bool nesterov, bool maximize,
                string_view retraction, const std::optional<Tensor>& grad_scale,
                const std::optional<Tensor>& found_inf) {
  const Tensors weights = l.weights.tensors(), grads = l.params.grads();
  const py::gil_scoped_release no_gil;
  const at::NoGradGuard no_grad;  // as a context of Python it takes 3 us
  op::polar_sgd_(weights, grads, l.radius, l.norm, l.state[0], l.row_state[0], copies, l.telemetry, l.kind, l.dims,
                 numbers, as_list(number_tensors), nesterov, maximize, retraction, grad_scale, found_inf);
}

void lists_adam_(const StepLists& l, const Tensors& copies, const std::vector<double>& numbers,
                 const std::vector<std::optional<Tensor>>& number_tensors, bool decoupled, bool maximize,
                 string_view retraction, const std::optional<Tensor>& grad_scale,
                 const std::optional<Tensor>& found_inf) {
  const Tensors weights = l.weights.tensors(), grads = l.params.grads();
  const py::gil_scoped_release no_gil;
  const at::NoGradGuard no_grad;  // as a context of Python it takes 3 us
  op::polar_adam_(weights, grads, l.radius, l.norm, l.state[0], l.state[1], l.state[2], l.row_state[0],
                  l.row_state[1], l.row_state[2], copies, l.telemetry, l.kind, l.dims, numbers, as_list(number_tensors),
                  decoupled, maximize, retraction, grad_scale, found_inf);
}

// Which parameters have gradients, and of what dtype and layout: what a plan of steps is made for.
class GradientTypes {
 public:
  explicit GradientTypes(std::vector<py::object> params) : params_(std::move(params)), types_(types()) {}
  bool unchanged() const { return types() == types_; }

 private:
  using Type = std::pair<at::ScalarType, at::Layout>;
  static Type type_of(const Tensor& grad) {
    return grad.defined() ? Type(grad.scalar_type(), grad.layout()) : Type(at::ScalarType::Undefined, at::kStrided);
  }
  std::vector<Type> types() const {
    const Tensors grads = params_.grads();
    std::vector<Type> types(grads.size());
    std::transform(grads.begin(), grads.end(), types.begin(), type_of);
    return types;
  }
  Parameters params_;
  std::vector<Type> types_;
};

Tensor in_backward_sgd_(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& z, const Tensor& weight,
                        const std::optional<Tensor>& scale, const std::optional<Tensor>& rho,
                        const std::optional<Tensor>& radius, const std::optional<Tensor>& norm,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& telemetry, string_view kind,
                        const std::vector<double>& numbers, bool maximize, bool keep_norm, bool refresh, bool need_x) {
  return op::in_backward_sgd_(grad, x, z, weight, scale, rho, radius, norm, bias, telemetry, kind, numbers, maximize,
                              keep_norm, refresh, need_x);
}

Tensor in_backward_buffers_(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& z, const Tensor& weight,
                            const std::optional<Tensor>& scale, const std::optional<Tensor>& rho,
                            const std::optional<Tensor>& radius, const std::optional<Tensor>& norm,
                            const std::optional<Tensor>& bias, const Tensors& buffers, const Tensors& radius_buffers,
                            const Tensors& bias_buffers, string_view kind, const std::vector<double>& numbers,
                            const std::vector<double>& bias_numbers, bool averages, bool option, bool maximize, bool keep_norm,
                            bool need_x) {
  return op::in_backward_buffers_(grad, x, z, weight, scale, rho, radius, norm, bias, buffers, radius_buffers, bias_buffers, kind, numbers,
                                  bias_numbers, averages, option, maximize, keep_norm, need_x);
}

// What this build was made with; WN_BUILD_* come from setup.py.
py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cuda"] = WN_BUILD_CUDA;
  info["cuda_reason"] = WN_BUILD_CUDA_REASON;
  info["cuda_archs"] = WN_BUILD_CUDA_ARCHS;
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  define(m, "weight_norm", op::weight_norm);
  define(m, "weight_norm_linear", op::weight_norm_linear);
  define(m, "foreach_weight_norm", foreach_weight_norm);
  define(m, "row_norm", op::row_norm);
  define(m, "project_", op::project_);
  define(m, "normalize_", op::normalize_);
  define(m, "polar_sgd_", polar_sgd_);
  define(m, "polar_adam_", polar_adam_);
  define(m, "in_backward_linear", op::in_backward_linear);
  define(m, "in_backward_sgd_", in_backward_sgd_);
  define(m, "in_backward_buffers_", in_backward_buffers_);
  m.def("small_products", &cpu::small_products);
  m.def("records_functions", &at::hasCallbacks);
  py::class_<StepLists>(m, "StepLists")
      .def(py::init([](std::vector<py::object> params, std::vector<py::object> weights, Tensors radius, Tensors norm,
                       std::vector<Tensors> state, std::vector<Tensors> row_state, Tensors telemetry, std::string kind,
                       std::vector<int64_t> dims) {
        state.resize(3);
        row_state.resize(3);
        return StepLists{Parameters(std::move(params)), Parameters(std::move(weights)), std::move(radius), std::move(norm), std::move(state),
                         std::move(row_state), std::move(telemetry), std::move(kind), std::move(dims)};
      }))
      .def("sgd_", torch::wrap_pybind_function(lists_sgd_))
      .def("adam_", torch::wrap_pybind_function(lists_adam_));
  py::class_<GradientTypes>(m, "GradientTypes")
      .def(py::init<std::vector<py::object>>())
      .def("unchanged", &GradientTypes::unchanged);
  py::class_<SharedWeights>(m, "SharedWeights")
      .def(py::init([](const std::vector<std::optional<Tensor>>& v, const std::vector<std::optional<Tensor>>& g,
                       const std::vector<int64_t>& dims, const std::vector<int64_t>& kinds,
                       const std::vector<bool>& lowered) {
        const py::gil_scoped_release no_gil;
        return std::make_unique<SharedWeights>(v, g, dims, kinds, lowered);
      }))
      .def("take", &SharedWeights::take)
      .def("plain", &SharedWeights::plain);
  m.attr("edit_tolerance") = edit_tolerance(false);
  m.attr("edit_tolerance_f64") = edit_tolerance(true);
  m.attr("build_info") = build_info();
}

}  // namespace wn
