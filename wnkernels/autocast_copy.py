"""Mixed precision without casts: the polar step writes the 16-bit weight that the next forward reads.

    optimizer = PolarSGD(polar_groups(model), lr=0.1)
    copies = autocast_copy(model, optimizer, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model(x), y)
    loss.backward()
    optimizer.step()

Under autocast a plain layer reads its float32 weight and writes a 16-bit copy in every forward, and its
16-bit gradient is copied to float32 again. Here the step writes the copy in the pass that writes the weight,
and, with ``low_gradients``, reads the 16-bit gradient as it is: 18 bytes for each element of a weight in a
training step with SGD instead of 30. The numbers are the same: the copy is the weight rounded, and widening a
gradient changes nothing. (Where a layer is used several times, torch adds its gradients in 16 bits, and here
they add in float32.)

A weight that somebody else has written is rounded again in the next forward, which the tensor's version
tells; ``p.data`` and torch's fused optimizers hide their writing from it. Outside of autocast, under another
autocast dtype and in transforms and compilers the layers do what torch's do. State dicts, deep copies and
pickles know nothing of all this.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import optim
from .in_backward import reduced_to_plain

__all__ = ["AutocastCopies", "autocast_copy"]


def autocast_copy(
    model: nn.Module,
    optimizer: "optim._PolarOptimizer",
    dtype: torch.dtype = torch.bfloat16,
    low_gradients: bool = False,
) -> "AutocastCopies":
    """Lets `optimizer` keep 16-bit copies of the weights of `model`, and the layers use them under autocast.

    Takes the float32 weights of ``nn.Linear`` and ``nn.Conv1d``, 2d and 3d that the optimizer steps in polar coordinates.
    The layers change their class until `AutocastCopies.remove`.

    Args:
        model: a plain model.
        optimizer: PolarSGD, PolarAdam or PolarAdamW of its parameters.
        dtype: of the copies, and of the autocast that uses them: torch.bfloat16 or torch.float16.
        low_gradients: keep ``weight.grad`` in `dtype`. Gradients that are added up, of several backwards or several uses
            of a layer, are then rounded after each addition.

    Returns: the handle.

    Raises: TypeError for another optimizer or dtype; ValueError where no layer is of this kind; RuntimeError where the
    optimizer has copies already.
    """
    return AutocastCopies(model, optimizer, dtype, low_gradients)


class AutocastCopies:
    """The 16-bit copies of an optimizer; made by `autocast_copy`."""

    def __init__(self, model: nn.Module, optimizer: "optim._PolarOptimizer", dtype: torch.dtype, low: bool) -> None:
        if not isinstance(optimizer, optim._PolarOptimizer):
            raise TypeError(f"optimizer must be PolarSGD, PolarAdam or PolarAdamW, got {type(optimizer).__name__}")
        if dtype not in optim.LOW_PRECISION:
            raise TypeError(f"dtype must be torch.bfloat16 or torch.float16, got {dtype}")
        if optimizer._copies:
            raise RuntimeError("the optimizer has 16-bit copies already: remove() those first")
        polar = {p for g in optimizer.param_groups for p in g["params"] if optim._is_polar(p, g["kind"])}
        self.optimizer, self.layers = optimizer, []
        for module in model.modules():
            if type(module) in _LAYERS and module.weight in polar and module.weight.dtype == torch.float32:
                self.layers.append(module)
        if not self.layers:
            raise ValueError(f"model {type(model).__name__} must have a plain Linear or Conv with a float32 weight that the "
                             "optimizer takes as polar, and has none")
        copies = {weight: _Copy(weight, dtype) for weight in dict.fromkeys(m.weight for m in self.layers)}
        for module in self.layers:
            module.__class__, module.__dict__["_copy"] = _LAYERS[type(module)], copies[module.weight]
        for weight in copies:
            weight.grad_dtype = dtype if low else weight.dtype
        optimizer._copies = copies
        optimizer._plans.clear()

    def remove(self) -> None:
        """Back to torch's layers, without copies."""
        for module in self.layers:
            module.__class__ = module.plain
            del module.__dict__["_copy"]
        for weight in self.optimizer._copies:
            grad, weight.grad = weight.grad, None
            weight.grad_dtype = weight.dtype
            weight.grad = None if grad is None else grad.to(weight.dtype)
        self.layers, self.optimizer._copies = [], {}
        self.optimizer._plans.clear()


class _Copy:
    """A weight rounded to 16 bits, and the mark of the weight that was rounded."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.tensor = torch.empty_like(weight, dtype=dtype, requires_grad=False)
        self.mark = None

    def buffer(self) -> Tensor:
        """Where the copy goes: of the weight's device and layout."""
        if self.tensor.device != self.weight.device or self.tensor.stride() != self.weight.stride():
            self.tensor = torch.empty_like(self.weight, dtype=self.dtype, requires_grad=False)
        return self.tensor

    @torch.no_grad()
    def current(self) -> Tensor:
        """The copy of the weight as it is now."""
        mark = optim._mark(self.weight)
        if self.mark != mark:
            self.buffer().copy_(self.weight)
            self.mark = mark
        return self.tensor


class _Rounded(torch.autograd.Function):
    """The copy, as a function of the weight."""

    @staticmethod
    def forward(ctx, weight, copy):
        ctx.dtype = weight.grad_dtype
        return copy.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


class _Copied:
    """Before torch's layer in the bases: has the weight to compute with."""

    def weight_to_use(self) -> Tensor:
        if not torch._C._is_any_autocast_enabled():
            return self.weight
        copy, weight = self._copy, self.weight
        device = weight.device.type
        usable = (
            weight is copy.weight
            and weight.dtype == torch.float32
            and torch.is_autocast_enabled(device)
            and torch.get_autocast_dtype(device) == copy.dtype
            and not torch.compiler.is_compiling()
            and torch._C._functorch.peek_interpreter_stack() is None
        )
        if not usable:
            return weight
        low = copy.current()
        return _Rounded.apply(weight, low) if torch.is_grad_enabled() and weight.requires_grad else low

    def __reduce_ex__(self, protocol):
        return reduced_to_plain(self, self.plain, "_copy")


class _Linear(_Copied, nn.Linear):
    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight_to_use(), self.bias)


class _Conv(_Copied):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight_to_use(), self.bias)


class _Conv1d(_Conv, nn.Conv1d):
    plain = nn.Conv1d


class _Conv2d(_Conv, nn.Conv2d):
    plain = nn.Conv2d


class _Conv3d(_Conv, nn.Conv3d):
    plain = nn.Conv3d


_LAYERS = {cls.plain: cls for cls in (_Linear, _Conv1d, _Conv2d, _Conv3d)}
