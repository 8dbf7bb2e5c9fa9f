// The torch side of the kernels: every operator of the `wnkernels` library, as C++ calls that go through the
// dispatcher, and the composite formulas that stand in where no kernel can (derivatives of derivatives, transforms,
// other devices).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "polar.h"

namespace wn {

using Dim = std::optional<int64_t>;  // nullopt: the norm over the whole tensor
using std::string_view;

Kind parse_kind(string_view kind);
// dim counted from the front; ValueError where v has no such dim.
Dim wrap_dim(const at::Tensor& v, Dim dim);
// The dtype of norms, sums and per-row state beside a weight: float32, or float64 for float64.
at::ScalarType accumulate_type(at::ScalarType weight);

// True where no kernel can go: under a functorch transform, or where a tensor (undefined ones are allowed) carries a
// forward-mode tangent.
bool transforming();
bool has_tangent(const at::Tensor& t);
template <class... Tensors> bool needs_formula(const Tensors&... tensors) {
  return transforming() || (has_tangent(tensors) || ...);
}

// Operators, dispatched. Shapes: v, w and their gradients alike; g and its gradient (R,) or v's shape with 1 in every
// dim but `dim`; for dim = nullopt 0-d or all ones.
namespace op {
at::Tensor weight_norm(const at::Tensor& v, const at::Tensor& g, Dim dim, string_view kind,
                       std::optional<at::ScalarType> out_dtype);
std::tuple<at::Tensor, at::Tensor> weight_norm_backward(const at::Tensor& grad, const at::Tensor& v,
                                                        const at::Tensor& g, Dim dim, string_view kind);
at::Tensor radius_backward(const at::Tensor& grad, const at::Tensor& v, const at::Tensor& g, Dim dim, string_view kind);
// The same for lists; dims and kinds have one entry for each weight or one for all. A dim below 0 is None, a kind is a
// number of `Kind`.
std::vector<at::Tensor> foreach_weight_norm(at::TensorList v, at::TensorList g, at::IntArrayRef dims,
                                            at::IntArrayRef kinds, std::optional<at::ScalarType> out_dtype);
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> foreach_weight_norm_backward(
    at::TensorList grads, at::TensorList v, at::TensorList g, at::IntArrayRef dims, at::IntArrayRef kinds);
at::Tensor row_norm(const at::Tensor& v, Dim dim);                                           // [R], accumulate_type
at::Tensor row_scale(const at::Tensor& v, const at::Tensor& g, string_view kind);  // s/n, [R], accumulate_type
at::Tensor project_(at::Tensor grad, const at::Tensor& v, const at::Tensor& g, Dim dim, string_view kind);
void normalize_(at::Tensor w, Dim dim, const std::optional<at::Tensor>& norm, double value);
std::tuple<at::Tensor, at::Tensor> linear_forward(const at::Tensor& x, const at::Tensor& v, const at::Tensor& g,
                                                  const std::optional<at::Tensor>& bias, string_view kind);
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(const at::Tensor& grad, const at::Tensor& x,
                                                               const at::Tensor& v, const at::Tensor& g,
                                                               const at::Tensor& scale, string_view kind, bool need_x,
                                                               bool need_weight);
at::Tensor weight_norm_linear(const at::Tensor& x, const at::Tensor& v, const at::Tensor& g,
                              const std::optional<at::Tensor>& bias, string_view kind,
                              std::optional<bool> materialize);
// In place on every list; see wnkernels.functional.polar_sgd_. A dim below 0 is None. `numbers` are lr, radius_lr,
// weight_decay, radius_weight_decay, momentum and the weight of the new gradient in the momentum, and an entry of
// `number_tensors` (none at all, or six) stands in for the number.
void polar_sgd_(at::TensorList weights, at::TensorList grads, at::TensorList radius, at::TensorList norm,
                at::TensorList momentum_buffers, at::TensorList radius_momentum, at::TensorList copies,
                at::TensorList telemetry, string_view kind, at::IntArrayRef dims, at::ArrayRef<double> numbers,
                const c10::List<std::optional<at::Tensor>>& number_tensors, bool nesterov, bool maximize,
                string_view retraction, const std::optional<at::Tensor>& grad_scale,
                const std::optional<at::Tensor>& found_inf);
// The last four numbers are beta1, beta2, eps and the count of steps.
void polar_adam_(at::TensorList weights, at::TensorList grads, at::TensorList radius, at::TensorList norm,
                 at::TensorList exp_avg, at::TensorList exp_avg_sq, at::TensorList max_exp_avg_sq,
                 at::TensorList radius_exp_avg, at::TensorList radius_exp_avg_sq, at::TensorList radius_max_exp_avg_sq,
                 at::TensorList copies, at::TensorList telemetry, string_view kind, at::IntArrayRef dims,
                 at::ArrayRef<double> numbers, const c10::List<std::optional<at::Tensor>>& number_tensors,
                 bool decoupled, bool maximize, string_view retraction, const std::optional<at::Tensor>& grad_scale,
                 const std::optional<at::Tensor>& found_inf);
// A linear layer with the SGD step inside its backward: csrc/in_backward.cpp.
std::tuple<at::Tensor, at::Tensor> in_backward_linear(const at::Tensor& x, const at::Tensor& weight,
                                                      const std::optional<at::Tensor>& scale,
                                                      const std::optional<at::Tensor>& bias, bool need_z);
at::Tensor in_backward_sgd_(const at::Tensor& grad, const at::Tensor& x, const std::optional<at::Tensor>& z,
                            const at::Tensor& weight, const std::optional<at::Tensor>& scale,
                            const std::optional<at::Tensor>& rho, const std::optional<at::Tensor>& radius,
                            const std::optional<at::Tensor>& norm, const std::optional<at::Tensor>& bias,
                            const std::optional<at::Tensor>& telemetry, string_view kind,
                            at::ArrayRef<double> numbers, bool maximize, bool keep_norm, bool refresh, bool need_x);
// The same where the optimizer keeps buffers, SGD's of momentum or, with `averages`, Adam's; option: nesterov, or decoupled
// decay. numbers: lr, radius_lr, weight_decay, radius_weight_decay, of the bias lr and weight_decay, and then momentum and the
// weight of the gradient in it, or beta1, beta2, eps and the count of steps with this one.
at::Tensor in_backward_buffers_(const at::Tensor& grad, const at::Tensor& x, const std::optional<at::Tensor>& z, const at::Tensor& weight,
                            const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& rho,
                            const std::optional<at::Tensor>& radius, const std::optional<at::Tensor>& norm,
                            const std::optional<at::Tensor>& bias, at::TensorList buffers, at::TensorList radius_buffers,
                            at::TensorList bias_buffers, string_view kind, at::ArrayRef<double> numbers,
                            at::ArrayRef<double> bias_numbers, bool averages, bool option, bool maximize, bool keep_norm,
                            bool need_x);
}  // namespace op

// The same mathematics in at:: operations: differentiable to any order, in any mode and transform.
namespace formula {
at::Tensor weight_norm(const at::Tensor& v, const at::Tensor& g, Dim dim, string_view kind,
                       std::optional<at::ScalarType> out_dtype);
std::tuple<at::Tensor, at::Tensor> weight_norm_backward(const at::Tensor& grad, const at::Tensor& v,
                                                        const at::Tensor& g, Dim dim, string_view kind);
at::Tensor radius_backward(const at::Tensor& grad, const at::Tensor& v, const at::Tensor& g, Dim dim, string_view kind);
at::Tensor row_norm(const at::Tensor& v, Dim dim);
}  // namespace formula

}  // namespace wn
