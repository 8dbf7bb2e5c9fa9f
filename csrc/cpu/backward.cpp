#include "engine.h"

namespace wn::cpu {

// The gradient of v has v's type; in place it overwrites G and has G's.
template <> void run<Backward>(const Problem<Backward>& problem) {
  dispatch_pair(problem.in_type[0], problem.in_type[1], [&](auto v, auto g) {
    using V = typename decltype(v)::type;
    using G = typename decltype(g)::type;
    if (problem.out[0] == problem.in[1]) return run_typed<Backward, Types<V, G>, Types<G>>(problem);
    run_typed<Backward, Types<V, G>, Types<V>>(problem);
  });
}

}  // namespace wn::cpu
