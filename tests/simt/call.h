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

// A list of polar steps in one call. Row values are a number or, where data is given, an array of the type.
struct StepValue {
  void* data;
  double value;
  int32_t type, stride;
};
struct StepWeight {
  int64_t outer, rows, inner;
  void *in[5], *copy;  // w, G, then the state
  double *radius, *norm, *telemetry, *row_state[3];
};
struct StepCall {
  int32_t formula, kind, retraction, weight_type, gradient_type, count, workspace;
  int32_t maximize, nesterov, decoupled;
  StepValue grad_scale, lr, radius_lr, weight_decay, radius_weight_decay;
  StepValue momentum, gradient_weight, beta1, beta2, eps, step;
  const float* skip;
  const StepWeight* weights;
};
enum StepName { sgd, sgd_momentum, adam, adam_amsgrad };

// A stage of a step inside the backward of a linear layer; `measured`: finish knows the lengths of all rows from row_norm.
struct InBackwardCall {
  int32_t stage, type, kind, keep_norm, one_column, known, measured;
  int64_t batch, rows, width;
  double lr, radius_lr, weight_decay, radius_weight_decay, bias_lr, bias_weight_decay, sign;
  double *rho, *radius, *norm, *telemetry;
  void *dy, *z, *of_x, *of_weight, *weight, *scale, *bias, *scratch;
};
enum StageName { prepare, fold, finish };

// Returns what went wrong, or an empty string.
extern "C" const char* simt_call(const Call* call);
// forward or backward of many weights of the same types
extern "C" const char* simt_list(const Call* calls, int count);
extern "C" const char* simt_steps(const StepCall* call);
extern "C" const char* simt_in_backward(const InBackwardCall* call);
extern "C" int64_t simt_in_backward_scratch(int64_t batch, int64_t rows);  // bytes
extern "C" void simt_device(int multiprocessors, int capability, int64_t shared_bytes, int64_t blocks);
extern "C" const char* simt_log();
