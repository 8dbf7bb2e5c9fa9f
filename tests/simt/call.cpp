#include "call.h"

#include "kernels.h"

#include <memory>
#include <stdexcept>
#include <string>

namespace {

template <class F> void run(const Call& call, const F& formula) {
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
  const int64_t bytes = call.workspace ? wn::cuda::workspace_bytes(problem) : 0;
  const std::unique_ptr<char[]> workspace(bytes > 0 ? new char[bytes] : nullptr);
  wn::cuda::run(problem, nullptr, workspace.get());
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

}  // namespace

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
