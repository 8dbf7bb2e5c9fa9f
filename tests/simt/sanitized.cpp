// A program to be built with sanitizers: every path on heap blocks of exactly the size of the tensors.
// With the argument "beyond" the output lacks its last element, which the sanitizer has to find.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "call.h"
#include "numeric.h"

namespace {

using wn::DType;

int64_t bytes_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

struct Tensor {
  std::unique_ptr<char[]> memory;
  DType type;

  Tensor(int64_t length, DType type) : memory(new char[length * bytes_of(type)]), type(type) {
    for (int64_t i = 0; i < length; ++i) {
      const double x = static_cast<double>(i * 7919 % 13) - 6.25;  // never zero, and exact in every type
      const wn::RowResults all = {memory.get(), type};
      all.set(i, x);
    }
  }
};

struct Device {
  int multiprocessors, capability;
  int64_t shared_bytes;
};
constexpr Device plain = {2, 80, 163 << 10}, with_clusters = {8, 90, 227 << 10}, wide = {24, 80, 163 << 10},
                 small = {1, 75, 12 << 10};

// Each layout on a device that forces a path.
struct Case {
  Device device;
  int64_t outer, rows, inner;
};
constexpr Case cases[] = {
    {plain, 1, 7, 37},           {plain, 1, 3, 3001},         {plain, 1, 3, 4096},  {plain, 3, 5, 43},
    {plain, 1, 2, 17301},        {with_clusters, 1, 3, 17301}, {wide, 1, 2, 17301},  {wide, 41, 2, 421},
    {small, 1, 2, 17301},        {plain, 37, 21, 1},          {plain, 64, 32, 1},   {plain, 19, 5, 9},
    {plain, 5, 40, 6},           {small, 500, 21, 1},         {wide, 1200, 5, 1},   {wide, 1200, 2, 3},
    {plain, 1, 5, 0},            {plain, 0, 4, 1},            {plain, 1, 1, 1},
};

// Two weights, a step each, with all of their tensors of exactly their size. Empty, or what went wrong.
std::string take_step(int formula, DType weight_type, DType gradient_type, const Case& shape, bool beyond) {
  const int states[] = {0, 1, 2, 3};
  const bool half = gradient_type != weight_type;
  std::vector<Tensor> kept;
  const auto make = [&](int64_t length, DType type) {
    kept.emplace_back(length, type);
    return static_cast<void*>(kept.back().memory.get());
  };
  const auto numbers = [&](int64_t length) { return static_cast<double*>(make(length, DType::f64)); };
  StepWeight weights[2];
  for (StepWeight& w : weights) {
    const int64_t length = shape.outer * shape.rows * shape.inner;
    w = {shape.outer, shape.rows, shape.inner, {}, half ? make(length, gradient_type) : nullptr, numbers(shape.rows),
         numbers(shape.rows), numbers(5 * shape.rows), {}};
    w.in[0] = make(length - (beyond && length > 0), weight_type);
    w.in[1] = make(length, gradient_type);
    for (int k = 0; k < states[formula]; ++k) {
      w.in[2 + k] = make(length, weight_type);
      w.row_state[k] = numbers(shape.rows);
    }
  }
  StepCall call{};
  call.formula = formula;
  call.weight_type = static_cast<int>(weight_type), call.gradient_type = static_cast<int>(gradient_type);
  call.count = 2, call.workspace = 1;
  call.grad_scale.value = 1, call.lr.value = call.radius_lr.value = 0.01, call.eps.value = 0.1;
  call.momentum.value = call.beta1.value = call.beta2.value = 0.5, call.gradient_weight.value = call.step.value = 1;
  call.weights = weights;
  simt_device(shape.device.multiprocessors, shape.device.capability, shape.device.shared_bytes, 2147483647);
  return simt_steps(&call);
}

// A step inside the backward, likewise.
std::string step_in_backward(DType type, const Device& device, int64_t batch, int64_t rows, int64_t width, bool beyond) {
  std::vector<Tensor> kept;
  const auto make = [&](int64_t length, DType of) {
    kept.emplace_back(length, of);
    return static_cast<void*>(kept.back().memory.get());
  };
  const auto numbers = [&](int64_t length) { return static_cast<double*>(make(length, DType::f64)); };
  InBackwardCall call{};
  call.type = static_cast<int>(type);
  call.known = call.sign = 1, call.lr = call.radius_lr = call.bias_lr = 0.01;
  call.batch = batch, call.rows = rows, call.width = width;
  call.rho = numbers(rows), call.radius = numbers(rows), call.norm = numbers(rows), call.telemetry = numbers(4 * rows);
  for (int64_t u = 0; u < rows; ++u) call.norm[u] = std::abs(call.norm[u]);
  call.dy = make(batch * rows, type), call.z = make(batch * rows, type), call.of_x = make(batch * rows, type);
  call.of_weight = make(batch * rows - beyond, type), call.weight = make(rows * width, type);
  call.scale = make(rows, type), call.bias = make(rows, type);
  simt_device(device.multiprocessors, device.capability, device.shared_bytes, 2147483647);
  call.scratch = make(simt_in_backward_scratch(batch, rows) / sizeof(double), DType::f64);
  for (call.stage = prepare; call.stage <= finish; ++call.stage) {
    const std::string error = simt_in_backward(&call);
    if (!error.empty()) return error;
  }
  return "";
}

void note_paths(std::set<std::string>& paths) {
  const std::string log = simt_log();
  for (std::size_t begin = 0; begin < log.size(); begin = log.find('\n', begin) + 1)
    paths.insert(log.substr(begin, log.find(';', begin) - begin));
}

}  // namespace

