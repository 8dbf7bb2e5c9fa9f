"""The linear layers that are compared: plain, weight norm in pure torch, and wnkernels'. Each has nn.Linear's arguments
and, under the same seed, the initial function of nn.Linear."""

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import wnkernels.functional
import wnkernels.nn


class _Exponential(nn.Module):
    """EWN, w = e^alpha v/|v|, on torch's own fused kernel: the fastest plain torch that we know."""

    def forward(self, alpha, v):
        return torch._weight_norm(v, alpha.exp(), 0)

    def right_inverse(self, weight):
        return torch.linalg.vector_norm(weight, dim=1, keepdim=True).log(), weight


class Forced(nn.Linear):
    """SWN by wnkernels' functional linear with the choice between its two paths taken away."""

    def __init__(self, *args, materialize, **kwargs):
        super().__init__(*args, **kwargs)
        self.materialize = materialize
        self.g = nn.Parameter(torch.linalg.vector_norm(self.weight.detach(), dim=1, keepdim=True))

    def forward(self, x):
        return wnkernels.functional.weight_norm_linear(x, self.weight, self.g, self.bias, materialize=self.materialize)


def torch_swn(*args, **kwargs):
    return parametrizations.weight_norm(nn.Linear(*args, **kwargs))


def torch_ewn(*args, **kwargs):
    layer = nn.Linear(*args, **kwargs)
    parametrize.register_parametrization(layer, "weight", _Exponential())
    return layer


def wnkernels_swn(*args, **kwargs):
    return wnkernels.nn.Linear(*args, kind="swn", **kwargs)


def wnkernels_ewn(*args, **kwargs):
    return wnkernels.nn.Linear(*args, kind="ewn", **kwargs)


def wnkernels_swn_weight(*args, **kwargs):
    return Forced(*args, materialize=True, **kwargs)


def wnkernels_swn_scaled(*args, **kwargs):
    return Forced(*args, materialize=False, **kwargs)


LINEAR = {
    "plain": nn.Linear,
    "torch SWN": torch_swn,
    "torch EWN": torch_ewn,
    "wnkernels SWN": wnkernels_swn,
    "wnkernels EWN": wnkernels_ewn,
}
FORCED = {"SWN, w materialized": wnkernels_swn_weight, "SWN, output scaled": wnkernels_swn_scaled}
COUNTERPART = {"wnkernels SWN": "torch SWN", "wnkernels EWN": "torch EWN"}
