// The operators of a linear layer that takes its SGD step inside the backward (in_backward.h has the mathematics).
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/engine.h"
#include "cpu/in_backward.h"
#include "in_backward.h"
#include "in_backward_run.h"
#include "ops.h"
#include "tensors.h"

namespace wn {
namespace {

using in_backward::Arguments;

enum : size_t { kLr, kRadiusLr, kWeightDecay, kRadiusWeightDecay, kBiasLr, kBiasWeightDecay, kNumbers };
// Of a weight with buffers the first four, and then, of a bias the rate and the decay, and then:
enum : size_t { kMomentum, kGradientWeight, kMomentumNumbers };
enum : size_t { kBeta1, kBeta2, kEps, kStep, kAverageNumbers };
constexpr size_t kOfWeight = kBiasLr, kOfBias = 2;

// Rows of one tile are worked on together, element by element.
constexpr int kTile = 16;

// |G|^2 by the Gram matrix of the batch costs batch^2 (rows + width) multiplications, |u'| one pass over the weight, or
// a multiplication for each element where the product measures what it writes.
bool gram_is_cheaper(int64_t batch, int64_t rows, int64_t width, bool measured_by_product) {
  return batch * batch * (rows + width) <= (measured_by_product ? 1 : 8) * rows * width;
}

int64_t batch_of(const Tensor& x) {
  int64_t batch = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) batch *= x.size(d);
  return batch;
}
Tensor as_matrix(const Tensor& x) { return x.reshape({batch_of(x), x.size(-1)}).contiguous(); }

void check_layer(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                 const std::optional<Tensor>& bias) {
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kDouble,
                   "weight must be float32 or float64, got ", weight.scalar_type());
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.is_contiguous(), "weight must be contiguous of shape (rows, width), got "
                    "shape ", weight.sizes(), " with strides ", weight.strides());
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == weight.size(1), "x must have shape (..., ", weight.size(1),
                    ") for a weight of shape ", weight.sizes(), ", got ", x.sizes());
  const auto check = [&](const char* name, const Tensor& t) {
    TORCH_CHECK_TYPE(t.scalar_type() == weight.scalar_type(), name, " must have the weight's dtype ",
                     weight.scalar_type(), ", got ", t.scalar_type());
    check_device(name, t, weight);
  };
  check("x", x);
  for (const auto& [name, t] : {std::make_pair("scale", scale), std::make_pair("bias", bias)}) {
    if (!t) continue;
    check(name, *t);
    TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == weight.size(0) && t->is_contiguous(), name,
                      " must be contiguous of shape (", weight.size(0), ",), got ", t->sizes());
  }
}

// Rows from, from + 1, ... of u x^T, (rows, batch), into columns of z and y = z scale + bias, (batch, rows).
template <class T, int width> struct Turn {
  const T *product, *scale, *bias;
  T *z, *y;
  int64_t rows, batch;

  WN_INLINE void operator()(int64_t from) const {
    T factor[width], shift[width];
    for (int j = 0; j < width; ++j) {
      factor[j] = scale ? scale[from + j] : T(1);
      shift[j] = bias ? bias[from + j] : T(0);
    }
    for (int64_t b = 0; b < batch; ++b) {
      T value[width];
      for (int j = 0; j < width; ++j) value[j] = product[(from + j) * batch + b];
      const int64_t at = b * rows + from;
      if (z)
        for (int j = 0; j < width; ++j) z[at + j] = value[j];
      for (int j = 0; j < width; ++j) y[at + j] = value[j] * factor[j] + shift[j];
    }
  }
};

// Calls part(first, last) for parts of the rows that begin with a whole tile.
template <class F> void for_parts(int64_t rows, int64_t batch, const F& part) {
  at::parallel_for(0, (rows + kTile - 1) / kTile, 1 + 16384 / (kTile * (batch + 1)), [&](int64_t begin, int64_t end) {
    part(begin * kTile, std::min(rows, end * kTile));
  });
}

// Calls tile(row) for tiles of rows, and single(row) for the rows that are left over.
template <class Tile, class Single>
WN_MULTIVERSION void work(int64_t first, int64_t last, const Tile& tile, const Single& single) {
  int64_t row = first;
  for (; row + kTile <= last; row += kTile) tile(row);
  for (; row < last; ++row) single(row);
}

