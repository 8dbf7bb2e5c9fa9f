"""Two-homogeneous networks near the origin and near saddles: what Kumar and Haupt (arXiv:2402.09226) predict.

A network H(x; W) is a sum of neurons h(x; w_j) with h(x; c w) = c^2 h(x; w) for c >= 0:

    "squared_relu"   h(x; u) = max(0, <u, x>)^2           a neuron is u, of x's dimension d
    "relu"           h(x; (u, a)) = a max(0, <u, x>)      a neuron is (u, a), of dimension d + 1

The neural correlation function (NCF) of labels z is N(W) = sum_i z_i H(x_i; W) = sum_j N(w_j). Its stationary
points on the unit sphere, grad N(u) = 2 N(u) u, are the KKT directions. From W(0) = delta W0 the flow of the
squared loss obeys d log|W|/dt = 2 N(u), du/dt = (I - u u^T) grad N(u) for u = W/|W| until |W| is of order
one: u goes to a KKT direction, and a norm r is reached after log(r/delta)/(2 N) from there. Near a saddle
(W_n, 0) the same holds for the small neurons, with the residual labels z = y - H(X; W_n).

numpy and scipy only: no kernel of this package takes part.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

__all__ = [
    "ACTIVATIONS", "Direction", "angle_to_nearest", "escape_time", "fit_neurons", "kkt_directions_in_plane",
    "kkt_residual", "ncf", "ncf_gradient", "ncf_maximum", "outputs",
]

ACTIVATIONS = ("squared_relu", "relu")


class Direction(NamedTuple):
    """A unit vector and the NCF there."""

    u: np.ndarray
    value: float


def _check(neurons: ArrayLike, X: ArrayLike, activation: str) -> tuple[np.ndarray, np.ndarray]:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    neurons, X = np.asarray(neurons, float), np.asarray(X, float)
    if X.ndim != 2:
        raise ValueError(f"X must have shape (n, d), got {X.shape}")
    size = X.shape[1] + (activation == "relu")
    if neurons.ndim == 0 or neurons.shape[-1] != size:
        raise ValueError(f"neurons must have shape (..., {size}) for {activation!r}, got {neurons.shape}")
    return neurons, X


def outputs(neurons: ArrayLike, X: ArrayLike, activation: str = "squared_relu") -> np.ndarray:
    """h(x_i; w_j), (..., n), for neurons (..., d or d + 1) and X (n, d); the network is its sum over j.

    Raises: ValueError for another activation, or shapes that do not fit.
    """
    neurons, X = _check(neurons, X, activation)
    if activation == "relu":
        return neurons[..., -1:] * np.maximum(neurons[..., :-1] @ X.T, 0)
    return np.maximum(neurons @ X.T, 0) ** 2


def ncf(neurons: ArrayLike, X: ArrayLike, z: ArrayLike, activation: str = "squared_relu") -> np.ndarray:
    """N(w_j) = sum_i z_i h(x_i; w_j), shape (...); that of a network is the sum over its neurons."""
    return outputs(neurons, X, activation) @ np.asarray(z, float)


def ncf_gradient(
    neurons: ArrayLike, X: ArrayLike, z: ArrayLike, activation: str = "squared_relu"
) -> np.ndarray:
    """dN/dw_j, of the neurons' shape; 0 is taken as the derivative of max(0, .) at 0."""
    neurons, X = _check(neurons, X, activation)
    z = np.asarray(z, float)
    if activation == "relu":
        products = neurons[..., :-1] @ X.T
        return np.concatenate(
            [neurons[..., -1:] * (((products > 0) * z) @ X), np.maximum(products, 0) @ z[:, None]], -1
        )
    return 2 * (np.maximum(neurons @ X.T, 0) * z) @ X


def kkt_residual(neurons: ArrayLike, X: ArrayLike, z: ArrayLike, activation: str = "squared_relu") -> float:
    """|(I - u u^T) grad N(u)|/|grad N(u)| of a whole network, u = W/|W|.

    The sine of the angle between W and grad N: zero at a KKT direction, and 1 where the gradient vanishes.
    """
    w = np.asarray(neurons, float).ravel()
    gradient = ncf_gradient(neurons, X, z, activation).ravel()
    u, length = w / np.linalg.norm(w), np.linalg.norm(gradient)
    return float(np.linalg.norm(gradient - (gradient @ u) * u) / length) if length else 1.0


