"""Diagnostics of the dynamics of normalized weights.

    monitor = Monitor(optimizer, every=10)         # a polar optimizer with telemetry=True
    ...training...
    monitor.plot("angles.png", "angular_update")   # monitor.table() is tidy: one line for each value

For a row w = s v/|v| with gradient G = dL/dw, of which p is the part along v/|v| and G_t the rest:

    norm, direction_norm   |w| = |s|, and |v|
    gradient_norm          |G|
    cosine                 <w, G>/(|w| |G|): -1 where a neuron has aligned with the negative gradient
    product, ratio         |w| |G| and |G|/|w|: late in training equal over the neurons that survive, the
                           product for EWN, the ratio for SWN and plain weights (Morwani and Ramaswamy,
                           arXiv:2010.12909, theorem 2)
    unit_gradient          |dL/dv| |v| = |w| |G_t|, the gradient at |v| = 1 (Wan et al., arXiv:2006.08419)
    angular_update         the angle that the step turned v by, in radians
    equilibrium_angle      that angle at equilibrium, sqrt(2 eta lambda/(1 + momentum)) (the same)

What a step knows comes from its telemetry, at no cost; `from_gradient` takes w and G where there was no step.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import functional
from .record import Recorder

__all__ = [
    "Monitor", "angular_update", "diagonal_invariant", "effective_initialization", "equilibrium_angles",
    "from_gradient", "from_telemetry", "layer_invariants", "momentum_gradient", "ncf", "normalized_margin",
    "participation_ratio", "row_space_residual", "top_share",
]


# -------------------------------------------------------------------------------------------------- of a step


def _derived(s: Tensor, radial: Tensor, tangential: Tensor) -> dict[str, Tensor]:
    """s: signed radius; radial, tangential: p and |G_t|."""
    length, gradient = s.abs(), torch.hypot(radial, tangential)
    return {
        "norm": length,
        "gradient_norm": gradient,
        "cosine": torch.where(gradient > 0, s.sign() * radial / gradient, 0.0),
        "product": length * gradient,
        "ratio": torch.where(length > 0, gradient / length, 0.0),
        "unit_gradient": length * tangential,
    }


def from_telemetry(telemetry: dict[str, Tensor]) -> dict[str, Tensor]:
    """The quantities of the module's docstring from a step's telemetry.

    Gradients are those at which the step was taken, radius and |v| those after it.

    Args:
        telemetry: of one weight, as `optim.PolarSGD.telemetry` or `functional.telemetry` gives it.

    Returns: name -> (R,) float64.
    """
    values = _derived(*(telemetry[name] for name in ("radius", "radial_gradient", "tangential_gradient")))
    return {**values, "direction_norm": telemetry["norm"], "angular_update": telemetry["angular_update"]}


def from_gradient(w: Tensor, grad: Tensor, dim: int | None = 0) -> dict[str, Tensor]:
    """The same from a weight and its gradient, where there was no step: no direction_norm and angular_update.

    Args:
        w, grad: w and dL/dw, of one shape.
        dim: the dim of rows, or None for one row.

    Returns: name -> (R,) float64. A row of zeros has no direction: its cosine, ratio and unit_gradient are 0.

    Raises: ValueError for tensors of different shapes.
    """
    if w.shape != grad.shape:
        raise ValueError(f"grad must have the shape of w, {tuple(w.shape)}, got {tuple(grad.shape)}")
    rows, G = (_rows(x.detach().double(), dim) for x in (w, grad))
    theta = functional.normalize_(rows.clone())
    radial = (theta * G).sum(1)
    return _derived(functional.row_norm(rows), radial, functional.row_norm(G - radial[:, None] * theta))


def _rows(x: Tensor, dim: int | None) -> Tensor:
    return x.reshape(1, -1) if dim is None else x.movedim(dim, 0).flatten(1).contiguous()


def angular_update(before: Tensor, after: Tensor, dim: int | None = 0) -> Tensor:
    """The angle in radians between each row of two weights, (R,) float64: 2 asin(|theta' - theta|/2).

    An arccos of the cosine loses every digit below 1e-4 in float32. Rows of zeros give 0 or pi/3.
    """
    first, second = (functional.normalize_(_rows(x.detach().double(), dim).clone()) for x in (before, after))
    return 2 * torch.asin((functional.row_norm(second - first) / 2).clamp(max=1))


def equilibrium_angles(optimizer) -> dict[str, Tensor]:
    """Name of each weight that SGD decays -> sqrt(2 eta lambda/(1 + momentum)), () or (R,); empty for Adam."""
    angles = {}
    for group, index, _ in optimizer._weights():
        x = torch.as_tensor(group["lr"] * group["weight_decay"], dtype=torch.float64)
        if "momentum" in group and (x > 0).all():
            angles[optimizer._name(group, index)] = torch.sqrt(2 * x / (1 + group["momentum"]))
    return angles


@torch.no_grad()
def momentum_gradient(optimizer) -> dict[str, Tensor]:
    """Name of each polar weight -> (|g|^2 + 2 mu <m, g>) |v|^2 by row; g = dL/dv, m the momentum so far.

    Its mean is what `theory.spherical.equilibrium_norm` takes (Wan et al., theorem 2). To be called between
    backward() and step(), whose telemetry does not have <m, g>; without momentum it is unit_gradient^2.
    """
    result = {}
    for group, index, p in optimizer._weights():
        if p.grad is None:
            continue
        state, dim = optimizer.state[p], group["dim"]
        w, G = (_rows(x.detach().double(), dim) for x in (state.get("master", p), p.grad))
        s = state["radius"].exp() if group["kind"] == "ewn" else state["radius"]
        theta = functional.normalize_(w.clone()) * s.sign()[:, None]
        g = (s / state["norm"])[:, None] * (G - (G * theta).sum(1, keepdim=True) * theta)
        square = g.square().sum(1)
        if "momentum_buffer" in state:
            square += 2 * group["momentum"] * (_rows(state["momentum_buffer"].double(), dim) * g).sum(1)
        result[optimizer._name(group, index)] = square * state["norm"] ** 2
    return result


class Monitor(Recorder):
    """A `Recorder` that a polar optimizer fills as it steps, from its telemetry.

    Args:
        optimizer: PolarSGD, PolarAdam or PolarAdamW with telemetry=True in the groups of interest.
        every: record each this many steps.

    Its quantities are those of the module's docstring; equilibrium_angle is there where SGD has weight
    decay. Steps count from 1; log_loss is NaN, unless the training sets the attribute `log_loss` before a
    step. `remove` ends it.

    Raises: ValueError for `every` below 1; RuntimeError, at the first recorded step, if no group has
    telemetry on.
    """

    def __init__(self, optimizer, every: int = 1) -> None:
        super().__init__(every)
        self.log_loss = math.nan
        self._handle = optimizer.register_step_post_hook(self._after)

    def _after(self, optimizer, args, kwargs) -> None:
        self._calls += 1
        if self._calls % self.every:
            return
        angles = equilibrium_angles(optimizer)
        for name, telemetry in optimizer.telemetry().items():
            values = from_telemetry(telemetry)
            if name in angles:
                values["equilibrium_angle"] = angles[name].expand_as(values["norm"])
            for quantity, value in values.items():
                for row, x in enumerate(value.tolist()):
                    for column, entry in zip(
                        self.columns.values(), (self._calls, self.log_loss, name, row, quantity, x)
                    ):
                        column.append(entry)

    def remove(self) -> None:
        self._handle.remove()


# ----------------------------------------------------------------------------------------------- of a network


def participation_ratio(norms: Tensor) -> Tensor:
    """(sum n^2)^2/sum n^4 over the last dim: how many neurons share the norm; 0 where all are 0."""
    square = _relative(norms).square()
    total = square.square().sum(-1)
    return torch.where(total > 0, square.sum(-1).square() / total, 0.0)


def top_share(norms: Tensor, count: int) -> Tensor:
    """The share of the `count` largest in sum n^2 over the last dim; 0 where all are 0."""
    square = _relative(norms).square()
    total = square.sum(-1)
    return torch.where(total > 0, square.topk(count, -1).values.sum(-1) / total, 0.0)


def _relative(norms: Tensor) -> Tensor:
    """Divided by the largest, so that fourth powers stay in range."""
    largest = norms.abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, norms / largest, 0.0)


def normalized_margin(outputs: Tensor, targets: Tensor, norm: float | Tensor, degree: float) -> Tensor:
    """min_i margin_i/norm^degree, for a network that is homogeneous of that degree in weights of that norm.

    Args:
        outputs: (n,) for two classes, with margins y f(x), or (n, K), with f_y - max of the others.
        targets: (n,), of -1 and 1, or of classes 0 to K - 1.
    """
    if outputs.ndim == 1:
        margins = targets * outputs
    else:
        own = outputs.gather(1, targets[:, None])
        margins = (own - outputs.scatter(1, targets[:, None], -torch.inf).amax(1, keepdim=True)).squeeze(1)
    return margins.min() / norm**degree


def layer_invariants(weights: Sequence[Tensor]) -> Tensor:
    """|W_l|^2 - |W_1|^2 for l = 2, ..., which the flow of a network homogeneous in each layer conserves."""
    squares = torch.stack([w.detach().double().square().sum() for w in weights])
    return squares[1:] - squares[0]


def ncf(forward: Callable, weight: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The neural correlation function of a two-homogeneous network, and how far it is from a KKT direction.

    N(w) = sum_i z_i H(x_i; w) (Kumar and Haupt, arXiv:2402.09226). Near the origin z are the labels; near a
    saddle, with the small neurons alone in `weight`, the residuals. While the weight is small dL/dw = -grad
    N, and the steps' own telemetry says the same: N(u) = -p/(2|w|), residual |G_t|/|G|.

    Args:
        forward: weight -> H at all inputs, (n,).
        weight: all weights of the network, not zero.
        z: (n,).

    Returns: N(u) at u = w/|w|, and |(I - u u^T) grad N|/|grad N|, the sine of the angle between w and the
    gradient.
    """
    w = weight.detach().requires_grad_()
    with torch.enable_grad():
        value = (forward(w) * z).sum()
        (gradient,) = torch.autograd.grad(value, w)
    derived = from_gradient(w, gradient, None)
    residual = derived["unit_gradient"] / (derived["norm"] * derived["gradient_norm"])
    return value.detach() / derived["norm"][0] ** 2, residual[0]


# --------------------------------------------------------------------- of diagonal nets <x, w^L>, w = s v/|v|


def effective_initialization(r: Tensor, r0: Tensor, ratio: float, kind: str) -> Tensor:
    """kappa: the normalized flow has come where that from kappa w(0) without normalization comes.

    Chou et al., arXiv:2305.05448: SWN (r/r0) exp(-(r^2 - r0^2)/(2 ratio)), EWN (r/r0)^(1 - 1/ratio).

    Args:
        r, r0: the radius now and at the start.
        ratio: the rate of the radius over that of v, with |v| = 1.

    Raises: ValueError for another kind.
    """
    if kind == "ewn":
        return (r / r0) ** (1 - 1 / ratio)
    if kind != "swn":
        raise ValueError(f"kind must be 'swn' or 'ewn', got {kind!r}")
    return r / r0 * torch.exp(-(r**2 - r0**2) / (2 * ratio))


def diagonal_invariant(v: Tensor, radius: Tensor, ratio: float, kind: str, depth: int) -> Tensor:
    """What moves only in the row space of the data, when gradient flow trains <a_i, w^L> = y_i; elementwise.

    With q = radius^2/(2 ratio) for SWN, alpha/ratio for EWN: log v + q for L = 2, else (v e^q)^(2 - L).

    Args:
        v: (N,) positive, |v| = 1.
        radius: g, or alpha.
        ratio: the rate of the radius over that of v.
        depth: L.
    """
    q = radius / ratio if kind == "ewn" else radius**2 / (2 * ratio)
    moved = v.log() + q
    return moved if depth == 2 else torch.exp((2 - depth) * moved)


def row_space_residual(change: Tensor, data: Tensor) -> Tensor:
    """|the part of `change` (N,) outside the row space of `data` (n, N)|/|change|; 0 for no change."""
    inside = data.mT @ torch.linalg.lstsq(data.mT, change[:, None]).solution
    length = torch.linalg.vector_norm(change)
    return torch.where(length > 0, torch.linalg.vector_norm(change - inside[:, 0]) / length, 0.0)