// y = z scale + bias, and z = x u^T where it is needed. A library's product is made as u x^T, the quicker orientation, and
// turned around in the pass that scales it.
std::tuple<Tensor, Tensor> in_backward_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                                              const std::optional<Tensor>& bias, bool need_z) {
  check_layer(x, weight, scale, bias);
  const int64_t rows = weight.size(0), batch = batch_of(x);
  at::DimVector shape(x.sizes().begin(), x.sizes().end());
  shape.back() = rows;
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
#if defined(WN_WITH_CUDA)
  if (weight.is_cuda()) {
    const auto [y, z] = in_backward::cuda::linear(as_matrix(x), weight, scale, bias, need_z);
    return {y.view(shape), need_z ? z : at::empty({0, rows}, x.options())};
  }
#endif
  const Tensor y = at::empty(shape, x.options()), z = at::empty({need_z ? batch : 0, rows}, x.options());
  const Tensor matrix = as_matrix(x);
  const bool small = cpu::small_products(batch);
  const Tensor product = small ? Tensor() : at::mm(weight, matrix.t());
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "in_backward_linear", [&] {
    const auto data = [](const std::optional<Tensor>& t) { return t ? t->const_data_ptr<scalar_t>() : nullptr; };
    if (small) {
      cpu::LinearForward<scalar_t>{matrix.const_data_ptr<scalar_t>(), weight.const_data_ptr<scalar_t>(), data(scale),
                                   data(bias), need_z ? z.mutable_data_ptr<scalar_t>() : nullptr,
                                   y.mutable_data_ptr<scalar_t>(), batch, rows, weight.size(1)}.run();
      return;
    }
    const Turn<scalar_t, kTile> tile{product.const_data_ptr<scalar_t>(), data(scale), data(bias),
                                     need_z ? z.mutable_data_ptr<scalar_t>() : nullptr,
                                     y.mutable_data_ptr<scalar_t>(), rows, batch};
    const Turn<scalar_t, 1> single{tile.product, tile.scale, tile.bias, tile.z, tile.y, rows, batch};
    for_parts(rows, batch, [&](int64_t first, int64_t last) { work(first, last, tile, single); });
  });
  return {y, z};
}

// The rows that need the length of u'.
struct Unfinished {
  struct Row {
    int64_t row;
    RowStep step;
  };
  std::vector<Row> rows;
  std::mutex writing;
};

// A step without buffers, and one with: those of the weight, of its radius and of the bias.
struct Bare {
  static constexpr int buffers = 0;
  using Formula = void;
};
template <class With> struct Buffered {
  With weight, bias;
  at::TensorList of_weight, of_radius, of_bias;
};
template <> struct Buffered<Bare> {};

