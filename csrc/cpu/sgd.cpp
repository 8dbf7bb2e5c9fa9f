#include "engine.h"

namespace wn::cpu {
namespace {

template <bool momentum, bool copy> using Problems = std::vector<Problem<PolarSgd<momentum, copy>>>;

template <bool momentum, class W, class G, class... Copy> void run_steps(const Problems<momentum, sizeof...(Copy) == 1>& problems) {
  using Formula = PolarSgd<momentum, sizeof...(Copy) == 1>;
  if constexpr (momentum)
    run_typed<Formula, Types<W, G, W>, Types<W, W, Copy...>>(problems);
  else
    run_typed<Formula, Types<W, G>, Types<W, Copy...>>(problems);
}

// Gradient and weight share a type, or a 16-bit parameter has a float32 master copy.
template <bool momentum> void run_plain(const Problems<momentum, false>& problems) {
  if (problems.front().in_type[0] == DType::f64) return run_steps<momentum, double, double>(problems);
  run_steps<momentum, float, float>(problems);
}
template <bool momentum> void run_master(const Problems<momentum, true>& problems) {
  if (problems.front().in_type[1] == DType::bf16) return run_steps<momentum, float, bf16, bf16>(problems);
  run_steps<momentum, float, f16, f16>(problems);
}

}  // namespace

template <> void run(const Problems<false, false>& problems) { run_plain<false>(problems); }
template <> void run(const Problems<true, false>& problems) { run_plain<true>(problems); }
template <> void run(const Problems<false, true>& problems) { run_master<false>(problems); }
template <> void run(const Problems<true, true>& problems) { run_master<true>(problems); }

}  // namespace wn::cpu
