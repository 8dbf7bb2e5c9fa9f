"""One call for the weights of a whole model, where the calls cost more than their arithmetic.

    handle = foreach_weight_norm(model)
    for x, y in batches:
        loss_of(model(x), y).backward()  # one call of the kernels forward, one backward
    handle.remove()

The first layer that needs its weight in a forward of `model` has the weights of all layers computed, by
`functional.foreach_weight_norm`, and every layer takes its own: those of `wnkernels.nn` and the tensors under
`wnkernels.weight_norm`, of up to SMALL elements. Larger ones gain nothing from company and stay as they are. The numbers
are those of the layers on their own.

Every forward that records gradients computes the weights once more, so forwards before a backward, gradient accumulation
and unused layers are as ever. The weights live as long as that forward and its graph; the one node of autograd holds the
gradients of all of them until the last is there. Without gradients the weights are kept for the next forward, until a
parameter is written, which its version tells (an edit of ``p.data`` in place hides it), or gradients are recorded. Grad
mode and autocast may change inside the forward: each combination has its own weights.

A layer computes its own weight, as without all this, where it is called from outside of a forward of `model`, where its
parameters or the weight have been written since this forward began, under `torch.compile`, `torch.jit.trace`, transforms
and hooks on saved tensors (activation checkpointing), and where its parameters are no plain tensors (DTensor).

State dicts do not change. Deep copies and pickles of the model have a handle of their own, which `foreach_weight_norm` of
the copy returns.
"""

from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize

from . import _C, functional, parametrize
from . import nn as layers

__all__ = ["ForeachWeightNorm", "foreach_weight_norm"]

# Weights of up to this many elements are small: they stay in a core's cache, and `nn.Linear` forms them (csrc/linear.cpp).
SMALL = 1 << 18

_PLAIN = {nn.Parameter, Tensor}


def foreach_weight_norm(model: nn.Module) -> "ForeachWeightNorm":
    """Computes the small weights of `model` together (see the module's docstring).

    Args:
        model: a model with layers of `wnkernels.nn`, or tensors under `wnkernels.weight_norm`, that are there already.

    Returns: the handle; that which the model has, if it has one.

    Raises: ValueError where the model has no such weight of up to SMALL elements.
    """
    for hook in model._forward_pre_hooks.values():
        if isinstance(getattr(hook, "__self__", None), ForeachWeightNorm):
            return hook.__self__
    return ForeachWeightNorm(model)


class _Place(NamedTuple):
    """Where a layer's parameters are now, whatever has been put in their place."""

    index: int
    tensors: dict[str, Tensor]  # the parameters, or the buffers, of a module
    radius: str
    v: str


class _Forward:
    """A forward of the model, in one thread."""

    def __init__(self, handle: "ForeachWeightNorm", outer: "_Forward | None") -> None:
        self.handle, self.outer = handle, outer
        self.last: _C.SharedWeights | None = None  # which a layer took its weight from
        self.recorded: dict[tuple, _C.SharedWeights] = {}
        # A captured graph has to compute what it uses.
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        self.kept = {} if capturing else handle.kept
        self.computed: set[tuple] = set()

    def weight_of(self, layer: nn.Module, given: tuple[Tensor, ...] = ()) -> Tensor | None:
        """w as the layer needs it now; None where the layer has to compute it.

        `given` are the radius and v that w is wanted of, where these might be others than the layer's.
        """
        place = self.handle.places.get(layer)
        if place is None:
            return None
        v, radius = place.tensors.get(place.v), place.tensors.get(place.radius)
        if given and (given[0] is not radius or given[1] is not v):
            return None
        w = self.last and self.last.take(place.index, v, radius)
        return self._look_for(place.index, v, radius) if w is None else w

    def _look_for(self, index: int, v: Tensor | None, radius: Tensor | None) -> Tensor | None:
        if type(v) not in _PLAIN or type(radius) not in _PLAIN or _elsewhere():
            return None
        recorded, device = torch.is_grad_enabled(), v.device.type
        lowered = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        key = recorded, device, torch.get_autocast_dtype(device) if lowered else None
        known = self.recorded if recorded else self.kept
        self.last = known.get(key)
        w = self.last and self.last.take(index, v, radius)
        if w is None and key not in self.computed:
            self.computed.add(key)
            self.last = self.handle.compute()
            w = self.last.take(index, v, radius)
            if recorded:
                self.handle.kept.clear()  # they are about to be trained
            if recorded or self.last.plain():
                known[key] = self.last
        return w


def _elsewhere() -> bool:
    """Whether somebody wants to see every layer compute its own weight."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


class ForeachWeightNorm:
    """The layers of a model whose weights are computed together; made by `foreach_weight_norm`."""

    def __init__(self, model: nn.Module) -> None:
        self.places: dict[nn.Module, _Place] = {}
        self.dims: list[int] = []
        self.kinds: list[int] = []
        self.lowered: list[bool] = []  # autocast has a say in the dtype of w
        for module in model.modules():
            if isinstance(module, layers.WeightNormed):
                self._add(module, module._parameters, "weight" + layers.RADIUS_SUFFIX[module.kind], "weight_v", True)
            elif isinstance(module, torch_parametrize.ParametrizationList) and isinstance(
                module[0], parametrize.WeightNorm
            ):
                tensors = module._parameters if "original1" in module._parameters else module._buffers
                self._add(module[0], tensors, "original0", "original1", False)
        if not self.places:
            raise ValueError(f"model {type(model).__name__} must have a layer of wnkernels.nn or a tensor under "
                             f"wnkernels.weight_norm of up to {SMALL} elements, and has none")
        self.kept: dict[tuple, _C.SharedWeights] = {}  # of forwards without gradients
        self._handles = [
            model.register_forward_pre_hook(self._begin, prepend=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def _add(self, layer: nn.Module, tensors: dict, radius: str, v: str, lowered: bool) -> None:
        if tensors[v].numel() <= SMALL:
            self.places[layer] = _Place(len(self.places), tensors, radius, v)
            self.dims.append(functional._front_dim(layer.dim, tensors[v]))
            self.kinds.append(functional._KINDS[layer.kind])
            self.lowered.append(lowered)

    def compute(self) -> "_C.SharedWeights":
        """All weights, of the parameters as they are now."""
        places = self.places.values()
        vs, radii = [p.tensors.get(p.v) for p in places], [p.tensors.get(p.radius) for p in places]
        if not {*map(type, chain(vs, radii))} <= _PLAIN:
            vs = [v if type(v) in _PLAIN and type(radius) in _PLAIN else None for v, radius in zip(vs, radii)]
        return _C.SharedWeights(vs, radii, self.dims, self.kinds, self.lowered)

    def remove(self) -> None:
        """Every layer computes its own weight again."""
        for handle in self._handles:
            handle.remove()
        self.places, self.kept, self._handles = {}, {}, []

    def __getstate__(self) -> dict:
        return self.__dict__ | {"kept": {}}

    def _begin(self, *_) -> None:
        if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is None:
            layers.running.forward = _Forward(self, layers.running.forward)

    def _end(self, *_) -> None:
        if not torch.compiler.is_compiling():
            forward = layers.running.forward
            if forward is not None and forward.handle is self:
                layers.running.forward = forward.outer
