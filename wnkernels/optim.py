"""Optimizers that train a plain model as if its weights were weight-normalized.

    opt = PolarSGD(polar_groups(model, kind="ewn"), lr=0.1, momentum=0.9)

The step that torch's optimizer would take on the parameters (g, v) of w = g v/|v| (SWN; Salimans and Kingma,
arXiv:1602.07868) or (alpha, v) of w = e^alpha v/|v| (EWN; Morwani and Ramaswamy, arXiv:2010.12909) is taken on w
itself, exactly. The model stays the plain model: any module, and nothing to remove afterwards. The specification is
`wnkernels.reference.polar_sgd_step` and `polar_adam_step`; `to_parametrized` gives the model that is meant.

Options of a parameter group, beside those of torch's optimizer:

- ``kind``: "swn", "ewn", "unit" (the radius stays what it was when the optimizer was made), or None (torch's plain
  step). Parameters with fewer than two dims (biases, gains) always take the plain step.
- ``dim``: the dimension of the weights that counts the rows, one radius and one |v| for each; None for one of all.
- ``radius_lr_ratio``: the radius learns with ``lr * radius_lr_ratio``, so that schedulers keep the ratio.
- ``weight_decay`` acts on v, ``radius_weight_decay`` (default 0) on g or alpha. torch's one ``weight_decay`` on a
  parametrized model is both, equal; for EWN it pulls every radius towards 1. In Adam decay is a part of the gradient,
  in AdamW it is decoupled: v <- (1 - lr weight_decay) v, and so for the radius, with its own rate.
- ``retraction``: "project" equals torch, |v| grows; "renormalize" keeps |v| as it was; "geodesic" (SGD without
  momentum and decay) moves along the great circle by the angle that gradient flow gives to first order, and keeps |v|.
- ``direction_norm``: the |v| to start with: "weight" for |w|, as torch's parametrization, or a number.
- ``telemetry``: keep what :meth:`telemetry` shows; it comes from the reductions that the step makes anyway.

``lr``, and the decays, may be 0-d tensors, or of shape (R,) in a group of one weight of R rows.

State: per row the radius parameter and |v| in float64, whatever the weight's dtype; the direction is the weight's. A
weight in bfloat16 or float16 has a float32 master copy, which a small step does not vanish in. Weights that the user
edits between two steps are picked up: where |w| is not the radius, the radius follows w. For 16-bit weights edits are
noticed by the tensor's version, which ``p.data`` hides: edit ``p`` itself under ``torch.no_grad()``. State tensors are
updated in place, and replaced only by `load_state_dict`.

On CUDA the polar step never waits for the device, and can be captured in a CUDA graph after two steps outside of it, which
make the state. A graph reads tensors when it is replayed (``lr``, the decays, Adam's count of steps, GradScaler's scale and
verdict), and keeps numbers. ``capturable=True`` makes the step of plain parameters so too.

``torch.nn.utils.clip_grad_norm_`` sees dL/dw, the gradients of the plain weights, and not those of (g, v).
"""

import copy
import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import wraps
from operator import is_

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize
from torch.optim import optimizer as torch_optimizer
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from . import _C, functional, parametrize
from . import nn as layers
from .autocast_copy import AutocastCopies, autocast_copy
from .in_backward import InBackward, in_backward

__all__ = [
    "AutocastCopies",
    "InBackward",
    "PolarAdam",
    "PolarAdamW",
    "PolarSGD",
    "autocast_copy",
    "describe",
    "from_parametrized",
    "in_backward",
    "polar_groups",
    "to_parametrized",
]

KINDS = ("swn", "ewn", "unit")
RETRACTIONS = ("project", "renormalize", "geodesic")
LOW_PRECISION = (torch.bfloat16, torch.float16)


# --------------------------------------------------------------------------------------------------- state of a weight


def _is_polar(p: Tensor, kind: str | None) -> bool:
    return kind is not None and p.ndim >= 2


@torch.no_grad()
def _initial_state(p: Tensor, group: dict, name: str) -> dict:
    """radius and norm, and the master copy of a 16-bit weight.

    Raises: TypeError for a p that is not floating point, ValueError for a dim out of range, for a meta tensor, and for
    a row that is zero or not finite.
    """
    if not p.is_floating_point():
        raise TypeError(f"{name} must be floating point for kind={group['kind']!r}, got {p.dtype}; use kind=None")
    if p.is_meta:
        raise ValueError(f"{name} is a meta tensor, of which no row has a direction: materialize the model first")
    length = functional.row_norm(p.detach(), layers.check_dim(group["dim"], p)).double().reshape(-1)
    bad = (~((length > 0) & length.isfinite())).nonzero() if p.numel() else ()
    if len(bad):
        row = bad[0].item()
        what = "is zero, and has no direction" if length[row] == 0 else "is not finite"
        raise ValueError(f"row {row} of {name} {what}: give it a value, or take the parameter in a group of kind=None")
    norm = group["direction_norm"]
    state = {
        "radius": length.log() if group["kind"] == "ewn" else length,
        "norm": length.clone() if norm == "weight" else torch.full_like(length, norm),
    }
    if p.dtype in LOW_PRECISION:
        state["master"] = p.detach().float()
    return state


def _mark(p: Tensor) -> tuple[int, int]:
    """What changes when somebody writes p."""
    return p._version, p.data_ptr()


def _hooked(step: Callable) -> Callable:
    """What torch makes of an optimizer's step: an entry in profiles, and the step's hooks.

    torch opens the entry whether somebody records or not, which takes longer than the step of a small weight; so its
    wrapper is taken only where somebody records or hooks.
    """
    in_full = torch.optim.Optimizer.profile_hook_step(step)

    @wraps(step)
    def hooked(self, *args, **kwargs):
        if (_C.records_functions() or self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
                or torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks):
            return in_full(self, *args, **kwargs)
        result = step(self, *args, **kwargs)
        self._optimizer_step_code()
        return result

    hooked.hooked = True  # torch's mark on a step that needs no wrapper
    return hooked


