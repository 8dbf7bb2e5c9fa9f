"""What is compared. Linear layers: plain, weight norm in pure torch, compiled by torch, by FlagGems, and wnkernels';
each has nn.Linear's arguments and, under the same seed, the initial function of nn.Linear. And the weight alone, as a
function of v and g."""

import contextlib

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import wnkernels.functional
import wnkernels.nn


class _Exponential(nn.Module):
    """EWN, w = e^alpha v/|v|, on torch's own fused kernel: the fastest plain torch that we know."""

    def forward(self, alpha, v):
        return torch._weight_norm(v, alpha.exp(), 0)

    def right_inverse(self, weight):
        return torch.linalg.vector_norm(weight, dim=1, keepdim=True).log(), weight


class _Direction(nn.Linear):
    """A layer whose weight is v, and which has the parameter g beside it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.g = nn.Parameter(torch.linalg.vector_norm(self.weight.detach(), dim=1, keepdim=True))


class ByFunction(_Direction):
    """SWN by one of the functions of `weight_norms`."""

    def __init__(self, function, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.function = function

    def forward(self, x):
        return F.linear(x, self.function(self.weight, self.g), self.bias)


class Forced(_Direction):
    """SWN by wnkernels' functional linear with the choice between its two paths taken away."""

    def __init__(self, *args, materialize, **kwargs):
        super().__init__(*args, **kwargs)
        self.materialize = materialize

    def forward(self, x):
        return wnkernels.functional.weight_norm_linear(x, self.weight, self.g, self.bias, materialize=self.materialize)


def operator(v, g):
    """What torch's parametrization computes."""
    return torch._weight_norm(v, g, 0)


def formula(v, g):
    """What one would write without it."""
    return g * v / v.norm(dim=1, keepdim=True)


class _FlagGems(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, g):
        import flag_gems
        w, norm = flag_gems.weight_norm_interface(v, g, 0)
        ctx.save_for_backward(v, g, norm)
        return w

    @staticmethod
    def backward(ctx, dw):
        import flag_gems
        return flag_gems.weight_norm_interface_backward(dw, *ctx.saved_tensors, 0)


def has_flag_gems(device):
    """FlagGems' kernels are Triton's, for a GPU, and importing it looks for one."""
    if torch.device(device).type != "cuda":
        return False
    try:
        import flag_gems  # noqa: F401
    except ImportError:
        return False
    return True


def compiled(what):
    """torch.compile of a module or function for the very shapes that it gets; an error where that is impossible.

    (`module.compile()` would run a module of torch itself, and so its parametrization, as it is: uncompiled.)
    """
    return torch.compile(what, fullgraph=True, dynamic=False)


@contextlib.contextmanager
def compiling(backward_again=False):
    """Around the calls of `compiled` of one point, which are compiled there, at the first call: forgets those of
    other points, which would count against the limit of recompilations. `backward_again`: a backward may run several
    times, so it cannot take over the memory of what the forward saved."""
    torch.compiler.reset()
    with torch._functorch.config.patch(donated_buffer=not backward_again):
        yield


def torch_swn(*args, **kwargs):
    return parametrizations.weight_norm(nn.Linear(*args, **kwargs))


def parametrized(model):
    """The model, with torch's parametrization of every Linear and Conv2d."""
    for module in list(model.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            parametrizations.weight_norm(module)
    return model


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


def torch_swn_compiled(*args, **kwargs):
    return compiled(torch_swn(*args, **kwargs))


def formula_compiled(*args, **kwargs):
    return compiled(ByFunction(formula, *args, **kwargs))


def flag_gems_swn(*args, **kwargs):
    return ByFunction(_FlagGems.apply, *args, **kwargs)


LINEAR = {
    "plain": nn.Linear,
    "torch SWN": torch_swn,
    "torch EWN": torch_ewn,
    "wnkernels SWN": wnkernels_swn,
    "wnkernels EWN": wnkernels_ewn,
}
COMPILED = {"torch SWN, compiled": torch_swn_compiled, "g v/|v|, compiled": formula_compiled}
FLAG_GEMS = {"FlagGems SWN": flag_gems_swn}
FORCED = {"SWN, w materialized": wnkernels_swn_weight, "SWN, output scaled": wnkernels_swn_scaled}
COUNTERPART = {"wnkernels SWN": "torch SWN", "wnkernels EWN": "torch EWN"}


def linear(device, *, compile=True, forced=False):
    """name -> maker of the layers that can be compared on a device."""
    return (LINEAR | (COMPILED if compile else {}) | (FLAG_GEMS if has_flag_gems(device) else {})
            | (FORCED if forced else {}))


def weight_norms(device, *, compile=True):
    """name -> function from (v, g) to w, rows along dim 0, of those that can be compared on a device."""
    functions = {"torch": operator, "wnkernels": wnkernels.functional.weight_norm}
    if compile:
        functions |= {"torch, compiled": compiled(operator), "g v/|v|, compiled": compiled(formula)}
    if has_flag_gems(device):
        functions["FlagGems"] = _FlagGems.apply
    return functions
