"""The specification: every operation of this package in plain torch, written to be read.

A weight is split into rows: the slices along ``dim``, each flattened, or the whole tensor for ``dim=None``. For one row
with direction parameter v, norm n = |v| and direction theta = v/n, weight normalization is

    SWN  w = g theta          parameters g (signed radius s = g) and v    Salimans and Kingma, arXiv:1602.07868, eq. 2
    EWN  w = e^alpha theta    parameters alpha (s = e^alpha) and v        Morwani and Ramaswamy, arXiv:2010.12909

With G = dL/dw and p = <G, theta>:  dL/dg = p,  dL/dalpha = s p,  dL/dv = (s/n)(G - p theta).

What holds for all functions here:

- A row of zeros has no direction: its w is 0, and so are all of its gradients.
- Norms neither overflow nor underflow: a row is scaled by a power of two, which rounds nothing, before it is squared.
- 16-bit tensors are computed in float32, everything else in its own dtype.
- The functions that return new tensors are differentiable to any order, in reverse and in forward mode.

Names, arguments and results are those of `wnkernels.functional`, whose tests take this module in float64 as the oracle.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("swn", "ewn")


# ------------------------------------------------------------------------------------------------- rows and arguments


def _check_kind(kind: str, kinds: tuple = KINDS) -> None:
    if kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join(map(repr, kinds))}, got {kind!r}")


def _reduced_dims(v: Tensor, dim: int | None) -> tuple[int, ...]:
    """The dimensions over which a norm is taken: all but `dim`, or all."""
    if dim is None:
        return tuple(range(v.ndim))
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an int or None, got {dim!r}")
    if not -v.ndim <= dim < v.ndim:
        raise ValueError(
            f"dim must be None or in [{-v.ndim}, {v.ndim - 1}] for a tensor of shape {tuple(v.shape)}, got {dim}"
        )
    return tuple(i for i in range(v.ndim) if i != dim % v.ndim)


def _keepdim_shape(v: Tensor, dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if i in dims else size for i, size in enumerate(v.shape))


def _per_row(value: Tensor, v: Tensor, dims: tuple[int, ...], name: str) -> Tensor:
    """A value per row, of v's shape with 1 in the reduced dims or (R,), in the first of these shapes."""
    full = _keepdim_shape(v, dims)
    flat = (v.shape[(set(range(v.ndim)) - set(dims)).pop()],) if len(dims) < v.ndim else ()
    if value.shape not in (full, flat):
        raise ValueError(
            f"{name} must have shape {full} or {flat} for v of shape {tuple(v.shape)}, got {tuple(value.shape)}"
        )
    return value.reshape(full)


