#include "shared_weights.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <c10/core/GradMode.h>

#include <algorithm>

namespace wn {

using at::ScalarType;
using at::Tensor;

namespace {

// The type of w, if it is not that of v.
std::optional<ScalarType> out_type(const Tensor& v, bool lowered) {
  const auto device = v.device().type();
  if (!lowered || v.scalar_type() != at::kFloat || !at::autocast::is_autocast_available(device) ||
      !at::autocast::is_autocast_enabled(device))
    return std::nullopt;
  return at::autocast::get_autocast_dtype(device);
}

uint32_t version_of(const Tensor& t) {
  return t.is_inference() ? 0 : t.unsafeGetTensorImpl()->version_counter().current_version();
}

c10::StorageImpl* storage_of(const Tensor& t) { return t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl(); }

}  // namespace

SharedWeights::Seen::Seen(const Tensor& t)
    : tensor(t), storage(t.unsafeGetTensorImpl()->unsafe_storage().getWeakStorageImpl()), version(version_of(t)) {}

bool SharedWeights::Seen::untouched() const {
  return storage_of(tensor) == storage._unsafe_get_target() && version_of(tensor) == version;
}
bool SharedWeights::Seen::same(const Tensor& t) const { return t.is_same(tensor) && untouched(); }

SharedWeights::SharedWeights(const std::vector<std::optional<Tensor>>& v, const std::vector<std::optional<Tensor>>& g,
                             const std::vector<int64_t>& dims, const std::vector<int64_t>& kinds,
                             const std::vector<bool>& lowered)
    : weights(v.size()), recorded(c10::GradMode::is_enabled()) {
  struct Call {  // one for each type that autocast asks for
    std::optional<ScalarType> out;
    std::vector<size_t> index;
    std::vector<Tensor> v, g;
    std::vector<int64_t> dims, kinds;
  };
  std::vector<Call> calls;
  for (size_t i = 0; i < v.size(); ++i) {
    if (!v[i] || !g[i] || v[i]->is_inference() || g[i]->is_inference()) continue;  // the last have no versions
    const auto out = out_type(*v[i], lowered[i]);
    auto call = std::find_if(calls.begin(), calls.end(), [&](const Call& c) { return c.out == out; });
    if (call == calls.end()) call = calls.insert(call, Call{out, {}, {}, {}, {}, {}});
    call->index.push_back(i);
    call->v.push_back(*v[i]);
    call->g.push_back(*g[i]);
    call->dims.push_back(dims[i]);
    call->kinds.push_back(kinds[i]);
  }
  for (const Call& call : calls) {
    const auto w = op::foreach_weight_norm(call.v, call.g, call.dims, call.kinds, call.out);
    for (size_t j = 0; j < w.size(); ++j)
      weights[call.index[j]] = Weight{Seen(w[j]), Seen(call.v[j]), Seen(call.g[j]), lowered[call.index[j]]};
  }
}

std::optional<Tensor> SharedWeights::take(size_t index, const std::optional<Tensor>& v,
                                          const std::optional<Tensor>& g) const {
  if (index >= weights.size() || !weights[index] || !v || !g || recorded != c10::GradMode::is_enabled())
    return std::nullopt;
  const Weight& weight = *weights[index];
  if (!weight.v.same(*v) || !weight.g.same(*g) || !weight.w.untouched() ||
      weight.w.tensor.scalar_type() != out_type(*v, weight.lowered).value_or(v->scalar_type()) ||
      (recorded && at::SavedTensorDefaultHooks::get_hooks(/*ignore_is_tracing=*/true)))
    return std::nullopt;
  return weight.w.tensor;
}

bool SharedWeights::plain() const {
  for (const auto& weight : weights)
    if (weight && weight->w.tensor.unsafeGetTensorImpl()->is_python_dispatch()) return false;
  return true;
}

}  // namespace wn
