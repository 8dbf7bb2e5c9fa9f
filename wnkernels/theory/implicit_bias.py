"""What interpolating gradient flow converges to, in closed form: no flow is run here, only roots and convex problems.

Diagonal linear nets f(x) = <x, w_1 * ... * w_L> and everything that is one in transformed inputs. Two papers:

- Yun, Krishnan and Mobahi (arXiv:2010.02501): from w_1 = ... = w_{L-1} = alpha eta and w_L = 0 the limit minimizes
  Q_{L,alpha,eta} among the interpolants (`interpolation_limit`).
- Chou, Rauhut and Ward (arXiv:2305.05448): on x = w^L (signed: x = u^L - v^L), w = r v/||v||, weight normalization acts
  like a start from kappa w(0) without it (`kappa`, `predicted_limit`, `invariant_residual`).

Everything is numpy in float64, and nothing here uses the kernels, so that it can referee them.
"""

import numpy as np
from scipy import special
from scipy.optimize import brentq, linprog, root

__all__ = ["basis_pursuit", "blow_up", "entropic_projection", "h", "h_inverse", "interpolation_limit",
           "invariant_residual", "kappa", "predicted_limit", "q_residual", "q_value", "two_sided"]


# ------------------------------------------------------------------------------------------------------ Yun et al.: Q


def _check_depth(depth):
    if depth < 2:
        raise ValueError(f"depth must be at least 2, got {depth}")


def blow_up(depth):
    """T_L, the end of the domain (-T_L, T_L) of h_L: int_0^inf (1 + u^2)^{-(L-1)/2} du; infinite for L = 2."""
    _check_depth(depth)
    return np.inf if depth == 2 else 0.5 * special.beta(0.5, depth / 2 - 1)


def _q(s, depth):
    """q(s) of p' = p^{L-2} q, q' = p^{L-1}, p(0) = 1, q(0) = 0; p^2 - q^2 = 1."""
    if depth == 2:
        return np.sinh(s)
    # With q = tan(phi), s is the integral of cos^{L-3}: an incomplete beta function of sin^2(phi).
    share = np.minimum(np.abs(s) / blow_up(depth), 1.0)
    near = share < 0.5
    sin2 = special.betaincinv(0.5, depth / 2 - 1, np.where(near, share, 0.5))
    cos2 = special.betaincinv(depth / 2 - 1, 0.5, np.where(near, 0.5, 1 - share))
    with np.errstate(divide="ignore"):
        return np.sign(s) * np.where(near, np.sqrt(sin2 / (1 - sin2)), np.sqrt((1 - cos2) / cos2))


def _s(q, depth):
    """The inverse of `_q`."""
    if depth == 2:
        return np.arcsinh(q)
    share = np.where(np.abs(q) < 1, special.betainc(0.5, depth / 2 - 1, q**2 / (1 + q**2)),
                     1 - special.betainc(depth / 2 - 1, 0.5, 1 / (1 + q**2)))
    return np.sign(q) * blow_up(depth) * share


def h(s, depth):
    """h_L = p^{L-1} q (Yun et al.): odd, increasing, infinite from `blow_up` on. Elementwise."""
    q = _q(np.asarray(s, dtype=float), depth)
    return (1 + q**2) ** ((depth - 1) / 2) * q


def _q_of_h(t, depth):
    """q with (1 + q^2)^{(L-1)/2} q = t, by Newton on the logarithms, where the equation is convex."""
    size = np.abs(np.asarray(t, dtype=float))
    log_t = np.log(np.maximum(size, 1e-300))
    log_q = np.where(log_t < 0, log_t, log_t / depth)  # right for t -> 0 and t -> infinity, never below the root
    for _ in range(60):
        excess = 0.5 * (depth - 1) * np.logaddexp(0, 2 * log_q) + log_q - log_t
        step = excess / ((depth - 1) * special.expit(2 * log_q) + 1)
        log_q = log_q - step
        if np.all(np.abs(step) < 1e-15 * np.maximum(np.abs(log_q), 1)):
            break
    return np.where(size > 1e-300, np.sign(t) * np.exp(log_q), 0.0)


def h_inverse(t, depth):
    """The inverse of `h`. Elementwise."""
    _check_depth(depth)
    return _s(_q_of_h(t, depth), depth)


def q_value(rho, depth, alpha, eta):
    """Q_{L,alpha,eta}(rho) = alpha^2 sum_j eta_j^2 H_L(rho_j/(alpha eta_j)^L), H_L the integral of h_L^{-1} from 0 on.

    Yun et al. (regression with orthogonally decomposable tensors). With t = h(s), H_L(t) = t s - int_0^s h, and int_0^s h = q^2/2, since (p^2/2)' = p^{L-1} q.
    """
    a = alpha * np.asarray(eta, dtype=float)
    t = np.asarray(rho, dtype=float) / a**depth
    q = _q_of_h(t, depth)
    return float((a**2 * (t * _s(q, depth) - q**2 / 2)).sum())


