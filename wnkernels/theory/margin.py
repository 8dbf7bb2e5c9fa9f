"""Maximum margins of linear predictors, by the solvers of scipy: where separable training ends up in the end.

Data are X of shape (n, d), one example a row, and labels y of shape (n,) in {-1, +1}. Everything is numpy in float64,
and nothing here uses the kernels, so that it can referee them. The predictions are those of Yun, Krishnan and Mobahi
(arXiv:2010.02501): gradient flow on fully connected, diagonal and circular convolutional linear nets of depth L ends in
the direction of a stationary point of the least l2, l_{2/L} and (of the Fourier transform) l_{2/L} norm at margin 1.
"""

import itertools

import numpy as np
from scipy import sparse
from scipy.optimize import linprog, nnls

__all__ = ["angle", "l1_max_margin", "l2_max_margin", "dft_l1_max_margin", "quasi_norm_max_margin", "stationarity"]


def _signed(X, y):
    """y_i x_i, as (n, d)."""
    X, y = np.asarray(X, dtype=float), np.asarray(y, dtype=float)
    if X.ndim != 2 or y.shape != X.shape[:1]:
        raise ValueError(f"X must have shape (n, d) and y shape (n,), got {X.shape} and {y.shape}")
    if not np.isin(y, (-1, 1)).all():
        raise ValueError(f"y must hold -1 and +1 only, got {np.unique(y)}")
    return y[:, None] * X


def _solve(cost, constraints, lower, bounds):
    answer = linprog(cost, A_ub=-constraints, b_ub=-lower, bounds=bounds, method="highs")
    if not answer.success:
        raise ValueError(f"X and y have no predictor of margin 1: {answer.message}")
    return answer.x


def angle(a, b):
    """The angle between two vectors in degrees, without the loss of precision of an arccos."""
    a, b = (np.asarray(v, dtype=float) / np.linalg.norm(v) for v in (a, b))
    return np.degrees(2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b)))


def l2_max_margin(X, y):
    """argmin ||beta||_2 with y_i <beta, x_i> >= 1 (the hard-margin support vector machine without a bias): (d,).

    As a problem of least distance by non-negative least squares (Lawson and Hanson, Solving Least Squares Problems,
    ch. 23.4), exact to rounding. Raises: ValueError for data that no beta separates.
    """
    Z = _signed(X, y)
    stacked = np.vstack([Z.T, np.ones(len(Z))])
    target = np.append(np.zeros(Z.shape[1]), 1.0)
    multipliers, distance = nnls(stacked, target)
    residual = stacked @ multipliers - target
    if distance <= 1e-12:
        raise ValueError("X and y have no predictor of margin 1: they are not linearly separable")
    return -residual[:-1] / residual[-1]


def l1_max_margin(X, y):
    """argmin ||beta||_1 with y_i <beta, x_i> >= 1, by linear programming (HiGHS): (d,).

    Raises: ValueError for data that no beta separates.
    """
    Z = _signed(X, y)
    d = Z.shape[1]
    halves = _solve(np.ones(2 * d), np.hstack([Z, -Z]), np.ones(len(Z)), (0, None))
    return halves[:d] - halves[d:]


def dft_l1_max_margin(X, y, facets=4000):
    """argmin ||F beta||_1 with y_i <beta, x_i> >= 1, F the unitary discrete Fourier transform: (d,).

    The modulus of a complex number is the largest of its projections on ``facets`` directions, which takes it for less
    by a factor of at least cos(pi/facets); what remains is a linear program. Raises: as `l1_max_margin`.
    """
    Z = _signed(X, y)
    n, d = Z.shape
    F = np.fft.rfft(np.eye(d), axis=0, norm="ortho")  # (d//2 + 1, d): the others are their conjugates
    rows, moduli = [], []
    for j, row in enumerate(F):
        directions = np.exp(2j * np.pi * np.arange(facets) / facets) if np.abs(row.imag).max() > 1e-12 else [1, -1]
        for direction in directions:
            rows.append(-(direction * row).real)
            moduli.append(j)
    # Variables: beta, then one bound on the modulus for each frequency.
    bounds_on_moduli = sparse.csr_matrix((np.ones(len(moduli)), (range(len(moduli)), moduli)), (len(moduli), len(F)))
    constraints = sparse.vstack([
        sparse.hstack([sparse.csr_matrix(Z), sparse.csr_matrix((n, len(F)))]),
        sparse.hstack([sparse.csr_matrix(np.array(rows)), bounds_on_moduli]),
    ]).tocsr()
    multiplicity = np.full(len(F), 2.0)
    multiplicity[0] = 1
    if d % 2 == 0:
        multiplicity[-1] = 1
    lower = np.append(np.ones(n), np.zeros(len(rows)))
    bounds = [(None, None)] * d + [(0, None)] * len(F)
    return _solve(np.append(np.zeros(d), multiplicity), constraints, lower, bounds)[:d]


def quasi_norm_max_margin(X, y, depth):
    """argmin ||beta||_{2/depth} with y_i <beta, x_i> >= 1, for depth >= 2: (d,).

    The quasi-norm is concave in every orthant, so that a vertex of the feasible polyhedra is optimal: all sets of at
    most n coordinates and as many active constraints are gone through. For small d and n. Raises: as `l1_max_margin`;
    ValueError for a depth below 2.
    """
    if depth < 2:
        raise ValueError(f"depth must be at least 2, got {depth}")
    Z = _signed(X, y)
    n, d = Z.shape
    best, least = None, np.inf
    for size in range(1, min(n, d) + 1):
        for support in itertools.combinations(range(d), size):
            for active in itertools.combinations(range(n), size):
                block = Z[np.ix_(active, support)]
                if np.linalg.matrix_rank(block) < size:
                    continue
                beta = np.zeros(d)
                beta[list(support)] = np.linalg.solve(block, np.ones(size))
                value = (np.abs(beta) ** (2 / depth)).sum()
                if value < least and (Z @ beta >= 1 - 1e-9).all():
                    best, least = beta, value
    if best is None:
        raise ValueError("X and y have no predictor of margin 1: they are not linearly separable")
    return best


def stationarity(rho, features, y, depth, active=1e-2, support=1e-2):
    """How far rho is from a stationary point of ||rho||_{2/depth} with y_i Re<rho, features_i> >= 1: a number.

    On the support, |rho_j|^{2/depth-2} rho_j = sum_i lambda_i y_i features_ij with lambda_i >= 0, and lambda_i = 0
    where the margin is not active (the conditions of Karush, Kuhn and Tucker); off the support
    there is no condition for depth >= 3. The residual of the least squares fit of lambda, relative to the left-hand
    side.

    Args:
        rho: (m,) real or complex, of any positive scale.
        features: (n, m) real or complex.
        y: (n,) of -1 and +1.
        active: examples whose margin exceeds the least by less than this share of it are active.
        support: the coordinates whose modulus is more than this share of the largest.
    """
    rho, features, y = np.asarray(rho), np.asarray(features), np.asarray(y, dtype=float)
    margins = y * (features.conj() @ rho).real
    on = np.abs(rho) > support * np.abs(rho).max()
    near = margins <= margins.min() + active * np.abs(margins.min())
    gradient = np.abs(rho[on]) ** (2 / depth - 2) * rho[on]
    columns = (y[near, None] * features[near][:, on]).T
    columns, gradient = (np.concatenate([part.real, part.imag]) for part in (columns, gradient))
    return nnls(columns, gradient)[1] / np.linalg.norm(gradient)
