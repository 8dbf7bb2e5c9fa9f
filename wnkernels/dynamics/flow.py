"""Gradient flow, in polar coordinates and in w.

With v the direction parameter of a row, n = |v|, theta = v/n, s = g (SWN) or e^alpha (EWN) and G = dL/dw, the
flow is

    dg/dt = -eta_r <G, theta>  or  dalpha/dt = -eta_r s <G, theta>,
    dv/dt = -eta_v (s/n) (G - <G, theta> theta)

with rates eta_r of the radius and eta_v of the direction; n stays what it is. The vector field comes from the
kernels (`functional.weight_norm` and `functional.project_`), the time steps from scipy. In w, with m = s and
c = n, it is

    SWN  dw/dt = -[eta_r P + eta_v (m^2/c^2) (I - P)] G,  EWN  dw/dt = -m^2 [eta_r P + (eta_v/c^2) (I - P)] G

where P projects on w (Morwani and Ramaswamy, arXiv:2010.12909, theorem 1, here with the rates and c). With c
= 1 and equal rates the second is -|w|^2 G.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import functional, reference
from .. import nn as layers

__all__ = ["Flow", "polar_flow", "weight_flow"]

KINDS = ("swn", "ewn")


@dataclass
class Flow:
    """A trajectory of T points; every entry is a list where the flow started from a list of tensors.

    t: (T,) float64. weight: (T, *shape) float64. radius: (T, R) float64, g or alpha, () for R where dim is
    None, and direction: (T, *shape), v; both None for a flow in w.
    t_events: as scipy's, one array of times for each event. success, message, evaluations: scipy's, nfev for
    the last.
    """

    t: Tensor
    weight: Tensor | list[Tensor]
    radius: Tensor | list[Tensor] | None
    direction: Tensor | list[Tensor] | None
    t_events: list[np.ndarray] | None
    success: bool
    message: str
    evaluations: int


def _start(w0, dim) -> tuple[list[Tensor], bool]:
    single = isinstance(w0, Tensor)
    tensors = [w0] if single else list(w0)
    if not tensors or not all(isinstance(w, Tensor) for w in tensors):
        raise TypeError(f"w0 must be a tensor or a list of tensors, got {type(w0).__name__}")
    for w in tensors:
        if not (w.is_floating_point() and w.isfinite().all()):
            raise ValueError("w0 must be floating point and finite")
        layers.check_dim(dim, w)
    return [w.detach().double().cpu().clone() for w in tensors], single


def _times(t) -> tuple[float, np.ndarray | None]:
    """The end, and the times to report (None: those of the integrator)."""
    if np.ndim(t) == 0:
        end, times = float(t), None
    else:
        times = np.asarray(t, dtype=float)
        end = float(times[-1]) if times.size else np.nan
    if not (0 < end < np.inf) or (times is not None and (times[0] < 0 or (np.diff(times) <= 0).any())):
        raise ValueError(f"t must be a positive end time, or increasing times from 0 on, got {t!r}")
    return end, times


class _Packing:
    """Tensors in one vector of numpy's."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.shapes = [x.shape for x in tensors]
        self.sizes = [x.numel() for x in tensors]

    def pack(self, tensors: Sequence[Tensor]) -> np.ndarray:
        return torch.cat([x.reshape(-1) for x in tensors]).numpy()

    def unpack(self, y: np.ndarray) -> list[Tensor]:
        """Copies, so that nothing which is done to them reaches the integrator."""
        parts = torch.tensor(y, dtype=torch.float64).split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes)]

    def unpack_all(self, ys: np.ndarray) -> list[Tensor]:
        """ys: (size, T) -> tensors of T points."""
        parts = torch.tensor(np.ascontiguousarray(ys.T), dtype=torch.float64).split(self.sizes, dim=1)
        return [part.reshape(len(part), *shape) for part, shape in zip(parts, self.shapes)]


def _gradient(gradient: Callable, weights: list[Tensor], single: bool) -> list[Tensor]:
    grads = gradient(weights[0]) if single else gradient(weights)
    return [grads] if single else list(grads)


def _solve(field, y0, t, events, weights_of, single, options):
    from scipy.integrate import solve_ivp

    end, times = _times(t)
    wrapped = None
    if events is not None:
        wrapped = []
        for event in events if isinstance(events, (list, tuple)) else [events]:

            def ask(time, y, event=event):
                weights = weights_of(y)
                return float(event(time, weights[0] if single else weights))

            ask.terminal, ask.direction = getattr(event, "terminal", False), getattr(event, "direction", 0.0)
            wrapped.append(ask)
    options = {"method": "DOP853", "rtol": 1e-10, "atol": 1e-12} | options
    return solve_ivp(field, (0.0, end), y0, t_eval=times, events=wrapped, **options)


def _flow(solution, single, weight, radius=None, direction=None) -> Flow:
    one = lambda xs: xs if xs is None or not single else xs[0]
    return Flow(
        torch.tensor(solution.t),
        one(weight),
        one(radius),
        one(direction),
        solution.t_events,
        bool(solution.success),
        solution.message,
        int(solution.nfev),
    )