int main(int count, char** arguments) {
  const bool beyond = count > 1 && std::strcmp(arguments[1], "beyond") == 0;
  const DType pairs[][2] = {{DType::f32, DType::f32}, {DType::bf16, DType::bf16}, {DType::f32, DType::bf16},
                            {DType::f64, DType::f64}, {DType::f16, DType::f32}};
  std::set<std::string> paths;
  int number = 0;
  for (const auto& [device, outer, rows, inner] : cases)
    for (const int pair : {0, 1 + number++ % 4}) {
      const auto& [v_type, w_type] = pairs[pair];
      for (int formula = row_norm; formula <= radius_backward; ++formula)
        for (const bool in_place : {false, true}) {
          if (in_place && formula != backward) continue;
          const int64_t length = outer * rows * inner;
          Tensor v(length, v_type), gradient(length, w_type), radius(rows, DType::f32), result(rows, DType::f32);
          const DType out_type = formula == forward ? w_type : v_type;
          Tensor out(length - (beyond && length > 0), out_type);
          Call call{};
          call.formula = formula;
          call.kind = static_cast<int>(length % 2);
          call.outer = outer, call.rows = rows, call.inner = inner;
          call.v = v.memory.get(), call.v_type = static_cast<int>(v_type);
          call.gradient = gradient.memory.get(), call.gradient_type = static_cast<int>(w_type);
          call.out = in_place ? call.gradient : out.memory.get();
          call.out_type = static_cast<int>(in_place ? w_type : out_type);
          call.radius = radius.memory.get(), call.result = result.memory.get();
          call.workspace = 1;
          simt_device(device.multiprocessors, device.capability, device.shared_bytes, 2147483647);
          const std::string error = simt_call(&call);
          if (!error.empty()) {
            std::fprintf(stderr, "%s\n", error.c_str());
            return 1;
          }
          note_paths(paths);
        }
    }
  const DType types[][2] = {{DType::f32, DType::f32}, {DType::f32, DType::bf16}, {DType::f64, DType::f64}};
  for (const Case& shape : cases)
    for (int formula = sgd; formula <= adam_amsgrad; ++formula) {
      const auto& [weight_type, gradient_type] = types[number++ % 3];
      const std::string error = take_step(formula, weight_type, gradient_type, shape, beyond);
      if (!error.empty()) {
        std::fprintf(stderr, "%s\n", error.c_str());
        return 1;
      }
      note_paths(paths);
    }
  for (const DType type : {DType::f32, DType::f64})
    for (const int64_t batch : {1, 9, 1030}) {
      const std::string error = step_in_backward(type, plain, batch, 35, 7, beyond);
      if (!error.empty()) {
        std::fprintf(stderr, "%s\n", error.c_str());
        return 1;
      }
      note_paths(paths);
    }
  for (const std::string& path : paths) std::printf("%s\n", path.c_str());
}
