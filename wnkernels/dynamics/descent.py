"""Gradient descent in polar coordinates, with losses that have left the range of floating point.

    point = polar_weights(weights, kind="ewn")                       # our kernels, or the same in pure torch
    run = normalized_descent(objective(forward, loss), point, lr=0.01, lr_cap=0.1, frac=5, stop=-50)

`normalized_descent` is the training loop of Morwani and Ramaswamy (arXiv:2010.12909, published code): a step
has the rate lr L^(1/frac - 1); where the loss does not fall the step is undone, bit for bit, and lr is
lowered.

Many instances of one small problem are one problem: their neurons are the rows of one weight. With
``instances=E`` the first R/E rows of each weight belong to the first instance, and so on; each has its own
rate and its own verdict, and may have its own kind.
"""

import math
from collections import Counter
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


@dataclass
class _Part:
    """The rows of a weight that are of one kind: views of the weight and of what belongs to it.

    rows: None for all. instances: the range of the instances whose rows they are. rates: a place for a rate
    of each row, where there are several instances.
    """

    index: int
    kind: str | None
    dim: int | None
    rows: slice | None
    instances: slice
    weight: Tensor
    rates: Tensor | None = None
    radius: Tensor | None = None
    norm: Tensor | None = None
    table: Tensor | None = None

    def of(self, x: Tensor | None) -> Tensor | None:
        """These rows of a tensor that has all of the weight's."""
        return x if x is None or self.rows is None else x[self.rows]


