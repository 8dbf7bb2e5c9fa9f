#include "engine.cuh"

namespace wn::cuda {

// dv has v's type as a gradient, and G's when it is written over G.
template <class Body> void with_signature(const Problem<Backward>& problem, Body&& body) {
  dispatch_pair(problem.in_type[0], problem.in_type[1], [&](auto v, auto w) {
    using V = typename decltype(v)::type;
    using W = typename decltype(w)::type;
    if (problem.out[0] == nullptr || problem.out_type[0] == problem.in_type[0])
      body(Signature<Backward, Types<V, W>, Types<V>>{});
    else if (problem.out_type[0] == problem.in_type[1]) body(Signature<Backward, Types<V, W>, Types<W>>{});
    else
      throw std::runtime_error(std::string("wnkernels: no kernel for a gradient of v in ") + name(problem.out_type[0]) +
                               "; it must have the type of v or of the gradient of w");
  });
}

template int64_t workspace_bytes(const Problem<Backward>&);
template void run(const Problem<Backward>&, void*, void*);
template void run_short_rows(std::vector<Problem<Backward>>&, void*);

}  // namespace wn::cuda
