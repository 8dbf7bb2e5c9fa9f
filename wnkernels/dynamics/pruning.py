"""Pruning of neurons and filters: scores, which to keep, and smaller layers that compute the pruned net.

    keep = largest(norms(net[0]), fraction=0.2)
    small = prune(net, 0, 2, keep)

The scores are those of Morwani and Ramaswamy (arXiv:2010.12909, section 6): the norm of a neuron's incoming
weight at the end of training, or how much it has grown since an earlier time.
"""

import copy

import torch
from torch import Tensor, nn

from .. import functional
from .. import nn as layers

__all__ = ["growth", "largest", "norms", "prune"]


@torch.no_grad()
def norms(layer: nn.Module | Tensor) -> Tensor:
    """The norm of each row of a layer's weight, or of a weight: (R,)."""
    w = layer if isinstance(layer, Tensor) else layer.weight
    return functional.row_norm(w.detach())


def growth(layer: nn.Module | Tensor, earlier: nn.Module | Tensor) -> Tensor:
    """How much longer each row is than in an earlier state of the layer or weight: (R,)."""
    return norms(layer) - norms(earlier)


def largest(scores: Tensor, fraction: float) -> Tensor:
    """The rows to keep, in order: all but the round((1 - fraction) R) with the smallest scores.

    Raises: ValueError unless 0 < fraction <= 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    count = max(1, len(scores) - round((1 - fraction) * len(scores)))
    return scores.topk(count).indices.sort().values


@torch.no_grad()
def prune(model: nn.Sequential, first: int, second: int, keep: Tensor) -> nn.Sequential:
    """A copy of a chain with fewer neurons in one layer.

    Args:
        model: layers and activations.
        first, second: the positions of the layer that is pruned, Linear or Conv2d, and of the next one, which
            reads it.
        keep: (K,) int64, the rows of the first layer to keep.

    Returns: a new model, whose layers are of the old kinds; their v keep their lengths where all inputs stay.

    Raises: TypeError for layers that are not of these classes; ValueError for indices out of range, and for a
    second layer of which the inputs are not those outputs.
    """
    producer, consumer = model[first], model[second]
    for name, layer in (("first", producer), ("second", consumer)):
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            raise TypeError(f"{name} must be the position of a Linear or Conv2d, got {type(layer).__name__}")
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise ValueError(f"{name} must have groups=1, got {layer.groups}")
    outputs = producer.weight.shape[0]
    if keep.numel() == 0 or keep.min() < 0 or keep.max() >= outputs:
        raise ValueError(f"keep must be indices in [0, {outputs - 1}], at least one, got {keep.tolist()}")
    inputs = consumer.weight.shape[1]
    if inputs % outputs:
        raise ValueError(f"second must read the {outputs} outputs of first, got {inputs} inputs")
    each = inputs // outputs  # a flattened channel is as many inputs of a linear layer as it has pixels
    columns = (keep[:, None] * each + torch.arange(each, device=keep.device)).reshape(-1)

    small = copy.deepcopy(model)
    _take(small[first], keep, 0)
    _take(small[second], columns, 1)
    return small


def _take(layer: nn.Module, indices: Tensor, dim: int) -> None:
    """Keeps these rows (dim 0) or inputs (dim 1) of a layer."""
    if isinstance(layer, layers.WeightNormed) and (layer.dim, dim) == (0, 0):
        tensors = {name: p for name, p in layer._parameters.items() if p is not None}
    else:  # what is left of w has other norms
        tensors = {"weight": layer.weight, "bias": layer.bias if dim == 0 else None}
    if isinstance(layer, layers.WeightNormed) and "weight" in tensors:
        kind, rows = layer.kind, layer.dim
        layer.give_back()
        _set(layer, tensors, indices, dim)
        _AS_NORMED[type(layer)].take_over(layer, kind, rows)
    else:
        _set(layer, tensors, indices, dim)


_AS_NORMED = {nn.Linear: layers.Linear, nn.Conv2d: layers.Conv2d}


def _set(layer: nn.Module, tensors: dict, indices: Tensor, dim: int) -> None:
    for name, x in tensors.items():
        if x is not None:
            taken = x.detach().index_select(dim, indices.to(x.device)).clone()
            layer._parameters[name] = nn.Parameter(taken, x.requires_grad)
    sizes = (
        ("out_features", "in_features") if isinstance(layer, nn.Linear) else ("out_channels", "in_channels")
    )
    setattr(layer, sizes[dim], len(indices))
