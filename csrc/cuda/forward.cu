#include "engine.cuh"

namespace wn::cuda {

template <class Body> void with_signature(const Problem<Forward>& problem, Body&& body) {
  dispatch_pair(problem.in_type[0], problem.out_type[0], [&](auto v, auto w) {
    body(Signature<Forward, Types<typename decltype(v)::type>, Types<typename decltype(w)::type>>{});
  });
}

template int64_t workspace_bytes(const Problem<Forward>&);
template void run(const Problem<Forward>&, void*, void*);
template void run_short_rows(std::vector<Problem<Forward>>&, void*);

}  // namespace wn::cuda
