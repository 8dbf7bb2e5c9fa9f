"""The optimizer's step inside the backward: each parameter is stepped as soon as its gradient is there.

    optimizer = PolarSGD(polar_groups(model, kind="ewn"), lr=0.1)
    inside = in_backward(model, optimizer)
    for x, y in batches:
        loss_of(model(x), y).backward()  # steps
        optimizer.step()                 # says that this backward was all
    inside.remove()

- A ``Linear`` layer under PolarSGD without momentum never has a gradient of its weight: the step is one
  in-place product of the gradient of its output and its input (csrc/in_backward.cpp), on CPUs and on CUDA devices,
  which the host never waits for. Per step the weight is read three times and written once, where plain SGD needs
  six passes; batches up to 512 on a CPU read it only twice. In float64 the weights are those of PolarSGD. Layers that
  PolarSGD takes as plain (``kind=None``) are stepped by the same product.
- With momentum, and with Adam but for amsgrad, the same product goes through the optimizer's buffers, which are read and
  written once more: on a CPU, for batches up to 512, and without telemetry. Of plain layers too.
- Everything else (convolutions, embeddings, momentum and Adam elsewhere, tied or 16-bit weights, rates for each row or on
  a CUDA device) has its gradient for as long as its own step takes, so that no two gradients of weights are there at once.
- Plain vectors (norms, and biases that no layer steps) keep their gradients until ``optimizer.step()``, which steps them
  together and drops them.

One backward is one step, and `optimizer.step()` must follow it: a second backward before that is refused,
since gradient accumulation would have to wait for the sum. So are, where they can be seen, other things that
need finished gradients: ``GradScaler`` (at its first step), and more than one process (DDP, FSDP). What
cannot be seen: clipping, logging or editing gradients after the backward finds none of weights, as their ``p.grad``
is None; `torch.nn.utils.clip_grad_norm_` sees those of vectors at most. A loss that uses a ``Linear`` weight directly as well (a
penalty) is refused in the backward, after the step of its layer.

A layer that is used several times in one forward, or was with a graph that is still alive, is stepped by its
gradient.

Between steps a ``Linear`` layer holds its weight up to a factor for each row. Whatever reads it through the
module (``layer.weight``, ``parameters()``, ``state_dict()``, ``to()``) finds the true weight, which is
written back at that moment, and may edit it, by ``.data`` too; so do the optimizer's methods. That is two passes over
the weight, so leave ``model.zero_grad()`` out: there is nothing to reset. A parameter that was kept in a variable is true after
``inside.fold()``; an edit of it before that is refused in the next forward. ``copy.deepcopy`` and pickles of
the model are plain.

Forward, backward and ``optimizer.step()`` can be captured in a CUDA graph, after two steps without it. Its replays
take the rates that the capture saw. Between them the weights may be read through the modules; after they are
written, or the optimizer's state is, the graph must be captured again. A graph measures the length of the rows in
every step, one more pass over the weight.
"""

from collections import ChainMap
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from . import _C, functional, optim

__all__ = ["InBackward", "in_backward"]

# So often is the length of the rows measured, which is otherwise known from the step.
REFRESH = 256


def in_backward(model: nn.Module, optimizer: "optim._PolarOptimizer") -> "InBackward":
    """Moves the steps of `optimizer` into the backward of `model` (see the module's docstring).

    Args:
        model: a plain model; its ``nn.Linear`` layers change their class until `InBackward.remove`.
        optimizer: PolarSGD, PolarAdam or PolarAdamW of its parameters. Rates and decays are read from its groups in every
            backward, so schedulers work as ever.

    Returns: the handle.

    Raises: TypeError for another optimizer; RuntimeError where it is in a backward already, where a parameter has a
    gradient that waits for a step, and for more than one process.
    """
    return InBackward(model, optimizer)


