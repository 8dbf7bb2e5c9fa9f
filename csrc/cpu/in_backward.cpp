#if defined(__GNUC__) && !defined(__clang__)
// Of products no bit is promised, and contracted multiply-adds are twice as quick.
#pragma GCC optimize("fp-contract=fast")
#pragma GCC diagnostic ignored "-Wpsabi"  // what takes or returns vectors is inlined
#endif

#include "in_backward.h"

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "../step.h"

#if !defined(WN_ONE_VERSION) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WN_WIDE_VECTORS
#endif

namespace wn::cpu {
namespace {

// Memory of one thread, aligned for vectors.
template <class T> struct Scratch {
  c10::DataPtr memory;
  explicit Scratch(int64_t size) : memory(c10::GetCPUAllocator()->allocate(size * sizeof(T))) {}
  T* data() const { return static_cast<T*>(memory.get()); }
};

// Vectors of `bytes`, and the tiles that fit into the registers then.
template <class T, int bytes> struct Simd {
  typedef T V __attribute__((vector_size(bytes)));
  typedef T Unaligned __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias));
  typedef double Wide __attribute__((vector_size(bytes)));
  typedef T Narrow __attribute__((vector_size(bytes / sizeof(double) * sizeof(T)), aligned(alignof(T)), may_alias));
  static constexpr int lanes = bytes / sizeof(T), panel = 2 * lanes, tile = bytes == 64 ? 8 : 4;
  static constexpr int wide_lanes = bytes / sizeof(double);

  static WN_INLINE V load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static WN_INLINE void store(T* p, const V& v) { *reinterpret_cast<Unaligned*>(p) = v; }
  static WN_INLINE Wide widen(const T* p) {
    return __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), Wide);
  }
};

// sum = sums of neighbours, of a and then of b.
template <class V, int... lane>
WN_INLINE void sum_pairs(const V& a, const V& b, V& sum, std::integer_sequence<int, lane...>) {
  sum = __builtin_shufflevector(a, b, 2 * lane...) + __builtin_shufflevector(a, b, (2 * lane + 1)...);
}

// Element i of v[0] becomes the sum of the lanes of v[i].
template <class S, int n = S::lanes> WN_INLINE void sum_lanes(typename S::V* v) {
  if constexpr (n > 1) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i)
      sum_pairs(v[2 * i], v[2 * i + 1], v[i], std::make_integer_sequence<int, S::lanes>{});
    sum_lanes<S, n / 2>(v);
  }
}

// low, high = the elements of a and b in turns.
template <class V, int... lane>
WN_INLINE void interleave(const V& a, const V& b, V& low, V& high, std::integer_sequence<int, lane...>) {
  constexpr int lanes = sizeof...(lane);
  low = __builtin_shufflevector(a, b, (lane / 2 + lane % 2 * lanes)...);
  high = __builtin_shufflevector(a, b, (lanes / 2 + lane / 2 + lane % 2 * lanes)...);
}

// Element i of v[j] becomes element j of v[i].
template <class S, int n = S::lanes> WN_INLINE void transpose(typename S::V* v) {
  if constexpr (n > 1) {
    typename S::V out[S::lanes];
#pragma GCC unroll 8
    for (int i = 0; i < S::lanes / 2; ++i)
      interleave(v[i], v[i + S::lanes / 2], out[2 * i], out[2 * i + 1], std::make_integer_sequence<int, S::lanes>{});
#pragma GCC unroll 16
    for (int i = 0; i < S::lanes; ++i) v[i] = out[i];
    transpose<S, n / 2>(v);
  }
}