// The scalar work of rows.
template <class T, class With> struct Prepare {
  const Arguments& a;
  const Buffered<With>& buffered;
  int64_t rows, batch;
  const T *dy, *z, *gram;  // gram as LinearGram makes it, null where |G|^2 is not needed
  T *scale, *bias;
  T *of_x, *of_weight;  // dy scale, by which u is multiplied for dx, and e, by which x is for u'; null if not needed
  bool turned;  // whether these are (rows, batch)
  T* kept;      // by what u is multiplied before e^T x is added, or the coefficients of the formula
  Unfinished* unfinished;

  // At a time, in short loops: each is vectorized, where a single one would be a chain of divisions and roots for each row.
  static constexpr int kRows = 64;

  WN_INLINE void operator()(int64_t from, int64_t count) const {
    double sum[kRows], inner[kRows], square[kRows];
    cpu::LinearSums<T>{dy, z, gram, batch, rows, sum, inner, square}.run(from, from + count);
    if (bias) step_bias(from, count, sum);
    T old_scale[kRows], factor[kRows];
    for (int64_t j = 0; j < count; ++j) old_scale[j] = a.polar ? scale[from + j] : T(1);
    if constexpr (With::buffers > 0) {
      step_with_buffers(from, count, inner, factor);
    } else if (a.polar) {
      step(from, count, inner, gram ? square : nullptr, factor);
    } else {
      std::fill(factor, factor + count, static_cast<T>(-a.sign * a.state.lr));
      std::fill(kept + from, kept + from + count, static_cast<T>(1 - a.state.lr * a.state.weight_decay));
    }
    if (turned) {
      cpu::LinearFactors<T>{dy, old_scale, factor, of_x, of_weight, batch, rows}.run(from, from + count);
      return;
    }
    const auto write = [&](T* to, const T* factors) {
      for (int64_t b = 0; b < batch && to; ++b)
        for (int64_t j = 0; j < count; ++j) to[b * rows + from + j] = dy[b * rows + from + j] * factors[j];
    };
    write(of_x, old_scale);
    write(of_weight, factor);
  }

  WN_INLINE void step_bias(int64_t from, int64_t count, const double* sum) const {
    if constexpr (With::buffers > 0) {
      using Formula = typename With::Formula;
      double c[Formula::coefficients];
      buffered.bias.coefficients(true, 1, 0, c);
      T* buffer[With::buffers];
      for (int i = 0; i < With::buffers; ++i) buffer[i] = buffered.of_bias[i].template mutable_data_ptr<T>();
      for (int64_t row = from; row < from + count; ++row) {
        double x[Formula::inputs] = {bias[row], a.sign * sum[row - from]}, y[Formula::outputs];
        for (int i = 0; i < With::buffers; ++i) x[2 + i] = buffer[i][row];
        Formula::combine(c, x, y);
        bias[row] = static_cast<T>(y[0]);
        for (int i = 0; i < With::buffers; ++i) buffer[i][row] = static_cast<T>(y[1 + i]);
      }
    } else {
      for (int64_t j = 0; j < count; ++j)
        bias[from + j] -= static_cast<T>(a.bias_lr * (a.sign * sum[j] + a.bias_weight_decay * bias[from + j]));
    }
  }

  WN_INLINE void signed_radii(int64_t from, int64_t count, double* s) const {
    const double* const radius = a.state.radius + from;
    if (a.state.kind == Kind::ewn)
      for (int64_t j = 0; j < count; ++j) s[j] = signed_radius(Kind::ewn, radius[j]);
    else
      std::copy(radius, radius + count, s);
  }

  // Steps of rows side by side: a loop over an array of RowStep would pick up each number by itself.
  struct Steps {
    double radius[kRows], n[kRows], along[kRows], fold[kRows], rho[kRows], factor[kRows], p[kRows], across[kRows];

    WN_INLINE void set(int64_t j, const RowStep& x) {
      radius[j] = x.radius, n[j] = x.n, along[j] = x.along, fold[j] = x.fold;
      rho[j] = x.rho, factor[j] = x.factor, p[j] = x.p, across[j] = x.across;
    }
    WN_INLINE RowStep at(int64_t j) const {
      return {radius[j], n[j], along[j], fold[j], rho[j], factor[j], p[j], across[j]};
    }
  };

  // The steps of rows, and what follows from them now. square = |G|^2, or null; factor becomes that of dy in e.
  WN_INLINE void step(int64_t from, int64_t count, const double* inner, const double* square, T* factor) const {
    const RowState state = a.state;
    Steps steps;
    double s[kRows], rho[kRows], norm[kRows];
    T new_scale[kRows];
    const auto row = [&](int64_t j) __attribute__((always_inline)) {
      return Row{state.rho[from + j], state.norm[from + j], state.radius[from + j], s[j]};
    };
    signed_radii(from, count, s);
    for (int64_t j = 0; j < count; ++j)
      steps.set(j, RowStep::of(state, row(j), a.sign * inner[j], square ? square[j] : double(INFINITY)));
    for (int64_t j = 0; j < count; ++j) {
      kept[from + j] = static_cast<T>(steps.fold[j]);
      factor[j] = static_cast<T>(a.sign * steps.factor[j]);
    }
    std::copy(steps.radius, steps.radius + count, state.radius + from);
    signed_radii(from, count, s);
    for (int64_t j = 0; j < count; ++j) {
      const Row now = steps.at(j).finished(state, row(j), -1);
      rho[j] = now.rho, norm[j] = now.norm, new_scale[j] = static_cast<T>(now.scale());
    }
    int64_t unknown = 0;
    for (int64_t j = 0; j < count; ++j) unknown += !steps.at(j).norm_known();
    if (unknown != 0 || a.measure || a.refresh || state.telemetry) {
      std::unique_lock<std::mutex> lock(unfinished->writing, std::defer_lock);
      for (int64_t j = 0; j < count; ++j)
        if (const RowStep step = steps.at(j); a.measure || a.refresh || !step.norm_known()) {
          if (!lock) lock.lock();
          unfinished->rows.push_back({from + j, step});
        } else {
          scale[from + j] = static_cast<T>(step.write(state, from + j, {rho[j], norm[j], step.radius, s[j]}));
        }
      return;
    }
    std::copy(rho, rho + count, state.rho + from);
    std::copy(norm, norm + count, state.norm + from);
    std::copy(new_scale, new_scale + count, scale + from);
  }

  WN_INLINE void step_with_buffers(int64_t from, int64_t count, const double* inner, T* factor) const {
    constexpr int coefficients = With::Formula::coefficients;
    T* const of_rows = kept + from * coefficients;
    if (!a.polar) {
      T c[coefficients];
      buffered.weight.coefficients(true, 1, 0, c);
      for (int64_t j = 0; j < count; ++j) std::copy_n(c, coefficients, of_rows + j * coefficients);
      std::fill_n(factor, count, static_cast<T>(a.sign));
      return;
    }
    const RowState state = a.state;
    const With weight = buffered.weight;
    double s[kRows], radius[kRows], rho[kRows], turned[kRows], of_radius[With::buffers][kRows], *buffer[With::buffers];
    T c[coefficients][kRows];
    for (int i = 0; i < With::buffers; ++i) buffer[i] = buffered.of_radius[i].template mutable_data_ptr<double>() + from;
    signed_radii(from, count, s);
    for (int64_t j = 0; j < count; ++j) {
      double before[With::buffers];
      static_for<With::buffers>([&](auto i) __attribute__((always_inline)) { before[i] = buffer[i][j]; });
      const Row old{state.rho[from + j], state.norm[from + j], state.radius[from + j], s[j]};
      const auto row = RowWith<With>::of(state, weight, old, a.sign * inner[j], before);
      static_for<With::buffers>([&](auto i) __attribute__((always_inline)) { of_radius[i][j] = row.radius_buffers[i]; });
      radius[j] = row.radius, rho[j] = old.rho, turned[j] = row.turned;
      factor[j] = static_cast<T>(a.sign * row.factor);
    }
    for (int64_t j = 0; j < count; ++j) {
      T of_row[coefficients];
      weight.coefficients(rho[j] != 0, rho[j], turned[j], of_row);
      static_for<coefficients>([&](auto q) __attribute__((always_inline)) { c[q][j] = of_row[q]; });
    }
    for (int64_t j = 0; j < count; ++j)
      for (int q = 0; q < coefficients; ++q) of_rows[j * coefficients + q] = c[q][j];
    std::copy(radius, radius + count, state.radius + from);
    for (int i = 0; i < With::buffers; ++i) std::copy_n(of_radius[i], count, buffer[i]);
  }
};

