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
          const std::string log = simt_log();
          for (std::size_t begin = 0; begin < log.size(); begin = log.find('\n', begin) + 1)
            paths.insert(log.substr(begin, log.find(';', begin) - begin));
        }
    }
  for (const std::string& path : paths) std::printf("%s\n", path.c_str());
}
