// wnkernels._C: the functions that Python calls outside of torch.compile, with the overhead of torch's own.
#include <ATen/core/List.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "ops.h"
#include "shared_weights.h"

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

Tensor in_backward_sgd_(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& z, const Tensor& weight,
                        const std::optional<Tensor>& scale, const std::optional<Tensor>& rho,
                        const std::optional<Tensor>& radius, const std::optional<Tensor>& norm,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& telemetry, string_view kind,
                        const std::vector<double>& numbers, bool maximize, bool keep_norm, bool refresh, bool need_x) {
  return op::in_backward_sgd_(grad, x, z, weight, scale, rho, radius, norm, bias, telemetry, kind, numbers, maximize,
                              keep_norm, refresh, need_x);
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
  py::class_<SharedWeights>(m, "SharedWeights")
      .def(py::init([](const std::vector<std::optional<Tensor>>& v, const std::vector<std::optional<Tensor>>& g,
                       const std::vector<int64_t>& dims, const std::vector<int64_t>& kinds,
                       const std::vector<bool>& lowered) {
        const py::gil_scoped_release no_gil;
        return std::make_unique<SharedWeights>(v, g, dims, kinds, lowered);
      }))
      .def("take", &SharedWeights::take)
      .def("plain", &SharedWeights::plain);
  m.attr("build_info") = build_info();
}

}  // namespace wn