template <class T, class With> WN_MULTIVERSION void prepare(const Prepare<T, With>& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; row += p.kRows) p(row, std::min<int64_t>(p.kRows, last - row));
}

// finish(i, row, |u'|) gives the scale of a row, for i < count and row = row_of(i). The length of u' is measured here where
// squares are null, or one has lost bits.
template <class T, class RowOf, class Finish>
void finish_rows(const Arguments& a, int64_t count, const double* squares, const RowOf& row_of, const Finish& finish) {
  bool known = squares != nullptr;
  for (int64_t i = 0; known && i < count; ++i)
    known = safe_square(static_cast<T>(squares[row_of(i)])) || a.state.rho[row_of(i)] == 0;
  const Tensor length = known ? Tensor() : op::row_norm(a.weight, 0).to(at::kDouble);
  const double* const lengths = known ? nullptr : length.const_data_ptr<double>();
  T* const scale = a.scale.mutable_data_ptr<T>();
  at::parallel_for(0, count, 512, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = row_of(i);
      scale[row] = static_cast<T>(finish(i, row, known ? std::sqrt(squares[row]) : lengths[row]));
    }
  });
}

template <class T, class With> Tensor run(const Arguments& a, const Buffered<With>& buffered) {
  using Formula = typename With::Formula;
  constexpr bool buffers = With::buffers > 0;
  const int64_t batch = a.dy.size(0), rows = a.weight.size(0), width = a.weight.size(1);
  const bool small = cpu::small_products(batch);
  const auto data = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; };
  const T *const x = a.x.const_data_ptr<T>(), *const dy = a.dy.const_data_ptr<T>();
  const T* const z = a.polar ? a.z.const_data_ptr<T>() : nullptr;
  const std::unique_ptr<double[]> squares(small && (a.measure || a.refresh) ? new double[rows] : nullptr);
  Unfinished unfinished;
  if ((a.measure || a.refresh) && !buffers) unfinished.rows.reserve(rows);
  Tensor dx = a.need_x ? at::empty_like(a.x) : Tensor(), gram, of_x, of_weight, kept;
  if (a.polar && !a.measure) {
    gram = at::empty({batch, batch}, a.x.options());
    cpu::LinearGram<T>{x, data(gram), batch, width}.run();
  }
  if (small || a.polar) {
    of_weight = small ? at::empty({rows, batch}, a.x.options()) : at::empty_like(a.dy);
    of_x = a.need_x ? at::empty_like(of_weight) : Tensor();
  }
  if (small || a.polar || a.bias.defined()) {
    int64_t numbers = 1;
    if constexpr (buffers) numbers = Formula::coefficients;
    kept = at::empty({rows * numbers}, a.x.options());
    const Prepare<T, With> job{a, buffered, rows, batch, dy, z, data(gram), data(a.scale), data(a.bias), data(of_x),
                               data(of_weight), small, data(kept), &unfinished};
    for_parts(rows, batch, [&](int64_t first, int64_t last) { prepare(job, first, last); });
  }
  if (small) {
    T* const u = data(a.weight);
    cpu::LinearStep<T, Formula> step{x, data(of_x), data(of_weight), data(kept), u, u, data(dx), squares.get(), batch, rows,
                                     width};
    T* of_weight[std::max(With::buffers, 1)];
    if constexpr (buffers) {
      for (int i = 0; i < With::buffers; ++i) of_weight[i] = data(buffered.of_weight[i]);
      step.buffers = of_weight, step.coefficients = step.kept;
    }
    step.run();
  } else {
    if (a.need_x) at::mm_out(dx, a.polar ? of_x : a.dy, a.weight);
    for (int64_t u = 0; u < rows && a.polar; ++u)
      if (const T factor = data(kept)[u]; factor != 1) a.weight.select(0, u).mul_(factor);
    if (a.polar)
      a.weight.addmm_(of_weight.t(), a.x);
    else
      a.weight.addmm_(a.dy.t(), a.x, 1 - a.state.lr * a.state.weight_decay, -a.sign * a.state.lr);
  }
  if constexpr (buffers) {
    if (a.polar)
      finish_rows<T>(a, rows, squares.get(), [](int64_t row) { return row; }, [&](int64_t, int64_t row, double length) {
        return RowWith<With>::finish(a.state, row, length);
      });
  } else if (const auto& list = unfinished.rows; !list.empty()) {
    finish_rows<T>(a, list.size(), squares.get(), [&](int64_t i) { return list[i].row; },
                   [&](int64_t i, int64_t row, double length) { return list[i].step.finish(a.state, row, length); });
  }
  return dx;
}

