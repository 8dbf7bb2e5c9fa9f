// The threads that reduce together: some of a warp, a block, a cluster of blocks.
#pragma once

#include "device.h"
#include "heuristics.h"

namespace wn::cuda {

struct Plus {
  template <class A> WN_DEVICE A operator()(A a, A b) const { return a + b; }
};
struct Larger {
  template <class A> WN_DEVICE A operator()(A a, A b) const { return b > a ? b : a; }
};
struct Or {
  WN_DEVICE uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
};

// The threads that share a row: `width` threads of a block, a power of two, and the same of the other blocks of the
// cluster. Teams wider than a warp wait for the whole block, so that all of its teams have to reduce together.
struct Team {
  int width, rank;
  int blocks, block;

  WN_DEVICE explicit Team(const Plan& plan)
      : width(plan.width), rank(tid() & (plan.width - 1)), blocks(1), block(0) {
    if (plan.shape.cluster > 1) {
      blocks = cluster_size();
      block = cluster_rank();
    }
  }
  WN_DEVICE int64_t threads() const { return int64_t(width) * blocks; }
  WN_DEVICE int64_t thread() const { return int64_t(block) * width + rank; }
  WN_DEVICE bool leader() const { return thread() == 0; }

  // Reduces every x[i] over the team, in the same tree for every thread. Zero must be neutral for the operation.
  template <class A, int n, class Operation> WN_DEVICE void reduce(A (&x)[n], Operation operation) const {
    butterfly(x, width < warp ? width : warp, operation);
    if (width <= warp) return;
    A* partial = shared<A>();
    A* total = partial + n * most_warps;
    const int lane = tid() % warp, warps = width / warp, first = (tid() - rank) / warp;
    block_sync();  // the results of the last reduction have been read
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (lane == 0) partial[i * most_warps + tid() / warp] = x[i];
    block_sync();
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = lane < warps ? partial[i * most_warps + first + lane] : A(0);
    butterfly(x, warp, operation);
    if (blocks == 1) return;
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (tid() == 0) total[i] = x[i];
    cluster_sync();
#pragma unroll
    for (int i = 0; i < n; ++i) {
      x[i] = peer(total, 0)[i];
#pragma unroll 1
      for (int b = 1; b < blocks; ++b) x[i] = operation(x[i], peer(total, b)[i]);
    }
    cluster_sync();  // a block may neither overwrite its total nor end before the others have read it
  }

 private:
  template <class A, int n, class Operation>
  WN_DEVICE static void butterfly(A (&x)[n], int size, Operation operation) {
    const unsigned all = ~0u >> (warp - size);
    const unsigned lanes = all << (tid() % warp & ~(size - 1));
#pragma unroll 1
    for (int distance = size / 2; distance > 0; distance /= 2)
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] = operation(x[i], shfl_xor(lanes, x[i], distance));
  }
};

}  // namespace wn::cuda