// out = kept in + a b, for in and out (m, panel), in null for zeros, kept (m,) or null for ones, a (m, k) with element
// (i, n) at a[i stride + n], or at a[i + n stride] where it is `turned`, and b (k, panel). The product is added up before it
// meets `in`, which is larger and would be rounded k times. The squares of out are added to squares (m,), if given, lane by
// lane.
template <class S, int m, bool turned, class T>
WN_INLINE void add_product(const T* in, const T* kept, T* out, int64_t out_stride, const T* a, int64_t stride,
                           const T* b, int64_t k, typename S::V* squares) {
  typename S::V sum[m][2];
#pragma GCC unroll 8
  for (int i = 0; i < m; ++i) sum[i][0] = sum[i][1] = typename S::V{};
  for (int64_t n = 0; n < k; ++n, b += S::panel) {
    const typename S::V b0 = S::load(b), b1 = S::load(b + S::lanes);
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) {
      const T factor = turned ? a[i + n * stride] : a[i * stride + n];
      sum[i][0] += b0 * factor;
      sum[i][1] += b1 * factor;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < m; ++i) {
    typename S::V out0 = sum[i][0], out1 = sum[i][1];
    if (in) {
      const T factor = kept ? kept[i] : T(1);
      out0 += S::load(in + i * S::panel) * factor;
      out1 += S::load(in + i * S::panel + S::lanes) * factor;
    }
    S::store(out + i * out_stride, out0);
    S::store(out + i * out_stride + S::lanes, out1);
    if (squares) squares[i] += out0 * out0 + out1 * out1;
  }
}

// The same for any m.
template <class S, bool turned, class T>
WN_INLINE void add_products(int64_t m, const T* in, const T* kept, T* out, int64_t out_stride, const T* a,
                            int64_t stride, const T* b, int64_t k, typename S::V* squares = nullptr) {
  int64_t i = 0;
  const auto tiles = [&](auto size) __attribute__((always_inline)) {
    for (; i + size <= m; i += size)
      add_product<S, size, turned>(in ? in + i * S::panel : nullptr, kept ? kept + i : nullptr, out + i * out_stride,
                                   out_stride, a + i * (turned ? 1 : stride), stride, b, k,
                                   squares ? squares + i : nullptr);
  };
  if constexpr (S::tile == 8) tiles(std::integral_constant<int, 8>{});
  tiles(std::integral_constant<int, 4>{});
  tiles(std::integral_constant<int, 2>{});
  tiles(std::integral_constant<int, 1>{});
}

// Rows of `count` columns from a matrix into panels, the last one filled up with zeros.
template <class S, class T> WN_INLINE void pack(const T* from, int64_t stride, int64_t rows, int64_t count, T* to) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = from + r * stride;
    int64_t c = 0;
    T* panel = to + r * S::panel;
    for (; c + S::panel <= count; c += S::panel, panel += rows * S::panel) {
      S::store(panel, S::load(row + c));
      S::store(panel + S::lanes, S::load(row + c + S::lanes));
    }
    if (c < count) {
      std::fill(panel, panel + S::panel, T(0));
      std::copy(row + c, row + count, panel);
    }
  }
}

// Rows of a panel of u, which stays in L1 between the product that reads it and the one that updates it.
constexpr int64_t kBlock = 32;

// The combination of `count` elements of a row of u and e^T x, both in panels, with the buffers from element `at` on. Writes
// u, with zeros behind those elements as before.
template <class Formula, class T, class Count>
WN_INLINE void combine_row(Count count, const T* coefficients, T* u, const T* product, T* const* buffers, int64_t at) {
  constexpr int state = Formula::inputs - 2;
  static_assert(Formula::outputs == 1 + state);
  T c[Formula::coefficients], *buffer[state];
  std::copy_n(coefficients, Formula::coefficients, c);
  for (int i = 0; i < state; ++i) buffer[i] = buffers[i] + at;
  const auto each = [&](int64_t lane) __attribute__((always_inline)) {
    T x[Formula::inputs], y[Formula::outputs];
    x[0] = u[lane], x[1] = product[lane];
    static_for<state>([&](auto i) __attribute__((always_inline)) { x[2 + i] = buffer[i][lane]; });
    Formula::combine(c, x, y);
    u[lane] = y[0];
    static_for<state>([&](auto i) __attribute__((always_inline)) { buffer[i][lane] = y[1 + i]; });
  };
#pragma omp simd
  for (int64_t lane = 0; lane < count; ++lane) each(lane);
}

