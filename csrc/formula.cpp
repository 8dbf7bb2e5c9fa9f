// Weight normalization in at:: operations (see wnkernels/reference.py for the same in Python, with comments on why).
#include <ATen/TensorOperators.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/exp2.h>
#include <ATen/ops/floor.h>
#include <ATen/ops/log2.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "ops.h"

namespace wn::formula {
namespace {

struct Parts {
  at::Tensor unit;       // v over a power of two per row: largest magnitude in [1, 2)
  at::Tensor power;      // that power of two
  at::Tensor inverse_n;  // 1 / |unit|, 0 for a zero row: whatever is multiplied by it has no value and no gradient there
  at::Tensor n;          // |unit|, 0 for a zero row
};

at::Tensor row_sum(const at::Tensor& x, Dim dim) {
  at::DimVector dims;
  for (int64_t d = 0; d < x.dim(); ++d)
    if (!dim || d != *dim) dims.push_back(d);
  return dims.empty() ? x : x.sum(dims, /*keepdim=*/true);
}

Parts parts(const at::Tensor& v, Dim dim) {
  at::DimVector dims;
  for (int64_t d = 0; d < v.dim(); ++d)
    if (!dim || d != *dim) dims.push_back(d);
  const at::Tensor plain = v.detach();
  at::Tensor power;
  if (dims.empty() || v.sym_numel() == 0) {
    power = at::ones_like(row_sum(plain, dim));
    if (dims.empty() && v.sym_numel() != 0) power = plain.abs();
  } else {
    power = plain.abs().amax(dims, /*keepdim=*/true);
  }
  const at::Tensor usable = (power > 0).logical_and(power.isfinite());
  power = at::exp2(at::floor(at::log2(at::where(usable, power, at::ones_like(power)))));
  const at::Tensor unit = v / power;
  const at::Tensor square = row_sum(unit * unit, dim);
  const at::Tensor zero = square == 0;
  const at::Tensor root = at::sqrt(at::where(zero, at::ones_like(square), square));
  return {unit, power, at::where(zero, at::zeros_like(root), at::reciprocal(root)),
          at::where(zero, at::zeros_like(root), root)};
}

// g in a shape that broadcasts along v's rows.
at::Tensor along_rows(const at::Tensor& g, const at::Tensor& v, Dim dim) {
  if (!dim) return g.reshape({});
  if (g.dim() == v.dim()) return g;
  at::Tensor r = g;
  for (int64_t d = 0; d < *dim; ++d) r = r.unsqueeze(0);
  for (int64_t d = *dim + 1; d < v.dim(); ++d) r = r.unsqueeze(-1);
  return r;
}

at::Tensor signed_radius(const at::Tensor& g, string_view kind) {
  return parse_kind(kind) == Kind::ewn ? at::exp(g) : g;
}

}  // namespace

at::Tensor weight_norm(const at::Tensor& v, const at::Tensor& g, Dim dim, string_view kind,
                       std::optional<at::ScalarType> out_dtype) {
  dim = wrap_dim(v, dim);
  const auto wide = accumulate_type(v.scalar_type());
  const Parts row = parts(v.to(wide), dim);
  const at::Tensor s = signed_radius(along_rows(g.to(wide), v, dim), kind);
  return (row.unit * (s * row.inverse_n)).to(out_dtype.value_or(v.scalar_type()));
}

std::tuple<at::Tensor, at::Tensor> weight_norm_backward(const at::Tensor& grad, const at::Tensor& v,
                                                        const at::Tensor& g, Dim dim, string_view kind) {
  dim = wrap_dim(v, dim);
  const auto wide = accumulate_type(v.scalar_type());
  const Parts row = parts(v.to(wide), dim);
  const at::Tensor G = grad.to(wide), direction = row.unit * row.inverse_n;
  const at::Tensor s = signed_radius(along_rows(g.to(wide), v, dim), kind);
  const at::Tensor p = row_sum(G * direction, dim);
  const at::Tensor dv = (G - p * direction) * (s * row.inverse_n) / row.power;
  const at::Tensor dr = parse_kind(kind) == Kind::ewn ? s * p : p;
  return {dv.to(v.scalar_type()), dr.reshape_symint(g.sym_sizes()).to(g.scalar_type())};
}

at::Tensor radius_backward(const at::Tensor& grad, const at::Tensor& v, const at::Tensor& g, Dim dim,
                           string_view kind) {
  return std::get<1>(formula::weight_norm_backward(grad, v, g, dim, kind));
}

at::Tensor row_norm(const at::Tensor& v, Dim dim) {
  dim = wrap_dim(v, dim);
  const Parts row = parts(v.to(accumulate_type(v.scalar_type())), dim);
  const at::Tensor n = row.n * row.power;
  return dim ? n.reshape_symint({v.sym_size(*dim)}) : n.reshape({});
}

}  // namespace wn::formula