def q_residual(rho, features, depth, alpha, eta):
    """How far rho (m,) is from a minimizer of Q among {rho: features rho = features rho}: relative distance of grad Q
    from the row space of features (n, m)."""
    a = alpha * np.asarray(eta, dtype=float)
    gradient = a ** (2 - depth) * h_inverse(np.asarray(rho, dtype=float) / a**depth, depth)
    features = np.asarray(features, dtype=float)
    projected = features.T @ np.linalg.lstsq(features.T, gradient, rcond=None)[0]
    return float(np.linalg.norm(gradient - projected) / np.linalg.norm(gradient))


def interpolation_limit(features, y, depth, alpha, eta):
    """argmin Q_{L,alpha,eta}(rho) with features rho = y (Yun et al.): (m,).

    By its dual: rho_j = (alpha eta_j)^L h_L((alpha eta_j)^{L-2} (features^T c)_j), a monotone system for c.

    Args:
        features: (n, m) of full row rank, the inputs in the coordinates of the decomposition.
        y: (n,).
        depth: L >= 2.
        alpha: the scale of the start.
        eta: (m,) positive, its shape.

    Raises: ValueError for arguments not as above; RuntimeError where the system has not been solved to 1e-10.
    """
    _check_depth(depth)
    features, y = np.asarray(features, dtype=float), np.asarray(y, dtype=float)
    eta = np.broadcast_to(np.asarray(eta, dtype=float), features.shape[1:])
    if not alpha > 0 or not (eta > 0).all():
        raise ValueError(f"alpha and eta must be positive, got {alpha} and {eta}")
    if np.linalg.matrix_rank(features) < len(features):
        raise ValueError(f"features must have full row rank, got shape {features.shape} and rank "
                         f"{np.linalg.matrix_rank(features)}")
    a = alpha * eta
    rate = a ** (depth - 2)

    def primal(c):
        return a**depth * h(rate * (features.T @ c), depth)

    def dual(c):
        s = rate * (features.T @ c)
        with np.errstate(over="ignore", invalid="ignore"):
            value = (a**2 * _q(s, depth) ** 2 / 2).sum() - y @ c
        return value if (np.abs(s) < blow_up(depth)).all() and np.isfinite(value) else np.inf

    def residual(c):
        return features @ primal(c) - y

    def hessian(c):
        q2 = _q(rate * (features.T @ c), depth) ** 2  # h' = p^{2L-2} + (L-1) p^{2L-4} q^2
        slope = (1 + q2) ** (depth - 1) + (depth - 1) * (1 + q2) ** (depth - 2) * q2
        return (features * (a**depth * rate * slope)) @ features.T

    c = _solve_dual(dual, residual, hessian, np.zeros(len(y)))
    if not np.abs(residual(c)).max() <= 1e-10 * np.abs(y).max():
        raise RuntimeError(f"interpolation_limit: the dual has a residual of {np.abs(residual(c)).max():.1e}")
    return primal(c)


def _solve_dual(value, gradient, hessian, point):
    """The minimizer of a smooth convex function, infinite off its domain: damped Newton, then a root finder for the
    last digits, which values that have stopped to differ cannot give."""
    for _ in range(2000):
        slope = gradient(point)
        step = -np.linalg.lstsq(hessian(point), slope, rcond=None)[0]
        scale, before = 1.0, value(point)
        while not value(point + scale * step) <= before + 1e-4 * scale * (slope @ step) and scale > 1e-9:
            scale /= 2
        if scale <= 1e-9 or -slope @ step < 1e-14 * abs(before):
            break
        point = point + scale * step
    polished = root(gradient, point, jac=hessian, method="hybr", tol=1e-15).x
    return min((point, polished), key=lambda x: np.linalg.norm(gradient(x)))


# --------------------------------------------------------------------------------------------------- Chou et al.: kappa


def basis_pursuit(A, y):
    """argmin ||x||_1 with A x = y by linear programming (HiGHS): (N,). Raises: ValueError where there is no such x."""
    A = np.asarray(A, dtype=float)
    answer = linprog(np.ones(2 * A.shape[1]), A_eq=np.hstack([A, -A]), b_eq=y, bounds=(0, None), method="highs")
    if not answer.success:
        raise ValueError(f"basis_pursuit: {answer.message}")
    return answer.x[:A.shape[1]] - answer.x[A.shape[1]:]


def two_sided(A):
    """[A, -A]: the matrix that acts on (u^L, v^L)."""
    return np.hstack([A, -np.asarray(A)])


