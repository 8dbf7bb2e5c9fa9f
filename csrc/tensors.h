// From tensors to the plain structs of the engines, with the checks that every operator shares.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include "kernels.h"
#include "ops.h"

namespace wn {

using at::ScalarType;
using at::Tensor;

inline bool is_16bit(ScalarType t) { return t == at::kBFloat16 || t == at::kHalf; }

inline void check_weight_dtype(const char* name, ScalarType t) {
  TORCH_CHECK_TYPE(t == at::kFloat || t == at::kDouble || is_16bit(t), name,
                   " must be float32, float64, bfloat16 or float16, got ", t);
}

// Beside v: v's dtype, or float32 with a 16-bit v, or 16-bit with a float32 v.
inline void check_pair(const char* name, ScalarType t, ScalarType v) {
  check_weight_dtype(name, t);
  TORCH_CHECK_TYPE(t == v || (t == at::kFloat && is_16bit(v)) || (is_16bit(t) && v == at::kFloat), name,
                   " must have v's dtype, or be float32 beside a 16-bit v or 16-bit beside a float32 v; got ", t,
                   " beside ", v);
}

inline void check_device(const char* name, const Tensor& t, const Tensor& v) {
  TORCH_CHECK(t.device() == v.device(), name, " must be on v's device ", v.device(), ", got ", t.device());
}

inline void check_radius(const Tensor& g, const Tensor& v, Dim dim) {
  check_device("g", g, v);
  TORCH_CHECK_TYPE(g.scalar_type() == v.scalar_type() || (g.scalar_type() == at::kFloat && is_16bit(v.scalar_type())),
                   "g must have v's dtype, or be float32 beside a 16-bit v; got ", g.scalar_type(), " beside ",
                   v.scalar_type());
  bool fits;
  if (!dim) {
    fits = true;
    for (const auto& size : g.sym_sizes()) fits = fits && size == 1;
  } else if (g.dim() == v.dim()) {
    fits = true;
    for (int64_t d = 0; d < v.dim(); ++d) fits = fits && g.sym_size(d) == (d == *dim ? v.sym_size(d) : c10::SymInt(1));
  } else {
    fits = g.dim() == 1 && g.sym_size(0) == v.sym_size(*dim);
  }
  if (fits) return;
  TORCH_CHECK_VALUE(dim, "g must be 0-d or all ones for dim=None, got shape ", g.sym_sizes());
  TORCH_CHECK_VALUE(false, "g must have shape (", v.sym_size(*dim), ",) or v's shape ", v.sym_sizes(),
                    " with 1 in every dimension but ", *dim, "; got ", g.sym_sizes());
}

inline void check_gradient(const char* name, const Tensor& grad, const Tensor& v) {
  check_device(name, grad, v);
  check_pair(name, grad.scalar_type(), v.scalar_type());
  TORCH_CHECK_VALUE(grad.sym_sizes() == v.sym_sizes(), name, " must have v's shape ", v.sym_sizes(), ", got ",
                    grad.sym_sizes());
}

// The arguments that most operators share, checked.
struct Rows {
  Dim dim;
  Kind kind;
};
inline Rows check_rows(const Tensor& v, const Tensor& g, Dim dim, string_view kind) {
  check_weight_dtype("v", v.scalar_type());
  const Rows rows{wrap_dim(v, dim), parse_kind(kind)};
  check_radius(g, v, rows.dim);
  return rows;
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kBFloat16: return DType::bf16;
    default: return DType::f16;
  }
}

inline Tensor dense(const Tensor& v) { return v.is_non_overlapping_and_dense() ? v : v.contiguous(); }

// t with exactly the strides of `like`, which is dense.
inline Tensor in_layout_of(const Tensor& t, const Tensor& like) {
  return t.strides() == like.strides() ? t : at::empty_like(like, t.options()).copy_(t);
}

// In a dense tensor the elements inside `dim` are as many as its stride says, whatever the order of the other dims.
inline Layout layout_of(const Tensor& dense_v, Dim dim) {
  const int64_t rows = dim ? dense_v.size(*dim) : 1, length = rows == 0 ? 0 : dense_v.numel() / rows;
  if (rows <= 1 || length == 0) return {1, rows, length};
  const int64_t inner = dense_v.stride(*dim);
  return {length / inner, rows, inner};
}

inline RowValues values_of(const Tensor& contiguous) {
  return {contiguous.const_data_ptr(), dtype_of(contiguous), 0};
}
inline RowResults results_of(const Tensor& contiguous) { return {contiguous.mutable_data_ptr(), dtype_of(contiguous)}; }

template <class Formula>
Problem<Formula> problem_of(Formula formula, const Layout& layout, at::ArrayRef<const Tensor*> in,
                            at::ArrayRef<const Tensor*> out) {
  Problem<Formula> p{std::move(formula), layout, {}, {}, {}, {}};
  int k = 0;
  for (const Tensor* t : in) {
    p.in[k] = t->const_data_ptr();
    p.in_type[k++] = dtype_of(*t);
  }
  k = 0;
  for (const Tensor* t : out) {
    p.out[k] = t->mutable_data_ptr();
    p.out_type[k++] = dtype_of(*t);
  }
  return p;
}

}  // namespace wn
