// What the torch side hands to an engine: plain structs of pointers and sizes, one entry point per backend.
#pragma once

#include <vector>

#include "polar.h"
#include "step.h"

namespace wn {

// Row u of a tensor is the set of its elements (o, u, i), element (o, u, i) at offset (o * rows + u) * inner + i.
// dim 0 has outer = 1 (contiguous rows), the last dim inner = 1 (columns).
struct Layout {
  int64_t outer = 1, rows = 0, inner = 0;
  WN_INLINE int64_t row_length() const { return outer * inner; }
};

// One kernel call: a formula over rows that all lie in the same layout. Outputs may alias inputs element by element; where
// the first is null, none is written, and only the rows' results are wanted.
template <class Formula> struct Problem {
  static constexpr int inputs = Formula::inputs, outputs = Formula::outputs > 0 ? Formula::outputs : 1;
  Formula formula;
  Layout layout;
  const void* in[inputs];
  DType in_type[inputs];
  void* out[outputs];
  DType out_type[outputs];
};

// Both run the problem to its end or queue it; a dtype combination without an instantiation throws std::runtime_error,
// a CUDA failure too. Allowed: x_0 (v) of any dtype; G, w of v's dtype, or fp32 with a 16-bit v, or 16-bit with an
// fp32 v; an output v- or G-typed.
namespace cpu {
template <class Formula> void run(const Problem<Formula>& problem);
// The same for many problems that share their types.
template <class Formula> void run(const std::vector<Problem<Formula>>& problems);
}
namespace cuda {
// Few long rows are spread over the whole GPU only if there is a workspace: device memory of at least
// workspace_bytes(problem), possibly none, that belongs to this call until the stream has passed it. The caller owns it,
// so that its allocator keeps it stream-ordered and graph-capturable.
template <class Formula> int64_t workspace_bytes(const Problem<Formula>& problem);
template <class Formula> void run(const Problem<Formula>& problem, void* stream, void* workspace = nullptr);
// Takes the problems with short rows out of a list whose problems share their types, and runs them: as many in a launch
// as the arguments of a kernel can describe, with blocks of one size.
template <class Formula> void run_short_rows(std::vector<Problem<Formula>>& problems, void* stream);
// The same as run for many problems that share their types, in few launches too. Nothing is done where *skip, if
// given, a number on the device, is not 0 when the kernels run. Of steps, with room for a copy, which may be null.
template <class Formula> int64_t workspace_bytes(const std::vector<Problem<Formula>>& problems);
template <class Formula>
void run(const std::vector<Problem<Formula>>& problems, void* stream, void* workspace, const float* skip);
}

}  // namespace wn
