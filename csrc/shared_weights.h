// Weights of many layers that were computed in one call, each for its layer to take (wnkernels/foreach.py).
#pragma once

#include <c10/core/StorageImpl.h>

#include <vector>

#include "ops.h"

namespace wn {

class SharedWeights {
 public:
  // As op::foreach_weight_norm; a weight whose v is null is left out. Where `lowered`, a float32 v gives the type of
  // autocast, if that is on.
  SharedWeights(const std::vector<std::optional<at::Tensor>>& v, const std::vector<std::optional<at::Tensor>>& g,
                const std::vector<int64_t>& dims, const std::vector<int64_t>& kinds, const std::vector<bool>& lowered);

  // The weight of these parameters, if it is what would be computed now: they are the same tensors, nobody has written
  // one of the three since (of which `.data` leaves no trace), grad mode and autocast are as they were, and no hooks on
  // saved tensors, which may compute it again, want to see the parameters.
  std::optional<at::Tensor> take(size_t index, const std::optional<at::Tensor>& v,
                                 const std::optional<at::Tensor>& g) const;

  // Whether all are plain tensors, which mean something outside of the mode in which they were computed.
  bool plain() const;

 private:
  struct Seen {
    at::Tensor tensor;
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;  // weak: its address is not given away meanwhile
    uint32_t version;
    explicit Seen(const at::Tensor& t);
    bool same(const at::Tensor& t) const;
    bool untouched() const;
  };
  struct Weight {
    Seen w, v, g;
    bool lowered;
  };
  std::vector<std::optional<Weight>> weights;
  bool recorded;
};

}  // namespace wn
