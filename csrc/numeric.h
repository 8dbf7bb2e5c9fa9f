// Numbers: the storage types, their conversions, and the arithmetic that must be the same on every backend.
// Free of torch and of CUDA headers, so that g++ and nvcc compile the same definitions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__CUDACC__)
#define WN_INLINE __host__ __device__ __forceinline__
#else
#define WN_INLINE inline __attribute__((always_inline))
#endif

namespace wn {

enum class DType : int { f32, f64, bf16, f16 };

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// Sums over elements of type T are kept in accumulator_t<T>: float, or double for double.
template <class T> struct accumulator { using type = float; };
template <> struct accumulator<double> { using type = double; };
template <class T> using accumulator_t = typename accumulator<T>::type;

template <class To, class From> WN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
#if defined(__CUDA_ARCH__)
  union { From f; To t; } u;
  u.f = from;
  return u.t;
#else
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
#endif
}

// Conversions are free of branches, so that loops over them vectorize; rounding is to nearest, ties to even.
WN_INLINE float widen(float x) { return x; }
WN_INLINE double widen(double x) { return x; }
WN_INLINE float widen(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
WN_INLINE float widen(f16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t exponent_fix = magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN
  const float value = bit_cast<float>(magnitude << 13) * 0x1p112f;         // also normalizes subnormals
  return bit_cast<float>(bit_cast<uint32_t>(value) | exponent_fix | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
#endif
}

template <class T> struct narrow;
template <> struct narrow<float> {
  static WN_INLINE float from(float x) { return x; }
  static WN_INLINE float from(double x) { return static_cast<float>(x); }
};
template <> struct narrow<double> {
  static WN_INLINE double from(double x) { return x; }
  static WN_INLINE double from(float x) { return x; }
};
template <> struct narrow<bf16> {
  static WN_INLINE bf16 from(double x) { return from(static_cast<float>(x)); }
  static WN_INLINE bf16 from(float x) {
    const uint32_t u = bit_cast<uint32_t>(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return bf16{static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
  }
};
template <> struct narrow<f16> {
  static WN_INLINE f16 from(double x) { return from(static_cast<float>(x)); }
  static WN_INLINE f16 from(float x) {
#if defined(__CUDA_ARCH__)
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    const uint32_t u = bit_cast<uint32_t>(x) & 0x7fffffffu;
    const uint32_t sign = (bit_cast<uint32_t>(x) >> 16) & 0x8000u;
    const uint32_t normal = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(u) + 0.5f) - 0x3f000000u;
    const uint32_t special = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = u < 0x38800000u ? subnormal : normal;
    return f16{static_cast<uint16_t>((u >= 0x47800000u ? special : finite) | sign)};
#endif
  }
};

// f(0), f(1), ... f(n - 1) with the index a compile-time constant, so that small arrays indexed by it stay in registers.
template <int... i, class F> WN_INLINE void static_for(std::integer_sequence<int, i...>, F&& f) {
  (f(std::integral_constant<int, i>{}), ...);
}
template <int n, class F> WN_INLINE void static_for(F&& f) { static_for(std::make_integer_sequence<int, n>{}, f); }

// A per-row array of any dtype (stride 0: one element for all rows), or one value when there is no array.
struct RowValues {
  const void* data = nullptr;
  DType type = DType::f32;
  double value = 0;
  int64_t stride = 1;

  template <class A> WN_INLINE A at(int64_t row) const {
    if (data == nullptr) return static_cast<A>(value);
    row *= stride;
    switch (type) {
      case DType::f32: return static_cast<A>(static_cast<const float*>(data)[row]);
      case DType::f64: return static_cast<A>(static_cast<const double*>(data)[row]);
      case DType::bf16: return static_cast<A>(widen(static_cast<const bf16*>(data)[row]));
      default: return static_cast<A>(widen(static_cast<const f16*>(data)[row]));
    }
  }
};

// A per-row array that a kernel writes; no array means that nobody asked for it.
struct RowResults {
  void* data = nullptr;
  DType type = DType::f32;

  template <class A> WN_INLINE void set(int64_t row, A x) const {
    if (data == nullptr) return;
    switch (type) {
      case DType::f32: static_cast<float*>(data)[row] = static_cast<float>(x); return;
      case DType::f64: static_cast<double*>(data)[row] = static_cast<double>(x); return;
      case DType::bf16: static_cast<bf16*>(data)[row] = narrow<bf16>::from(x); return;
      default: static_cast<f16*>(data)[row] = narrow<f16>::from(x); return;
    }
  }
};

template <class A> struct limits;  // std::numeric_limits is not callable from device code
template <> struct limits<float> {
  static constexpr float smallest_normal = 0x1p-126f, largest = 0x1.fffffep127f, safe_square = 0x1p-103f;
};
template <> struct limits<double> {
  static constexpr double smallest_normal = 0x1p-1022, largest = 0x1.fffffffffffffp1023, safe_square = 0x1p-970;
};

WN_INLINE float magnitude(float x) { return ::fabsf(x); }
WN_INLINE double magnitude(double x) { return ::fabs(x); }

// A sum of squares that neither overflowed nor lost bits to underflow (smallest normal / epsilon).
template <class A> WN_INLINE bool safe_square(A sum) {
  return (sum >= limits<A>::safe_square) & (sum <= limits<A>::largest);
}

// A coefficient that carries all of its bits: zero or a normal number.
template <class A> WN_INLINE bool full_precision(A x) {
  const A m = magnitude(x);
  return (x == A(0)) | ((m >= limits<A>::smallest_normal) & (m <= limits<A>::largest));
}

// x or 0, without a branch.
WN_INLINE float zero_unless(bool keep, float x) {
  return bit_cast<float>(bit_cast<uint32_t>(x) & -static_cast<uint32_t>(keep));
}
WN_INLINE double zero_unless(bool keep, double x) {
  return bit_cast<double>(bit_cast<uint64_t>(x) & -static_cast<uint64_t>(keep));
}

// a or b, without a branch.
WN_INLINE float pick(bool first, float a, float b) {
  return bit_cast<float>(bit_cast<uint32_t>(zero_unless(first, a)) | bit_cast<uint32_t>(zero_unless(!first, b)));
}
WN_INLINE double pick(bool first, double a, double b) {
  return bit_cast<double>(bit_cast<uint64_t>(zero_unless(first, a)) | bit_cast<uint64_t>(zero_unless(!first, b)));
}

// Saturates, so that a coefficient times an exact zero stays zero where infinity times zero would be NaN.
template <class A> WN_INLINE A finite(A x) {
  x = pick(x > limits<A>::largest, limits<A>::largest, x);
  return pick(x < -limits<A>::largest, -limits<A>::largest, x);
}

// exp and log in double to less than one unit in the last place, by the method of fdlibm (Sun Microsystems) without its
// branches: loops over rows that call libm are not vectorized.
constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
constexpr double kInteger = 0x1.8p52;  // x + kInteger has the integer next to x in its last bits

WN_INLINE double exponential(double x) {
  x = pick(x < -1000, -1000.0, pick(x > 1000, 1000.0, x));  // 0 and infinity already
  const double n = (x * 1.44269504088896338700 + kInteger) - kInteger;
  const double high = x - n * kLn2High, low = n * kLn2Low, r = high - low, t = r * r;
  const double c = r - t * (1.66666666666666019037e-01 + t * (-2.77777777770155933842e-03 + t * (
      6.61375632143793436117e-05 + t * (-1.65339022054652515390e-06 + t * 4.13813679705723846039e-08))));
  const double y = 1 - ((low - r * c / (2 - c)) - high);
  const double half = (0.5 * n + kInteger) - kInteger;  // 2^n in two steps, for results that are infinite or subnormal
  const auto power = [](double m) { return bit_cast<double>(bit_cast<uint64_t>(m + (1023 + kInteger)) << 52); };
  return y * power(half) * power(n - half);
}

// For positive x.
WN_INLINE double logarithm(double x) {
  const bool subnormal = x < limits<double>::smallest_normal;
  const uint64_t half_root = 0x3fe6a09e00000000;  // sqrt(1/2): the mantissa is taken from [sqrt(1/2), sqrt(2))
  const uint64_t bits = bit_cast<uint64_t>(pick(subnormal, x * 0x1p54, x)) + (0x3ff0000000000000 - half_root);
  const double exponent = bit_cast<double>(bits >> 52 | bit_cast<uint64_t>(0x1p52)) - 0x1p52;
  const double k = exponent - pick(subnormal, 1023.0 + 54, 1023.0);
  const double f = bit_cast<double>((bits & 0x000fffffffffffff) + half_root) - 1;
  const double s = f / (2 + f), z = s * s, w = z * z, square = 0.5 * f * f;
  const double even = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
  const double odd = z * (6.666666666666735130e-01 + w * (2.857142874366239149e-01 + w * (
      1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
  return k * kLn2High - ((square - (s * (square + (even + odd)) + k * kLn2Low)) - f);
}

// x * 2^e in two steps: 2^e alone may leave the range of double where the product does not.
struct PowerOfTwo {
  double first = 1, second = 1;
  PowerOfTwo() = default;
  explicit WN_INLINE PowerOfTwo(int e) : first(::ldexp(1.0, e / 2)), second(::ldexp(1.0, e - e / 2)) {}
  WN_INLINE double operator*(double x) const { return x * first * second; }
};

}  // namespace wn