def _check_floating(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a floating point tensor, got {x.dtype}")


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# ---------------------------------------------------------------------------------------------- overflow-safe building


def _sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.sum(dims, keepdim=True) if dims else x  # torch takes an empty list of dims as all of them


def _exponent(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Per row, the integer e (as a float) that brings the largest magnitude of 2^-e x into [1/2, 1). No gradient."""
    largest = x.detach().abs()
    if dims:
        largest = largest.sum(dims, keepdim=True) if x.numel() == 0 else largest.amax(dims, keepdim=True)
    return torch.frexp(largest).exponent.to(x.dtype)


def _times_power_of_two(x: Tensor, e: Tensor) -> Tensor:
    half = (e / 2).floor()  # 2^e may leave the range of the dtype where x 2^e does not
    return x * half.exp2() * (e - half).exp2()


def _direction(v: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """theta, and the norm n = m 2^e as the pair (m, e). A zero row has theta = 0 and m = 0, both without a gradient."""
    e = _exponent(v, dims)
    u = _times_power_of_two(v, -e)
    square = _sum(u * u, dims)
    zero = square == 0
    # The inner `where` keeps 1/0 out of the derivatives, the outer one makes them zero.
    length = torch.where(zero, 1.0, square).sqrt()
    return torch.where(zero, 0.0, u / length), torch.where(zero, 0.0, length), e


def _signed_radius(radius: Tensor, kind: str) -> Tensor:
    return radius.exp() if kind == "ewn" else radius


# --------------------------------------------------------------------------------------------------------- operations


def row_norm(v: Tensor, dim: int | None = 0) -> Tensor:
    """The norm of every row of v.

    Args:
        v: floating point tensor of any shape.
        dim: the dimension that counts the rows (negative: from the end), or None for one norm of the whole tensor.

    Returns: shape (R,), or () for ``dim=None``; float32 for 16-bit v, else v's dtype.

    Raises: ValueError for a `dim` out of range; TypeError for a v that is not a floating point tensor.
    """
    _check_floating(v=v)
    dims = _reduced_dims(v, dim)
    _, m, e = _direction(v.to(_compute_dtype(v.dtype)), dims)
    return _times_power_of_two(m, e).reshape(() if dim is None else (-1,))


def weight_norm(
    v: Tensor, g: Tensor, dim: int | None = 0, kind: str = "swn", out_dtype: torch.dtype | None = None
) -> Tensor:
    """w = g v/|v| (``kind="swn"``) or w = e^g v/|v| (``kind="ewn"``, where g is alpha), for every row.

    Args:
        v: direction parameter, floating point, of any shape.
        g: radius parameter: v's shape with 1 in the reduced dims, or (R,); for ``dim=None`` all ones, or ().
        dim: the dimension that counts the rows (negative: from the end), or None for the norm of the whole tensor.
        kind: "swn" or "ewn".
        out_dtype: the dtype of w; None for v's.

    Returns: w, of v's shape.

    Raises: ValueError for a wrong kind, dim or shape; TypeError for tensors that are not floating point.
    """
    _check_kind(kind)
    _check_floating(v=v, g=g)
    dims = _reduced_dims(v, dim)
    dtype = _compute_dtype(v.dtype)
    theta, _, _ = _direction(v.to(dtype), dims)
    s = _signed_radius(_per_row(g, v, dims, "g").to(dtype), kind)
    return (s * theta).to(v.dtype if out_dtype is None else out_dtype)


def weight_norm_backward(
    grad: Tensor, v: Tensor, g: Tensor, dim: int | None = 0, kind: str = "swn"
) -> tuple[Tensor, Tensor]:
    """The gradients of `weight_norm`: (dL/dv, dL/dg or dL/dalpha) from grad = dL/dw, shaped and typed as v and g.

    Itself differentiable, with n a function of v as it must be for second derivatives.

    Raises: ValueError for a wrong kind, dim or shape; TypeError for tensors that are not floating point.
    """
    _check_kind(kind)
    _check_floating(grad=grad, v=v, g=g)
    dims = _reduced_dims(v, dim)
    if grad.shape != v.shape:
        raise ValueError(f"grad must have the shape of v, {tuple(v.shape)}, got {tuple(grad.shape)}")
    dtype = _compute_dtype(v.dtype)
    theta, m, e = _direction(v.to(dtype), dims)
    zero = m == 0
    s = _signed_radius(_per_row(g, v, dims, "g").to(dtype), kind)

    grad_e = _exponent(grad.to(dtype), dims)
    G = _times_power_of_two(grad.to(dtype), -grad_e)
    p = _sum(G * theta, dims)
    tangential = s / torch.where(zero, 1.0, m) * (G - p * theta)
    dv = torch.where(zero, 0.0, _times_power_of_two(tangential, grad_e - e))
    dr = _times_power_of_two(s * p if kind == "ewn" else p, grad_e)
    return dv.to(v.dtype), dr.to(g.dtype).reshape(g.shape)


def weight_norm_linear(
    x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None = None, kind: str = "swn", materialize: bool | None = None
) -> Tensor:
    """y = x w^T + bias with w = weight_norm(v, g, 0, kind).

    Args:
        x: (..., N).  v: (R, N).  g: (R, 1) or (R,).  bias: (R,) or None.
        kind: "swn" or "ewn".
        materialize: whether w is formed (True), or y = (x v^T)(s/n) + bias (False); None leaves the choice open. The
            value is the same up to rounding, and the specification always forms w.

    Returns: y, of shape (..., R), in the dtype that torch's `linear` gives, autocast included.

    Raises: as `weight_norm`; ValueError if v is not a matrix.
    """
    _check_floating(x=x, v=v, g=g)
    if v.ndim != 2:
        raise ValueError(f"v must be a matrix (R, N), got shape {tuple(v.shape)}")
    return F.linear(x, weight_norm(v, g, 0, kind), bias)


@torch.no_grad()
def project_(grad: Tensor, v: Tensor, g: Tensor, dim: int | None = 0, kind: str = "swn") -> Tensor:
    """Overwrites grad = dL/dw by dL/dv, and returns dL/dg (or dL/dalpha) in g's shape and dtype.

    Raises: as `weight_norm_backward`.
    """
    dv, dr = weight_norm_backward(grad, v, g, dim, kind)
    grad.copy_(dv)
    return dr


@torch.no_grad()
def normalize_(w: Tensor, dim: int | None = 0, norm: float | Tensor = 1.0) -> Tensor:
    """Scales every row of w in place to the length `norm` (a number, or a tensor with one per row), and returns w.

    Rows of zeros stay zero.

    Raises: ValueError for a wrong dim or shape of norm; TypeError for a w that is not floating point.
    """
    _check_floating(w=w)
    if not isinstance(norm, Tensor):
        shape = _keepdim_shape(w, _reduced_dims(w, dim))
        norm = torch.full(shape, norm, dtype=_compute_dtype(w.dtype), device=w.device)
    return w.copy_(weight_norm(w, norm, dim))


# ------------------------------------------------------------------------------------- gradient steps on the weight w

POLAR_KINDS = (*KINDS, "unit")


class PolarStep(NamedTuple):
    """The result of a polar step.

    weight: W', of W's shape.
    radius: the new g or alpha, (R,).
    norm: the new |v|, (R,).
    state: the new optimizer state, to be given to the next step.
    """

    weight: Tensor
    radius: Tensor
    norm: Tensor
    state: dict


def _polar_step(weight, grad, radius, norm, kind, dim, maximize, update_direction, update_radius):
    """One step on (radius, v) for the v that W, radius and norm stand for: v = n theta with theta = sign(s) W/|W|.

    So a polar step is, by definition, the step of the reparametrized model, and nothing of v but its norm is stored.
    """
    _check_kind(kind, POLAR_KINDS)
    _check_floating(weight=weight, grad=grad, radius=radius, norm=norm)
    chart = "ewn" if kind == "ewn" else "swn"
    sign = torch.ones_like(radius) if kind == "ewn" else torch.where(radius < 0, -1.0, 1.0).to(radius.dtype)
    v = weight_norm(weight, sign * norm, dim, out_dtype=_compute_dtype(weight.dtype))
    dv, dr = weight_norm_backward((-grad if maximize else grad).to(v.dtype), v, radius, dim, chart)
    v = update_direction(v, dv)
    if kind != "unit":  # "unit": the radius is what it was given as
        radius = update_radius(radius, dr)
    return weight_norm(v, radius, dim, chart, weight.dtype), radius, row_norm(v, dim)


def _sgd(x, grad, state, buffer, lr, momentum, dampening, nesterov, weight_decay):
    """torch.optim.SGD on one tensor."""
    grad = grad + weight_decay * x
    if momentum != 0:
        first = buffer not in state
        state[buffer] = grad if first else momentum * state[buffer] + (1 - dampening) * grad
        grad = grad + momentum * state[buffer] if nesterov else state[buffer]
    return x - lr * grad


@torch.no_grad()
def polar_sgd_step(
    weight: Tensor,
    grad: Tensor,
    radius: Tensor,
    norm: Tensor,
    state: dict | None = None,
    *,
    lr: float,
    kind: str = "swn",
    dim: int | None = 0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    radius_weight_decay: float = 0.0,
    radius_lr: float | None = None,
    maximize: bool = False,
) -> PolarStep:
    """torch.optim.SGD's step on (radius, v), taken on the weight itself.

    Args:
        weight, grad: W and dL/dW, of any shape.
        radius: g or alpha, (R,), or () for ``dim=None``; kept in float32 or wider.
        norm: |v|, of the shape of radius.
        state: of the previous step; None or {} at the first.
        kind: "swn", "ewn", or "unit": the signed radius is `radius` and stays what it is.
        weight_decay: acts on v.  radius_weight_decay: acts on g or alpha.
        radius_lr: the rate of the radius; None for lr.
        lr, momentum, dampening, nesterov, maximize: as in torch.optim.SGD.

    Returns: a `PolarStep`; its state has "momentum_buffer" (of W's shape) and "radius_momentum_buffer" (R,) if
    momentum is not 0. The arguments are left as they are.

    Raises: as `weight_norm_backward`.
    """
    state = dict(state or {})
    rule = dict(momentum=momentum, dampening=dampening, nesterov=nesterov)

    def update_direction(v, dv):
        return _sgd(v, dv, state, "momentum_buffer", lr, weight_decay=weight_decay, **rule)

    def update_radius(r, dr):
        rate = lr if radius_lr is None else radius_lr
        return _sgd(r, dr, state, "radius_momentum_buffer", rate, weight_decay=radius_weight_decay, **rule)

    return PolarStep(
        *_polar_step(weight, grad, radius, norm, kind, dim, maximize, update_direction, update_radius), state
    )


def _adam(x, grad, state, prefix, step, lr, betas, eps, weight_decay, decoupled, amsgrad):
    """torch.optim.Adam (decay in the gradient) or AdamW (decoupled) on one tensor."""
    beta1, beta2 = betas
    if decoupled:
        x = x - lr * weight_decay * x
    else:
        grad = grad + weight_decay * x
    mean = beta1 * state.get(prefix + "exp_avg", torch.zeros_like(x)) + (1 - beta1) * grad
    square = beta2 * state.get(prefix + "exp_avg_sq", torch.zeros_like(x)) + (1 - beta2) * grad * grad
    state[prefix + "exp_avg"], state[prefix + "exp_avg_sq"] = mean, square
    if amsgrad:
        square = torch.maximum(state.get(prefix + "max_exp_avg_sq", square), square)
        state[prefix + "max_exp_avg_sq"] = square
    denominator = (square / (1 - beta2**step)).sqrt() + eps
    return x - lr / (1 - beta1**step) * mean / denominator


@torch.no_grad()
def polar_adam_step(
    weight: Tensor,
    grad: Tensor,
    radius: Tensor,
    norm: Tensor,
    state: dict | None = None,
    *,
    lr: float = 1e-3,
    kind: str = "swn",
    dim: int | None = 0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    radius_weight_decay: float = 0.0,
    radius_lr: float | None = None,
    decoupled: bool = True,
    amsgrad: bool = False,
    maximize: bool = False,
) -> PolarStep:
    """torch.optim.AdamW's step (Adam's with ``decoupled=False``) on (radius, v), taken on the weight itself.

    Args:
        weight, grad, radius, norm, state, kind, dim, radius_lr: as in `polar_sgd_step`.
        weight_decay: acts on v.  radius_weight_decay: acts on g or alpha.  decoupled: x <- (1 - lr decay) x instead
            of a term in the gradient.
        lr, betas, eps, amsgrad, maximize: as in torch.optim.AdamW.

    Returns: a `PolarStep`; its state has "step", and with and without the prefix "radius_" the moments "exp_avg",
    "exp_avg_sq", and with amsgrad "max_exp_avg_sq". The arguments are left as they are.

    Raises: as `weight_norm_backward`.
    """
    state = dict(state or {})
    state["step"] = state.get("step", 0) + 1
    rule = dict(step=state["step"], betas=betas, eps=eps, decoupled=decoupled, amsgrad=amsgrad)

    def update_direction(v, dv):
        return _adam(v, dv, state, "", lr=lr, weight_decay=weight_decay, **rule)

    def update_radius(r, dr):
        rate = lr if radius_lr is None else radius_lr
        return _adam(r, dr, state, "radius_", lr=rate, weight_decay=radius_weight_decay, **rule)

    return PolarStep(
        *_polar_step(weight, grad, radius, norm, kind, dim, maximize, update_direction, update_radius), state
    )
