// A program to be built with sanitizers: every path on heap blocks of exactly the size of the tensors.
// With the argument "beyond" the output lacks its last element, which the sanitizer has to find.
#include <cstdio>
#include <cstring>
#include <memory>
#include <set>
#include <string>

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

}  // namespace

int main(int count, char** arguments) {
  const bool beyond = count > 1 && std::strcmp(arguments[1], "beyond") == 0;
  const Device devices[] = {{2, 90, 227 << 10}, {24, 80, 163 << 10}, {8, 90, 227 << 10}, {1, 75, 12 << 10}};
  const int64_t layouts[][3] = {{1, 7, 37},    {1, 3, 3001}, {3, 5, 43},   {1, 2, 17301}, {41, 2, 421},
                                {37, 21, 1},   {19, 5, 9},   {1200, 5, 1}, {500, 3, 3},   {5, 40, 6},
                                {1, 3, 8192},  {1, 5, 0},    {0, 4, 1},    {1, 1, 1},     {64, 32, 1}};
  const DType pairs[][2] = {{DType::f32, DType::f32}, {DType::f64, DType::f64}, {DType::bf16, DType::bf16},
                            {DType::f16, DType::f32}, {DType::f32, DType::bf16}};
  std::set<std::string> paths;
  for (const Device& device : devices)
    for (const auto& [outer, rows, inner] : layouts)
      for (const auto& [v_type, w_type] : pairs)
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
            const std::string log = simt_log();
            for (std::size_t begin = 0; begin < log.size(); begin = log.find('\n', begin) + 1)
              paths.insert(log.substr(begin, log.find(';', begin) - begin));
          }
  for (const std::string& path : paths) std::printf("%s\n", path.c_str());
}