template <class S, class T, class Formula>
WN_INLINE void step_columns(const LinearStep<T, Formula>& p, int64_t first, int64_t last) {
  constexpr bool has_formula = !std::is_void_v<Formula>;
  constexpr int64_t P = S::panel;
  const int64_t count = last - first, panels = (count + P - 1) / P, batch = p.batch;
  const Scratch<T> memory(2 * batch * panels * P + (has_formula ? 2 : 1) * kBlock * P);
  T *const x = memory.data(), *const dx = x + batch * panels * P, *const u = dx + batch * panels * P;
  typename S::V sums[kBlock];
  pack<S>(p.x + first, p.width, batch, count, x);
  if (p.dx) std::fill(dx, u, T(0));
  for (int64_t row = 0; row < p.rows; row += kBlock) {
    const int64_t rows = std::min(kBlock, p.rows - row), after = std::min(kBlock, p.rows - row - rows);
    std::fill(sums, sums + kBlock, typename S::V{});
    for (int64_t c = 0; c < panels; ++c) {
      const int64_t at = row * p.width + first + c * P, width = std::min(P, count - c * P);
      const bool turns = c + 1 == panels;  // to the next block; the hardware does not foresee runs as short as a panel's
      const T* const next = turns ? p.u + (row + rows) * p.width + first : p.u + at + P;
      for (int64_t r = 0; r < (turns ? after : rows); ++r)
        for (int64_t i = r * p.width; i < r * p.width + P; i += 64 / sizeof(T)) {
          __builtin_prefetch(next + i, 0, 2);
          if constexpr (has_formula)
            for (int b = 0; b < Formula::inputs - 2; ++b) __builtin_prefetch(p.buffers[b] + (next - p.u) + i, 0, 2);
        }
      pack<S>(p.u + at, p.width, rows, width, u);
      if (p.dx) {
        T* const d = dx + c * batch * P;
        add_products<S, true, T>(batch, d, nullptr, d, P, p.a + row * batch, batch, u, rows);
      }
      const bool whole = width == P;
      if constexpr (has_formula) {
        T* const product = u + kBlock * P;
        add_products<S, false, T>(rows, nullptr, nullptr, product, P, p.e + row * batch, batch, x + c * batch * P, batch);
        for (int64_t r = 0; r < rows; ++r) {
          const T* const coefficients = p.coefficients + (row + r) * Formula::coefficients;
          T *const of_row = u + r * P, *const to = p.updated + at + r * p.width;
          if (whole) combine_row<Formula>(std::integral_constant<int64_t, P>{}, coefficients, of_row, product + r * P, p.buffers,
                                          at + r * p.width);
          else combine_row<Formula>(width, coefficients, of_row, product + r * P, p.buffers, at + r * p.width);
          const typename S::V u0 = S::load(of_row), u1 = S::load(of_row + S::lanes);
          if (p.squares) sums[r] += u0 * u0 + u1 * u1;
          std::copy(of_row, of_row + (whole ? P : width), to);
        }
        continue;
      }
      add_products<S, false, T>(rows, u, p.kept + row, whole ? p.updated + at : u, whole ? p.width : P,
                                p.e + row * batch, batch, x + c * batch * P, batch, p.squares ? sums : nullptr);
      for (int64_t r = 0; r < rows && !whole; ++r)
        std::copy(u + r * P, u + r * P + width, p.updated + at + r * p.width);
    }
    for (int64_t r = 0; r < rows && p.squares; r += S::lanes) {
      sum_lanes<S>(sums + r);
      for (int64_t i = 0; i < std::min<int64_t>(S::lanes, rows - r); ++i) p.squares[row + r + i] = sums[r][i];
    }
  }
  for (int64_t b = 0; b < batch && p.dx; ++b)
    for (int64_t c = 0; c < panels; ++c) {
      const T* const from = dx + (c * batch + b) * P;
      std::copy(from, from + std::min(P, count - c * P), p.dx + b * p.width + first + c * P);
    }
}

// Of the inner products: columns that stay in L1 from one part of the batch to the next; the batch whose sums are kept at
// a time; and rows that stay in L2 from one such batch to the next.
constexpr int64_t kDepth = 512, kBatch = 32, kRows = 16;

// sums (n, m) += x (n, k) u (m, k)^T, lane by lane.
template <class S, int m, int n, class T>
WN_INLINE void add_inner(const T* u, const T* x, int64_t stride, int64_t k, typename S::V* sums) {
  using V = typename S::V;
  V sum[n][m];
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) sum[j][i] = sums[j * m + i];
  int64_t c = 0;
  const auto add = [&](const auto& load) __attribute__((always_inline)) {
    V ui[m], xj;
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) load(ui[i], u + i * stride + c);
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) {
      load(xj, x + j * stride + c);
#pragma GCC unroll 8
      for (int i = 0; i < m; ++i) sum[j][i] += ui[i] * xj;
    }
  };
  for (; c + S::lanes <= k; c += S::lanes)
    add([](V& v, const T* p) __attribute__((always_inline)) { v = S::load(p); });
  if (c < k)
    add([&](V& v, const T* p) __attribute__((always_inline)) {
      v = V{};
      for (int i = 0; i < k - c; ++i) v[i] = p[i];
    });
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j)
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) sums[j * m + i] = sum[j][i];
}