def kkt_directions_in_plane(X: ArrayLike, z: ArrayLike) -> list[Direction]:
    """All KKT directions of a squared ReLU neuron for inputs in the plane, largest value first; exact.

    Between two angles at which an input becomes active N is a quadratic form, whose stationary directions are
    its eigenvectors; N is once differentiable, so there are no others.

    Raises: ValueError if X is not of shape (n, 2).
    """
    X, z = np.asarray(X, float), np.asarray(z, float)
    if X.ndim != 2 or X.shape[1] != 2:
        raise ValueError(f"X must have shape (n, 2), got {X.shape}")
    angles = np.arctan2(X[:, 1], X[:, 0])
    ends = np.unique(np.mod(np.concatenate([angles - math.pi / 2, angles + math.pi / 2]), 2 * math.pi))
    found = []
    for start, end in zip(ends, np.append(ends[1:], ends[0] + 2 * math.pi)):
        middle = np.array([math.cos((start + end) / 2), math.sin((start + end) / 2)])
        active = X @ middle > 0
        form = (X[active].T * z[active]) @ X[active]
        values, vectors = np.linalg.eigh(form)
        for value, vector in zip(values, vectors.T):
            for u in (vector, -vector):
                # Where no active input has a label, N = 0 on the arc, and no direction is singled out.
                if form.any() and (math.atan2(u[1], u[0]) - start) % (2 * math.pi) <= end - start:
                    found.append(Direction(u, float(value)))
    return sorted(found, key=lambda direction: -direction.value)


def ncf_maximum(
    X: ArrayLike, z: ArrayLike, activation: str = "squared_relu", starts: int = 64, seed: int = 0
) -> Direction:
    """The largest NCF of one neuron of unit length, and where: also that of a network of unit length.

    L-BFGS from random starts on N(w)/|w|^2. For "relu" the output weight is eliminated, |a| = |u|:
    N = max over u of |sum_i z_i max(0, <u, x_i>)|/2.

    Args:
        X: (n, d).  z: (n,).
        starts: how many random directions the ascents begin at; `seed` draws them.
    """
    X, z = np.asarray(X, float), np.asarray(z, float)
    rng, best = np.random.default_rng(seed), None
    degree = 1 if activation == "relu" else 2
    _check(np.zeros(X.shape[-1] + (activation == "relu")), X, activation)

    def quotient(u, sign):
        length, products = np.linalg.norm(u), np.maximum(X @ u, 0)
        value = products**degree @ z
        gradient = degree * (z * (products > 0) * products ** (degree - 1)) @ X
        scale = -sign / length**degree
        return scale * value, scale * (gradient - degree * value * u / length**2)

    for start in rng.normal(size=(starts, X.shape[1])):
        for sign in (1, -1) if activation == "relu" else (1,):
            first = start / np.linalg.norm(start)
            end = optimize.minimize(quotient, first, sign, jac=True, method="L-BFGS-B")
            u = end.x / np.linalg.norm(end.x)
            neuron = np.append(u, sign) / math.sqrt(2) if activation == "relu" else u
            value = float(ncf(neuron, X, z, activation))
            if best is None or value > best.value:
                best = Direction(neuron, value)
    return best


def angle_to_nearest(neurons: ArrayLike, directions: list[Direction]) -> float:
    """The angle in radians between each neuron and its nearest direction, averaged with weights |w_j|^2."""
    neurons = np.asarray(neurons, float)
    squares = (neurons**2).sum(-1)
    unit = neurons / np.sqrt(squares)[:, None]
    distances = np.linalg.norm(unit[:, None] - np.array([u for u, _ in directions]), axis=-1).min(1)
    return float(2 * np.arcsin(np.minimum(distances / 2, 1)) @ squares / squares.sum())


def escape_time(radius: float, delta: float, value: float) -> float:
    """log(radius/delta)/(2 value): the time from |W| = delta to radius along a KKT direction of that NCF.

    Kumar and Haupt, sec. 4. Raises: ValueError unless radius, delta and value are positive.
    """
    for name, x in (("radius", radius), ("delta", delta), ("value", value)):
        if not x > 0:
            raise ValueError(f"{name} must be positive, got {x}")
    return math.log(radius / delta) / (2 * value)


def fit_neurons(X: ArrayLike, y: ArrayLike, start: ArrayLike, activation: str = "squared_relu") -> np.ndarray:
    """Neurons, of the shape of `start`, at a stationary point of sum_i (H(x_i; W) - y_i)^2/2 near `start`.

    Least squares, whose cost is flat to rounding near the point, then a root of the gradient.

    Raises: RuntimeError where there is none.
    """
    start, X = _check(start, X, activation)

    def residuals(w):
        return outputs(w.reshape(start.shape), X, activation).sum(0) - y

    def jacobian(w):
        neurons = w.reshape(start.shape)
        return np.stack([ncf_gradient(neurons, X, e, activation).ravel() for e in np.eye(len(X))])

    def gradient(w):
        return residuals(w) @ jacobian(w)

    coarse = optimize.least_squares(residuals, start.ravel(), jacobian)
    end = optimize.root(gradient, coarse.x, tol=1e-14)
    size = np.abs(jacobian(end.x)).max() * np.abs(y).sum()  # of the terms that cancel in the gradient
    if not np.abs(gradient(end.x)).max() <= 1e-12 * size:
        raise RuntimeError(f"fit_neurons found no stationary point from this start: {end.message}")
    return end.x.reshape(start.shape)
