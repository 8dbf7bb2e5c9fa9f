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
parameter is written, which its version tells (``p.data`` hides it), or gradients are recorded. Grad mode and autocast may
change inside the forward: each combination has its own weights.

A layer computes its own weight, as without all this, where it is called from outside of a forward of `model`, where its
parameters have been written since this forward began, under `torch.compile`, `torch.jit.trace`, transforms, forward mode,
and hooks on saved tensors (activation checkpointing), and where its parameters are no plain tensors (DTensor). A weight
that is edited in place is computed anew.

State dicts do not change. Deep copies and pickles of the model have a handle of their own, which `foreach_weight_norm` of
the copy returns.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize as torch_parametrize

from . import functional, parametrize
from . import nn as layers

__all__ = ["ForeachWeightNorm", "foreach_weight_norm"]

# Weights of up to this many elements are small: they stay in a core's cache, and `nn.Linear` forms them (csrc/linear.cpp).
SMALL = 1 << 18


def foreach_weight_norm(model: nn.Module) -> "ForeachWeightNorm":
    """Computes the small weights of `model` together (see the module's docstring).

    Args:
        model: a model with layers of `wnkernels.nn`, or tensors under `wnkernels.weight_norm`, that are there already.

    Returns: the handle; that which the model has, if it has one.

    Raises: ValueError where the model has no such layer of up to SMALL elements.
    """
    for hook in model._forward_pre_hooks.values():
        if isinstance(getattr(hook, "__self__", None), ForeachWeightNorm):
            return hook.__self__
    return ForeachWeightNorm(model)


class _Place(NamedTuple):
    """Where the parameters of a weight are now, whatever has been put in their place."""

    holders: tuple[dict, dict]  # parameters and buffers of a module
    radius: str
    v: str
    dim: int | None
    kind: str

    def parameters(self) -> tuple[Tensor | None, Tensor | None]:
        parameters, buffers = self.holders
        if self.v in parameters:
            return parameters.get(self.radius), parameters[self.v]
        return buffers.get(self.radius), buffers.get(self.v)


class _Weight(NamedTuple):
    w: Tensor
    radius: Tensor
    v: Tensor
    marks: tuple[int, ...]
    scope: object  # the token of the forward in which it was computed


class _Scope:
    """A forward of the model, in one thread."""

    def __init__(self, handle: "ForeachWeightNorm", outer: "_Scope | None") -> None:
        self.handle, self.outer, self.token = handle, outer, object()
        self.weights: dict[tuple, dict[nn.Module, _Weight]] = {}  # with a graph

    def weight_of(self, layer: nn.Module, out_dtype: torch.dtype | None, given: tuple = ()) -> Tensor | None:
        """w for a layer; None where it has to compute its own. `given` are the radius and v that it is to be of, if they
        might be others than those of the layer."""
        handle = self.handle
        place = handle.places.get(layer)
        if place is None or _elsewhere():
            return None
        radius, v = place.parameters()
        if not (type(v) in _PLAIN and type(radius) in _PLAIN) or (given and (given[0] is not radius or given[1] is not v)):
            return None
        recorded = torch.is_grad_enabled()
        key = v.device, v.dtype, out_dtype, recorded
        known = self.weights if recorded else handle.kept
        weights = known.get(key)
        weight = weights and weights.get(layer)
        if weight and weight.radius is radius and weight.v is v and weight.marks == _marks(weight.w, radius, v):
            return weight.w
        if weights and (weight is None or weight.scope is self.token):
            return None
        if recorded:
            handle.kept.clear()
        weights = self.compute(key)
        if recorded or type(weights[layer].w) is Tensor and not _capturing(v):
            known[key] = weights
        return weights[layer].w

    def compute(self, key: tuple) -> dict[nn.Module, _Weight]:
        device, dtype, out_dtype, _ = key
        chosen = []
        for layer, place in self.handle.places.items():
            radius, v = place.parameters()
            if type(v) in _PLAIN and type(radius) in _PLAIN and v.device == device and v.dtype == dtype:
                chosen.append((layer, place, radius, v))
        made = functional.foreach_weight_norm(
            [v for *_, v in chosen], [radius for _, _, radius, _ in chosen], [place.dim for _, place, *_ in chosen],
            [place.kind for _, place, *_ in chosen], out_dtype)
        return {layer: _Weight(w, radius, v, _marks(w, radius, v), self.token)
                for (layer, _, radius, v), w in zip(chosen, made)}


_PLAIN = (nn.Parameter, Tensor)


def _marks(w: Tensor, radius: Tensor, v: Tensor) -> tuple[int, ...]:
    """What changes when somebody writes one of them."""
    return (w._version if not w.is_inference() else 0), radius._version, v._version, radius.data_ptr(), v.data_ptr()


def _capturing(v: Tensor) -> bool:
    return v.is_cuda and torch.cuda.is_current_stream_capturing()


def _elsewhere() -> bool:
    """Whether somebody else decides what is computed when."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


class ForeachWeightNorm:
    """The layers of a model whose weights are computed together; made by `foreach_weight_norm`."""

    def __init__(self, model: nn.Module) -> None:
        self.places: dict[nn.Module, _Place] = {}
        for module in model.modules():
            if isinstance(module, layers.WeightNormed):
                suffix = layers.RADIUS_SUFFIX[module.kind]
                self._add(module, module, "weight" + suffix, "weight_v", module.dim, module.kind)
            elif isinstance(module, torch_parametrize.ParametrizationList):
                norm = module[0]
                if isinstance(norm, parametrize.WeightNorm):
                    self._add(norm, module, "original0", "original1", norm.dim, norm.kind)
        if not self.places:
            raise ValueError(f"model {type(model).__name__} must have a layer of wnkernels.nn or a tensor under "
                             f"wnkernels.weight_norm of up to {SMALL} elements, and has none")
        self.kept: dict[tuple, dict[nn.Module, _Weight]] = {}  # without a graph
        self._handles = [
            model.register_forward_pre_hook(self._begin, prepend=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def _add(self, layer: nn.Module, holder: nn.Module, *names_and_settings) -> None:
        place = _Place((holder._parameters, holder._buffers), *names_and_settings)
        v = place.parameters()[1]
        if v is not None and v.numel() <= SMALL:
            self.places[layer] = place

    def remove(self) -> None:
        """Every layer computes its own weight again."""
        for handle in self._handles:
            handle.remove()
        self.places, self.kept, self._handles = {}, {}, []

    def __getstate__(self) -> dict:
        return self.__dict__ | {"kept": {}}

    def _begin(self, *_) -> None:
        if not torch.compiler.is_compiling():
            layers.running.forward = _Scope(self, layers.running.forward)

    def _end(self, *_) -> None:
        if not torch.compiler.is_compiling():
            scope = layers.running.forward
            if scope is not None and scope.handle is self:
                layers.running.forward = scope.outer
