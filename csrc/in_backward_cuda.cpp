// A step inside the backward on a GPU: the products are torch's, the row work csrc/cuda/in_backward_rows.cu.
#if defined(WN_WITH_CUDA)

#include <ATen/ops/add.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>

#include "cuda/in_backward_rows.h"
#include "in_backward_run.h"
#include "run.h"

namespace wn::in_backward::cuda {

std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                                  const std::optional<Tensor>& bias, bool need_z) {
  const c10::DeviceGuard guard(weight.device());
  if (bias && !scale && !need_z) return {at::addmm(*bias, x, weight.t()), Tensor()};
  const Tensor z = at::mm(x, weight.t());
  Tensor y = need_z ? at::empty_like(z) : z;
  if (scale && bias) at::addcmul_out(y, *bias, z, *scale);
  else if (scale) at::mul_out(y, z, *scale);
  else if (bias) at::add_out(y, z, *bias);
  else if (need_z) y.copy_(z);
  return {y, need_z ? z : Tensor()};
}

Tensor run(const Arguments& a) {
  const c10::DeviceGuard guard(a.weight.device());
  const c10::impl::VirtualGuardImpl device(c10::DeviceType::CUDA);
  void* const stream = device.getStream(a.weight.device()).native_handle();
  const int64_t batch = a.dy.size(0);
  const auto pointer = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };

  wn::cuda::RowsInBackward rows{};
  rows.state = a.state;
  rows.type = dtype_of(a.weight);
  rows.batch = batch, rows.rows = a.weight.size(0), rows.width = a.weight.size(1);
  rows.dy = a.dy.const_data_ptr();
  rows.weight = a.weight.mutable_data_ptr(), rows.scale = pointer(a.scale), rows.bias = pointer(a.bias);
  rows.bias_lr = a.bias_lr, rows.bias_weight_decay = a.bias_weight_decay, rows.sign = a.sign;
  rows.known = a.polar && !a.measure;
  // From torch's allocator, which orders memory by stream and can be captured in a graph.
  const int64_t bytes = wn::cuda::scratch_bytes(batch, rows.rows);
  const Tensor scratch = at::empty({bytes}, a.weight.options().dtype(at::kByte));
  rows.scratch = scratch.mutable_data_ptr();

  if (!a.polar) {
    if (a.bias.defined()) wn::cuda::prepare(rows, stream);
    const Tensor dx = a.need_x ? at::mm(a.dy, a.weight) : Tensor();
    Tensor weight = a.weight;
    weight.addmm_(a.dy.t(), a.x, 1 - a.state.lr * a.state.weight_decay, -a.sign * a.state.lr);
    return dx;
  }
  const Tensor of_x = a.need_x ? at::empty_like(a.dy) : Tensor();
  const Tensor of_weight = rows.known ? at::mm(at::mm(a.x, a.x.t()), a.dy) : at::empty_like(a.dy);
  rows.z = a.z.const_data_ptr(), rows.of_x = pointer(of_x), rows.of_weight = of_weight.mutable_data_ptr();
  wn::cuda::prepare(rows, stream);
  const Tensor dx = a.need_x ? at::mm(of_x, a.weight) : Tensor();
  wn::cuda::fold(rows, stream);
  Tensor weight = a.weight;
  weight.addmm_(of_weight.t(), a.x);
  const bool measured = a.measure || a.refresh;
  if (measured) {
    const RowNorm norm{{wn::cuda::lengths(rows), DType::f64}};
    wn::run(problem_of(norm, layout_of(weight, 0), {&weight}, {}), weight);
  }
  wn::cuda::finish(rows, measured, stream);
  return dx;
}

}  // namespace wn::in_backward::cuda
#endif