def kappa(r_end, r_start, eta, kind="swn"):
    """The factor on w(0) from which the flow without normalization has the same limit (or is on the same path).

    SWN: (r_end/r_start) exp(-(r_end^2 - r_start^2)/(2 eta)); EWN: (r_end/r_start)^{1 - 1/eta}; eta is the rate of the
    radius over that of the direction, with ||v|| = 1. From the invariants of the flow (Chou et al.): with
    d log v_j + d r^2/(2 eta) in the row space, and for EWN dr/dt = r^2 (...) in the place of dr/dt. Elementwise.

    Raises: ValueError for another kind.
    """
    return np.exp(_log_kappa(r_end, r_start, eta, kind))


def _log_kappa(r_end, r_start, eta, kind):
    r_end, r_start, eta = (np.asarray(x, dtype=float) for x in (r_end, r_start, eta))
    growth = np.log(r_end / r_start)
    if kind == "swn":
        return growth - (r_end**2 - r_start**2) / (2 * eta)
    if kind == "ewn":
        return growth * (1 - 1 / eta)
    raise ValueError(f"kind must be 'swn' or 'ewn', got {kind!r}")


def entropic_projection(B, y, start):
    """The limit x = w^2 of plain gradient flow on ||B w^2 - y||^2 from w(0) = start, for depth 2: (m,).

    x = start^2 exp(B^T lambda) with B x = y, the Bregman projection of the entropy (Chou et al.; Woodworth et al.,
    arXiv:2002.09277), by Newton on the dual.

    Args:
        B: (n, m); for signed signals `two_sided`.
        y: (n,).
        start: (m,) positive.

    Raises: RuntimeError where the dual has not been solved to 1e-9.
    """
    B, y, log_start = (np.asarray(x, dtype=float) for x in (B, y, 2 * np.log(start)))

    def primal(lam):
        with np.errstate(over="ignore"):
            return np.exp(log_start + B.T @ lam)

    def dual(lam):
        return primal(lam).sum() - y @ lam

    def residual(lam):
        with np.errstate(invalid="ignore"):  # inf - inf, from which the root finder steps back
            return B @ primal(lam) - y

    def hessian(lam):
        return (B * primal(lam)) @ B.T

    guess = np.zeros(len(y))
    if (log_start < 0).all():
        # A small start is close to the linear program min sum -log(start_j^2) x_j, and lambda to its multipliers.
        guess = linprog(-log_start, A_eq=B, b_eq=y, bounds=(0, None), method="highs").eqlin.marginals
    lam = _solve_dual(dual, residual, hessian, guess)
    if not np.abs(residual(lam)).max() <= 1e-9 * np.abs(y).max():
        raise RuntimeError(f"entropic_projection: the dual has a residual of {np.abs(residual(lam)).max():.1e}")
    return primal(lam)


def predicted_limit(B, y, start, eta, kind="swn"):
    """kappa and the limit x = w^2 of the weight-normalized flow for depth 2, without any flow: (float, (m,)).

    The root of log kappa = log kappa(r_end), r_end^2 = sum_j x_j of the entropic projection from kappa start.

    Args:
        B, y, start: as in `entropic_projection`; the flow starts at w = start, r = ||start||.
        eta, kind: as in `kappa`.

    Raises: RuntimeError as `entropic_projection`.
    """
    start = np.asarray(start, dtype=float)
    r_start = np.linalg.norm(start)

    def limit(log_kappa):
        return entropic_projection(B, y, np.exp(log_kappa) * start)

    def excess(log_kappa):
        return _log_kappa(np.sqrt(limit(log_kappa).sum()), r_start, eta, kind) - log_kappa

    # x shrinks towards the least l1 norm as kappa falls, and its norm is bounded: widen until the sign changes.
    low = high = 0.0
    while excess(low) < 0:
        low -= 4
    while excess(high) > 0:
        high += 4
    root_found = brentq(excess, low, high, xtol=1e-13, rtol=1e-14) if low < high else low
    return np.exp(root_found), limit(root_found)


def invariant_residual(w, start, kappa, B, depth):
    """How far the invariant is from being kept: the relative distance from the row space of B, a number.

    Weight-normalized flow keeps log(w/(kappa start)) (depth 2), (w/kappa)^{2-L} - start^{2-L} (depth L >= 3) in the row
    space of B, with kappa that of the radius so far (Chou et al.).

    Args:
        w, start: (m,) positive, now and at the start.
        kappa: `kappa` of ||w|| and ||start||.
        B: (n, m).
    """
    w, start = np.asarray(w, dtype=float), np.asarray(start, dtype=float)
    if depth == 2:
        change = np.log(w / start) - np.log(kappa)
    else:
        change = (w / kappa) ** (2 - depth) - start ** (2 - depth)
    projected = B.T @ np.linalg.lstsq(B.T, change, rcond=None)[0]
    return float(np.linalg.norm(change - projected) / np.linalg.norm(change))