class InBackward:
    """An optimizer that steps inside the backward; made by `in_backward`."""

    def __init__(self, model: nn.Module, optimizer: "optim._PolarOptimizer") -> None:
        if not isinstance(optimizer, optim._PolarOptimizer):
            raise TypeError(f"optimizer must be PolarSGD, PolarAdam or PolarAdamW, got {type(optimizer).__name__}")
        if optimizer._inside is not None:
            raise RuntimeError("the optimizer steps in a backward already: remove() that first")
        _refuse_processes()
        self.optimizer = optimizer
        self.steps = 0  # calls of optimizer.step()
        self.places: dict[Tensor, tuple[int, int]] = {}  # parameter -> number of its group, index in it
        for number, group in enumerate(optimizer.param_groups):
            for index, p in enumerate(group["params"]):
                self.places[p] = number, index
                if p.grad is not None:
                    name = optimizer._name(group, index)
                    raise RuntimeError(f"parameter {name!r} has a gradient: step or clear it first")
        self.stepped = dict.fromkeys(self.places, -1)  # `steps` at the last step of a parameter
        self.run = torch.compiler.disable(_Layer.forward)  # what a graph cannot hold
        self.layers: dict[Tensor, _Layer] = {}
        for weight, module in self._linear_layers(model).items():
            self.layers[weight] = _Layer(self, module)
        # Many small steps cost more than one: what is no weight waits for optimizer.step().
        self.waiting = [p for p in self.places if not optim._is_polar(p, self.group(p)["kind"]) and p.dim() < 2]
        at_once = self.places.keys() - set(self.waiting)
        self._handles = [_hook_gradient(p, self._accumulated) for p in at_once]
        self._handles.append(optimizer.register_step_pre_hook(self._refuse_scaling))
        self._handles.append(optimizer.register_step_post_hook(self._count))
        optimizer._inside = self
        optimizer._plans.clear()  # those of other steps hold state that is replaced here

    def fold(self) -> None:
        """Writes the true weights into all parameters."""
        for layer in self.layers.values():
            layer.fold()

    def settle(self) -> None:
        """`fold`, and read the optimizer's state anew: somebody is about to change it."""
        for layer in self.layers.values():
            layer.fold()
            layer.stale = True

    def remove(self) -> None:
        """Back to a plain model with true weights, and an optimizer that steps when it is told to."""
        for layer in self.layers.values():
            layer.remove()
        for handle in self._handles:
            handle.remove()
        self.layers, self._handles, self.optimizer._inside = {}, [], None
        self.optimizer._plans.clear()

    # ------------------------------------------------------------------------------------------------------- parameters

    def group(self, p: Tensor) -> dict:
        return self.optimizer.param_groups[self.places[p][0]]

    def name(self, p: Tensor) -> str:
        return self.optimizer._name(self.group(p), self.places[p][1])

    def _linear_layers(self, model: nn.Module) -> dict[Tensor, nn.Linear]:
        """The layers whose weights need no gradient."""
        owners: dict[Tensor, list[nn.Module]] = {}
        for module in model.modules():
            for p in module._parameters.values():
                owners.setdefault(p, []).append(module)
        self.tied = {p for p, modules in owners.items() if len(modules) > 1}
        found = {}
        for p, modules in owners.items():
            module = modules[0]
            if p not in self.tied and type(module) is nn.Linear and p is module.weight and p in self.places:
                group = self.group(p)
                stepped = _is_row_step(group) and (p.is_cpu or not _keeps_buffers(group))
                supported = p.dtype in (torch.float32, torch.float64) and p.is_contiguous()
                supported = supported and (p.is_cpu or p.is_cuda and bool(_C.build_info["cuda"]))
                if stepped and supported and p.numel():
                    found[p] = module
        return found

    def begin(self, p: Tensor) -> None:
        """Before a parameter is written in a backward."""
        if self.stepped[p] == self.steps:
            raise RuntimeError(
                f"parameter {self.name(p)!r} has had its step since the last optimizer.step(), and gets another "
                "gradient. Inside the backward every backward is a step: call optimizer.step() after it; gradients are not "
                "accumulated over several, and a Linear weight may be used by its layer alone"
            )
        self.stepped[p] = self.steps

    @torch.no_grad()
    def _accumulated(self, p: Tensor) -> None:
        """Steps a parameter whose gradient is there, and drops the gradient."""
        if p.grad is None:  # stepped by its layer
            return
        _refuse_processes()
        self.begin(p)
        layer = self.layers.get(p)
        if layer is not None:
            layer.fold()
        alone = ChainMap({"params": [p], "param_names": [self.name(p)]}, self.group(p))
        self.optimizer._step_group(p, alone)
        p.grad = None
        if layer is not None:
            layer.follow()
            layer.advance()

    # --------------------------------------------------------------------------------------------------------- step()

    @staticmethod
    def _refuse_scaling(optimizer, args, kwargs) -> None:
        if getattr(optimizer, "found_inf", None) is not None:
            raise RuntimeError(
                "GradScaler must see all gradients before the first weight is written, and inside the backward the "
                "weights were written with the scaled loss: use bfloat16, which needs no scaling, or do not use in_backward"
            )

    def _count(self, optimizer, args, kwargs) -> None:
        self.steps += 1
        for p in self.waiting:
            p.grad = None


