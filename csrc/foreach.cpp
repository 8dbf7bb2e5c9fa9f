// Weight normalization of lists of weights: one operator, one node of autograd, and few kernel calls.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "run.h"

namespace wn {
namespace {

using at::IntArrayRef;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using TensorLists = std::tuple<std::vector<Tensor>, std::vector<Tensor>>;

void check_count(const char* name, TensorList list, TensorList v) {
  TORCH_CHECK_VALUE(list.size() == v.size(), name, " must have one tensor per v (", v.size(), "), got ", list.size());
}

// How the weights of a list are normalized.
struct Settings {
  IntArrayRef dims, kinds;

  Settings(TensorList v, TensorList g, IntArrayRef dims, IntArrayRef kinds) : dims(dims), kinds(kinds) {
    check_count("g", g, v);
    const auto check = [&](const char* name, size_t count) {
      TORCH_CHECK_VALUE(count == v.size() || count == 1, name, " must have one entry per v (", v.size(),
                        ") or one for all, got ", count);
    };
    check("dims", dims.size());
    check("kinds", kinds.size());
  }
  Dim dim(size_t i) const {
    const int64_t d = dims[dims.size() == 1 ? 0 : i];
    return d < 0 ? Dim() : Dim(d);
  }
  string_view kind(size_t i) const {
    const int64_t k = kinds[kinds.size() == 1 ? 0 : i];
    TORCH_CHECK_VALUE(k == 0 || k == 1, "kinds must be 0 (swn) or 1 (ewn), got ", k);
    return k == 0 ? "swn" : "ewn";
  }
};

// Problems by what one call of an engine takes: the same device and types.
template <class Formula> class Groups {
 public:
  void add(const Problem<Formula>& problem, const Tensor& on) {
    if (problem.layout.rows == 0) return;
    auto group = std::find_if(groups.begin(), groups.end(), [&](const Group& g) {
      const Problem<Formula>& first = g.problems.front();
      return g.on.device() == on.device() && std::equal(first.in_type, std::end(first.in_type), problem.in_type) &&
             std::equal(first.out_type, std::end(first.out_type), problem.out_type);
    });
    if (group == groups.end()) group = groups.insert(group, Group{on, {}});
    group->problems.push_back(problem);
  }
  void run() {
    for (Group& group : groups) wn::run(std::move(group.problems), group.on);
  }

 private:
  struct Group {
    Tensor on;
    std::vector<Problem<Formula>> problems;
  };
  std::vector<Group> groups;
};

// ---- for CPU, CUDA and Meta ----------------------------------------------------------------------------------------

std::vector<Tensor> foreach_weight_norm(TensorList v, TensorList g, IntArrayRef dims, IntArrayRef kinds,
                                        std::optional<ScalarType> out_dtype) {
  const Settings settings(v, g, dims, kinds);
  std::vector<Tensor> w, kept;  // what the kernels read, until they are done
  w.reserve(v.size());
  kept.reserve(2 * v.size());
  Groups<Forward> groups;
  for (size_t i = 0; i < v.size(); ++i) {
    const Rows rows = check_rows(v[i], g[i], settings.dim(i), settings.kind(i));
    const ScalarType out = out_dtype.value_or(v[i].scalar_type());
    check_pair("out_dtype", out, v[i].scalar_type());
    const Tensor& x = kept.emplace_back(dense(v[i]));
    w.push_back(at::empty_strided_symint(x.sym_sizes(), x.sym_strides(), x.options().dtype(out)));
    if (v[i].is_meta()) continue;
    const Tensor& radius = kept.emplace_back(g[i].contiguous());
    groups.add(problem_of(Forward{rows.kind, values_of(radius)}, layout_of(x, rows.dim), {&x}, {&w.back()}), v[i]);
  }
  groups.run();
  return w;
}

TensorLists foreach_weight_norm_backward(TensorList grads, TensorList v, TensorList g, IntArrayRef dims,
                                         IntArrayRef kinds) {
  const Settings settings(v, g, dims, kinds);
  check_count("grads", grads, v);
  std::vector<Tensor> dv, dr, kept;
  dv.reserve(v.size());
  dr.reserve(v.size());
  kept.reserve(3 * v.size());
  Groups<Backward> groups;
  for (size_t i = 0; i < v.size(); ++i) {
    const Rows rows = check_rows(v[i], g[i], settings.dim(i), settings.kind(i));
    check_gradient("grads", grads[i], v[i]);
    const Tensor& x = kept.emplace_back(dense(v[i]));
    dv.push_back(at::empty_like(x));
    dr.push_back(at::empty_like(g[i], at::MemoryFormat::Contiguous));
    if (v[i].is_meta()) continue;
    const Tensor &G = kept.emplace_back(in_layout_of(grads[i], x)), &radius = kept.emplace_back(g[i].contiguous());
    groups.add(problem_of(Backward{rows.kind, values_of(radius), results_of(dr.back())}, layout_of(x, rows.dim),
                          {&x, &G}, {&dv.back()}),
               v[i]);
  }
  groups.run();
  return {dv, dr};
}

void register_kernels(torch::Library& m) {
  m.impl("foreach_weight_norm", TORCH_FN(foreach_weight_norm));
  m.impl("foreach_weight_norm_backward", TORCH_FN(foreach_weight_norm_backward));
}

// ---- one by one: devices without kernels, transforms, derivatives of derivatives -------------------------------------

namespace one_by_one {

std::vector<Tensor> foreach_weight_norm(TensorList v, TensorList g, IntArrayRef dims, IntArrayRef kinds,
                                        std::optional<ScalarType> out_dtype) {
  const Settings settings(v, g, dims, kinds);
  std::vector<Tensor> w;
  for (size_t i = 0; i < v.size(); ++i)
    w.push_back(op::weight_norm(v[i], g[i], settings.dim(i), settings.kind(i), out_dtype));
  return w;
}

TensorLists foreach_weight_norm_backward(TensorList grads, TensorList v, TensorList g, IntArrayRef dims,
                                         IntArrayRef kinds) {
  const Settings settings(v, g, dims, kinds);
  check_count("grads", grads, v);
  TensorLists gradients;
  for (size_t i = 0; i < v.size(); ++i) {
    auto [dv, dr] = op::weight_norm_backward(grads[i], v[i], g[i], settings.dim(i), settings.kind(i));
    std::get<0>(gradients).push_back(std::move(dv));
    std::get<1>(gradients).push_back(std::move(dr));
  }
  return gradients;
}

}  // namespace one_by_one

// ---- derivatives ---------------------------------------------------------------------------------------------------

bool any_has_tangent(TensorList list) {
  return std::any_of(list.begin(), list.end(), [](const Tensor& t) { return has_tangent(t); });
}
bool any_requires_grad(TensorList list) {
  return std::any_of(list.begin(), list.end(), [](const Tensor& t) { return t.requires_grad(); });
}

struct ForeachWeightNorm : torch::autograd::Function<ForeachWeightNorm> {
  static variable_list forward(AutogradContext* ctx, const TensorList& v, const TensorList& g, IntArrayRef dims,
                               IntArrayRef kinds, std::optional<ScalarType> out_dtype) {
    ctx->set_materialize_grads(false);
    variable_list saved(v.begin(), v.end()), frozen;
    saved.insert(saved.end(), g.begin(), g.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["dims"] = dims;
    ctx->saved_data["kinds"] = kinds;
    const at::AutoDispatchBelowADInplaceOrView below;
    auto w = op::foreach_weight_norm(v, g, dims, kinds, out_dtype);
    for (size_t i = 0; i < v.size(); ++i)
      if (!v[i].requires_grad() && !g[i].requires_grad()) frozen.push_back(w[i]);
    ctx->mark_non_differentiable(frozen);
    return w;
  }

  // Weights that were not used have no gradient and are left out; those whose direction is fixed go one by one.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const size_t n = grads.size();
    const auto saved = ctx->get_saved_variables();
    const auto dims = ctx->saved_data["dims"].toIntVector(), kinds = ctx->saved_data["kinds"].toIntVector();
    const TensorList weights(saved);
    const Settings settings(weights.slice(0, n), weights.slice(n), dims, kinds);
    variable_list result(2 * n + 3), G, v, g;
    std::vector<int64_t> used_dims, used_kinds;
    std::vector<size_t> used;
    for (size_t i = 0; i < n; ++i) {
      if (!grads[i].defined()) continue;
      if (ctx->needs_input_grad(i)) {
        used.push_back(i);
        G.push_back(grads[i]);
        v.push_back(saved[i]);
        g.push_back(saved[n + i]);
        used_dims.push_back(settings.dim(i).value_or(-1));
        used_kinds.push_back(settings.kind(i) == "ewn");
      } else if (ctx->needs_input_grad(n + i)) {
        result[n + i] = op::radius_backward(grads[i], saved[i], saved[n + i], settings.dim(i), settings.kind(i));
      }
    }
    if (used.empty()) return result;
    auto [dv, dg] = op::foreach_weight_norm_backward(G, v, g, used_dims, used_kinds);
    for (size_t j = 0; j < used.size(); ++j) {
      result[used[j]] = std::move(dv[j]);
      if (ctx->needs_input_grad(n + used[j])) result[n + used[j]] = std::move(dg[j]);
    }
    return result;
  }
};

std::vector<Tensor> differentiable_forward(TensorList v, TensorList g, IntArrayRef dims, IntArrayRef kinds,
                                           std::optional<ScalarType> out_dtype) {
  if (transforming() || any_has_tangent(v) || any_has_tangent(g))
    return one_by_one::foreach_weight_norm(v, g, dims, kinds, out_dtype);
  if (!c10::GradMode::is_enabled() || !(any_requires_grad(v) || any_requires_grad(g))) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return op::foreach_weight_norm(v, g, dims, kinds, out_dtype);
  }
  check_count("g", g, v);
  return ForeachWeightNorm::apply(v, g, dims, kinds, out_dtype);
}

TensorLists differentiable_backward(TensorList grads, TensorList v, TensorList g, IntArrayRef dims, IntArrayRef kinds) {
  bool formula = transforming(), record = false;
  for (const TensorList list : {grads, v, g}) {
    formula = formula || any_has_tangent(list);
    record = record || any_requires_grad(list);
  }
  if (formula || (record && c10::GradMode::is_enabled()))
    return one_by_one::foreach_weight_norm_backward(grads, v, g, dims, kinds);
  const at::AutoDispatchBelowADInplaceOrView below;
  return op::foreach_weight_norm_backward(grads, v, g, dims, kinds);
}

void register_one_by_one(torch::Library& m) {
  m.impl("foreach_weight_norm", TORCH_FN(one_by_one::foreach_weight_norm));
  m.impl("foreach_weight_norm_backward", TORCH_FN(one_by_one::foreach_weight_norm_backward));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wnkernels, m) {
  m.def("foreach_weight_norm(Tensor[] v, Tensor[] g, int[] dims, int[] kinds, ScalarType? out_dtype=None) -> Tensor[]");
  m.def("foreach_weight_norm_backward(Tensor[] grads, Tensor[] v, Tensor[] g, int[] dims, int[] kinds) "
        "-> (Tensor[], Tensor[])");
}

TORCH_LIBRARY_IMPL(wnkernels, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(wnkernels, Meta, m) { register_kernels(m); }
#if defined(WN_WITH_CUDA)
TORCH_LIBRARY_IMPL(wnkernels, CUDA, m) { register_kernels(m); }
#endif
TORCH_LIBRARY_IMPL(wnkernels, CompositeExplicitAutograd, m) { register_one_by_one(m); }
TORCH_LIBRARY_IMPL(wnkernels, FuncTorchBatchedDecomposition, m) { register_one_by_one(m); }
TORCH_LIBRARY_IMPL(wnkernels, Autograd, m) {
  m.impl("foreach_weight_norm", TORCH_FN(differentiable_forward));
  m.impl("foreach_weight_norm_backward", TORCH_FN(differentiable_backward));
}

namespace op {
std::vector<Tensor> foreach_weight_norm(TensorList v, TensorList g, IntArrayRef dims, IntArrayRef kinds,
                                        std::optional<ScalarType> out_dtype) {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("wnkernels::foreach_weight_norm", "")
                                 .typed<decltype(op::foreach_weight_norm)>();
  return handle.call(v, g, dims, kinds, out_dtype);
}
TensorLists foreach_weight_norm_backward(TensorList grads, TensorList v, TensorList g, IntArrayRef dims,
                                         IntArrayRef kinds) {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("wnkernels::foreach_weight_norm_backward", "")
                                 .typed<decltype(op::foreach_weight_norm_backward)>();
  return handle.call(grads, v, g, dims, kinds);
}
}  // namespace op
}  // namespace wn