class _Kept:
    """A state tensor that torch's load_state_dict would cast to the dtype of its parameter, and must not."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Bucket:
    """The tensors that one call steps, in lists that stay the same objects from step to step."""

    def __init__(self) -> None:
        self.indices, self.params, self.states, self.weights, self.dims = [], [], [], [], []
        self.copies = self.marks = self.telemetry = None
        self.rounded = []  # the objects of the optimizer's _copies, whose tensors are the copies
        self.buffers: dict[str, list[Tensor]] = {}  # by their name in the state
        self.lists = None  # all of these for the kernel, which takes the gradients from the parameters
        self.first = False  # the buffers are fresh, and not yet in the states
        self.step = None  # of Adam: one count on the device, shared by the states

    def column(self, name: str) -> list[Tensor]:
        return [state[name] for state in self.states]

    @torch.no_grad()
    def reread(self, marks: list) -> None:
        """Takes what the user wrote to 16-bit parameters; elements that were left alone keep their master's bits."""
        for i, (p, master) in enumerate(zip(self.params, self.weights)):
            if self.marks is None or self.marks[i] != marks[i]:
                master.copy_(torch.where(p == master.to(p.dtype), master, p))


class _Plan:
    """How a group is stepped, for as long as the same parameters have gradients and no option adds or drops state."""

    def __init__(self, key: tuple, params: list[Tensor]) -> None:
        self.key, self.count, self.grads = key, len(params), _C.GradientTypes(params)
        self.plain: list[int] = []
        self.buckets: list[_Bucket] = []
        self.known: list[dict] = []  # all states when the plan was made; others in their place make it void


# ---------------------------------------------------------------------------------------------------------- optimizers


