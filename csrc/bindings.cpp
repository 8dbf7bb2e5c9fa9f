// wnkernels._C: the functions that Python calls outside of torch.compile, with the overhead of torch's own.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "ops.h"

namespace wn {
namespace {

using at::Tensor;
namespace py = pybind11;

template <class F> void define(py::module_& m, const char* name, F function) {
  // Errors of torch become Python's (ValueError, TypeError, RuntimeError), and the GIL is released around the call.
  m.def(name, torch::wrap_pybind_function_no_gil(function));
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
  define(m, "row_norm", op::row_norm);
  define(m, "project_", op::project_);
  define(m, "normalize_", op::normalize_);
  m.attr("build_info") = build_info();
}

}  // namespace wn
