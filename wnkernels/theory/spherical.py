"""Spherical motion dynamics of scale-invariant weights, after Wan, Zhu, Zhang and Sun (arXiv:2006.08419).

For a loss with L(k w) = L(w), the v of weight normalization among them, SGD with weight decay,

    m <- alpha m + g + lambda w,  w <- w - eta m,

drives |w| to an equilibrium at which every step turns w by the same angle, whatever the gradients. The unit
gradient is g |w|, the gradient at |w| = 1; G^2 stands for the mean of its square.

numpy and scipy only: no kernel of this package takes part. All functions take numbers or arrays.
"""

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "angular_update", "equilibrium_angle", "equilibrium_norm", "exact_equilibrium_angle", "norm_transient",
    "rate", "rescale_factor", "steps_after_decay", "transient_ratio", "transient_time",
]


def rate(lr: ArrayLike, weight_decay: ArrayLike, momentum: ArrayLike = 0.0) -> np.ndarray:
    """x = eta lambda/(1 - alpha): the rate per step of the dynamics; |w|^4 relaxes like e^(-4 x t)."""
    lr, weight_decay, momentum = (np.asarray(x, float) for x in (lr, weight_decay, momentum))
    for name, value, good in (
        ("lr", lr, lr > 0),
        ("weight_decay", weight_decay, weight_decay > 0),
        ("momentum", momentum, (momentum >= 0) & (momentum < 1)),
    ):
        if not good.all():
            allowed = "in [0, 1)" if name == "momentum" else "positive"
            raise ValueError(f"{name} must be {allowed}, got {value}")
    return lr * weight_decay / (1 - momentum)


def equilibrium_angle(lr: ArrayLike, weight_decay: ArrayLike, momentum: ArrayLike = 0.0) -> np.ndarray:
    """sqrt(2 lambda eta/(1 + alpha)), the angle per step at equilibrium, in radians. Theorems 1 and 2."""
    x, momentum = rate(lr, weight_decay, momentum), np.asarray(momentum)
    return np.sqrt(2 * x * (1 - momentum) / (1 + momentum))


def exact_equilibrium_angle(lr: ArrayLike, weight_decay: ArrayLike) -> np.ndarray:
    """arccos(1 - eta lambda): the fixed point of SGD without momentum for a constant |unit gradient|.

    The step leaves w (1 - eta lambda) - eta g with g orthogonal to w; at constant length its cosine with w is
    the factor, however large the step.
    """
    return np.arccos(1 - rate(lr, weight_decay))


def equilibrium_norm(
    squared_gradient: ArrayLike, lr: ArrayLike, weight_decay: ArrayLike, momentum: ArrayLike = 0.0
) -> np.ndarray:
    """|w| at equilibrium, (G^2 eta/(lambda (1 - alpha)(2 - lambda eta/(1 + alpha))))^(1/4). Theorems 1 and 2.

    Args:
        squared_gradient: the mean of |g|^2 |w|^2; with momentum that of (|g|^2 + 2 alpha <m, g>)|w|^2.
    """
    x = rate(lr, weight_decay, momentum)
    lr, weight_decay, momentum = np.asarray(lr), np.asarray(weight_decay), np.asarray(momentum)
    correction = 2 - x * (1 - momentum) / (1 + momentum)
    return (np.asarray(squared_gradient) * lr / (weight_decay * (1 - momentum) * correction)) ** 0.25


def norm_transient(
    t: ArrayLike, start: ArrayLike, squared_gradient: ArrayLike, lr: ArrayLike, weight_decay: ArrayLike
) -> np.ndarray:
    """|w| after t steps of SGD without momentum from |w| = start, for a constant |unit gradient|.

    y = |w|^4 obeys dy/dt = 4 x (y* - y) with x = eta lambda << 1 and y* = eta G^2/(2 lambda).
    """
    x = rate(lr, weight_decay)
    limit = np.asarray(lr) * np.asarray(squared_gradient) / (2 * np.asarray(weight_decay))
    return (limit + (np.asarray(start) ** 4 - limit) * np.exp(-4 * x * np.asarray(t))) ** 0.25


def transient_ratio(k: ArrayLike, xt: ArrayLike) -> np.ndarray:
    """1/sqrt(1 + (k - 1) e^(-4 x t)): the angle over its new equilibrium, t steps after eta -> eta/k.

    `xt` is the new rate x times t. It begins at k^(-1/2), where the norm is still that of the old
    equilibrium.
    """
    return 1 / np.sqrt(1 + (np.asarray(k) - 1) * np.exp(-4 * np.asarray(xt)))


def transient_time(k: ArrayLike, ratio: ArrayLike) -> np.ndarray:
    """x t at which `transient_ratio` reaches `ratio`, which is in (k^(-1/2), 1)."""
    return np.log((np.asarray(k) - 1) / (np.asarray(ratio, float) ** -2 - 1)) / 4


def steps_after_decay(
    k: ArrayLike, lr: ArrayLike, weight_decay: ArrayLike, momentum: ArrayLike = 0.0
) -> np.ndarray:
    """ceil(log(k)(1 - alpha)/(2 lambda eta)): least steps to the new equilibrium after eta -> eta/k.

    Corollary 3.1; `lr` is the new rate. `rescale_factor` saves them.
    """
    return np.ceil(np.log(k) / (2 * rate(lr, weight_decay, momentum)))


def rescale_factor(k: ArrayLike) -> np.ndarray:
    """k^(-1/4): what |w| is to be multiplied by when eta -> eta/k, to be at its new equilibrium at once."""
    return np.asarray(k, float) ** -0.25


def angular_update(before: ArrayLike, after: ArrayLike) -> np.ndarray:
    """The angle in radians between two weights, 2 asin(|theta' - theta|/2), over the last axis.

    Right where an arccos has lost all digits. Raises: ValueError for weights of different shapes.
    """
    before, after = np.asarray(before, float), np.asarray(after, float)
    if before.shape != after.shape:
        raise ValueError(f"after must have the shape of before, {before.shape}, got {after.shape}")
    theta = [w / np.linalg.norm(w, axis=-1, keepdims=True) for w in (before, after)]
    return 2 * np.arcsin(np.minimum(np.linalg.norm(theta[1] - theta[0], axis=-1) / 2, 1))
