#include "engine.cuh"

namespace wn::cuda {

template <class Body> void with_signature(const Problem<RowNorm>& problem, Body&& body) {
  dispatch(problem.in_type[0], [&](auto v) {
    body(Signature<RowNorm, Types<typename decltype(v)::type>, Types<>>{});
  });
}

template <class Body> void with_signature(const Problem<RowScale>& problem, Body&& body) {
  dispatch(problem.in_type[0], [&](auto v) {
    body(Signature<RowScale, Types<typename decltype(v)::type>, Types<>>{});
  });
}

template int64_t workspace_bytes(const Problem<RowNorm>&);
template int64_t workspace_bytes(const Problem<RowScale>&);
template void run(const Problem<RowNorm>&, void*, void*);
template void run(const Problem<RowScale>&, void*, void*);

}  // namespace wn::cuda