void check_state(const char* name, const std::optional<Tensor>& t, const Tensor& weight, bool given, int64_t columns) {
  const int64_t rows = weight.size(0);
  TORCH_CHECK_VALUE(t.has_value() == given, name, " must be given with scale, and only then");
  if (!t) return;
  check_device(name, *t, weight);
  TORCH_CHECK_TYPE(t->scalar_type() == at::kDouble, name, " must be float64, got ", t->scalar_type());
  TORCH_CHECK_VALUE(t->is_contiguous() && t->numel() == rows * columns, name, " must be contiguous with ",
                    rows * columns, " elements for a weight of ", rows, " rows, got shape ", t->sizes());
}

double* pointer(const std::optional<Tensor>& t) { return t ? t->mutable_data_ptr<double>() : nullptr; }

// What both steps are given, checked; z is made where it was not.
Arguments arguments_of(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& z, const Tensor& weight,
                       const std::optional<Tensor>& scale, const std::optional<Tensor>& rho,
                       const std::optional<Tensor>& radius, const std::optional<Tensor>& norm,
                       const std::optional<Tensor>& bias, string_view kind, at::ArrayRef<double> numbers, size_t count,
                       bool maximize, bool keep_norm, bool need_x) {
  check_layer(x, weight, scale, bias);
  const int64_t rows = weight.size(0), batch = batch_of(x);
  check_device("grad", grad, weight);
  TORCH_CHECK_TYPE(grad.scalar_type() == weight.scalar_type(), "grad must have the weight's dtype ",
                   weight.scalar_type(), ", got ", grad.scalar_type());
  TORCH_CHECK_VALUE(grad.dim() >= 1 && grad.size(-1) == rows && batch_of(grad) == batch, "grad must have shape (..., ",
                    rows, ") with the batch of x ", x.sizes(), ", got ", grad.sizes());
  TORCH_CHECK_VALUE(numbers.size() == count, "numbers must have ", count, " entries, got ", numbers.size());
  const bool polar = scale.has_value();
  check_state("rho", rho, weight, polar, 1);
  check_state("radius", radius, weight, polar, 1);
  check_state("norm", norm, weight, polar, 1);
  if (z) {
    check_device("z", *z, weight);
    TORCH_CHECK_VALUE(z->dim() == 2 && z->size(0) == batch && z->size(1) == rows && z->is_contiguous() &&
                          z->scalar_type() == weight.scalar_type(),
                      "z must be contiguous of the weight's dtype and of shape (", batch, ", ", rows, "), got ",
                      z->scalar_type(), " of ", z->sizes());
  }
  const Kind k = !polar || kind == "swn" ? Kind::swn : kind == "unit" ? Kind::unit : parse_kind(kind);
  Arguments a{};
  a.dy = as_matrix(grad), a.x = as_matrix(x), a.weight = weight;
  a.scale = scale.value_or(Tensor()), a.bias = bias.value_or(Tensor());
  a.state = {pointer(rho), pointer(radius), pointer(norm), nullptr, k, keep_norm, weight.size(1) == 1, numbers[kLr],
             numbers[kRadiusLr], numbers[kWeightDecay], numbers[kRadiusWeightDecay]};
  a.sign = maximize ? -1 : 1;
  a.polar = polar, a.need_x = need_x;
  return a;
}