def _hook_gradient(p: Tensor, hook: Callable) -> RemovableHandle:
    """torch's ``register_post_accumulate_grad_hook``, also for what is frozen and may be thawed."""
    frozen = not p.requires_grad
    p.requires_grad_()
    handle = p.register_post_accumulate_grad_hook(hook)
    if frozen:
        p.requires_grad_(False)
    return handle


def _refuse_processes() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            "in_backward must run in a single process: DDP and FSDP average finished gradients over "
            f"{distributed.get_world_size()} processes, and inside the backward there are none"
        )


def _keeps_buffers(group: dict) -> bool:
    return group.get("momentum") != 0


def _option(group: dict) -> bool:
    """What the rule of a step with buffers asks beside numbers: nesterov, or whether decay is decoupled."""
    return group["decoupled_weight_decay"] if "betas" in group else group["nesterov"]


def _is_row_step(group: dict) -> bool:
    """Whether the step of a row is made of its gradient and of numbers that the host has."""
    if group["kind"] is not None and (group["dim"] not in (0, -2) or group["retraction"] == "geodesic"):
        return False
    return not group.get("amsgrad") and not any(
        isinstance(group[option], Tensor) and (group[option].numel() != 1 or not group[option].is_cpu)
        for option in ("lr", "weight_decay", "radius_weight_decay", "radius_lr_ratio")
    )


# ---------------------------------------------------------------------------------------------------------- linear layers


class _Parameters(dict):
    """The parameters of a layer, which are read with their true values."""

    def __init__(self, layer: "_Layer", parameters: dict) -> None:
        super().__init__(parameters)
        self.layer = layer
        self.raw = super().get

    def __getitem__(self, name):
        self.layer.hand_out()
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.layer.hand_out()
        return super().get(name, default)

    def values(self):
        self.layer.hand_out()
        return super().values()

    def items(self):
        self.layer.hand_out()
        return super().items()


def reduced_to_plain(module: nn.Module, plain: type[nn.Module], own: str) -> tuple:
    """``__reduce_ex__`` of a layer whose copies and pickles are torch's: `own` is the attribute that stays behind."""
    attributes = {name: value for name, value in module.__dict__.items() if name != own}
    attributes["_parameters"] = dict(module._parameters.items())
    return object.__new__, (plain,), attributes


class _Linear(nn.Linear):
    """A Linear whose weight is stepped inside its backward; `_Layer` does the work."""

    def forward(self, input: Tensor) -> Tensor:
        layer = self.__dict__["_layer"]
        return layer.inside.run(layer, input)

    def __reduce_ex__(self, protocol):
        return reduced_to_plain(self, nn.Linear, "_layer")


class _Use:
    """A recorded forward that may come to its backward."""

    def __init__(self, layer: "_Layer") -> None:
        self.layer, self.version, self.folded = layer, layer.version, layer.folded
        layer.uses += 1
        layer.shared = layer.shared or layer.uses > 1

    def __del__(self) -> None:
        if self.version == self.layer.version:
            self.layer.uses -= 1


