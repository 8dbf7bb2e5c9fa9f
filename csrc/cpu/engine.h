// The CPU engine: runs a formula (polar.h) over the rows of a problem.
//
// Every reduction goes over pieces of fixed size with fixed lanes inside a piece, and pieces are added in order in
// double. So the bits depend neither on the number of threads nor on the path taken:
//   rows.h     a row is contiguous (or `outer` contiguous segments): one row at a time through the cache;
//              split: the same, but too few rows to go around: pieces of rows in parallel, in three phases;
//   tiles.h    rows of a few elements, in a cache of up to a thousand: tiles of rows side by side;
//   columns.h  neighbouring elements belong to different rows (last dim, small inner).
#pragma once

#include "columns.h"
#include "tiles.h"

namespace wn::cpu {
namespace {

constexpr int64_t kShortSegment = 32;  // segments of rows below this length are handled as columns

template <class Formula, class In> int64_t bytes_of(const Problem<Formula>& problem) {
  return problem.layout.rows * problem.layout.row_length() * In::bytes;
}

template <class Formula, class In, class Out> void run_typed(const Problem<Formula>& problem, int64_t bytes_of_call) {
  using E = Elements<Formula, In, Out>;
  const Layout& layout = problem.layout;
  const int64_t length = layout.row_length();
  if (length == 0) return rows_in_range<Formula, E>(problem, 0, layout.rows);
  if (in_tiles<Formula, E>(layout, bytes_of_call)) return run_short_rows<Formula, E>(problem, bytes_of_call);
  if (layout.outer > 1 && layout.inner < kShortSegment)
    return run_columns<Formula, E>(problem, {layout.outer, layout.rows * layout.inner, layout.inner,
                                             layout.rows * layout.inner});
  if (layout.rows < 2 * at::get_num_threads() && layout.rows * length > kGrain) return split_rows<Formula, E>(problem);
  at::parallel_for(0, layout.rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, length)),
                   [&](int64_t first, int64_t last) { rows_in_range<Formula, E>(problem, first, last); });
}

template <class Formula, class In, class Out> void run_typed(const Problem<Formula>& problem) {
  run_typed<Formula, In, Out>(problem, bytes_of<Formula, In>(problem));
}

// Several problems of the same types: small ones side by side in one parallel region, large ones one after the other.
template <class Formula, class In, class Out> void run_typed(const std::vector<Problem<Formula>>& problems) {
  std::vector<const Problem<Formula>*> small;
  int64_t elements = 0, bytes = 0;
  for (const Problem<Formula>& problem : problems) bytes += bytes_of<Formula, In>(problem);
  // Rows of a kernel that is no step differ in their last bits by path: there each problem is on its own.
  const auto bytes_of_call = [bytes](const Problem<Formula>& problem) {
    return Formula::residuals > 0 ? bytes : bytes_of<Formula, In>(problem);
  };
  for (const Problem<Formula>& problem : problems) {
    const int64_t size = problem.layout.rows * problem.layout.row_length();
    if (size > kGrain) {
      run_typed<Formula, In, Out>(problem, bytes_of_call(problem));
    } else {
      small.push_back(&problem);
      elements += size;
    }
  }
  const int64_t count = static_cast<int64_t>(small.size());
  if (count > 0)
    at::parallel_for(0, count, std::max<int64_t>(1, kGrain * count / std::max<int64_t>(1, elements)),
                     [&](int64_t first, int64_t last) {
                       for (int64_t i = first; i < last; ++i) run_typed<Formula, In, Out>(*small[i], bytes_of_call(*small[i]));
                     });
}

}  // namespace
}  // namespace wn::cpu
