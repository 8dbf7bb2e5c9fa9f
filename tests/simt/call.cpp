#include "call.h"

#include "cuda/in_backward_rows.h"
#include "kernels.h"

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

template <class F> wn::Problem<F> problem_of(const Call& call, const F& formula) {
  wn::Problem<F> problem{};
  problem.formula = formula;
  problem.layout = {call.outer, call.rows, call.inner};
  problem.in[0] = call.v;
  problem.in_type[0] = static_cast<wn::DType>(call.v_type);
  if constexpr (F::inputs > 1) {
    problem.in[1] = call.gradient;
    problem.in_type[1] = static_cast<wn::DType>(call.gradient_type);
  }
  problem.out[0] = call.formula == radius_backward ? nullptr : call.out;
  problem.out_type[0] = static_cast<wn::DType>(call.out_type);
  return problem;
}

template <class F> void run(const Call& call, const F& formula) {
  const auto problem = problem_of(call, formula);
  const int64_t bytes = call.workspace ? wn::cuda::workspace_bytes(problem) : 0;
  const std::unique_ptr<char[]> workspace(bytes > 0 ? new char[bytes] : nullptr);
  wn::cuda::run(problem, nullptr, workspace.get());
}

// Those of the calls that cannot share a launch are done one by one.
template <class F, class Formula> void run_list(const Call* calls, int count, Formula&& formula) {
  std::vector<wn::Problem<F>> problems;
  for (int i = 0; i < count; ++i) problems.push_back(problem_of(calls[i], formula(calls[i])));
  wn::cuda::run_short_rows(problems, nullptr);
  for (const auto& problem : problems) wn::cuda::run(problem, nullptr);
}

template <class F> F of_radius(const Call& call) {
  F formula{};
  formula.kind = static_cast<wn::Kind>(call.kind);
  formula.radius = {call.radius, static_cast<wn::DType>(call.radius_type), 0};
  return formula;
}

template <class F, class G> F with(F formula, wn::RowResults G::*member, const wn::RowResults& result) {
  formula.*member = result;
  return formula;
}

wn::RowValues values(const StepValue& v) { return {v.data, static_cast<wn::DType>(v.type), v.value, v.stride}; }

template <class F, class Fill> void run_steps(const StepCall& call, Fill&& fill) {
  std::vector<wn::Problem<F>> problems;
  const auto weight_type = static_cast<wn::DType>(call.weight_type), gradient_type = static_cast<wn::DType>(call.gradient_type);
  const bool f64 = weight_type == wn::DType::f64;
  for (int i = 0; i < call.count; ++i) {
    const StepWeight& weight = call.weights[i];
    wn::Problem<F> p{};
    p.layout = {weight.outer, weight.rows, weight.inner};
    wn::PolarRow& rows = p.formula.rows;
    rows.kind = static_cast<wn::Kind>(call.kind);
    rows.retraction = static_cast<wn::Retraction>(call.retraction);
    rows.gradient_sign = call.maximize ? -1 : 1;
    rows.grad_scale = values(call.grad_scale);
    rows.lr = values(call.lr);
    rows.radius_lr = values(call.radius_lr);
    rows.weight_decay = values(call.weight_decay);
    rows.radius_weight_decay = values(call.radius_weight_decay);
    rows.edit_tolerance = f64 ? 1e-12 : 1e-5;
    rows.edit_floor = f64 ? 0x1p-1022 : 0x1p-126;
    rows.one_column = p.layout.row_length() == 1;
    rows.radius = weight.radius;
    rows.norm = weight.norm;
    rows.telemetry = weight.telemetry;
    fill(p.formula, weight);
    for (int k = 0; k < F::inputs; ++k) {
      p.in[k] = weight.in[k];
      p.in_type[k] = k == 1 ? gradient_type : weight_type;
      const int output = k == 0 ? 0 : k - 1;  // the gradient is not written
      p.out[output] = weight.in[k];
      p.out_type[output] = weight_type;
    }
    p.out[0] = weight.in[0];
    p.out[F::outputs - 1] = weight.copy;
    p.out_type[F::outputs - 1] = gradient_type;
    problems.push_back(p);
  }
  const int64_t bytes = call.workspace ? wn::cuda::workspace_bytes(problems) : 0;
  const std::unique_ptr<char[]> workspace(bytes > 0 ? new char[bytes] : nullptr);
  wn::cuda::run(problems, nullptr, workspace.get(), call.skip);
}

