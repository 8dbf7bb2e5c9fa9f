#include "engine.h"

namespace wn::cpu {

// Of one problem, or of a list with the types of its first.
template <class Problems> void run_forward(const Problem<Forward>& first, const Problems& problems) {
  dispatch_pair(first.in_type[0], first.out_type[0], [&](auto v, auto w) {
    run_typed<Forward, Types<typename decltype(v)::type>, Types<typename decltype(w)::type>>(problems);
  });
}

template <> void run(const Problem<Forward>& problem) { run_forward(problem, problem); }
template <> void run(const std::vector<Problem<Forward>>& problems) { run_forward(problems.front(), problems); }

}  // namespace wn::cpu