// z (batch, kRows) = the products of rows row..row + m - 1 of u with `batch`, at most kBatch, of x.
template <class S, int m, class T>
WN_INLINE void forward_tile(const LinearForward<T>& p, int64_t row, int64_t first, int64_t batch, T* z) {
  typename S::V sums[kBatch * m];
  for (int64_t i = 0; i < batch * m || i % S::lanes; ++i) sums[i] = typename S::V{};
  const T *const u = p.u + row * p.width, *const x = p.x + first * p.width;
  for (int64_t c = 0; c < p.width; c += kDepth) {
    const int64_t k = std::min(kDepth, p.width - c);
    int64_t b = 0;
    const auto tiles = [&](auto n) __attribute__((always_inline)) {
      for (; b + n <= batch; b += n) add_inner<S, m, n>(u + c, x + b * p.width + c, p.width, k, sums + b * m);
    };
    if constexpr (S::tile == 8 && m == 4) tiles(std::integral_constant<int, 4>{});
    tiles(std::integral_constant<int, 2>{});
    tiles(std::integral_constant<int, 1>{});
  }
  T added[kBatch * m];
  for (int64_t i = 0; i < batch * m; i += S::lanes) {
    sum_lanes<S>(sums + i);
    S::store(added + i, sums[i]);
  }
  for (int64_t b = 0; b < batch; ++b)
    for (int i = 0; i < m; ++i) z[b * kRows + i] = added[b * m + i];
}

template <class S, class T> WN_INLINE void forward_rows(const LinearForward<T>& p, int64_t first, int64_t last) {
  constexpr int m = 4;
  T z[kBatch * kRows], scale[kRows], bias[kRows];
  for (int64_t row = first; row < last; row += kRows) {
    const int64_t rows = std::min(kRows, last - row);
    for (int64_t i = 0; i < rows; ++i) {
      scale[i] = p.scale ? p.scale[row + i] : T(1);
      bias[i] = p.bias ? p.bias[row + i] : T(0);
    }
    for (int64_t b = 0; b < p.batch; b += kBatch) {
      const int64_t batch = std::min(kBatch, p.batch - b);
      int64_t r = 0;
      for (; r + m <= rows; r += m) forward_tile<S, m>(p, row + r, b, batch, z + r);
      for (; r < rows; ++r) forward_tile<S, 1>(p, row + r, b, batch, z + r);
      for (int64_t n = 0; n < batch; ++n) {  // whole cache lines, where the tiles have parts of them
        const T* const from = z + n * kRows;
        const int64_t at = (b + n) * p.rows + row;
        if (p.z) std::copy(from, from + rows, p.z + at);
        for (int64_t i = 0; i < rows; ++i) p.y[at + i] = from[i] * scale[i] + bias[i];
      }
    }
  }
}

// Rows of the Gram matrix that are made at a time, up to the end of their block on the diagonal; those left over one by one.
constexpr int kGramRows = 4;

template <class S, class T> WN_INLINE void gram_rows(const LinearGram<T>& p, int64_t first, int64_t last) {
  const LinearForward<T> products{p.x, p.x, nullptr, nullptr, nullptr, nullptr, p.batch, p.batch, p.width};
  T z[kBatch * kRows];
  const auto tile = [&](int64_t row, auto m) __attribute__((always_inline)) {
    for (int64_t b = 0; b < row + m; b += kBatch) {
      const int64_t batch = std::min(kBatch, row + m - b);
      forward_tile<S, m>(products, row, b, batch, z);
      for (int64_t n = 0; n < batch; ++n)
        for (int64_t i = 0; i < m; ++i) {
          const int64_t below = row + i - (b + n);
          p.gram[(row + i) * p.batch + b + n] = z[n * kRows + i] * T(below > 0 ? 2 : below == 0);
        }
    }
  };
  int64_t row = first;
  for (; row + kGramRows <= last; row += kGramRows) tile(row, std::integral_constant<int, kGramRows>{});
  for (; row < last; ++row) tile(row, std::integral_constant<int, 1>{});
}

