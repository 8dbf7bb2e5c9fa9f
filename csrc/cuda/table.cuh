// Many problems in one launch: a table in the kernel's arguments. It needs no memory on the device, no copy and no cache,
// and it is a part of a captured graph. A block looks up its problem by its index.
#pragma once

#include "heuristics.h"

namespace wn::cuda {

#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int64_t argument_bytes = 4096;
#else
constexpr int64_t argument_bytes = 32764;
#endif

template <class F> struct Entry {
  Problem<F> problem;
  Plan plan;
  int64_t begin;    // its first block in the table
  void* workspace;  // of split rows
};

template <class F> struct Table {
  static constexpr int most = static_cast<int>((argument_bytes - 32) / sizeof(Entry<F>));  // with 16 bytes to spare
  int64_t first;  // block of this launch
  int count;
  Entry<F> entry[most];

  WN_DEVICE const Entry<F>& of_block(int64_t block) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (entry[middle].begin <= block ? low : high) = middle;
    }
    return entry[low];
  }
};

}  // namespace wn::cuda
