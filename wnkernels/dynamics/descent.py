"""Gradient descent in polar coordinates, with losses that have left the range of floating point.

    point = polar_weights(weights, kind="ewn")                       # our kernels, or the same in pure torch
    run = normalized_descent(objective, point, lr=0.01, lr_cap=0.1, frac=5, stop=-50)

`normalized_descent` is the training loop of Morwani and Ramaswamy (arXiv:2010.12909, published code): a step has the
rate lr L^(1/frac - 1); where the loss does not fall the step is undone, bit for bit, and lr is lowered.

Many instances of one small problem are one problem: their neurons are the rows of one weight. With ``instances=E`` the
first R/E rows of each weight belong to the first instance, and so on; each has its own rate and its own verdict.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import functional
from .. import nn as layers

__all__ = ["Descent", "PolarWeights", "TorchWeights", "multi_stage", "normalized_descent", "objective", "polar_weights"]


class PolarWeights:
    """Weights with their polar coordinates, stepped by the fused polar step; `polar_weights` makes one.

    weights: the weights w, as tensors that keep their identity. radius, norm: (R,) float64 for each, g or alpha and
    |v|; None for a plain weight. telemetry: (R, 5) for each as of `functional.polar_sgd_`, or None.
    """

    def __init__(self, weights, kinds, dims, norm, radius_lr_ratio, retraction, instances, telemetry) -> None:
        self.weights = [w.detach().clone(memory_format=torch.contiguous_format) for w in weights]
        self.kinds, self.dims, self.instances = kinds, dims, instances
        self.radius_lr_ratio, self.retraction = radius_lr_ratio, retraction
        self.radius, self.norm, self.telemetry = [], [], []
        for w, kind, dim in zip(self.weights, kinds, dims):
            length = None if kind is None else functional.row_norm(w, dim).double().reshape(-1)
            self.radius.append(length.log() if kind == "ewn" else length)
            own = kind is not None and isinstance(norm, str)
            self.norm.append(None if kind is None else length.clone() if own else torch.full_like(length, norm))
            rows = telemetry and kind is not None
            self.telemetry.append(torch.full((len(length), 5), math.nan, dtype=torch.float64) if rows else None)
        self._saved = None

    def step(self, grads: Sequence[Tensor], lr: float | Tensor) -> None:
        """One step of gradient descent. grads: dL/dw of each weight. lr: a number, or (E,) for E instances."""
        many = isinstance(lr, Tensor) and lr.numel() > 1
        for kind in dict.fromkeys(self.kinds):
            mine = [i for i, k in enumerate(self.kinds) if k == kind]
            if kind is None:
                for i in mine:
                    rate = self._of_rows(lr, i).view(-1, *[1] * (self.weights[i].ndim - 1)) if many else lr
                    self.weights[i].sub_(grads[i] * rate)
            elif many:
                for i in mine:
                    self._polar(kind, [i], grads, self._of_rows(lr, i))
            else:
                self._polar(kind, mine, grads, lr)

    def _of_rows(self, values: Tensor, i: int) -> Tensor:
        return values.repeat_interleave(self.weights[i].shape[0] // self.instances)

    def _polar(self, kind, indices, grads, lr) -> None:
        functional.polar_sgd_(
            [self.weights[i] for i in indices],
            [grads[i].contiguous() for i in indices],
            [self.radius[i] for i in indices],
            [self.norm[i] for i in indices],
            kind=kind,
            dims=[self.dims[i] for i in indices],
            lr=lr,
            radius_lr=lr * self.radius_lr_ratio,
            retraction=self.retraction,
            telemetry=[self.telemetry[i] for i in indices] if self.telemetry[indices[0]] is not None else None,
        )

    def _tensors(self) -> list[Tensor]:
        return [x for x in (*self.weights, *self.radius, *self.norm) if x is not None]

    def snapshot(self) -> None:
        """Remembers all weights and coordinates."""
        self._saved = [x.clone() for x in self._tensors()]

    def rollback(self, instances: Tensor | None = None) -> None:
        """Puts everything, or the instances where the (E,) bool tensor is true, back to the snapshot, bit for bit.

        Raises: RuntimeError without a snapshot.
        """
        if self._saved is None:
            raise RuntimeError("rollback() needs a snapshot(): none was taken")
        for x, saved in zip(self._tensors(), self._saved):
            if instances is None:
                x.copy_(saved)
            else:
                rows = instances.repeat_interleave(len(x) // self.instances).view(-1, *[1] * (x.ndim - 1))
                torch.where(rows, saved, x, out=x)


class TorchWeights(PolarWeights):
    """The same in pure torch: w = g v/|v| or e^alpha v/|v| by torch's operations, autograd, plain descent on both.

    radius and norm are those of the current leaves, and the weights are new tensors after each step.
    """

    def __init__(self, *args) -> None:
        super().__init__(*args)
        if self.retraction == "geodesic":
            raise ValueError("retraction must be 'project' or 'renormalize' for backend='torch', got 'geodesic'")
        plain, self._leaves = self.weights, []
        for w, kind, dim, radius, norm in zip(plain, self.kinds, self.dims, self.radius, self.norm):
            if kind is None:
                self._leaves.append((w,))
                continue
            shape = layers.radius_shape(w, dim)
            length = functional.row_norm(w, dim).reshape(shape)
            v = w / length * norm.reshape(shape)
            self._leaves.append((radius.reshape(shape).clone().requires_grad_(), v.requires_grad_()))
        self._compute()

    def _compute(self) -> None:
        self._graphs = []
        for leaves, kind, dim in zip(self._leaves, self.kinds, self.dims):
            if kind is None:
                self._graphs.append(leaves[0])
                continue
            radius, v = leaves
            others = tuple(i for i in range(v.ndim) if i != dim)
            length = torch.linalg.vector_norm(v, dim=others, keepdim=dim is not None)
            self._graphs.append((radius.exp() if kind == "ewn" else radius) * (v / length))
        self.weights = [w.detach() for w in self._graphs]

    @property
    def radius(self):
        return [None if len(x) == 1 else x[0].detach().reshape(-1) for x in self._leaves] if self._made else self._radius

    def step(self, grads: Sequence[Tensor], lr: float | Tensor) -> None:
        raise NotImplementedError


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
        retraction: "project" (raw v, as torch), "renormalize" or "geodesic", as of `functional.polar_sgd_`.
        instances: how many instances share the rows of each weight.
        telemetry: keep what the steps report.
        backend: "wnkernels", or "torch" for the same in pure torch.

    Raises: ValueError for an argument that is not as above, and for a zero row.
    """
    raise NotImplementedError


