// A step inside the backward as its operators hand it to a backend, checked, and the backend on a GPU.
#pragma once

#include "in_backward.h"
#include "tensors.h"

namespace wn::in_backward {

struct Arguments {
  Tensor dy, x, z, weight, scale, bias;  // dy, z (batch, rows) and x (batch, width) contiguous; undefined where absent
  RowState state;
  double bias_lr, bias_weight_decay, sign;
  bool polar, need_x, measure, refresh;
};

namespace cuda {
// y = z scale + bias of shape (batch, rows) and z = x u^T, which is undefined where it is not needed.
std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                                  const std::optional<Tensor>& bias, bool need_z);
// Takes the step; returns dx, undefined where it is not needed.
Tensor run(const Arguments& a);
}  // namespace cuda

}  // namespace wn::in_backward