template <class S, class T> WN_INLINE void sum_rows(const LinearSums<T>& p, int64_t first, int64_t last) {
  constexpr int P = S::panel, vectors = P / S::wide_lanes;
  const int64_t part = p.gram ? p.batch : std::min(p.batch, kBatch), size = part * P;
  const Scratch<T> memory(3 * size);
  T* const form = memory.data() + 2 * size;
  for (int64_t row = first; row < last; row += P) {
    const int64_t count = std::min<int64_t>(P, last - row);
    typename S::Wide of_dy[vectors] = {}, of_dy_z[vectors] = {}, of_form[vectors] = {};
    for (int64_t b = 0; b < p.batch; b += part) {
      const int64_t batch = std::min(part, p.batch - b);
      struct Columns {
        const T* data;
        int64_t stride;
      };
      const auto columns = [&](const T* from, bool packed, T* to) __attribute__((always_inline)) {
        from += b * p.rows + row;
        if (!packed && count == P) return Columns{from, p.rows};
        pack<S>(from, p.rows, batch, count, to);
        return Columns{to, P};
      };
      const Columns dy = columns(p.dy, p.gram != nullptr, memory.data());
      const Columns z = p.z ? columns(p.z, false, memory.data() + size) : Columns{};
      for (int64_t i = 0, m; i < batch && p.gram; i += m) {
        m = i + kGramRows <= batch ? kGramRows : 1;
        add_products<S, false, T>(m, nullptr, nullptr, form + i * P, P, p.gram + i * batch, batch, dy.data, i + m);
      }
      for (int64_t n = 0; n < batch; ++n)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; ++i) {
          const int64_t column = i * S::wide_lanes;
          const typename S::Wide g = S::widen(dy.data + n * dy.stride + column);
          of_dy[i] += g;
          if (p.z) of_dy_z[i] += g * S::widen(z.data + n * z.stride + column);
          if (p.gram) of_form[i] += g * S::widen(form + n * P + column);
        }
    }
    const auto write = [&](const typename S::Wide* sums, double* to) __attribute__((always_inline)) {
      double values[P];
      std::memcpy(values, sums, sizeof(values));
      std::copy(values, values + count, to + (row - first));
    };
    write(of_dy, p.of_dy);
    write(of_dy_z, p.of_dy_z);
    write(of_form, p.of_form);
  }
}

template <class S, class T> WN_INLINE void turn_rows(const LinearFactors<T>& p, int64_t first, int64_t last) {
  constexpr int L = S::lanes;
  const auto one_by_one = [&](int64_t row, int64_t b, int64_t end) __attribute__((always_inline)) {
    for (; row < last; ++row)
      for (int64_t i = b; i < end; ++i) {
        const T value = p.dy[i * p.rows + row];
        if (p.a) p.a[row * p.batch + i] = value * p.of_a[row - first];
        p.e[row * p.batch + i] = value * p.of_e[row - first];
      }
  };
  int64_t b = 0;
  for (; b + L <= p.batch; b += L) {  // all rows of a part of the batch: each element of the batch is in pages of its own
    int64_t row = first;
    for (; row + L <= last; row += L) {
      typename S::V v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) v[i] = S::load(p.dy + (b + i) * p.rows + row);
      transpose<S>(v);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        const int64_t at = (row + i) * p.batch + b;
        if (p.a) S::store(p.a + at, v[i] * p.of_a[row - first + i]);
        S::store(p.e + at, v[i] * p.of_e[row - first + i]);
      }
    }
    one_by_one(row, b, b + L);
  }
  one_by_one(first, b, p.batch);
}

template <int bytes, class T> WN_INLINE void part_of(const LinearForward<T>& p, int64_t first, int64_t last) {
  forward_rows<Simd<T, bytes>>(p, first, last);
}
template <int bytes, class T, class Formula>
WN_INLINE void part_of(const LinearStep<T, Formula>& p, int64_t first, int64_t last) {
  step_columns<Simd<T, bytes>>(p, first, last);
}
template <int bytes, class T> WN_INLINE void part_of(const LinearFactors<T>& p, int64_t first, int64_t last) {
  turn_rows<Simd<T, bytes>>(p, first, last);
}
template <int bytes, class T> WN_INLINE void part_of(const LinearGram<T>& p, int64_t first, int64_t last) {
  gram_rows<Simd<T, bytes>>(p, first, last);
}
template <int bytes, class T> WN_INLINE void part_of(const LinearSums<T>& p, int64_t first, int64_t last) {
  sum_rows<Simd<T, bytes>>(p, first, last);
}