class PolarWeights:
    """Weights with their polar coordinates, stepped by the fused polar step. `polar_weights` makes one.

    weights: the weights w, which keep their identity. grads: a place for the gradient of each; `snapshot` and
    `rollback` remember it too. radius, norm: for each (R,) float64, g or alpha and |v|; None for a plain
    weight, and NaN in the plain rows of one that has others too.
    """

    def __init__(self, weights, kinds, dims, norm, radius_lr_ratio, retraction, instances, telemetry) -> None:
        self.kinds, self.dims, self.instances = kinds, dims, instances
        self.radius_lr_ratio, self.retraction = radius_lr_ratio, retraction
        radius, norms, tables = [], [], []
        for i, (w, kind, dim) in enumerate(zip(weights, kinds, dims)):
            parts = None, None, None
            if kind is not None:
                length = functional.row_norm(w, dim).double().reshape(-1)
                if isinstance(norm, list):
                    n = norm[i]
                else:
                    n = length.clone() if norm == "weight" else torch.full_like(length, norm)
                table = torch.full((len(length), 4), math.nan, dtype=torch.float64, device=w.device)
                parts = length, n, table if telemetry else None
            for column, part in zip((radius, norms, tables), parts):
                column.append(part)
        count, grads = len(weights), [torch.zeros_like(w) for w in weights]
        shared = self._share([*weights, *grads, *radius, *norms], [slice(0, instances)] * 4 * count)
        self.weights, self.grads, self.radius, self.norm = (
            shared[i : i + count] for i in range(0, 4 * count, count)
        )
        self._tables = tables
        self._owners, self._rates = [None] * count, [None] * count  # of each row: its instance, and its rate
        if instances > 1:
            everyone = [torch.arange(instances, device=w.device) for w in weights]
            self._owners = [x.repeat_interleave(len(w) // instances) for x, w in zip(everyone, weights)]
            self._rates = [torch.empty(len(w), dtype=torch.float64, device=w.device) for w in weights]
        self._parts = [part for i in range(count) for part in self._split(i)]
        self._calls = self._grouped()
        self._saved = None

    def _split(self, i: int) -> list[_Part]:
        w, kind = self.weights[i], self.kinds[i]
        if not isinstance(kind, dict):
            kind = {kind: self.instances}
        each, first, parts = w.shape[0] // self.instances, 0, []
        for name, count in kind.items():
            last = first + count
            rows = None if count == self.instances else slice(each * first, each * last)
            part = _Part(i, name, self.dims[i], rows, slice(first, last), w if rows is None else w[rows])
            part.rates, part.radius, part.norm, part.table = (
                part.of(column[i]) for column in (self._rates, self.radius, self.norm, self._tables)
            )
            if name == "ewn":
                part.radius.log_()
            elif name is None and part.radius is not None:
                part.radius.fill_(math.nan), part.norm.fill_(math.nan)
            parts.append(part)
            first = last
        return parts

    def _grouped(self) -> list[tuple[list[_Part], list[Tensor], dict]]:
        """The calls of a step: parts, their rows of `grads`, and the kernel's arguments that never change.

        One call takes all weights of a kind, but rates of rows only beside one weight.
        """
        groups = {}
        for i, part in enumerate(self._parts):
            groups.setdefault(part.kind if self.instances == 1 else i, []).append(part)
        return [
            (
                parts,
                [part.of(self.grads[part.index]) for part in parts],
                dict(
                    weights=[part.weight for part in parts],
                    radius=[part.radius for part in parts],
                    norm=[part.norm for part in parts],
                    kind=parts[0].kind,
                    dims=[part.dim for part in parts],
                    retraction=self.retraction,
                    telemetry=None if parts[0].table is None else [part.table for part in parts],
                ),
            )
            for parts in groups.values()
        ]

    def _share(self, tensors: Sequence[Tensor | None], spans: Sequence[slice]) -> list[Tensor | None]:
        """The tensors as views of one buffer for each dtype, so that one copy remembers them all.

        spans: the instances whose rows each tensor has. None stays None.
        """
        views, self._state = list(tensors), []
        present = [i for i, x in enumerate(tensors) if x is not None]
        for dtype in dict.fromkeys(tensors[i].dtype for i in present):
            chosen = [i for i in present if tensors[i].dtype == dtype]
            buffer = torch.cat([tensors[i].reshape(-1) for i in chosen])
            for i, part in zip(chosen, buffer.split([tensors[i].numel() for i in chosen])):
                views[i] = part.view(tensors[i].shape)
            owner = None
            if self.instances > 1:  # of each entry of the buffer
                everyone = torch.arange(self.instances, device=buffer.device)
                owners = [everyone[spans[i]] for i in chosen]
                each = [views[i].numel() // len(o) for i, o in zip(chosen, owners)]
                owner = torch.cat([o.repeat_interleave(n) for o, n in zip(owners, each)])
            self._state.append((buffer, owner))
        return views

    def step(self, grads: Sequence[Tensor], lr: float | Tensor) -> None:
        """One step of descent. grads: dL/dw of each weight. lr: a number, or (E,) for E instances."""
        many = self._spread(lr)
        for parts, kept, arguments in self._calls:
            some = kept if grads is self.grads else [part.of(grads[part.index]) for part in parts]
            rate = parts[0].rates if many else lr  # several parts have one rate
            if parts[0].kind is None:
                for part, grad in zip(parts, some):
                    if many:
                        part.weight.addcmul_(grad, _column(rate, grad), value=-1)
                    else:
                        part.weight.sub_(grad * lr)
            else:
                functional.polar_sgd_(
                    grads=[grad.contiguous() for grad in some],
                    lr=rate,
                    radius_lr=rate if self.radius_lr_ratio == 1 else rate * self.radius_lr_ratio,
                    **arguments,
                )

    def _spread(self, lr: float | Tensor) -> bool:
        """Whether there are rates of instances, which become those of rows."""
        many = isinstance(lr, Tensor) and lr.numel() > 1
        if many:
            for owner, rates in zip(self._owners, self._rates):
                torch.index_select(lr.double(), 0, owner, out=rates)
        return many

    def telemetry(self) -> list[dict[str, Tensor] | None]:
        """What the last step did to each weight, as `functional.telemetry`; None for a plain one.

        NaN in the plain rows of a weight that has others too.

        Raises: RuntimeError where the point was made without telemetry.
        """
        result = []
        for i, kind in enumerate(self.kinds):
            parts = [part for part in self._parts if part.index == i]
            if kind is None:
                result.append(None)
                continue
            if parts[0].table is None:
                raise RuntimeError("telemetry() needs polar_weights(..., telemetry=True), got telemetry=False")
            values = [functional.telemetry(part.table, part.radius, part.norm, part.kind or "swn") for part in parts]
            result.append({name: torch.cat([v[name] for v in values]) for name in values[0]})
        return result

    def snapshot(self) -> None:
        """Remembers all weights, gradients and coordinates. One snapshot is kept, the last."""
        if self._saved is None:
            self._saved = [buffer.clone() for buffer, _ in self._state]
        else:
            for saved, (buffer, _) in zip(self._saved, self._state):
                saved.copy_(buffer)

    def rollback(self, instances: Tensor | None = None) -> None:
        """Puts everything, or the instances where the (E,) bool tensor is true, back to the snapshot.

        Raises: RuntimeError without a snapshot.
        """
        if self._saved is None:
            raise RuntimeError("rollback() needs a snapshot(): none was taken")
        for saved, (buffer, owner) in zip(self._saved, self._state):
            if instances is None:
                buffer.copy_(saved)
            else:
                undone = instances if owner is None else instances.index_select(0, owner)
                torch.where(undone, saved, buffer, out=buffer)

    def take(self, instances: Tensor) -> "PolarWeights":
        """A new point that has only these instances, (K,) int64, increasing; telemetry starts anew."""

        def rows(x):
            return None if x is None else x.view(self.instances, -1)[instances].view(-1, *x.shape[1:])

        chosen, kinds = instances.tolist(), []
        for kind in self.kinds:
            if isinstance(kind, dict):
                owners = [name for name, count in kind.items() for _ in range(count)]
                kind = dict(Counter(owners[i] for i in chosen))
            kinds.append(kind)
        taken = type(self)(
            [rows(w) for w in self.weights],
            kinds,
            self.dims,
            [rows(n) for n in self.norm],
            self.radius_lr_ratio,
            self.retraction,
            len(chosen),
            any(table is not None for table in self._tables),
        )
        taken.keep([rows(grad) for grad in self.grads])
        return taken

    def keep(self, grads: Sequence[Tensor]) -> None:
        """Writes the gradients to `grads`."""
        for kept, grad in zip(self.grads, grads):
            kept.copy_(grad)


class TorchWeights(PolarWeights):
    """The same in pure torch: w = g v/|v| or e^alpha v/|v|, autograd, and plain descent on both.

    weights, radius and norm are those after the last step, as new tensors; there is no telemetry.
    """

    def __init__(self, *args) -> None:
        super().__init__(*args)
        leaves, spans = [], []
        for part in self._parts:
            w = part.weight
            if part.kind is not None:
                shape = layers.radius_shape(w, part.dim)
                leaves.append(part.radius.to(w.dtype).reshape(shape))
                w = w / _length(w, part.dim) * part.norm.to(w.dtype).reshape(shape)
            leaves.append(w)
            spans += [part.instances] * (1 if part.kind is None else 2)
        everyone, count = slice(0, self.instances), len(self.grads)
        shared = self._share([*leaves, *self.grads], [*spans, *[everyone] * count])
        leaves, self.grads = shared[:-count], shared[-count:]
        # Leaves with version counters of their own: a graph must not notice what happens to its neighbours.
        leaves = (x.data for x in leaves)
        self._leaves = [
            [next(leaves)] if part.kind is None else [next(leaves).requires_grad_() for _ in range(2)]
            for part in self._parts
        ]
        self._compute()

    @torch.enable_grad()
    def _compute(self) -> None:
        self._graphs = []
        columns = [[[] for _ in self.kinds] for _ in range(3)]
        for part, leaves in zip(self._parts, self._leaves):
            if part.kind is None:
                w, values = leaves[0], (part.radius, part.norm)
            else:
                radius, v = leaves
                length = _length(v, part.dim)
                w = (radius.exp() if part.kind == "ewn" else radius) * (v / length)
                values = radius.detach().reshape(-1), length.detach().reshape(-1)
            self._graphs.append(w)
            for column, x in zip(columns, (w.detach(), *values)):
                column[part.index].append(x)
        self.weights, self.radius, self.norm = (
            [xs[0] if len(xs) == 1 else torch.cat(xs) for xs in column] for column in columns
        )

    def step(self, grads: Sequence[Tensor], lr: float | Tensor) -> None:
        many = self._spread(lr)
        for part, leaves, graph in zip(self._parts, self._leaves, self._graphs):
            grad, rate = part.of(grads[part.index]), part.rates if many else lr
            if part.kind is None:
                slopes, rates = [grad], [rate]
            else:
                slopes, rates = torch.autograd.grad(graph, leaves, grad), [rate * self.radius_lr_ratio, rate]
            with torch.no_grad():
                before = _length(leaves[-1], part.dim) if self.retraction == "renormalize" else None
                for leaf, slope, rate in zip(leaves, slopes, rates):
                    leaf.sub_(slope * (_column(rate, slope) if many else rate))
                if part.kind is not None and self.retraction == "renormalize":
                    leaves[1].mul_(before / _length(leaves[1], part.dim))
        self._compute()

    def rollback(self, instances: Tensor | None = None) -> None:
        super().rollback(instances)
        self._compute()


def _column(rates: Tensor, x: Tensor) -> Tensor:
    """Rates of the rows of x, to be multiplied with it."""
    return rates.view(-1, *[1] * (x.ndim - 1))


def _length(v: Tensor, dim: int | None) -> Tensor:
    return torch.linalg.vector_norm(
        v, dim=tuple(i for i in range(v.ndim) if i != dim), keepdim=dim is not None
    )


def polar_weights(
    weights: Sequence[Tensor],
    kind: str | None | Sequence[str | None] | dict[str | None, int],
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
        kind: "swn", "ewn" or None (plain descent on w), or one for each weight. Or a dict, how many of the
            instances are of each kind, in this order.
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
        if isinstance(k, dict) and (min(k.values(), default=0) < 1 or sum(k.values()) != instances):
            raise ValueError(f"kind must have counts above 0 that sum to instances={instances}, got {k}")
        for name in k if isinstance(k, dict) else [k]:
            if name not in KINDS:
                raise ValueError(f"kind must be 'swn', 'ewn' or None, got {name!r}")
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
    lr: float | Tensor,
    lr_cap: float | Tensor,
    frac: float | Tensor,
    stop: float,
    max_steps: int = 1_000_000,
    patience: int = 0,
    factor: float = 1.1,
    levels: Sequence[float] = (),
    callback: Callable | None = None,
    shrink: bool = False,
) -> Descent:
    """Descent with the rate lr L^(1/frac - 1), where lr grows with each accepted step and else falls.

    A step is accepted if the loss falls.

    Args:
        objective: list of weights -> (log L, [(dL/dw)/L]), with log L () or (E,) for E instances.
        point: where to start; stepped in place.
        lr, lr_cap, factor: lr is multiplied by `factor` after an accepted step while it is below lr_cap, and
            divided by it after an undone one. lr and lr_cap, and frac, may be (E,), one for each instance.
        frac: 0 for the rate lr/L.
        stop: the log L at which to end.
        max_steps: the most steps to try.
        patience: give up, as a whole or an instance, where log L has fallen by less than 0.001 in this many
            steps; 0 for never.
        levels: values of log L at which the weights are kept; one instance only.
        callback: (step, log L, point, gradients over L), called at the start, and after each step that was
            accepted; with several instances after each step. The next step overwrites what it gets.
        shrink: take instances that have ended out of the batch, without a callback. The objective must be
            one of any number of instances, the same for all of them; `point` is not stepped to the end.

    With an objective that needs no autograd all of it may run under ``torch.inference_mode()``, where small
    steps are a fifth cheaper.

    Returns: a `Descent`.

    Raises: ValueError for an argument that is not as above, and for a loss that is not finite at the start.
    """
    fracs, rates = (torch.as_tensor(x, dtype=torch.float64) for x in (frac, lr))
    if not ((fracs == 0) | (fracs >= 1)).all():
        raise ValueError(f"frac must be 0 or at least 1, got {frac}")
    if not ((0 < rates) & (rates < math.inf)).all() or not factor > 1:
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
    if shrink and callback is not None:
        raise ValueError("callback must be None for shrink=True")
    callback = callback or (lambda *_: None)
    callback(0, log_loss, point, grads)
    power = torch.where(fracs == 0, 0.0, 1 / fracs)
    if log_loss.ndim:
        lr, lr_cap, power = (
            torch.as_tensor(x, dtype=log_loss.dtype, device=log_loss.device).expand(point.instances)
            for x in (lr, lr_cap, power)
        )
        descend, last = _descend_many, (callback, shrink)
    else:
        lr, lr_cap, power = (float(x) for x in (lr, lr_cap, power))
        descend, last = _descend_one, (callback, levels)
    return descend(
        objective, point, log_loss, grads, lr, lr_cap, power, stop, max_steps, patience, factor, *last
    )


def _descend_one(
    objective, point, log_loss, grads, lr, lr_cap, power, stop, max_steps, patience, factor, callback, levels
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
        new_value = new_log_loss.item()
        if not new_value < value:
            point.rollback()
            lr /= factor
            continue
        log_loss, grads, value = new_log_loss, new_grads, new_value
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
    objective, point, log_loss, grads, lr, lr_cap, power, stop, max_steps, patience, factor, callback, shrink
):
    point.keep(grads)
    steps, before = torch.full_like(log_loss, max_steps), torch.full_like(log_loss, math.inf)
    active, running, size = log_loss > stop, len(log_loss), len(log_loss)
    index, ends = torch.arange(len(lr), device=lr.device), None

    def ended():
        """The state of all instances."""
        now = [*point.weights, log_loss, steps, lr]
        if ends is None:
            return [x.clone() for x in now]
        for x, part in zip(ends, now):
            x.view(len(ends[-1]), -1)[index] = part.view(len(index), -1)
        return ends

    for step in range(max_steps):
        if patience and step % patience == 0:
            active = active & (log_loss < before - GAIN)
            before = log_loss
        previous, running = running, int(torch.count_nonzero(active))
        if running < previous:
            steps = torch.where(active, steps, steps.clamp(max=step))
        if running == 0:
            break
        if shrink and running < size:
            ends, size = ended(), running
            keep = active.nonzero()[:, 0]
            point = point.take(keep)
            log_loss, lr, lr_cap, power, steps, before, active, index = (
                x[keep] for x in (log_loss, lr, lr_cap, power, steps, before, active, index)
            )
        point.snapshot()
        point.step(point.grads, (log_loss * power).exp_().mul_(lr))
        new_log_loss, grads = objective(point.weights)
        point.keep(grads)
        accepted, lower = new_log_loss < log_loss, lr / factor
        if running < size:
            accepted, lower = accepted & active, torch.where(active, lower, lr)
        point.rollback(~accepted)
        log_loss = torch.where(accepted, new_log_loss, log_loss)
        lr = torch.where(accepted, torch.where(lr < lr_cap, lr * factor, lr), lower)
        active = active & (log_loss > stop) if running < size else log_loss > stop
        callback(step + 1, log_loss, point, point.grads)
    *weights, log_loss, steps, lr = ended()
    return Descent(weights, log_loss, log_loss <= stop, steps.long(), lr)


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