class _PolarOptimizer(torch.optim.Optimizer):
    """What the optimizers share; subclasses say which buffers a weight has, and make the calls."""

    # GradScaler hands the scale and its verdict over as the attributes grad_scale and found_inf.
    _step_supports_amp_scaling = True
    _buffers: tuple[str, ...] = ()  # the states that are like the weight; "radius_" + name is that of its radius
    _inside = None  # the InBackward that takes the steps
    _copies: dict = {}  # weight -> its 16-bit copy, of autocast_copy

    def __init__(self, params, defaults: dict) -> None:
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        self._plans: dict[int, _Plan] = {}
        self._telemetry: dict[Tensor, Tensor] = {}
        self._untouched: dict[Tensor, tuple] = {}  # marks of the weights of which |v| was taken, until their first step
        self._snapshot = None

    def _settle(self) -> None:
        """Before weights are read or state is written: weights that in_backward holds up to factors become true."""
        if self._inside is not None:
            self._inside.settle()

    def __getstate__(self) -> dict:
        self._settle()
        return super().__getstate__()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        for p, values in self.state.items():
            for name, value in values.items():
                if isinstance(value, _Kept):
                    values[name] = value.tensor.to(p.device, copy=True)

    # ------------------------------------------------------------------------------------------------------- groups

    def _name(self, group: dict, index: int) -> str:
        if "param_names" in group:
            return group["param_names"][index]
        number = next((i for i, other in enumerate(self.param_groups) if other is group), len(self.param_groups))
        return f"{number}.{index}"

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; the weights of a polar group are looked at here.

        Raises: what torch's does; ValueError for an option that is not as the module's docstring says, and for a row
        that is zero or not finite, by the name of its parameter.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(param_group)
            states = {}
            for index, p in enumerate(param_group["params"]):
                if _is_polar(p, param_group["kind"]):
                    name = f"parameter {self._name(param_group, index)!r}"
                    states[p] = _initial_state(p, param_group, name)
        except Exception:
            self.param_groups.pop()
            raise
        self.state.update(states)
        self._untouched.update({p: _mark(p) for p in states})

    def _check_group(self, group: dict) -> None:
        kind, polar = group["kind"], [p for p in group["params"] if _is_polar(p, group["kind"])]
        if kind is not None and kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))} or None, got {kind!r}")
        if group["retraction"] not in RETRACTIONS:
            allowed = ", ".join(map(repr, RETRACTIONS))
            raise ValueError(f"retraction must be one of {allowed}, got {group['retraction']!r}")
        norm = group["direction_norm"]
        if norm != "weight" and not (isinstance(norm, (int, float)) and 0 < norm < math.inf):
            raise ValueError(f"direction_norm must be 'weight' or a positive number, got {norm!r}")
        dims = [layers.check_dim(group["dim"], p) for p in polar]
        rows = [1 if dim is None else p.shape[dim] for p, dim in zip(polar, dims)]
        for option in ("lr", "weight_decay", "radius_weight_decay", "radius_lr_ratio"):
            value = group[option]
            if isinstance(value, Tensor) and value.numel() != 1:
                if len(group["params"]) != 1 or tuple(value.shape) != tuple(rows):
                    raise ValueError(
                        f"{option} must be a number or a tensor of one element, or of shape (R,) in a group of one "
                        f"weight of R rows; got shape {tuple(value.shape)}"
                    )
            if not (torch.as_tensor(value) >= 0).all():
                raise ValueError(f"{option} must be at least 0, got {value}")
        if polar:
            for option in ("foreach", "fused"):
                if group[option] is False:
                    raise ValueError(
                        f"{option} must be None or True for kind={kind!r}, got False: the polar step has one "
                        "implementation, a single pass over all tensors"
                    )

    # --------------------------------------------------------------------------------------------------------- plans

    def _key(self, group: dict) -> tuple:
        """The options on which the state depends."""
        raise NotImplementedError

    def _plan(self, number, group: dict) -> _Plan:
        params = group["params"]
        key = (group["kind"], group["dim"], group["telemetry"], *self._key(group))
        plan = self._plans.get(number)
        if plan is not None and plan.key == key and plan.count == len(params) and plan.grads.unchanged():
            if len(self.state) == len(plan.known) and all(map(is_, self.state.values(), plan.known)):
                return plan
        return self._new_plan(number, group, key)

    @torch.no_grad()
    def _new_plan(self, number, group: dict, key: tuple) -> _Plan:
        params = group["params"]
        if any(p.is_cuda for p in params) and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("this step sets up state, which a CUDA graph would repeat: take two steps before the capture")
        plan = _Plan(key, params)
        buckets = {}
        for index, p in enumerate(params):
            grad = p.grad
            if grad is None:
                continue
            if not _is_polar(p, group["kind"]):
                plan.plain.append(index)
                continue
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    f"the gradient of parameter {self._name(group, index)!r} must be dense, got layout {grad.layout}: "
                    "make the module with sparse=False, or take the parameter in a group of kind=None"
                )
            state = self._ready(group, index)
            copied = self._copies.get(p)
            where = (p.dtype, grad.dtype, p.device, copied is not None, *self._age(state, group))
            bucket = buckets.setdefault(where, _Bucket())
            bucket.indices.append(index)
            bucket.params.append(p)
            bucket.states.append(state)
            bucket.weights.append(state.get("master", p))
            bucket.dims.append(group["dim"])
            if copied is not None:
                bucket.rounded.append(copied)
        for bucket in buckets.values():
            bucket.radius, bucket.norm = bucket.column("radius"), bucket.column("norm")
            if bucket.params[0].dtype in LOW_PRECISION:
                bucket.copies = bucket.params
            if group["telemetry"]:
                bucket.telemetry = [self._telemetry_of(p) for p in bucket.params]
            self._fill(bucket, group)
            state = [[bucket.buffers.get(prefix + name, []) for name in self._buffers] for prefix in ("", "radius_")]
            functional.check_device(type(self).__name__, bucket.weights)
            bucket.lists = _C.StepLists(bucket.params, bucket.weights, bucket.radius, bucket.norm, *state,
                                        bucket.telemetry or [], group["kind"],
                                        functional.front_dims(bucket.dims, bucket.weights))
        plan.buckets, plan.known = list(buckets.values()), list(self.state.values())
        self._plans[number] = plan
        return plan

    def _ready(self, group: dict, index: int) -> dict:
        """The state of a weight, on its device, and made again where it was dropped or is of an older weight."""
        p = group["params"][index]
        state, mark = self.state[p], self._untouched.pop(p, None)
        if "radius" not in state or (mark is not None and mark != _mark(p)):
            state.update(_initial_state(p, group, f"parameter {self._name(group, index)!r}"))
        if p.dtype in LOW_PRECISION:
            state.setdefault("master", p.detach().float())
        else:
            state.pop("master", None)
        dtype = torch.float32 if p.dtype in LOW_PRECISION else p.dtype
        for name, value in state.items():
            rowwise = name == "norm" or name.startswith("radius")
            state[name] = value.to(p.device, value.dtype if name == "step" else torch.float64 if rowwise else dtype)
        return state

    def _telemetry_of(self, p: Tensor) -> Tensor:
        rows = self.state[p]["radius"].numel()
        known = self._telemetry.get(p)
        if known is None or known.device != p.device or len(known) != rows:
            known = self._telemetry[p] = torch.full((rows, 4), math.nan, dtype=torch.float64, device=p.device)
        return known

    def _age(self, state: dict, group: dict) -> tuple:
        """What the weights of one call must have in common beside dtype and device."""
        raise NotImplementedError

    def _fill(self, bucket: _Bucket, group: dict) -> None:
        """Adds the buffers of the optimizer."""
        raise NotImplementedError

    def _alone(self, p: Tensor, group: dict) -> tuple[list, list, list] | None:
        """For a step of one parameter inside the backward, which the caller takes: its buffers, those of its radius, and the
        numbers of the rule. None where there are no buffers."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------------------------------------- step

    @_hooked
    def step(self, closure: Callable | None = None):
        """Takes one step.

        Args:
            closure: evaluates the model again and returns the loss; optional.

        Returns: the loss of the closure, or None.

        Raises: RuntimeError for a sparse gradient of a polar weight.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            self._step_group(number, group)
        return loss

    def _step_group(self, number, group: dict) -> None:
        """`number` is the key of the group's plan."""
        plan = self._plan(number, group)
        if plan.plain:
            self._plain(group, plan.plain)
        for bucket in plan.buckets:
            self._polar(number, group, bucket)

    def _polar(self, number, group: dict, bucket: _Bucket) -> None:
        grad_scale, found_inf = self._scaling(bucket.params[0].device)
        if bucket.first and group.get("dampening") and found_inf is not None and found_inf.item():
            return  # the next step is the first one, which is not dampened; other steps do not wait for the device
        if bucket.rounded:
            bucket.copies = [copied.buffer() for copied in bucket.rounded]
            # Whether found_inf skips the step only the device may know: a copy that is true before it stays so either way.
            true = [found_inf is None or copied.mark == _mark(p) for copied, p in zip(bucket.rounded, bucket.params)]
        elif bucket.copies is not None:
            marks = [_mark(p) for p in bucket.params]
            if marks != bucket.marks:
                bucket.reread(marks)
        ratio = group["radius_lr_ratio"]
        lr = group["lr"]
        radius_lr = lr if isinstance(ratio, (int, float)) and ratio == 1 else lr * ratio
        numbers = [lr, radius_lr, group["weight_decay"], group["radius_weight_decay"]]
        options = group["maximize"], group["retraction"], grad_scale, found_inf
        self._call(group, bucket, numbers, options)
        if bucket.rounded:
            for copied, p, is_true in zip(bucket.rounded, bucket.params, true):
                if is_true:
                    copied.mark = _mark(p)
        elif bucket.copies is not None:
            bucket.marks = [_mark(p) for p in bucket.params]
        if bucket.first:
            for i, state in enumerate(bucket.states):
                state.update({name: tensors[i] for name, tensors in bucket.buffers.items()})
            self._plans.pop(number, None)  # what has stepped once can go with what has stepped before

    def _scaling(self, device: torch.device) -> list[Tensor | None]:
        """grad_scale and found_inf, where GradScaler has set them."""
        given = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return [None if x is None else x.to(device, non_blocking=True) for x in given]

    def _call(self, group: dict, bucket: _Bucket, numbers: list, options: tuple) -> None:
        """The kernel; `numbers` and `options` are those that SGD and Adam share."""
        raise NotImplementedError

    @torch.no_grad()
    def _plain(self, group: dict, indices: list) -> None:
        """torch's own step on the parameters that have no radius."""
        params = [group["params"][i] for i in indices]
        grads = [p.grad for p in params]
        grad_scale, found_inf = self._scaling(params[0].device)
        # torch's fused functions scale and skip on the device, except that of SGD when it makes its buffers; the others
        # must wait for the verdict.
        fresh = group.get("momentum") and any("momentum_buffer" not in self.state.get(p, ()) for p in params)
        if found_inf is not None and (fresh or not self._fused(group)) and found_inf.item():
            return
        if self._fused(group):
            self._plain_call(group, params, grads, grad_scale=grad_scale, found_inf=found_inf)
        else:
            self._plain_call(group, params, grads if grad_scale is None else [g / grad_scale for g in grads])

    def _fused(self, group: dict) -> bool:
        """Whether plain parameters take torch's fused step."""
        return bool(group["fused"])

    def _plain_call(self, group: dict, params: list, grads: list, **scaling) -> None:
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------------------- state

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but nothing is shared with `state_dict`, and radii, |v| and master copies keep their dtypes.

        Raises: what torch's does; ValueError for the state of another optimizer.
        """
        if not all("radius_lr_ratio" in group for group in state_dict["param_groups"]):
            raise ValueError("state_dict must come from a polar optimizer; use from_parametrized to start from torch's")

        def keep(_, loaded):
            state = {}
            for key, values in loaded["state"].items():
                own = _Kept if "radius" in values else Tensor.clone
                state[key] = {name: own(x) if isinstance(x, Tensor) else x for name, x in values.items()}
            return {**loaded, "state": state}

        self._settle()
        handle = self.register_load_state_dict_pre_hook(keep)  # after the user's hooks
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def _weights(self):
        """(group, index, p) of every polar weight that has a state."""
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                if _is_polar(p, group["kind"]) and "radius" in self.state.get(p, ()):
                    yield group, index, p

    @torch.no_grad()
    def snapshot(self) -> None:
        """Remembers all parameters and all state, for `rollback`. One snapshot is kept, the last."""
        self._settle()
        for group, index, _ in self._weights():
            self._ready(group, index)
        params = [p for group in self.param_groups for p in group["params"]]
        tensors = {id(x): x for p in params for x in (p, *self.state.get(p, {}).values()) if isinstance(x, Tensor)}
        self._snapshot = (
            [(x, x.detach().clone()) for x in tensors.values()],
            {p: dict(self.state[p]) for p in params if p in self.state},
        )

    @torch.no_grad()
    def rollback(self) -> None:
        """Puts all parameters and all state back to the last `snapshot`, bit for bit; as often as wanted.

        Raises: RuntimeError without a snapshot.
        """
        if self._snapshot is None:
            raise RuntimeError("rollback() needs a snapshot(): none was taken since the optimizer was made or loaded")
        self._settle()
        tensors, states = self._snapshot
        for x, value in tensors:
            x.copy_(value)
        for p in [p for p in self.state if p not in states]:
            del self.state[p]
        for p, then in states.items():
            now = self.state[p]
            if now.keys() != then.keys() or not all(now[name] is x for name, x in then.items()):
                now.clear()
                now.update(then)
                self._plans.clear()

    @torch.no_grad()
    def rescale_direction(self, k: float) -> None:
        """|v| <- k |v| for all weights, which stay as they are, with the buffers that belong to the longer v.

        dL/dv is proportional to 1/|v|, so first moments are divided by k, and second ones by k^2. Steps with the rate
        k^2 lr, the radius's unchanged, then go on as steps with lr would have. After a decay of lr by a factor f this
        takes an equilibrium |v|, where |v|^4 is proportional to lr / weight_decay, to the new one: k = f^(1/4).

        Raises: ValueError unless k is positive and finite.
        """
        if not 0 < k < math.inf:
            raise ValueError(f"k must be positive and finite, got {k}")
        self._settle()
        powers = {"norm": 1, "momentum_buffer": -1, "exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2}
        for _, _, p in self._weights():
            for name, value in self.state[p].items():
                if name in powers:
                    value.mul_(k ** powers[name])

    @torch.no_grad()
    def telemetry(self) -> dict[str, dict[str, Tensor]]:
        """What the last step did, for the weights of groups with ``telemetry=True``.

        Returns: parameter name, or "group.index" where the optimizer was given none, -> a dict of

        - "radius" (signed, 0 for a lost row) and "norm", |v|, as they are now; "radial_gradient" <G, theta>;
          "tangential_gradient" |G - <G, theta> theta|; "angular_update", in radians; all (R,) in float64, and the last
          three NaN before the first step;
        - "effective_lr": lr / |v|^2, (R,), the rate of the direction theta = v/|v| per unit of the radius;
        - "lost_rows": how many rows have become zero, and so have lost their direction; 0-d int64.

        Raises: RuntimeError if no group has telemetry on.
        """
        if not any(group["telemetry"] for group in self.param_groups):
            raise RuntimeError("telemetry() needs a group with telemetry=True, got none")
        result = {}
        for group, index, p in self._weights():
            if group["telemetry"]:
                state = self.state[p]
                values = functional.telemetry(self._telemetry_of(p), state["radius"], state["norm"], group["kind"])
                lost = functional.row_norm(p.detach(), group["dim"]).view(-1) == 0
                values["radius"].masked_fill_(lost, 0)
                values["effective_lr"] = group["lr"] / values["norm"] ** 2
                values["lost_rows"] = lost.sum()
                result[self._name(group, index)] = values
        return result


def _add_buffers(state: dict, names: Iterable, weight: Tensor) -> None:
    for name in names:
        if name not in state:
            state[name] = torch.zeros_like(weight)
            if "radius" in state:
                state["radius_" + name] = torch.zeros_like(state["radius"])


def _columns(state: dict, names: Iterable) -> tuple[list, list]:
    return [state[name] for name in names], [state["radius_" + name] for name in names if "radius" in state]


class PolarSGD(_PolarOptimizer):
    """torch.optim.SGD on the (g, v) or (alpha, v) of plain weights.

    Args:
        params: as of torch's optimizers; best from `polar_groups`. Tensors of two dims or more are weights.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as of torch.optim.SGD.
        kind, dim, radius_lr_ratio, radius_weight_decay, retraction, direction_norm, telemetry: defaults of the groups,
            see the module's docstring.
        foreach, fused: None or True; both are what the polar step is anyway. Plain parameters go by them as in torch.
        capturable: plain parameters take torch's fused step, which reads a tensor lr on the device. The polar step is
            always capturable.

    Raises: ValueError for an option that is not allowed, and for rows that are zero or not finite; what torch's
    optimizers raise.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        kind: str | None = "swn",
        dim: int | None = 0,
        radius_lr_ratio: float = 1.0,
        radius_weight_decay: float | Tensor = 0.0,
        retraction: str = "project",
        direction_norm: str | float = "weight",
        telemetry: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            kind=kind,
            dim=dim,
            radius_lr_ratio=radius_lr_ratio,
            radius_weight_decay=radius_weight_decay,
            retraction=retraction,
            direction_norm=direction_norm,
            telemetry=telemetry,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
            capturable=capturable,
        )
        super().__init__(params, defaults)

    def _check_group(self, group: dict) -> None:
        super()._check_group(group)
        if not group["momentum"] >= 0:
            raise ValueError(f"momentum must be at least 0, got {group['momentum']}")
        if group["capturable"] and (group["foreach"] or group["fused"] is False):
            raise ValueError("capturable=True is torch's fused step of plain parameters: foreach must be None, and fused "
                             f"None or True; got foreach={group['foreach']}, fused={group['fused']}")
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                "nesterov needs a momentum and no dampening, got "
                f"momentum={group['momentum']}, dampening={group['dampening']}"
            )
        if group["retraction"] == "geodesic" and group["kind"] is not None:
            for option in ("momentum", "weight_decay"):
                if torch.as_tensor(group[option]).any():
                    raise ValueError(
                        f"{option} must be 0 for retraction='geodesic', which follows the gradient flow of the "
                        f"direction, got {group[option]}"
                    )

    _buffers = ("momentum_buffer",)

    def _key(self, group: dict) -> tuple:
        return (group["momentum"] != 0,)

    def _age(self, state: dict, group: dict) -> tuple:
        return (group["momentum"] != 0 and "momentum_buffer" not in state,)

    def _fill(self, bucket: _Bucket, group: dict) -> None:
        if group["momentum"] == 0:
            return
        bucket.first = "momentum_buffer" not in bucket.states[0]
        likes = {"momentum_buffer": bucket.weights, "radius_momentum_buffer": bucket.radius}
        for name, tensors in likes.items():
            bucket.buffers[name] = [torch.zeros_like(x) for x in tensors] if bucket.first else bucket.column(name)

    def _alone(self, p: Tensor, group: dict) -> tuple[list, list, list] | None:
        if group["momentum"] == 0:
            return None
        state = self.state[p]
        first = "momentum_buffer" not in state
        _add_buffers(state, self._buffers, p)
        numbers = [group["momentum"], 1.0 if first else 1.0 - group["dampening"]]
        return *_columns(state, self._buffers), numbers

    def _call(self, group: dict, bucket: _Bucket, numbers: list, options: tuple) -> None:
        numbers += group["momentum"], 1.0 if bucket.first else 1.0 - group["dampening"]
        numbers = functional.numbers_and_tensors(numbers)
        bucket.lists.sgd_(bucket.copies or [], *numbers, group["nesterov"], *options)

    def _fused(self, group: dict) -> bool:
        return bool(group["fused"] or group["capturable"])

    def _plain_call(self, group: dict, params: list, grads: list, **scaling) -> None:
        buffers = [self.state[p].get("momentum_buffer") if p in self.state else None for p in params]
        sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=any(grad.is_sparse for grad in grads),
            foreach=group["foreach"],
            fused=self._fused(group) or group["fused"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            **scaling,
        )
        if group["momentum"] != 0:
            for p, buffer in zip(params, buffers):
                self.state[p]["momentum_buffer"] = buffer


