// Problems on the device of a tensor.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "tensors.h"

namespace wn {

template <class Formula> void run(const Problem<Formula>& problem, const Tensor& on) {
  if (problem.layout.rows == 0) return;
  if (on.is_cpu()) return cpu::run(problem);
#if defined(WN_WITH_CUDA)
  const c10::DeviceGuard guard(on.device());
  const c10::impl::VirtualGuardImpl device(c10::DeviceType::CUDA);
  // From torch's allocator, which orders memory by stream and can be captured in a graph.
  const int64_t bytes = cuda::workspace_bytes(problem);
  const Tensor workspace = bytes > 0 ? at::empty({bytes}, on.options().dtype(at::kByte)) : Tensor();
  cuda::run(problem, device.getStream(on.device()).native_handle(), bytes > 0 ? workspace.mutable_data_ptr() : nullptr);
#else
  TORCH_CHECK(false, "this build of wnkernels has no kernels for ", on.device());
#endif
}

// Many problems of the same types: on a CPU small ones in one parallel region, on a GPU those with short rows in few
// launches, the others one by one.
template <class Formula> void run(std::vector<Problem<Formula>> problems, const Tensor& on) {
  if (on.is_cpu()) return cpu::run(problems);
#if defined(WN_WITH_CUDA)
  const c10::DeviceGuard guard(on.device());
  const c10::impl::VirtualGuardImpl device(c10::DeviceType::CUDA);
  cuda::run_short_rows(problems, device.getStream(on.device()).native_handle());
#endif
  for (const Problem<Formula>& problem : problems) run(problem, on);
}

}  // namespace wn
