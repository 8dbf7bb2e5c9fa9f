"""Closed forms: how fast a loss e^-m falls along the flow of one scalar; EWN with scalar neurons.

Morwani and Ramaswamy (arXiv:2010.12909, section 4): under EWN the loss is Theta(1/(t (log t)^2)) at any
depth, without normalization, or with SWN, Theta(1/(t (log t)^(2-2/L))) for a homogeneous net of degree L.
"""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import expi

__all__ = ["ewn_rate", "plain_rate", "trajectory_invariant", "trajectory_limits", "trajectory_point"]


def ewn_rate(margin: float) -> float:
    """L t (log t)^2 when the margin is `margin`, for w' = w^2 e^-w, of which t = Ei(w) - e^w/w; tends to 1.

    Args:
        margin: between 1 and 700.
    """
    scaled = expi(margin) * math.exp(-margin) - 1 / margin  # t L
    return scaled * (margin + math.log(scaled)) ** 2


def plain_rate(margin: float, depth: int) -> float:
    """depth^2 L t (log t)^(2-2/depth) at margin p^depth, for p' = depth p^(depth-1) e^-margin.

    With w = p^depth, w' = depth^2 w^(2-2/depth) e^-w, so that t L depth^2 is the integral of e^(u-w)
    u^-(2-2/depth) up to u = w, here from u = 1 on. Tends to 1; for depth 1 it is 1 - e^(1-w).

    Args:
        margin: above 1; depth: at least 1.
    """
    power = 2 - 2 / depth
    scaled, _ = quad(lambda s: math.exp(-s) * (margin - s) ** -power, 0, min(margin - 1, 745), limit=200)
    return scaled * (margin + math.log(scaled / depth**2)) ** power


def trajectory_invariant(w: ArrayLike, x: ArrayLike) -> np.ndarray:
    """x_2/w_1 - x_1/w_2, which the flow of f = <x, w> with each w_i = e^alpha_i its own neuron conserves."""
    w, x = np.asarray(w, dtype=float), np.asarray(x, dtype=float)
    return x[1] / w[..., 0] - x[0] / w[..., 1]


def trajectory_point(w0: ArrayLike, x: ArrayLike, margin: float) -> np.ndarray:
    """w where that flow from w0 has <x, w> = margin: 1/w_i = 1/w_i(0) - x_i s. All are positive."""
    w0, x = np.asarray(w0, dtype=float), np.asarray(x, dtype=float)
    end = (1 / (w0 * x)).min()  # where the first of the w_i is infinite

    def weights(s):
        return 1 / (1 / w0 - x * s)

    return weights(brentq(lambda s: weights(s) @ x - margin, 0, end * (1 - 1e-12), xtol=1e-15, rtol=1e-14))


def trajectory_limits(w0: ArrayLike, x: ArrayLike) -> np.ndarray:
    """The limit of that flow: infinity for the first w_i to get there, the finite rest from the invariant."""
    w0, x = np.asarray(w0, dtype=float), np.asarray(x, dtype=float)
    rest = 1 / w0 - x * (1 / (w0 * x)).min()
    with np.errstate(divide="ignore"):
        return np.where(np.abs(rest) < 1e-12, np.inf, 1 / rest)
