#include "steps.h"

namespace wn::cpu {

template <bool option, bool copy> using Problems = std::vector<Problem<PolarSgd<option, copy>>>;

template <> void run(const Problems<false, false>& problems) { run_plain(problems); }
template <> void run(const Problems<true, false>& problems) { run_plain(problems); }
template <> void run(const Problems<false, true>& problems) { run_with_copy(problems); }
template <> void run(const Problems<true, true>& problems) { run_with_copy(problems); }

}  // namespace wn::cpu
