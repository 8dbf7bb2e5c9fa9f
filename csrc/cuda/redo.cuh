// A row that left the range of its accumulator is solved again in double, from memory and before anything of it is
// overwritten. That is rare: its function is not inlined, takes no registers from the main path, and looks up the types of the
// elements at run time, so that there is one per formula.
#pragma once

#include "packs.cuh"
#include "team.cuh"

namespace wn::cuda {

template <class F, class A> WN_DEVICE bool all_safe(const A* gram) {
  bool safe = true;
#pragma unroll
  for (int k = 0; k < F::gram_inputs; ++k) safe = safe && safe_square(gram[k * (k + 1) / 2 + k]);
  return safe;
}

// Whether a row must be solved again. The square of an input of zeros is not safe, but exact.
template <class F, class A> WN_DEVICE bool must_redo(const A* gram, const uint32_t* nonzero, bool exact) {
  bool redo = !exact;
#pragma unroll
  for (int k = 0; k < F::gram_inputs; ++k)
    redo = redo || (!safe_square(gram[k * (k + 1) / 2 + k]) && nonzero[k] != 0);
  return redo;
}

// One by one, for any layout and types; three times over the row: largest elements, Gram matrix, combination.
// Inputs that are not finite stay unscaled: they give what they give.
template <class F> WN_OUTLINE void redo_row(const Problem<F>& problem, const Plan& plan, int64_t row) {
  const Layout& layout = problem.layout;
  const Team team(plan);
  int exponent[F::inputs] = {};
  PowerOfTwo scale[F::inputs];
  double largest[F::inputs] = {}, gram[F::gram_inputs * (F::gram_inputs + 1) / 2] = {};
  double coefficient[at_least_one<F::coefficients>], result[at_least_one<F::results>];
#pragma unroll 1
  for (int pass = 0; pass < (F::outputs > 0 ? 3 : 2); ++pass) {
#pragma unroll 1
    for (int64_t j = team.thread(); j < layout.row_length(); j += team.threads()) {
      const int64_t o = j / layout.inner, offset = (o * layout.rows + row) * layout.inner + (j - o * layout.inner);
      double x[F::inputs];
#pragma unroll
      for (int k = 0; k < F::inputs; ++k)
        x[k] = scale[k] * RowValues{problem.in[k], problem.in_type[k], 0}.template at<double>(offset);
      if (pass == 0) {
#pragma unroll
        for (int k = 0; k < F::inputs; ++k) {
          const double m = magnitude(x[k]);
          largest[k] = Larger{}(largest[k], m == m ? m : INFINITY);
        }
      } else if (pass == 1) {
        add_products<F>(x, gram);
      } else if constexpr (F::outputs > 0) {
        double y[F::outputs];
        F::combine(coefficient, x, y);
#pragma unroll
        for (int l = 0; l < F::outputs; ++l) RowResults{problem.out[l], problem.out_type[l]}.set(offset, y[l]);
      }
    }
    if (pass == 0) {
      team.reduce(largest, Larger{});
#pragma unroll
      for (int k = 0; k < F::inputs; ++k) {
        if (!(largest[k] > 0 && largest[k] <= limits<double>::largest)) continue;
        exponent[k] = ::ilogb(largest[k]);
        scale[k] = PowerOfTwo(-exponent[k]);
      }
    } else if (pass == 1) {
      team.reduce(gram, Plus{});
      problem.formula.solve(row, gram, exponent, coefficient, result);
#pragma unroll
      for (int i = 0; i < F::coefficients; ++i) coefficient[i] = finite(coefficient[i]);
      if (team.leader()) problem.formula.finish(row, result);
    }
  }
}

}  // namespace wn::cuda