def objective(forward: Callable, loss: Callable) -> Callable:
    """weights -> (log L, [(dL/dw)/L]), by autograd.

    Args:
        forward: list of weights -> outputs.
        loss: outputs -> (log L, (dL/doutputs)/L), such as a function of `dynamics.losses` with its target bound.
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

    log_loss: () or (E,), the last accepted. reached: bool of that shape. steps: tried, the undone included, int64 of
    that shape. lr: the last. snapshots: level -> the weights when log L first was at or below it.
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
    levels: Sequence[float] = (),
    callback: Callable | None = None,
    factor: float = 1.1,
) -> Descent:
    """Descent with the rate lr L^(1/frac - 1), of which lr grows with accepted steps and falls with undone ones.

    Args:
        objective: list of weights -> (log L, [(dL/dw)/L]), with log L () or (E,) for E instances.
        point: where to start; stepped in place.
        lr, lr_cap, factor: lr is multiplied by `factor` after an accepted step while it is below lr_cap, and divided
            by it after an undone one.
        frac: 0 for the rate lr/L.
        stop: the log L at which to end.
        max_steps: the most steps to try.
        levels: values of log L at which the weights are kept.
        callback: (step, log L, point, gradients over L), called at the start and after each accepted step.

    Returns: a `Descent`.
    """
    raise NotImplementedError


def multi_stage(optimizer, milestones: Sequence[int], factor: float, *, rescale: bool = False):
    """A schedule for polar optimizers: lr is divided by `factor` at each milestone, a number of steps.

    Args:
        rescale: also divide |v| by factor^(1/4), with the momentum buffers (Wan et al., arXiv:2006.08419).

    Returns: an object with ``step()``, to be called after each step of the optimizer.
    """
    raise NotImplementedError
