#include "engine.h"

namespace wn::cpu {

template <> void run<Forward>(const Problem<Forward>& problem) {
  dispatch_pair(problem.in_type[0], problem.out_type[0], [&](auto v, auto w) {
    run_typed<Forward, Types<typename decltype(v)::type>, Types<typename decltype(w)::type>>(problem);
  });
}

}  // namespace wn::cpu
