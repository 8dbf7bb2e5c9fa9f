// Runs every formula of the CPU engine over exactly sized heap buffers, to be built with -fsanitize=address,undefined:
// an access outside of a buffer ends the program. Values are compared with double arithmetic.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "cpu/engine.h"

using namespace wn;

namespace {

std::mt19937 random_bits(std::random_device{}());
int checks = 0;

void check(bool good, const char* what, const Layout& l, DType type) {
  ++checks;
  if (good) return;
  std::printf("%s is wrong for %s, outer %ld, rows %ld, inner %ld\n", what, name(type), l.outer, l.rows, l.inner);
  std::exit(1);
}

// `offset` elements behind the start of the allocation: vectors must not need alignment.
template <class T> struct Buffer {
  std::unique_ptr<T[]> memory;
  T* data;
  int64_t size;
  Buffer(int64_t n, int offset) : memory(new T[n + offset]), data(memory.get() + offset), size(n) {}
  void fill(double scale) {
    std::normal_distribution<double> normal(0, scale);
    for (int64_t i = 0; i < size; ++i) data[i] = narrow<T>::from(normal(random_bits));
  }
  double at(int64_t i) const { return static_cast<double>(widen(data[i])); }
};

template <class T> void check_layout(const Layout& l, DType type, double scale) {
  const int64_t size = l.outer * l.rows * l.inner;
  const bool f64 = type == DType::f64;
  const double precision = f64 ? 1e-12 : type == DType::f32 ? 1e-5 : 1.6e-2;
  for (int offset : {0, 1}) {
    Buffer<T> v(size, offset), g(l.rows, offset), G(size, offset), w(size, offset), dv(size, offset), dg(l.rows, offset);
    Buffer<double> norm(l.rows, offset);
    v.fill(scale);
    g.fill(1);
    G.fill(scale);
    const RowValues radius{g.data, type, 0};
    const auto row = [&](int64_t u, auto&& element) {
      for (int64_t o = 0; o < l.outer; ++o)
        for (int64_t i = 0; i < l.inner; ++i) element((o * l.rows + u) * l.inner + i);
    };
    RowNorm row_norm;
    row_norm.norm = {norm.data, DType::f64};
    using cpu::Types;
    cpu::run_typed<RowNorm, Types<T>, Types<>>({row_norm, l, {v.data}, {type}, {nullptr}, {type}});
    cpu::run_typed<Forward, Types<T>, Types<T>>({Forward{Kind::swn, radius}, l, {v.data}, {type}, {w.data}, {type}});
    Backward backward;
    backward.kind = Kind::swn;
    backward.radius = radius;
    backward.radius_gradient = {dg.data, type};
    cpu::run_typed<Backward, Types<T, T>, Types<T>>({backward, l, {v.data, G.data}, {type, type}, {dv.data}, {type}});
    for (int64_t u = 0; u < l.rows; ++u) {
      double square = 0, product = 0, gradient = 0;
      row(u, [&](int64_t i) {
        const double x = v.at(i) / scale, y = G.at(i) / scale;
        square += x * x;
        product += x * y;
        gradient += y * y;
      });
      const double n = std::sqrt(square), p = n > 0 ? product / n : 0, s = g.at(u), size_g = std::sqrt(gradient);
      check(std::fabs(norm.at(u) / scale - n) <= (f64 ? 1e-12 : 1e-5) * n, "norm", l, type);
      check(std::fabs(dg.at(u) / scale - p) <= precision * size_g + 1e-300, "dg", l, type);
      row(u, [&](int64_t i) {
        const double theta = n > 0 ? v.at(i) / scale / n : 0;
        check(std::fabs(w.at(i) - s * theta) <= precision * std::fabs(s), "w", l, type);
        const double expected = n > 0 ? s / n * (G.at(i) / scale - p * theta) : 0;
        check(std::fabs(dv.at(i) - expected) <= precision * std::fabs(n > 0 ? s / n : 0) * size_g, "dv", l, type);
      });
    }
    cpu::run_typed<Backward, Types<T, T>, Types<T>>({backward, l, {v.data, G.data}, {type, type}, {G.data}, {type}});
    for (int64_t i = 0; i < size; ++i) check(std::memcmp(&G.data[i], &dv.data[i], sizeof(T)) == 0, "in place", l, type);
  }
}

}  // namespace

int main() {
  const Layout layouts[] = {{1, 1, 1},   {1, 5, 1},    {1, 70, 9},  {1, 9, 33},    {1, 3, 4097}, {1, 2, 20001}, {1, 0, 5},
                            {1, 5, 0},   {7, 5, 1},    {300, 3, 1}, {2, 700, 1},   {5, 6, 9},    {4, 3, 50},    {3, 2, 9000},
                            {900, 2, 1}, {40, 600, 1}, {1, 1, 0},   {600, 70, 1}, {1, 520, 31}};
  for (const Layout& l : layouts) {
    for (double scale : {1.0, 1e-30, 1e30}) {
      check_layout<float>(l, DType::f32, scale);
      check_layout<bf16>(l, DType::bf16, scale);
    }
    for (double scale : {1.0, 1e-250, 1e250}) check_layout<double>(l, DType::f64, scale);
  }
  std::printf("%d values checked\n", checks);
}