// The step of checked arguments.
template <class With> Tensor take_step(Arguments& a, const std::optional<Tensor>& z, const Tensor& x, const Buffered<With>& buffered) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  if (a.polar) a.z = z ? *z : at::mm(a.x, a.weight.t());
  Tensor dx;
#if defined(WN_WITH_CUDA)
  if constexpr (With::buffers == 0)
    if (a.weight.is_cuda()) dx = in_backward::cuda::run(a);
#endif
  if (a.weight.is_cpu())
    AT_DISPATCH_FLOATING_TYPES(a.weight.scalar_type(), "in_backward", [&] { dx = run<scalar_t>(a, buffered); });
  return a.need_x ? dx.view(x.sizes()) : at::empty({0}, x.options());
}

void written(std::initializer_list<std::optional<Tensor>> tensors) {
  for (const auto& t : tensors)
    if (t) t->unsafeGetTensorImpl()->bump_version();
}

Tensor in_backward_sgd_(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& z, const Tensor& weight,
                        const std::optional<Tensor>& scale, const std::optional<Tensor>& rho,
                        const std::optional<Tensor>& radius, const std::optional<Tensor>& norm,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& telemetry, string_view kind,
                        at::ArrayRef<double> numbers, bool maximize, bool keep_norm, bool refresh, bool need_x) {
  Arguments a = arguments_of(grad, x, z, weight, scale, rho, radius, norm, bias, kind, numbers, kNumbers, maximize,
                             keep_norm, need_x);
  check_state("telemetry", telemetry, weight, a.polar && telemetry, 4);
  a.state.telemetry = pointer(telemetry);
  a.refresh = refresh;
  const int64_t batch = a.x.size(0);
  const bool by_product = weight.is_cpu() && cpu::small_products(batch);
  a.measure = a.polar && !telemetry && !gram_is_cheaper(batch, weight.size(0), weight.size(1), by_product);
  a.bias_lr = numbers[kBiasLr], a.bias_weight_decay = numbers[kBiasWeightDecay];
  const Tensor dx = take_step(a, z, x, Buffered<Bare>{});
  written({weight, scale, rho, radius, norm, bias, telemetry});
  return dx;
}

WithMomentum with(std::type_identity<WithMomentum>, double lr, double decay, at::ArrayRef<double> n, bool nesterov) {
  return {Momentum::of(n[kMomentum], n[kGradientWeight], nesterov), lr, decay};
}
WithAverages with(std::type_identity<WithAverages>, double lr, double decay, at::ArrayRef<double> n, bool decoupled) {
  return {lr, decay, n[kBeta1], n[kBeta2], n[kEps], 1 - std::pow(n[kBeta1], n[kStep]),
          std::sqrt(1 - std::pow(n[kBeta2], n[kStep])), decoupled};
}