class PolarAdam(_PolarOptimizer):
    """torch.optim.Adam on the (g, v) or (alpha, v) of plain weights: weight decay is a part of the gradient.

    Args:
        params: as of torch's optimizers; best from `polar_groups`. Tensors of two dims or more are weights.
        lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as of torch.optim.Adam.
        kind, dim, radius_lr_ratio, radius_weight_decay, retraction, direction_norm, telemetry: defaults of the groups,
            see the module's docstring; not retraction="geodesic".
        foreach, fused: None or True; both are what the polar step is anyway. Plain parameters go by them as in torch.
        capturable: of plain parameters, as in torch. The polar step counts on the device, and is always capturable.

    Raises: ValueError for an option that is not allowed, and for rows that are zero or not finite; what torch's
    optimizers raise.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.0,
        amsgrad: bool = False,
        *,
        kind: str | None = "swn",
        dim: int | None = 0,
        radius_lr_ratio: float = 1.0,
        radius_weight_decay: float | Tensor = 0.0,
        retraction: str = "project",
        direction_norm: str | float = "weight",
        telemetry: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        decoupled_weight_decay: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            kind=kind,
            dim=dim,
            radius_lr_ratio=radius_lr_ratio,
            radius_weight_decay=radius_weight_decay,
            retraction=retraction,
            direction_norm=direction_norm,
            telemetry=telemetry,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
            capturable=capturable,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        super().__init__(params, defaults)

    def _check_group(self, group: dict) -> None:
        super()._check_group(group)
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas must be in [0, 1), got {group['betas']}")
        if not group["eps"] >= 0:
            raise ValueError(f"eps must be at least 0, got {group['eps']}")
        if group["retraction"] == "geodesic" and group["kind"] is not None:
            raise ValueError("retraction must be 'project' or 'renormalize' for Adam, got 'geodesic': there is no flow")

    def _key(self, group: dict) -> tuple:
        return (group["amsgrad"],)

    _buffers = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def _names(self, group: dict) -> tuple[str, ...]:
        return self._buffers if group["amsgrad"] else self._buffers[:2]

    def _age(self, state: dict, group: dict) -> tuple:
        return (state["step"].item() if "step" in state else 0.0,)

    def _fill(self, bucket: _Bucket, group: dict) -> None:
        for state, weight in zip(bucket.states, bucket.weights):
            _add_buffers(state, self._names(group), weight)
        for name in self._names(group):
            for column in (name, "radius_" + name):
                bucket.buffers[column] = bucket.column(column)
        # One count serves the bucket. It is not shared with weights outside, which may stand still.
        count = bucket.states[0].get("step")
        bucket.step = torch.zeros((), device=bucket.params[0].device) if count is None else count.clone()
        for state in bucket.states:
            state["step"] = bucket.step

    def _alone(self, p: Tensor, group: dict) -> tuple[list, list, list] | None:
        state, names = self.state[p], self._names(group)
        _add_buffers(state, names, p)
        # A new count: others may share the old one.
        state["step"] = torch.ones(()) if "step" not in state else state["step"] + 1
        self._plans.pop(p, None)
        return *_columns(state, names), [*map(float, group["betas"]), group["eps"], state["step"].item()]

    def _call(self, group: dict, bucket: _Bucket, numbers: list, options: tuple) -> None:
        bucket.step.add_(1)
        found_inf = options[-1]
        if found_inf is not None:
            bucket.step.sub_(found_inf)
        numbers = functional.numbers_and_tensors([*numbers, *group["betas"], group["eps"], bucket.step])
        bucket.lists.adam_(bucket.copies or [], *numbers, group["decoupled_weight_decay"], *options)

    def _plain_call(self, group: dict, params: list, grads: list, **scaling) -> None:
        names, on_device = self._names(group), group["capturable"] or group["fused"]
        for p, grad in zip(params, grads):
            if grad.is_sparse:
                raise RuntimeError("Adam does not take sparse gradients: make the module with sparse=False")
            state = self.state[p]
            if "step" not in state:
                state["step"] = torch.zeros((), device=p.device if on_device else "cpu")
            for name in names:
                if name not in state:
                    state[name] = torch.zeros_like(p)
        columns = {name: [self.state[p][name] for p in params] for name in (*names, "step")}
        beta1, beta2 = group["betas"]
        adam(
            params,
            grads,
            columns["exp_avg"],
            columns["exp_avg_sq"],
            columns.get("max_exp_avg_sq", []),
            columns["step"],
            foreach=group["foreach"],
            fused=group["fused"],
            capturable=group["capturable"],
            has_complex=any(p.is_complex() for p in params),
            decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            **scaling,
        )


class PolarAdamW(PolarAdam):
    """torch.optim.AdamW on the (g, v) or (alpha, v) of plain weights: v <- (1 - lr weight_decay) v before the step.

    Arguments and errors are those of `PolarAdam`, but weight_decay is 0.01, as torch's, and always decoupled.
    """

    def __init__(self, params: Iterable, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, *args, **options):
        super().__init__(params, lr, betas, eps, weight_decay, *args, decoupled_weight_decay=True, **options)


# -------------------------------------------------------------------------------------------------------- whole models

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _refuse_normalized(name: str, module: nn.Module, excluded: Callable[[str], bool]) -> None:
    """Raises for a v of a weight-normalized module: its length has no effect, so it has no radius to learn."""
    prefix = f"{name}." if name else ""
    found = []
    if isinstance(module, layers.WeightNormed):
        found = ["weight_v"]
    elif torch_parametrize.is_parametrized(module):
        for tensor, chain in module.parametrizations.items():
            if any(type(x).__name__ == "_WeightNorm" or isinstance(x, parametrize.WeightNorm) for x in chain):
                found.append(f"parametrizations.{tensor}.original1")
    else:
        parameters = module._parameters
        found = [key for key in parameters if key.endswith("_v") and key[:-1] + "g" in parameters]
    for key in found:
        if not excluded(prefix + key):
            raise ValueError(
                f"{prefix + key!r} is the v of a weight that is normalized already: fold the model first "
                "(wnkernels.fold, or torch's remove_parametrizations), or exclude it"
            )


def _rows_of(module: nn.Module, transpose_dim: int | None) -> int | None:
    """The dimension of `module.weight` that counts its outputs; None for a plain weight."""
    if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
        return 0
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is None and not module.sparse:
        return 0
    return transpose_dim if isinstance(module, _TRANSPOSED) else None


def polar_groups(
    model: nn.Module,
    kind: str = "swn",
    *,
    transpose_dim: int | None = None,
    exclude: str | Iterable[str] = (),
    plain: dict | None = None,
    verbose: bool = False,
    **options,
) -> list[dict]:
    """The parameter groups that make a model polar, chosen by module type.

    Weights of Linear, Conv1d, 2d, 3d (grouped ones too), Embedding and EmbeddingBag get `kind`, with a row for each
    output (dim 0). Everything else is plain: biases, normalization layers, attention's stacked in_proj_weight,
    recurrent layers, bare parameters, and embeddings with a padding_idx (a row of zeros) or sparse gradients.

    Args:
        model: any module; its parameters are named in the groups.
        kind: "swn", "ewn" or "unit".
        transpose_dim: the rows of ConvTranspose weights (in, out/groups, ...): 1 for the outputs, 0 for the inputs
            (torch's weight_norm takes 0); None leaves these weights plain.
        exclude: one or several patterns, as of `fnmatch`, for the names of parameters that shall be plain.
        plain: options of the group of plain parameters, such as ``{"weight_decay": 0.0}``.
        verbose: print `describe` of the result.
        options: of the polar groups, such as ``radius_lr_ratio=0.5``.

    Returns: the groups, for PolarSGD, PolarAdam or PolarAdamW; the polar ones first.

    Raises: ValueError for a wrong kind; for a model without such weights; for lazy layers that have not run; for a
    weight that is normalized already (fold the model); for transpose_dim=1 and a ConvTranspose with groups, of which
    no dimension counts the outputs.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)

    def excluded(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    dims = {}
    for name, module in model.named_modules():
        _refuse_normalized(name, module, excluded)
        weight, dim = module._parameters.get("weight"), _rows_of(module, transpose_dim)
        path = f"{name}.weight" if name else "weight"
        if weight is None or dim is None or excluded(path):
            continue
        if nn.parameter.is_lazy(weight):
            raise ValueError(f"{path!r} has no shape yet: run a batch through the model first")
        if isinstance(module, _TRANSPOSED) and module.groups > 1 and dim % weight.ndim == 1:
            raise ValueError(
                f"transpose_dim=1 must not meet groups={module.groups} of {name!r}, where a row along dim 1 mixes "
                "outputs of all groups: exclude it, or take transpose_dim=0"
            )
        dims.setdefault(weight, dim)
    if not dims:
        raise ValueError(f"model {type(model).__name__} has no weight of Linear, Conv or Embedding to take as polar")
    chosen: dict = {dim: [] for dim in dims.values()}
    others = []
    for name, p in model.named_parameters():
        (chosen[dims[p]] if p in dims else others).append((name, p))
    groups = [{"params": params, "kind": kind, "dim": dim, **options} for dim, params in chosen.items()]
    if others:
        groups.append({"params": others, "kind": None, **(plain or {})})
    if verbose:
        print(describe(groups))
    return groups


def describe(groups: torch.optim.Optimizer | Iterable[dict]) -> str:
    """What is stepped how, one line for each parameter: its name, shape, kind and dim, or "plain".

    Args:
        groups: an optimizer of this module, or parameter groups with names, as `polar_groups` gives them.
    """
    lines = []
    for number, group in enumerate(groups.param_groups if isinstance(groups, torch.optim.Optimizer) else groups):
        for index, entry in enumerate(group["params"]):
            named = isinstance(entry, tuple)
            p = entry[1] if named else entry
            name = entry[0] if named else group.get("param_names", {index: f"{number}.{index}"})[index]
            polar = _is_polar(p, group["kind"])
            lines.append((name, str(tuple(p.shape)), f"{group['kind']}, dim {group['dim']}" if polar else "plain"))
    widths = [max((len(line[i]) for line in lines), default=0) for i in (0, 1)]
    return "\n".join(f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {how}" for name, shape, how in lines)


# ---------------------------------------------------------------------------------------------------------- conversion

_TORCH = {PolarSGD: torch.optim.SGD, PolarAdam: torch.optim.Adam, PolarAdamW: torch.optim.AdamW}


def _options_of(optimizer_class: type) -> dict:
    return optimizer_class([torch.ones(1)]).defaults


def _current_radius(state: dict, weight: Tensor, group: dict) -> tuple[Tensor, Tensor]:
    """(radius, sign), after edits of the weight since the last step."""
    ewn = group["kind"] == "ewn"
    s = state["radius"].exp() if ewn else state["radius"]
    length = functional.row_norm(weight, group["dim"]).double().reshape(-1)
    sign = torch.where(s < 0, -1.0, 1.0).to(s)
    tolerance = _C.edit_tolerance_f64 if weight.dtype == torch.float64 else _C.edit_tolerance
    edited = (length - s.abs()).abs() > tolerance * torch.maximum(length, s.abs())
    return torch.where(edited, length.log() if ewn else sign * length, state["radius"]), sign


@torch.no_grad()
def to_parametrized(model: nn.Module, optimizer: _PolarOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The parametrized model, with torch's optimizer, that `optimizer` on `model` stands for; they go on the same.

    Args:
        model: a plain model; is copied.
        optimizer: a PolarSGD, PolarAdam or PolarAdamW of its parameters.

    Returns: the model with `wnkernels.weight_norm` on its polar weights, and torch.optim's SGD, Adam or AdamW with the
    momenta. A radius of kind "unit" is frozen.

    Raises: TypeError for another optimizer, and for 16-bit weights, of which torch's optimizers have no master copy;
    ValueError for parameters that are not the model's, for tied weights, and for options that torch has not
    (retraction, and rates or decays for each row).
    """
    if type(optimizer) not in _TORCH:
        raise TypeError(f"optimizer must be PolarSGD, PolarAdam or PolarAdamW, got {type(optimizer).__name__}")
    optimizer._settle()
    names = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    target = _TORCH[type(optimizer)]
    model, known = copy.deepcopy(model), _options_of(target)
    for group in optimizer.param_groups:
        if group["kind"] is not None and group["retraction"] != "project":
            raise ValueError(f"retraction must be 'project', as torch's steps, got {group['retraction']!r}")
        for option in ("lr", "weight_decay", "radius_weight_decay", "radius_lr_ratio"):
            if isinstance(group[option], Tensor) and group[option].numel() != 1:
                raise ValueError(f"{option} must be one number for torch, got shape {tuple(group[option].shape)}")
    groups, states = [], {}
    for group in optimizer.param_groups:
        members: dict[str, list] = {"v": [], "radius": [], "plain": []}
        for index, p in enumerate(group["params"]):
            if p not in names:
                raise ValueError(f"parameter {optimizer._name(group, index)!r} must be one of the model")
            state = {k: x.clone() if isinstance(x, Tensor) else x for k, x in optimizer.state.get(p, {}).items()}
            name = names[p][0]
            if not _is_polar(p, group["kind"]):
                members["plain"].append(model.get_parameter(name))
                states[members["plain"][-1]] = state
                continue
            if len(names[p]) > 1:
                raise ValueError(f"{' and '.join(names[p])} are one parameter: untie them")
            if p.dtype in LOW_PRECISION:
                raise TypeError(f"{name!r} must be float32 or float64, got {p.dtype}")
            owner, _, key = name.rpartition(".")
            module, dim = model.get_submodule(owner), layers.check_dim(group["dim"], p)
            value, sign = _current_radius(state, p, group)
            parametrize.weight_norm(module, key, dim, "ewn" if group["kind"] == "ewn" else "swn")
            radius, v = module.parametrizations[key].original0, module.parametrizations[key].original1
            radius.copy_(value.reshape(radius.shape))
            v.copy_(functional.weight_norm(p, (sign * state["norm"]).to(p.dtype).reshape(radius.shape), dim))
            members["v"].append(v)
            states[v] = {k: x for k, x in state.items() if k != "norm" and not k.startswith("radius")}
            if group["kind"] == "unit":
                radius.requires_grad_(False)
                continue
            members["radius"].append(radius)
            states[radius] = {
                k.removeprefix("radius_"): x.to(p.dtype).reshape(radius.shape)
                for k, x in state.items()
                if k.startswith("radius_")
            }
            if "step" in state:
                states[radius]["step"] = state["step"].clone()
        own = {option: group[option] for option in known if option in group}
        of_radius = {"lr": group["lr"] * group["radius_lr_ratio"], "weight_decay": group["radius_weight_decay"]}
        for role, params in members.items():
            if params:
                groups.append({**own, **(of_radius if role == "radius" else {}), "params": params})
    result = target(groups)
    result.state.update({p: state for p, state in states.items() if state})
    return model, result


@torch.no_grad()
def from_parametrized(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, _PolarOptimizer]:
    """The plain model, with a polar optimizer, that goes on as `optimizer` on the normalized `model` would.

    Args:
        model: a model with layers of `wnkernels.nn` or `wnkernels.weight_norm` parametrizations; is copied.
        optimizer: torch.optim's SGD, Adam or AdamW of its parameters. A radius that it does not have, or that needs no
            gradient, is taken as fixed: kind "unit".

    Returns: the folded model, and PolarSGD, PolarAdam or PolarAdamW with the momenta.

    Raises: TypeError for another optimizer; ValueError for parameters that are not the model's, for a v that the
    optimizer does not have where it has the radius, for a v and a radius with different options other than lr and
    weight_decay, and for rows that are zero.
    """
    target = next((ours for ours, theirs in _TORCH.items() if type(optimizer) is theirs), None)
    if target is None:
        raise TypeError(f"optimizer must be torch.optim's SGD, Adam or AdamW, got {type(optimizer).__name__}")
    names = {p: name for name, p in model.named_parameters()}
    where = {p: group for group in optimizer.param_groups for p in group["params"]}
    normalized = _normalized_weights(model)  # v -> (name of the weight, radius, kind, dim)
    radii = {radius: v for v, (_, radius, _, _) in normalized.items()}
    model = copy.deepcopy(model)
    with torch.enable_grad():  # without it, torch takes what it unparametrizes for frozen
        parametrize.fold(model)

    groups: dict[tuple, dict] = {}
    states = {}
    for number, group in enumerate(optimizer.param_groups):
        own = {k: x for k, x in group.items() if k in _options_of(target)}
        for p in group["params"]:
            if p not in names:
                raise ValueError(f"every parameter of group {number} must be the model's, got one that is not")
            state = {k: x.clone() if isinstance(x, Tensor) else x for k, x in optimizer.state.get(p, {}).items()}
            if p in radii:
                if radii[p] not in where:
                    raise ValueError(f"optimizer must have {names[radii[p]]!r} where it has {names[p]!r}")
                continue
            if p not in normalized:
                key, options, name = (number,), {"kind": None}, names[p]
            else:
                name, radius, kind, dim = normalized[p]
                theirs = where.get(radius) if radius.requires_grad else None
                key = (number, id(theirs), kind, dim)
                values = radius.detach().double().reshape(-1)
                moments = optimizer.state.get(radius, {})
                if theirs is None:
                    options = {"kind": "unit", "dim": dim}
                    values = values.exp() if kind == "ewn" else values
                    moments = {k: torch.zeros_like(values) for k, x in state.items() if x is not None}
                else:
                    options = {"kind": kind, "dim": dim, **_radius_options(group, theirs, names[radius])}
                for k, x in moments.items():
                    if k != "step" and x is not None:
                        state["radius_" + k] = x.double().reshape(-1).clone()
                state.update(radius=values.clone(), norm=functional.row_norm(p, dim).double().reshape(-1))
                if "step" in state:
                    state["step"] = state["step"].to(p.device)
            entry = groups.setdefault(key, {**own, **options, "params": []})
            entry["params"].append((name, model.get_parameter(name)))
            states[name] = state
    result = target(list(groups.values()))
    for group in result.param_groups:
        for name, p in zip(group["param_names"], group["params"]):
            if states[name]:
                result.state[p] = {k: x for k, x in states[name].items() if x is not None}
    result._untouched.clear()  # |v| was given
    return model, result


def _normalized_weights(model: nn.Module) -> dict[Tensor, tuple]:
    found = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, layers.WeightNormed):
            found[module.weight_v] = (prefix + "weight", module.radius, module.kind, module.dim)
        elif torch_parametrize.is_parametrized(module):
            for tensor, originals in module.parametrizations.items():
                if isinstance(originals[0], parametrize.WeightNorm):
                    norm = originals[0]
                    found[originals.original1] = (prefix + tensor, originals.original0, norm.kind, norm.dim)
    return found


def _radius_options(of_v: dict, of_radius: dict, name: str) -> dict:
    for option in of_v.keys() & of_radius.keys() - {"params", "param_names", "lr", "initial_lr", "weight_decay"}:
        if of_v[option] != of_radius[option]:
            raise ValueError(f"{option} of {name!r} must be that of its v, {of_v[option]}, got {of_radius[option]}")
    same = of_v["lr"] is of_radius["lr"] or of_v["lr"] == of_radius["lr"]
    if not same and of_v["lr"] == 0:
        raise ValueError(f"lr of the v of {name!r} must not be 0 where that of its radius is {of_radius['lr']}")
    ratio = 1.0 if same else of_radius["lr"] / of_v["lr"]
    return {"radius_lr_ratio": ratio, "radius_weight_decay": of_radius["weight_decay"]}