class _Layer:
    """The weight of a Linear layer as rows u with v = rho u and w = scale u, and its step."""

    def __init__(self, inside: InBackward, module: nn.Linear) -> None:
        self.inside, self.module, self.weight = inside, module, module.weight
        self.kind = inside.group(self.weight)["kind"]
        self.scale = self.rho = self.mark = None
        self.folded = True  # the parameter holds the true weight, as far as the host knows
        self.captured = False  # a CUDA graph may write the weight: see `_capture`
        self.stale = True  # the optimizer's state, or the weight unseen, may have changed
        self.version = 0  # counts the values that the weight has had
        self.uses = 0  # of this version, by forwards that may still come to their backward
        self.shared = False  # there were several
        self.refresh = 0
        self._reread()
        module.__class__ = _Linear
        module.__dict__["_layer"] = self
        module.__dict__["_parameters"] = _Parameters(self, module._parameters)

    def remove(self) -> None:
        self.fold()
        module = self.module
        module.__class__ = nn.Linear
        del module.__dict__["_layer"]
        module.__dict__["_parameters"] = dict(module._parameters.items())

    # ---------------------------------------------------------------------------------------------------------- weight

    @torch.no_grad()
    def fold(self) -> None:
        """Writes the true weight into the parameter."""
        if self.folded or self._written():
            return
        self.weight.mul_(self.scale.unsqueeze(1))
        self.folded = not self.captured
        self.follow()

    def hand_out(self) -> None:
        """The true weight, to somebody who may write it by ``.data``, which shows in no mark."""
        self.fold()
        self.stale = True

    def follow(self) -> None:
        """After a step by the optimizer, or a fold: the weight has the optimizer's radius, and is true."""
        if self.kind is not None:
            state = self.inside.optimizer.state[self.weight]
            s = state["radius"].exp() if self.kind == "ewn" else state["radius"]
            self.rho.copy_(torch.where(s == 0, 0.0, state["norm"] / s))
            self.scale.fill_(1)
        self.mark = optim._mark(self.weight)

    def advance(self) -> None:
        """The weight has another value."""
        self.version += 1
        self.uses, self.shared = 0, False

    @torch.no_grad()
    def _reread(self) -> None:
        """Takes the weight and the optimizer's state as they are now."""
        weight = self.weight
        if self._written():
            self.advance()
        else:
            self.fold()
        if self.kind is not None:
            optimizer, group, index = self.inside.optimizer, self.inside.group(weight), self.inside.places[weight][1]
            untouched = weight in optimizer._untouched
            state = optimizer._ready(group, index)
            if untouched:  # nor is this its first step
                optimizer._untouched[weight] = optim._mark(weight)
            state["radius"].copy_(optim._current_radius(state, weight, group)[0])
            if self.scale is None or (self.scale.dtype, self.scale.device) != (weight.dtype, weight.device):
                self.rho = torch.empty_like(state["radius"])
                self.scale = weight.new_empty(len(weight))
        self.follow()
        self.stale = False

    def _capture(self) -> None:
        """A graph is made of this step. The host does not see its replays, so from now on the weight is never known to be
        folded, and folding it once more does no harm: then its scale is 1."""
        if self.kind is not None:
            self.captured, self.folded = True, False

    def _written(self) -> bool:
        """Whether somebody else has written the weight. Raises: RuntimeError where it was not the true one."""
        if self.mark == optim._mark(self.weight):
            return False
        if not (self.folded or self.captured and bool((self.scale == 1).all())):
            raise RuntimeError(
                f"parameter {self.inside.name(self.weight)!r} was written while its layer held it up to a factor for "
                "each row: get it from the module (layer.weight), or fold() what in_backward gave, before editing it"
            )
        return True

    # --------------------------------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor) -> Tensor:
        weight, raw = self.weight, self.module._parameters.raw
        if raw("weight") is not weight:  # replaced, or called with other parameters: a plain layer
            return F.linear(x, self.module.weight, self.module.bias)
        bias = raw("bias")
        if self.stale or weight._version != self.mark[0] or weight.data_ptr() != self.mark[1]:
            self._reread()
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            self._capture()
        if torch.is_grad_enabled():
            _refuse_processes()
            return _Step.apply(x, weight, bias, self)
        return self.linear(x, bias, False)[0]

    def linear(self, x: Tensor, bias: Tensor | None, need_z: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """y, and what the backward needs: x, and x u^T, or under autocast both x and w in the lower type."""
        weight, scale = self.weight, None if self.folded else self.scale
        if torch._C._is_any_autocast_enabled() and weight.dtype == torch.float32:
            device = weight.device.type
            if torch.is_autocast_enabled(device):
                low = torch.get_autocast_dtype(device)
                w = torch.empty_like(weight, dtype=low)
                w.copy_(weight) if scale is None else torch.mul(weight, scale.unsqueeze(1), out=w)
                x = x.to(low)
                return F.linear(x, w, None if bias is None else bias.to(low)), x, w
        y, z = _C.in_backward_linear(x, weight, scale, bias, need_z)
        return y, x, z if need_z else None

    # -------------------------------------------------------------------------------------------------------- backward

    def backward(self, use: _Use, dy: Tensor, x: Tensor, saved: Tensor, needs: tuple) -> tuple:
        """Gradients of x, weight and bias; None for what is stepped here."""
        weight, inside = self.weight, self.inside
        if use.version != self.version or self.mark != optim._mark(weight):
            raise RuntimeError(
                f"parameter {inside.name(weight)!r} was written since the forward of this backward: inside the backward "
                "one forward goes with one backward and its step (no retain_graph, no second loss)"
            )
        low = x.dtype != weight.dtype
        dx = None
        if low and needs[0]:
            dx = dy @ saved
        if self.stale:
            self._reread()
        group = inside.group(weight)
        rows = dy.reshape(-1, dy.shape[-1])
        if not needs[1] or self.shared or not self._by_product(group, len(rows)):
            if needs[0] and not low:
                dx = (dy if self.folded or self.scale is None else dy * self.scale) @ weight
            dw = (rows.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if needs[1] else None
            return dx, dw, rows.sum(0).to(weight.dtype) if needs[2] else None

        if low:
            dy, x = dy.to(weight.dtype), x.to(weight.dtype)
        if low or use.folded != self.folded:
            saved = None  # not the x u^T of this u: made again
        bias = self.module._parameters.raw("bias") if needs[2] and self._steps_bias(group) else None
        inside.begin(weight)
        inside.optimizer._untouched.pop(weight, None)
        if bias is not None:
            bias_group = inside.group(bias)
            inside.begin(bias)
        lr = float(group["lr"])
        numbers = [lr, lr * float(group["radius_lr_ratio"]), float(group["weight_decay"]),
                   float(group["radius_weight_decay"])]
        bias_numbers = [] if bias is None else [float(bias_group["lr"]), float(bias_group["weight_decay"])]
        state_of_rows = None, None, None, None
        telemetry, refresh = None, False
        if self.kind is not None:
            state = inside.optimizer.state[weight]
            state_of_rows = self.scale, self.rho, state["radius"], state["norm"]
            if group["telemetry"]:
                telemetry = inside.optimizer._telemetry_of(weight)
            self.refresh = (self.refresh + 1) % REFRESH
            refresh = self.refresh == 0 or weight.is_cuda and torch.cuda.is_current_stream_capturing()
        layer = dy, x, saved, weight, *state_of_rows, bias
        keep_norm, need_x = group["retraction"] == "renormalize", needs[0] and not low
        kind, alone = self.kind or "swn", inside.optimizer._alone(weight, group)
        if alone is None:
            result = _C.in_backward_sgd_(
                *layer, telemetry, kind, [*numbers, *(bias_numbers or (0.0, 0.0))], group["maximize"], keep_norm, refresh,
                need_x,
            )
        else:
            buffers, radius_buffers, rule = alone
            bias_buffers = []
            if bias is not None:
                bias_buffers, _, bias_rule = inside.optimizer._alone(bias, bias_group)
                bias_numbers += bias_rule
            result = _C.in_backward_buffers_(
                *layer, buffers, radius_buffers, bias_buffers, kind, [*numbers, *rule], bias_numbers,
                isinstance(inside.optimizer, optim.PolarAdam), _option(group), group["maximize"], keep_norm, need_x,
            )
        self.folded = self.kind is None
        self.mark = optim._mark(weight)
        self.advance()
        if needs[0] and not low:
            dx = result
        return dx, None, None if bias is not None or not needs[2] else dy.reshape(-1, dy.shape[-1]).sum(0)

    def _steps_bias(self, group: dict) -> bool:
        """Whether the bias can go with a weight of this group."""
        bias, inside = self.module._parameters.raw("bias"), self.inside
        if bias not in inside.places or bias in inside.tied:
            return False
        own = inside.group(bias)
        like = bias.dtype == self.weight.dtype and bias.is_contiguous() and own["maximize"] == group["maximize"]
        if _keeps_buffers(own):
            like = like and _option(own) == _option(group)
        return like and _keeps_buffers(own) == _keeps_buffers(group) and _is_row_step(own)

    def _by_product(self, group: dict, batch: int) -> bool:
        if not _keeps_buffers(group):
            return _is_row_step(group)
        reports = group["telemetry"] and self.kind is not None
        return _is_row_step(group) and self.weight.is_cpu and _C.small_products(batch) and not reports


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layer):
        y, *saved = layer.linear(x, bias, layer.kind is not None)
        ctx.layer, ctx.use, ctx.dtype = layer, _Use(layer), x.dtype
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        if dy is None:
            return None, None, None, None
        dx, dw, db = ctx.layer.backward(ctx.use, dy, *ctx.saved_tensors, ctx.needs_input_grad)
        return None if dx is None else dx.to(ctx.dtype), dw, db, None