// Rows first..last - 1 of the forward, the factors, the Gram matrix or the sums, or columns of the step, with the widest
// vectors of this machine.
template <class Problem> using Part = void (*)(const Problem&, int64_t first, int64_t last);

template <class Problem>
void part_by_16(const Problem& p, int64_t first, int64_t last) { part_of<16>(p, first, last); }
#ifdef WN_WIDE_VECTORS
template <class Problem> __attribute__((target("arch=x86-64-v3")))
void part_by_32(const Problem& p, int64_t first, int64_t last) { part_of<32>(p, first, last); }
template <class Problem> __attribute__((target("arch=x86-64-v4")))
void part_by_64(const Problem& p, int64_t first, int64_t last) { part_of<64>(p, first, last); }
#endif

template <class Problem> Part<Problem> part() {
#ifdef WN_WIDE_VECTORS
  if (__builtin_cpu_supports("x86-64-v4")) return &part_by_64<Problem>;
  if (__builtin_cpu_supports("x86-64-v3")) return &part_by_32<Problem>;
#endif
  return &part_by_16<Problem>;
}

// Columns of one task of a step, at most, and what their number is a multiple of.
constexpr int64_t kColumns = 1024, kColumnUnit = 32;

}  // namespace

bool small_products(int64_t batch) { return batch > 0 && batch <= 512; }  // larger ones were not measured

template <class T> void LinearForward<T>::run() const {
  constexpr int64_t unit = kRows;
  const auto forward = part<LinearForward>();
  at::parallel_for(0, (rows + unit - 1) / unit, 1 + 2048 / (1 + batch * width), [&](int64_t begin, int64_t end) {
    forward(*this, begin * unit, std::min(rows, end * unit));
  });
}

template <class T, class Formula> void LinearStep<T, Formula>::run() const {
  const auto step = part<LinearStep>();
  const int64_t tasks = std::max<int64_t>(at::get_num_threads(), (width + kColumns - 1) / kColumns);
  const int64_t units = (width + kColumnUnit - 1) / kColumnUnit, columns = (units + tasks - 1) / tasks * kColumnUnit;
  const int64_t parts = (width + columns - 1) / columns;
  const std::unique_ptr<double[]> sums(squares ? new double[parts * rows] : nullptr);
  at::parallel_for(0, parts, 1 + 2048 / (1 + batch * rows), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      LinearStep of_part = *this;
      if (squares) of_part.squares = sums.get() + i * rows;
      step(of_part, i * columns, std::min(width, (i + 1) * columns));
    }
  });
  for (int64_t row = 0; row < rows && squares; ++row) {
    squares[row] = 0;
    for (int64_t i = 0; i < parts; ++i) squares[row] += sums[i * rows + row];
  }
}

template <class T> void LinearGram<T>::run() const {
  const auto gram_of = part<LinearGram>();
  at::parallel_for(0, (batch + kRows - 1) / kRows, 1 + 2048 / (1 + batch * width), [&](int64_t begin, int64_t end) {
    gram_of(*this, begin * kRows, std::min(batch, end * kRows));
  });
}

template <class T> void LinearFactors<T>::run(int64_t first, int64_t last) const {
  part<LinearFactors>()(*this, first, last);
}

template <class T> void LinearSums<T>::run(int64_t first, int64_t last) const {
  part<LinearSums>()(*this, first, last);
}

template struct LinearForward<float>;
template struct LinearForward<double>;
template struct LinearStep<float>;
template struct LinearStep<double>;
template struct LinearStep<float, PolarSgd<true, false>>;
template struct LinearStep<double, PolarSgd<true, false>>;
template struct LinearStep<float, PolarAdam<false, false>>;
template struct LinearStep<double, PolarAdam<false, false>>;
template struct LinearFactors<float>;
template struct LinearFactors<double>;
template struct LinearGram<float>;
template struct LinearGram<double>;
template struct LinearSums<float>;
template struct LinearSums<double>;

}  // namespace wn::cpu
