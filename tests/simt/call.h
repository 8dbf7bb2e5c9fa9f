// The entry point of the tests: a problem by numbers and pointers, as ctypes can pass it.
#pragma once

#include <cstdint>

struct Call {
  int32_t formula, kind;
  int64_t outer, rows, inner;
  void *v, *gradient, *out, *radius, *result;
  int32_t v_type, gradient_type, out_type, radius_type, result_type, workspace;
};
enum FormulaName { row_norm, row_scale, forward, backward, radius_backward };

// Returns what went wrong, or an empty string.
extern "C" const char* simt_call(const Call* call);
extern "C" void simt_device(int multiprocessors, int capability, int64_t shared_bytes, int64_t blocks);
extern "C" const char* simt_log();