Tensor in_backward_buffers_(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& z, const Tensor& weight,
                            const std::optional<Tensor>& scale, const std::optional<Tensor>& rho,
                            const std::optional<Tensor>& radius, const std::optional<Tensor>& norm,
                            const std::optional<Tensor>& bias, at::TensorList buffers, at::TensorList radius_buffers,
                            at::TensorList bias_buffers, string_view kind, at::ArrayRef<double> numbers,
                            at::ArrayRef<double> bias_numbers, bool averages, bool option, bool maximize, bool keep_norm,
                            bool need_x) {
  const size_t count = averages ? kAverageNumbers : kMomentumNumbers, lists = averages ? WithAverages::buffers : WithMomentum::buffers;
  Arguments a = arguments_of(grad, x, z, weight, scale, rho, radius, norm, bias, kind, numbers, kOfWeight + count, maximize,
                             keep_norm, need_x);
  TORCH_CHECK_VALUE(weight.is_cpu() && cpu::small_products(a.x.size(0)), "a step with buffers goes by the products for "
                    "batches of 1 to 512 on a CPU, got a batch of ", a.x.size(0), " on ", weight.device());
  const auto check_list = [&](const char* name, at::TensorList list, bool given, const auto& check) {
    TORCH_CHECK_VALUE(list.size() == (given ? lists : 0), name, " must hold ", given ? lists : 0, " tensors, got ", list.size());
    for (const Tensor& t : list) check(name, t);
  };
  const auto like = [](const Tensor& model) {
    return [&model](const char* name, const Tensor& t) {
      check_device(name, t, model);
      TORCH_CHECK_TYPE(t.scalar_type() == model.scalar_type(), name, " must have the dtype ", model.scalar_type(), ", got ",
                       t.scalar_type());
      TORCH_CHECK_VALUE(t.sizes() == model.sizes() && t.is_contiguous(), name, " must be contiguous of shape ",
                        model.sizes(), ", got ", t.sizes(), " with strides ", t.strides());
    };
  };
  check_list("buffers", buffers, true, like(weight));
  check_list("radius_buffers", radius_buffers, a.polar,
             [&](const char* name, const Tensor& t) { check_state(name, t, weight, true, 1); });
  check_list("bias_buffers", bias_buffers, bias.has_value(), like(a.bias));
  const size_t of_bias = bias ? kOfBias + count : 0;
  TORCH_CHECK_VALUE(bias_numbers.size() == of_bias, "bias_numbers must have ", of_bias, " entries, got ", bias_numbers.size());
  a.measure = a.polar;
  const auto step = [&](auto rule) {
    using With = typename decltype(rule)::type;
    const auto made = [&](at::ArrayRef<double> n, size_t decay, size_t first) {
      return with(rule, n[0], n[decay], n.slice(first), option);
    };
    const With of_weight = made(numbers, kWeightDecay, kOfWeight);
    return take_step(a, z, x, Buffered<With>{of_weight, bias ? made(bias_numbers, 1, kOfBias) : of_weight, buffers, radius_buffers,
                                             bias_buffers});
  };
  const Tensor dx = averages ? step(std::type_identity<WithAverages>{}) : step(std::type_identity<WithMomentum>{});
  written({weight, scale, rho, radius, norm, bias});
  for (const at::TensorList list : {buffers, radius_buffers, bias_buffers})
    for (const Tensor& t : list) written({t});
  return dx;
}

std::tuple<Tensor, Tensor> in_backward_linear_meta(const Tensor& x, const Tensor& weight, const std::optional<Tensor>&,
                                                   const std::optional<Tensor>&, bool need_z) {
  c10::SymDimVector shape(x.sym_sizes().begin(), x.sym_sizes().end() - 1);
  c10::SymInt batch = 1;
  for (const auto& size : shape) batch = batch * size;
  shape.push_back(weight.sym_size(0));
  return {at::empty_symint(shape, x.options()),
          at::empty_symint({need_z ? batch : c10::SymInt(0), weight.sym_size(0)}, x.options())};
}

Tensor in_backward_sgd_meta(const Tensor&, const Tensor& x, const std::optional<Tensor>&, const Tensor&,
                            const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                            const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                            string_view, at::ArrayRef<double>, bool, bool, bool, bool need_x) {
  return need_x ? at::empty_symint(x.sym_sizes(), x.options()) : at::empty({0}, x.options());
}