def polar_flow(
    gradient: Callable,
    w0: Tensor | Sequence[Tensor],
    t: float | Sequence[float],
    *,
    kind: str,
    dim: int | None = 0,
    norm: float | Sequence[Tensor] | Tensor = 1.0,
    radius_rate: float = 1.0,
    direction_rate: float = 1.0,
    events: Callable | Sequence[Callable] | None = None,
    **options,
) -> Flow:
    """Gradient flow of (g, v) or (alpha, v), from w0.

    Args:
        gradient: w -> dL/dw, a float64 tensor each, or lists of them where w0 is a list. Any positive
            multiple is allowed, which changes the time.
        w0: the weight at time 0, or a list of weights; no row may be zero.
        t: the end, or the increasing times to report.
        kind: "swn" or "ewn".
        dim: the dim of rows of each weight; None for one radius and one |v| of the whole tensor.
        norm: |v|, a positive number, or a tensor of shape (R,), or a list of them.
        radius_rate, direction_rate: eta_r and eta_v, positive numbers.
        events: functions (t, w) -> float, or one, of which the zeros are reported; with ``terminal`` and
            ``direction`` as in scipy.
        options: of scipy.integrate.solve_ivp; method="DOP853", rtol=1e-10 and atol=1e-12 where not given.
            method="LSODA" where the flow is stiff.

    Returns: a `Flow`.

    Raises: ValueError or TypeError for an argument that is not as above.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be 'swn' or 'ewn', got {kind!r}")
    for name, rate in (("radius_rate", radius_rate), ("direction_rate", direction_rate)):
        if not 0 < rate < np.inf:
            raise ValueError(f"{name} must be positive and finite, got {rate}")
    weights, single = _start(w0, dim)
    dims = [layers.check_dim(dim, w) for w in weights]
    radii, directions = [], []
    for i, (w, d) in enumerate(zip(weights, dims)):
        length = functional.row_norm(w, d)
        if not (length > 0).all():
            raise ValueError(f"w0 must have no zero row, which has no direction, got one in tensor {i}")
        radii.append(length.log() if kind == "ewn" else length)
        n = norm if isinstance(norm, (int, float)) else norm if isinstance(norm, Tensor) else norm[i]
        if not (torch.as_tensor(n) > 0).all():
            raise ValueError(f"norm must be positive, got {n}")
        directions.append(
            functional.normalize_(w.clone(), d, n.double() if isinstance(n, Tensor) else float(n))
        )
    packing = _Packing(radii + directions)
    count = len(weights)

    def weights_of(y):
        parts = packing.unpack(y)
        return [functional.weight_norm(v, r, d, kind) for r, v, d in zip(parts[:count], parts[count:], dims)]

    def field(_, y):
        parts = packing.unpack(y)
        radius, v = parts[:count], parts[count:]
        w = [functional.weight_norm(v, r, d, kind) for r, v, d in zip(radius, v, dims)]
        velocities = []
        grads = [g.detach().clone() for g in _gradient(gradient, w, single)]
        for g, x, r, d in zip(grads, v, radius, dims):
            velocities.append(functional.project_(g, x, r, d, kind).mul_(-radius_rate))  # g becomes that of v
        return packing.pack(velocities + [g.mul_(-direction_rate) for g in grads])

    solution = _solve(field, packing.pack(radii + directions), t, events, weights_of, single, options)
    parts = packing.unpack_all(solution.y)
    radius, direction = parts[:count], parts[count:]
    weight = [
        torch.stack([functional.weight_norm(x, y, d, kind) for x, y in zip(v, r)])
        for v, r, d in zip(direction, radius, dims)
    ]
    return _flow(solution, single, weight, radius, direction)


def weight_flow(
    gradient: Callable,
    w0: Tensor | Sequence[Tensor],
    t: float | Sequence[float],
    *,
    kind: str | None = None,
    dim: int | None = 0,
    norm: float = 1.0,
    radius_rate: float = 1.0,
    direction_rate: float = 1.0,
    events: Callable | Sequence[Callable] | None = None,
    **options,
) -> Flow:
    """The flow of w itself: dw/dt = -G for ``kind=None``, else that of `polar_flow`, seen in w.

    It uses no kernel, so that it can be held against `polar_flow`. Arguments and result are those of
    `polar_flow`; norm is one number, and for ``kind=None`` norm and the rates must be 1.
    """
    if kind not in (None, *KINDS):
        raise ValueError(f"kind must be None, 'swn' or 'ewn', got {kind!r}")
    if kind is None and (norm, radius_rate, direction_rate) != (1.0, 1.0, 1.0):
        raise ValueError(
            "norm, radius_rate and direction_rate must be 1 for kind=None, which has no polar coordinates"
        )
    weights, single = _start(w0, dim)
    packing = _Packing(weights)

    def velocity(w, g):
        if kind is None:
            return -g
        dims = reference._reduced_dims(w, dim)
        square = w.square().sum(dims, keepdim=True)
        radial = (w * g).sum(dims, keepdim=True) / square * w
        along, across = (radius_rate, square * (direction_rate / norm**2))
        if kind == "ewn":
            along = radius_rate * square
        return -(along * radial + across * (g - radial))

    def field(_, y):
        w = packing.unpack(y)
        return packing.pack([velocity(x, g) for x, g in zip(w, _gradient(gradient, w, single))])

    solution = _solve(field, packing.pack(weights), t, events, packing.unpack, single, options)
    return _flow(solution, single, packing.unpack_all(solution.y))
