// From dtypes known at run time to the types of a kernel instantiation.
#pragma once

#include <stdexcept>
#include <string>

#include "numeric.h"

namespace wn {

template <class T> struct type_tag { using type = T; };

inline const char* name(DType type) {
  switch (type) {
    case DType::f32: return "float32";
    case DType::f64: return "float64";
    case DType::bf16: return "bfloat16";
    default: return "float16";
  }
}

// Calls f(type_tag<T>{}).
template <class F> void dispatch(DType type, F&& f) {
  switch (type) {
    case DType::f32: return f(type_tag<float>{});
    case DType::f64: return f(type_tag<double>{});
    case DType::bf16: return f(type_tag<bf16>{});
    case DType::f16: return f(type_tag<f16>{});
  }
  throw std::runtime_error("wnkernels: unknown dtype code " + std::to_string(static_cast<int>(type)));
}

// Calls f(type_tag<Tv>{}, type_tag<Tw>{}) for the pairs that have kernels: equal types, and fp32 with a 16-bit type.
template <class F> void dispatch_pair(DType v, DType w, F&& f) {
  if (v == w) return dispatch(v, [&](auto tag) { f(tag, tag); });
  if (v == DType::f32 && w == DType::bf16) return f(type_tag<float>{}, type_tag<bf16>{});
  if (v == DType::f32 && w == DType::f16) return f(type_tag<float>{}, type_tag<f16>{});
  if (v == DType::bf16 && w == DType::f32) return f(type_tag<bf16>{}, type_tag<float>{});
  if (v == DType::f16 && w == DType::f32) return f(type_tag<f16>{}, type_tag<float>{});
  throw std::runtime_error(std::string("wnkernels: no kernel for v of ") + name(v) + " with w of " + name(w) +
                           "; they must be equal, or float32 with a 16-bit type");
}

}  // namespace wn