Tensor in_backward_buffers_meta(const Tensor&, const Tensor& x, const std::optional<Tensor>&, const Tensor&,
                                const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                                const std::optional<Tensor>&, const std::optional<Tensor>&, at::TensorList, at::TensorList,
                                at::TensorList, string_view, at::ArrayRef<double>, at::ArrayRef<double>, bool, bool, bool,
                                bool, bool need_x) {
  return need_x ? at::empty_symint(x.sym_sizes(), x.options()) : at::empty({0}, x.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wnkernels, m) {
  m.def("in_backward_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, bool need_z) -> (Tensor, "
        "Tensor)");
  m.def("in_backward_sgd_(Tensor grad, Tensor x, Tensor? z, Tensor(a!) weight, Tensor(b!)? scale, Tensor(c!)? rho, "
        "Tensor(d!)? radius, Tensor(e!)? norm, Tensor(f!)? bias, Tensor(g!)? telemetry, str kind, float[] numbers, "
        "bool maximize, bool keep_norm, bool refresh, bool need_x) -> Tensor");
  m.def("in_backward_buffers_(Tensor grad, Tensor x, Tensor? z, Tensor(a!) weight, Tensor(b!)? scale, Tensor(c!)? rho, "
        "Tensor(d!)? radius, Tensor(e!)? norm, Tensor(f!)? bias, Tensor(g!)[] buffers, Tensor(h!)[] radius_buffers, "
        "Tensor(i!)[] bias_buffers, str kind, float[] numbers, float[] bias_numbers, bool averages, bool option, "
        "bool maximize, bool keep_norm, bool need_x) -> Tensor");
}

static void register_in_backward(torch::Library& m) {
  m.impl("in_backward_linear", TORCH_FN(in_backward_linear));
  m.impl("in_backward_sgd_", TORCH_FN(in_backward_sgd_));
  m.impl("in_backward_buffers_", TORCH_FN(in_backward_buffers_));
}

TORCH_LIBRARY_IMPL(wnkernels, CPU, m) { register_in_backward(m); }
#if defined(WN_WITH_CUDA)
TORCH_LIBRARY_IMPL(wnkernels, CUDA, m) { register_in_backward(m); }
#endif
TORCH_LIBRARY_IMPL(wnkernels, Autograd, m) {  // the Python function around them records
  m.impl("in_backward_linear", torch::CppFunction::makeFallthrough());
  m.impl("in_backward_sgd_", torch::CppFunction::makeFallthrough());
  m.impl("in_backward_buffers_", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(wnkernels, Meta, m) {
  m.impl("in_backward_linear", TORCH_FN(in_backward_linear_meta));
  m.impl("in_backward_sgd_", TORCH_FN(in_backward_sgd_meta));
  m.impl("in_backward_buffers_", TORCH_FN(in_backward_buffers_meta));
}

namespace op {
std::tuple<Tensor, Tensor> in_backward_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                                              const std::optional<Tensor>& bias, bool need_z) {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("wnkernels::in_backward_linear", "")
                                 .typed<decltype(op::in_backward_linear)>();
  return handle.call(x, weight, scale, bias, need_z);
}
Tensor in_backward_sgd_(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& z, const Tensor& weight,
                        const std::optional<Tensor>& scale, const std::optional<Tensor>& rho,
                        const std::optional<Tensor>& radius, const std::optional<Tensor>& norm,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& telemetry, string_view kind,
                        at::ArrayRef<double> numbers, bool maximize, bool keep_norm, bool refresh, bool need_x) {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("wnkernels::in_backward_sgd_", "")
                                 .typed<decltype(op::in_backward_sgd_)>();
  return handle.call(grad, x, z, weight, scale, rho, radius, norm, bias, telemetry, kind, numbers, maximize, keep_norm,
                     refresh, need_x);
}
Tensor in_backward_buffers_(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& z, const Tensor& weight,
                            const std::optional<Tensor>& scale, const std::optional<Tensor>& rho,
                            const std::optional<Tensor>& radius, const std::optional<Tensor>& norm,
                            const std::optional<Tensor>& bias, at::TensorList buffers, at::TensorList radius_buffers,
                            at::TensorList bias_buffers, string_view kind, at::ArrayRef<double> numbers,
                            at::ArrayRef<double> bias_numbers, bool averages, bool option, bool maximize, bool keep_norm,
                            bool need_x) {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("wnkernels::in_backward_buffers_", "")
                                 .typed<decltype(op::in_backward_buffers_)>();
  return handle.call(grad, x, z, weight, scale, rho, radius, norm, bias, buffers, radius_buffers, bias_buffers, kind, numbers,
                     bias_numbers, averages, option, maximize, keep_norm, need_x);
}
}  // namespace op
}  // namespace wn
