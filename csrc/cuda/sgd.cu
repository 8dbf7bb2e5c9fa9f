#include "step.cuh"

namespace wn::cuda {

template <bool option> using Problems = std::vector<Problem<PolarSgd<option, true>>>;

template int64_t workspace_bytes(const Problems<false>&);
template int64_t workspace_bytes(const Problems<true>&);
template void run(const Problems<false>&, void*, void*, const float*);
template void run(const Problems<true>&, void*, void*, const float*);

}  // namespace wn::cuda
