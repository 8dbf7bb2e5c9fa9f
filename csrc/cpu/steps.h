// The instantiations of a step: gradient and weight share a type, or a float32 weight has a 16-bit copy (the parameter
// whose master it is, or what autocast would make of it), and its gradient is of either type.
#pragma once

#include "engine.h"

namespace wn::cpu {
namespace {

// A step has inputs of its state behind w and G, of the weight's type, and writes them behind w'.
template <class Formula, class W, class G, class... State, class... Copy>
void run_steps(const std::vector<Problem<Formula>>& problems, Types<State...>, Types<Copy...>) {
  run_typed<Formula, Types<W, G, State...>, Types<W, State..., Copy...>>(problems);
}

template <class W, int count> struct Repeated;
template <class W> struct Repeated<W, 0> { using type = Types<>; };
template <class W> struct Repeated<W, 1> { using type = Types<W>; };
template <class W> struct Repeated<W, 2> { using type = Types<W, W>; };
template <class W> struct Repeated<W, 3> { using type = Types<W, W, W>; };
template <class Formula, class W> using State = typename Repeated<W, Formula::inputs - 2>::type;

template <class Formula> void run_plain(const std::vector<Problem<Formula>>& problems) {
  if (problems.front().in_type[0] == DType::f64)
    return run_steps<Formula, double, double>(problems, State<Formula, double>{}, Types<>{});
  run_steps<Formula, float, float>(problems, State<Formula, float>{}, Types<>{});
}

template <class Formula, class Copy> void run_copy(const std::vector<Problem<Formula>>& problems) {
  if (problems.front().in_type[1] == DType::f32)
    return run_steps<Formula, float, float>(problems, State<Formula, float>{}, Types<Copy>{});
  run_steps<Formula, float, Copy>(problems, State<Formula, float>{}, Types<Copy>{});
}

template <class Formula> void run_with_copy(const std::vector<Problem<Formula>>& problems) {
  if (problems.front().out_type[Formula::outputs - 1] == DType::bf16) return run_copy<Formula, bf16>(problems);
  run_copy<Formula, f16>(problems);
}

}  // namespace
}  // namespace wn::cpu