template <bool momentum> void run_sgd(const StepCall& call) {
  run_steps<wn::PolarSgd<momentum, true>>(call, [&](auto& formula, const StepWeight& weight) {
    formula.nesterov = call.nesterov;
    formula.momentum = values(call.momentum);
    formula.gradient_weight = values(call.gradient_weight);
    formula.radius_momentum = weight.row_state[0];
  });
}
template <bool amsgrad> void run_adam(const StepCall& call) {
  run_steps<wn::PolarAdam<amsgrad, true>>(call, [&](auto& formula, const StepWeight& weight) {
    formula.decoupled = call.decoupled;
    formula.beta1 = values(call.beta1);
    formula.beta2 = values(call.beta2);
    formula.eps = values(call.eps);
    formula.step = values(call.step);
    formula.radius_average = weight.row_state[0];
    formula.radius_square = weight.row_state[1];
    formula.radius_largest = weight.row_state[2];
  });
}

void run_in_backward(const InBackwardCall& call) {
  wn::cuda::RowsInBackward rows{};
  rows.state = {call.rho, call.radius, call.norm, call.telemetry, static_cast<wn::Kind>(call.kind), call.keep_norm != 0,
                call.one_column != 0, call.lr, call.radius_lr, call.weight_decay, call.radius_weight_decay};
  rows.type = static_cast<wn::DType>(call.type);
  rows.batch = call.batch, rows.rows = call.rows, rows.width = call.width;
  rows.dy = call.dy, rows.z = call.z, rows.of_x = call.of_x, rows.of_weight = call.of_weight;
  rows.weight = call.weight, rows.scale = call.scale, rows.bias = call.bias, rows.scratch = call.scratch;
  rows.bias_lr = call.bias_lr, rows.bias_weight_decay = call.bias_weight_decay, rows.sign = call.sign;
  rows.known = call.known;
  if (call.stage == prepare) return wn::cuda::prepare(rows, nullptr);
  if (call.stage == fold) return wn::cuda::fold(rows, nullptr);
  if (call.measured) {
    const wn::RowNorm norm{{wn::cuda::lengths(rows), wn::DType::f64}};
    const wn::Problem<wn::RowNorm> problem{norm, {1, rows.rows, rows.width}, {rows.weight}, {rows.type}, {}, {}};
    wn::cuda::run(problem, nullptr);
  }
  wn::cuda::finish(rows, call.measured, nullptr);
}

}  // namespace

extern "C" int64_t simt_in_backward_scratch(int64_t batch, int64_t rows) { return wn::cuda::scratch_bytes(batch, rows); }

extern "C" const char* simt_in_backward(const InBackwardCall* call) {
  static std::string error;
  error.clear();
  try {
    run_in_backward(*call);
  } catch (const std::exception& e) {
    error = e.what();
  }
  return error.c_str();
}

extern "C" const char* simt_list(const Call* calls, int count) {
  static std::string error;
  error.clear();
  try {
    if (calls->formula == forward) {
      run_list<wn::Forward>(calls, count, of_radius<wn::Forward>);
    } else {
      run_list<wn::Backward>(calls, count, [](const Call& call) {
        return with(of_radius<wn::Backward>(call), &wn::Backward::radius_gradient,
                    wn::RowResults{call.result, static_cast<wn::DType>(call.result_type)});
      });
    }
  } catch (const std::exception& e) {
    error = e.what();
  }
  return error.c_str();
}

extern "C" const char* simt_steps(const StepCall* call) {
  static std::string error;
  error.clear();
  try {
    switch (call->formula) {
      case sgd: run_sgd<false>(*call); break;
      case sgd_momentum: run_sgd<true>(*call); break;
      case adam: run_adam<false>(*call); break;
      case adam_amsgrad: run_adam<true>(*call); break;
      default: error = "simt: unknown step";
    }
  } catch (const std::exception& e) {
    error = e.what();
  }
  return error.c_str();
}

extern "C" const char* simt_call(const Call* call) {
  static std::string error;
  error.clear();
  const wn::RowResults result = {call->result, static_cast<wn::DType>(call->result_type)};
  try {
    switch (call->formula) {
      case row_norm: run(*call, wn::RowNorm{result}); break;
      case row_scale: run(*call, with(of_radius<wn::RowScale>(*call), &wn::RowScale::scale, result)); break;
      case forward: run(*call, of_radius<wn::Forward>(*call)); break;
      case backward:
      case radius_backward:
        run(*call, with(of_radius<wn::Backward>(*call), &wn::Backward::radius_gradient, result));
        break;
      default: error = "simt: unknown formula";
    }
  } catch (const std::exception& e) {
    error = e.what();
  }
  return error.c_str();
}
