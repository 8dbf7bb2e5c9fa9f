"""Gradient descent in polar coordinates, with losses that have left the range of floating point.

    point = polar_weights(weights, kind="ewn")                       # our kernels, or the same in pure torch
    run = normalized_descent(objective(forward, loss), point, lr=0.01, lr_cap=0.1, frac=5, stop=-50)

`normalized_descent` is the training loop of Morwani and Ramaswamy (arXiv:2010.12909, published code): a step
has the rate lr L^(1/frac - 1); where the loss does not fall the step is undone, bit for bit, and lr is
lowered.

Many instances of one small problem are one problem: their neurons are the rows of one weight. With
``instances=E`` the first R/E rows of each weight belong to the first instance, and so on; each has its own
rate and its own verdict.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import functional
from .. import nn as layers

__all__ = [
    "Descent",
    "PolarWeights",
    "TorchWeights",
    "multi_stage",
    "normalized_descent",
    "objective",
    "polar_weights",
]

KINDS = (None, "swn", "ewn")
GAIN = 1e-3  # what log L must fall by in `patience` steps
RETRACTIONS = {"wnkernels": ("project", "renormalize", "geodesic"), "torch": ("project", "renormalize")}


# --------------------------------------------------------------------------------------- weights and one step


class PolarWeights:
    """Weights with their polar coordinates, stepped by the fused polar step. `polar_weights` makes one.

    weights: the weights w, which keep their identity. radius, norm: for each (R,) float64, g or alpha and
    |v|; None for a plain weight. telemetry: for each (R, 5) as of `functional.polar_sgd_`, or None.
    """

    def __init__(self, weights, kinds, dims, norm, radius_lr_ratio, retraction, instances, telemetry) -> None:
        self.weights, self.kinds, self.dims, self.instances = weights, kinds, dims, instances
        self.radius_lr_ratio, self.retraction = radius_lr_ratio, retraction
        self.radius, self.norm, self.telemetry = [], [], []
        for w, kind, dim in zip(weights, kinds, dims):
            if kind is None:
                parts = None, None, None
            else:
                length = functional.row_norm(w, dim).double().reshape(-1)
                n = length.clone() if norm == "weight" else torch.full_like(length, norm)
                table = torch.full((len(length), 5), math.nan, dtype=torch.float64, device=w.device)
                parts = length.log() if kind == "ewn" else length, n, table if telemetry else None
            for column, part in zip((self.radius, self.norm, self.telemetry), parts):
                column.append(part)
        # One call of the kernel takes all weights of a kind.
        self._calls = {k: [i for i, kind in enumerate(kinds) if kind == k] for k in dict.fromkeys(kinds)}
        self._saved = None

    def step(self, grads: Sequence[Tensor], lr: float | Tensor) -> None:
        """One step of descent. grads: dL/dw of each weight. lr: a number, or (E,) for E instances."""
        for kind, indices in self._calls.items():
            if kind is None:
                for i in indices:
                    self.weights[i].sub_(
                        grads[i] * _as_factor(_rates(lr, grads[i], self.instances), grads[i])
                    )
            elif (
                isinstance(lr, Tensor) and lr.numel() > 1
            ):  # the kernel takes rates of rows beside one weight
                for i in indices:
                    self._polar(kind, [i], grads, _rates(lr, grads[i], self.instances))
            else:
                self._polar(kind, indices, grads, lr)

    def _polar(self, kind, indices, grads, lr) -> None:
        def pick(column):
            return [column[i] for i in indices]

        telemetry = pick(self.telemetry)
        functional.polar_sgd_(
            pick(self.weights),
            [grads[i].contiguous() for i in indices],
            pick(self.radius),
            pick(self.norm),
            kind=kind,
            dims=pick(self.dims),
            lr=lr,
            radius_lr=lr * self.radius_lr_ratio,
            retraction=self.retraction,
            telemetry=None if telemetry[0] is None else telemetry,
        )

    def _state(self) -> list[Tensor]:
        return [x for x in (*self.weights, *self.radius, *self.norm) if x is not None]

    def snapshot(self) -> None:
        """Remembers all weights and coordinates. One snapshot is kept, the last."""
        self._saved = [x.clone() for x in self._state()]

    def rollback(self, instances: Tensor | None = None) -> None:
        """Puts everything, or the instances where the (E,) bool tensor is true, back to the snapshot.

        Raises: RuntimeError without a snapshot.
        """
        if self._saved is None:
            raise RuntimeError("rollback() needs a snapshot(): none was taken")
        for x, saved in zip(self._state(), self._saved):
            if instances is None:
                x.copy_(saved)
            else:
                _choose(instances, saved, x, out=x)


class TorchWeights(PolarWeights):
    """The same in pure torch: w = g v/|v| or e^alpha v/|v|, autograd, and plain descent on both.

    weights, radius and norm are those after the last step, as new tensors; there is no telemetry.
    """

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self._leaves = []
        for w, kind, dim, radius, norm in zip(self.weights, self.kinds, self.dims, self.radius, self.norm):
            if kind is None:
                self._leaves.append([w])
                continue
            shape = layers.radius_shape(w, dim)
            v = w / _length(w, dim) * norm.to(w.dtype).reshape(shape)
            self._leaves.append(
                [radius.to(w.dtype).reshape(shape).clone().requires_grad_(), v.requires_grad_()]
            )
        self._compute()

    @torch.enable_grad()
    def _compute(self) -> None:
        self._graphs = []
        for i, (leaves, kind, dim) in enumerate(zip(self._leaves, self.kinds, self.dims)):
            if kind is None:
                self._graphs.append(leaves[0])
                continue
            radius, v = leaves
            length = _length(v, dim)
            self._graphs.append((radius.exp() if kind == "ewn" else radius) * (v / length))
            self.radius[i], self.norm[i] = radius.detach().reshape(-1), length.detach().reshape(-1)
        self.weights = [w.detach() for w in self._graphs]

    def step(self, grads: Sequence[Tensor], lr: float | Tensor) -> None:
        for leaves, graph, grad, dim, norm in zip(self._leaves, self._graphs, grads, self.dims, self.norm):
            rate = _rates(lr, grad, self.instances)
            polar = len(leaves) == 2
            slopes = torch.autograd.grad(graph, leaves, grad) if polar else [grad]
            rates = (rate * self.radius_lr_ratio, rate) if polar else (rate,)
            with torch.no_grad():
                for leaf, slope, rate in zip(leaves, slopes, rates):
                    leaf.sub_(slope * _as_factor(rate, slope))
                if polar and self.retraction == "renormalize":
                    leaves[1].mul_(norm.reshape(leaves[0].shape) / _length(leaves[1], dim))
        self._compute()

    def _state(self) -> list[Tensor]:
        return [leaf.detach() for leaves in self._leaves for leaf in leaves]

    def rollback(self, instances: Tensor | None = None) -> None:
        super().rollback(instances)
        self._compute()


def _rates(lr: float | Tensor, x: Tensor, instances: int) -> float | Tensor:
    """A rate of each instance as one of each row of x."""
    if not isinstance(lr, Tensor) or lr.numel() == 1:
        return lr
    return lr[:, None].expand(instances, x.shape[0] // instances).reshape(-1)


def _as_factor(rates: float | Tensor, x: Tensor) -> float | Tensor:
    """Rates of the rows of x, to be multiplied with it."""
    many = isinstance(rates, Tensor) and rates.numel() > 1
    return rates.view(-1, *[1] * (x.ndim - 1)) if many else rates


def _choose(condition: Tensor, x: Tensor, y: Tensor, **out) -> Tensor:
    """torch.where for the rows of instances: x where the (E,) condition is true, else y."""
    E = len(condition)
    out = {name: tensor.view(E, -1) for name, tensor in out.items()}
    return torch.where(condition[:, None], x.reshape(E, -1), y.reshape(E, -1), **out).view(y.shape)


def _length(v: Tensor, dim: int | None) -> Tensor:
    return torch.linalg.vector_norm(
        v, dim=tuple(i for i in range(v.ndim) if i != dim), keepdim=dim is not None
    )


def polar_weights(
    weights: Sequence[Tensor],
    kind: str | None | Sequence[str | None],
    *,
    dims: int | None | Sequence[int | None] = 0,
    norm: float | str = 1.0,
    radius_lr_ratio: float = 1.0,
    retraction: str = "project",
    instances: int = 1,
    telemetry: bool = False,
    backend: str = "wnkernels",
) -> PolarWeights:
    """Copies of weights with polar coordinates, to be stepped.

    Args:
        weights: tensors, float32 or float64.
        kind: "swn", "ewn" or None (plain descent on w), or one for each weight.
        dims: the dim of rows, or None for one radius of the whole weight, or one for each weight.
        norm: |v| of all rows to start with, or "weight" for |w|.
        radius_lr_ratio: the rate of the radius over that of the direction.
        retraction: "project" (raw v, as torch), "renormalize" or, with our kernels, "geodesic"; see
            `functional.polar_sgd_`.
        instances: how many instances share the rows (dim 0) of each weight, evenly and in order.
        telemetry: keep what the steps report; our kernels only.
        backend: "wnkernels", or "torch" for the same in pure torch.

    Raises: TypeError for weights that are not tensors of these dtypes, ValueError for any other argument that
    is not as above, and for a row that is zero or not finite and so has no direction.
    """
    if backend not in RETRACTIONS:
        raise ValueError(f"backend must be 'wnkernels' or 'torch', got {backend!r}")
    if retraction not in RETRACTIONS[backend]:
        allowed = ", ".join(map(repr, RETRACTIONS[backend]))
        raise ValueError(f"retraction must be one of {allowed} for backend={backend!r}, got {retraction!r}")
    if telemetry and backend == "torch":
        raise ValueError("telemetry must be False for backend='torch', whose steps report nothing")
    if norm != "weight" and not (isinstance(norm, (int, float)) and 0 < norm < math.inf):
        raise ValueError(f"norm must be 'weight' or a positive number, got {norm!r}")
    if not 0 <= radius_lr_ratio < math.inf:
        raise ValueError(f"radius_lr_ratio must be at least 0 and finite, got {radius_lr_ratio}")
    weights = list(weights)
    kinds = list(kind) if isinstance(kind, (list, tuple)) else [kind] * len(weights)
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims] * len(weights)
    if not len(weights) == len(kinds) == len(dims):
        raise ValueError(
            f"kind and dims must have one entry for each of {len(weights)} weights, got {len(kinds)} and "
            f"{len(dims)}"
        )
    for i, (w, k) in enumerate(zip(weights, kinds)):
        if not isinstance(w, Tensor) or w.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"weights[{i}] must be a tensor of float32 or float64, got {getattr(w, 'dtype', type(w))}"
            )
        if k not in KINDS:
            raise ValueError(f"kind must be 'swn', 'ewn' or None, got {k!r}")
        dims[i] = layers.check_dim(dims[i], w)
        if instances > 1 and (dims[i] != 0 or w.shape[0] % instances):
            raise ValueError(
                f"instances={instances} must divide the rows of weights[{i}], of shape {tuple(w.shape)}, "
                f"and dims must be 0, got {dims[i]}"
            )
        length = functional.row_norm(w.detach(), dims[i]).reshape(-1)
        if k is not None and not ((length > 0) & length.isfinite()).all():
            raise ValueError(f"weights[{i}] must have no row that is zero or not finite: it has no direction")
    copies = [w.detach().clone(memory_format=torch.contiguous_format) for w in weights]
    made = PolarWeights if backend == "wnkernels" else TorchWeights
    return made(copies, kinds, dims, norm, radius_lr_ratio, retraction, instances, telemetry)


# ------------------------------------------------------------------------------------- the whole of a descent


def objective(forward: Callable, loss: Callable) -> Callable:
    """weights -> (log L, [(dL/dw)/L]), by autograd.

    Args:
        forward: list of weights -> outputs.
        loss: outputs -> (log L, (dL/doutputs)/L), as the functions of `dynamics.losses`.
    """

    def evaluate(weights):
        weights = [w.detach().requires_grad_() for w in weights]
        outputs = forward(weights)
        log_loss, gradient = loss(outputs.detach())
        return log_loss, torch.autograd.grad(outputs, weights, gradient)

    return evaluate


@dataclass
class Descent:
    """What `normalized_descent` returns.

    weights: at the end. log_loss: () or (E,) for E instances, that of these weights. reached: whether it is
    at or below `stop`. steps: how many were tried, the undone ones included. lr: the last. All of the shape
    of log_loss.
    snapshots: level -> the weights when log L first was at or below it.
    """

    weights: list[Tensor]
    log_loss: Tensor
    reached: Tensor
    steps: Tensor
    lr: Tensor
    snapshots: dict[float, list[Tensor]] = field(default_factory=dict)


def normalized_descent(
    objective: Callable,
    point: PolarWeights,
    *,
    lr: float,
    lr_cap: float,
    frac: float,
    stop: float,
    max_steps: int = 1_000_000,
    patience: int = 0,
    factor: float = 1.1,
    levels: Sequence[float] = (),
    callback: Callable | None = None,
) -> Descent:
    """Descent with the rate lr L^(1/frac - 1), where lr grows with each accepted step and else falls.

    A step is accepted if the loss falls.

    Args:
        objective: list of weights -> (log L, [(dL/dw)/L]), with log L () or (E,) for E instances.
        point: where to start; stepped in place.
        lr, lr_cap, factor: lr is multiplied by `factor` after an accepted step while it is below lr_cap, and
            divided by it after an undone one.
        frac: 0 for the rate lr/L.
        stop: the log L at which to end.
        max_steps: the most steps to try.
        patience: give up, as a whole or an instance, where log L has fallen by less than 0.001 in this many
            steps; 0 for never.
        levels: values of log L at which the weights are kept; one instance only.
        callback: (step, log L, point, gradients over L), called at the start, and after each step that was
            accepted; with several instances after each step.

    Returns: a `Descent`.

    Raises: ValueError for an argument that is not as above, and for a loss that is not finite at the start.
    """
    if frac != 0 and not frac >= 1:
        raise ValueError(f"frac must be 0 or at least 1, got {frac}")
    if not (0 < lr < math.inf and factor > 1):
        raise ValueError(f"lr must be positive and finite, and factor above 1, got {lr} and {factor}")
    log_loss, grads = objective(point.weights)
    if not log_loss.isfinite().all():
        raise ValueError(f"objective must be finite at the start, got log L = {log_loss}")
    if log_loss.shape not in ((), (point.instances,)) or (log_loss.ndim == 0 and point.instances > 1):
        raise ValueError(
            f"objective must give one log L for each of {point.instances} instances, got shape "
            f"{tuple(log_loss.shape)}"
        )
    if levels and log_loss.ndim:
        raise ValueError("levels must be empty for several instances")
    callback = callback or (lambda *_: None)
    callback(0, log_loss, point, grads)
    power = 1 / frac if frac else 0.0
    descend = _descend_many if log_loss.ndim else _descend_one
    return descend(
        objective,
        point,
        log_loss,
        grads,
        lr,
        lr_cap,
        power,
        stop,
        max_steps,
        patience,
        factor,
        levels,
        callback,
    )


def _descend_one(
    objective, point, log_loss, grads, lr, lr_cap, power, stop, max_steps, patience, factor, levels, callback
):
    snapshots, pending = {}, sorted(levels, reverse=True)
    value, step = log_loss.item(), 0
    before = math.inf
    while value > stop and step < max_steps:
        if patience and step % patience == 0:
            if not value < before - GAIN:
                break
            before = value
        step += 1
        point.snapshot()
        point.step(grads, lr * math.exp(value * power))
        new_log_loss, new_grads = objective(point.weights)
        if not new_log_loss.item() < value:
            point.rollback()
            lr /= factor
            continue
        log_loss, grads, value = new_log_loss, new_grads, new_log_loss.item()
        lr = lr * factor if lr < lr_cap else lr
        while pending and value <= pending[0]:
            snapshots[pending.pop(0)] = [w.clone() for w in point.weights]
        callback(step, log_loss, point, grads)
    weights = [w.clone() for w in point.weights]
    return Descent(
        weights,
        log_loss,
        log_loss <= stop,
        torch.tensor(step),
        torch.tensor(lr, dtype=torch.float64),
        snapshots,
    )


def _descend_many(
    objective, point, log_loss, grads, lr, lr_cap, power, stop, max_steps, patience, factor, _, callback
):
    lr, steps = torch.full_like(log_loss, lr), torch.zeros_like(log_loss)
    active, before = log_loss > stop, torch.full_like(log_loss, math.inf)
    for step in range(max_steps):
        if patience and step % patience == 0:
            active &= log_loss < before - GAIN
            before = log_loss
        if not active.any():
            break
        steps += active
        point.snapshot()
        point.step(grads, lr * torch.exp(log_loss * power))
        new_log_loss, new_grads = objective(point.weights)
        accepted = (new_log_loss < log_loss) & active
        point.rollback(~accepted)
        log_loss = torch.where(accepted, new_log_loss, log_loss)
        grads = [_choose(accepted, new, old) for new, old in zip(new_grads, grads)]
        lr = torch.where(
            accepted, torch.where(lr < lr_cap, lr * factor, lr), torch.where(active, lr / factor, lr)
        )
        active &= log_loss > stop
        callback(step + 1, log_loss, point, grads)
    return Descent([w.clone() for w in point.weights], log_loss, log_loss <= stop, steps.long(), lr)


class multi_stage:
    """A schedule of several stages: at each milestone lr is divided by `factor`, in all groups.

    With ``rescale`` the |v| of a polar optimizer, whose equilibrium is proportional to lr^(1/4), is divided
    by factor^(1/4) at the same time, and its momentum buffers with it (Wan et al., arXiv:2006.08419, section
    5).

    Args:
        optimizer: PolarSGD, PolarAdam or PolarAdamW; without ``rescale`` any of torch's.
        milestones: increasing numbers of steps.
        factor: above 1.

    ``step()`` is to be called after each step of the optimizer.

    Raises: ValueError for an argument that is not as above.
    """

    def __init__(
        self, optimizer, milestones: Sequence[int], factor: float = 10.0, *, rescale: bool = False
    ) -> None:
        if not factor > 1 or sorted(set(milestones)) != list(milestones):
            raise ValueError(
                f"factor must be above 1 and milestones increasing, got {factor} and {list(milestones)}"
            )
        if rescale and not hasattr(optimizer, "rescale_direction"):
            raise ValueError(
                f"optimizer must be a polar one for rescale=True, got {type(optimizer).__name__}"
            )
        self.optimizer, self.milestones, self.factor, self.rescale = (
            optimizer,
            set(milestones),
            factor,
            rescale,
        )
        self.count = 0

    def step(self) -> None:
        self.count += 1
        if self.count in self.milestones:
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr"] / self.factor
            if self.rescale:
                self.optimizer.rescale_direction(self.factor**-0.25)
