#include "engine.h"

namespace wn::cpu {

template <> void run<RowNorm>(const Problem<RowNorm>& problem) {
  dispatch(problem.in_type[0], [&](auto v) { run_typed<RowNorm, Types<typename decltype(v)::type>, Types<>>(problem); });
}

template <> void run<RowScale>(const Problem<RowScale>& problem) {
  dispatch(problem.in_type[0], [&](auto v) { run_typed<RowScale, Types<typename decltype(v)::type>, Types<>>(problem); });
}

}  // namespace wn::cpu
