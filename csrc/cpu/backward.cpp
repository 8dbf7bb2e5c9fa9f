#include "engine.h"

namespace wn::cpu {

// The gradient of v has v's type; in place it overwrites G and has G's. Of one problem, or of a list with the types of
// its first.
template <class Problems> void run_backward(const Problem<Backward>& first, const Problems& problems) {
  dispatch_pair(first.in_type[0], first.in_type[1], [&](auto v, auto g) {
    using V = typename decltype(v)::type;
    using G = typename decltype(g)::type;
    if (first.out[0] == first.in[1]) return run_typed<Backward, Types<V, G>, Types<G>>(problems);
    run_typed<Backward, Types<V, G>, Types<V>>(problems);
  });
}

template <> void run(const Problem<Backward>& problem) { run_backward(problem, problem); }
template <> void run(const std::vector<Problem<Backward>>& problems) { run_backward(problems.front(), problems); }

}  // namespace wn::cpu
