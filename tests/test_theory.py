"""The referees of linear nets against definitions, brute force and other solvers: nothing here runs a net."""

import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp
from scipy.optimize import minimize

from wnkernels.theory import implicit_bias as bias
from wnkernels.theory import margin


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)


def separable(rng, n=5, d=4):
    X = rng.normal(size=(n, d))
    return X, np.sign(X @ rng.normal(size=d))


# -------------------------------------------------------------------------------------------------------------- margins


@pytest.mark.parametrize("name, order", [("l1", 1), ("l2", 2)])
def test_no_sampled_predictor_has_a_smaller_norm(rng, name, order):
    X, y = separable(rng)
    best = getattr(margin, f"{name}_max_margin")(X, y)
    assert (y * (X @ best)).min() == pytest.approx(1, abs=1e-9)
    others = best + rng.normal(size=(20000, 4)) * np.geomspace(1e-3, 1, 20000)[:, None]
    margins = (y * (others @ X.T)).min(1)
    norms = np.linalg.norm(others, order, axis=1)[margins > 0] / margins[margins > 0]
    assert len(norms) > 1000 and norms.min() >= np.linalg.norm(best, order) * (1 - 1e-9)


def test_l2_max_margin_is_that_of_slsqp(rng):
    X, y = separable(rng)
    found = minimize(lambda b: b @ b, np.linalg.lstsq(X, y, rcond=None)[0], jac=lambda b: 2 * b, method="SLSQP",
                     constraints={"type": "ineq", "fun": lambda b: y * (X @ b) - 1, "jac": lambda b: y[:, None] * X},
                     options={"ftol": 1e-14, "maxiter": 1000})
    np.testing.assert_allclose(margin.l2_max_margin(X, y), found.x, atol=1e-6)


def test_max_margins_of_the_paper():
    X, y = np.array([[1.0, 2.0], [0.0, -3.0]]), np.array([1, -1])
    np.testing.assert_allclose(margin.l1_max_margin(X, y), [0, 0.5], atol=1e-12)
    np.testing.assert_allclose(margin.l2_max_margin(X, y), [0.2, 0.4], atol=1e-12)
    np.testing.assert_allclose(margin.dft_l1_max_margin(X, y), [1 / 3, 1 / 3], atol=1e-9)
    np.testing.assert_allclose(margin.quasi_norm_max_margin(X, y, 3), [0, 0.5], atol=1e-12)


@pytest.mark.parametrize("d", [2, 3, 5, 6])
def test_dft_l1_has_no_better_neighbour_and_few_facets_are_worse(rng, d):
    X, y = separable(rng, n=3, d=d)

    def norm(beta):
        return np.abs(np.fft.fft(beta, axis=-1, norm="ortho")).sum(-1)

    best = margin.dft_l1_max_margin(X, y)
    assert (y * (X @ best)).min() >= 1 - 1e-7
    others = best + rng.normal(size=(20000, d)) * np.geomspace(1e-4, 1, 20000)[:, None]
    margins = (y * (others @ X.T)).min(1)
    assert (norm(others)[margins > 0] / margins[margins > 0]).min() >= norm(best) * (1 - 1e-6)
    assert norm(margin.dft_l1_max_margin(X, y, facets=8)) >= norm(best) * (1 - 1e-6)


def test_quasi_norm_depth_two_is_the_linear_program(rng):
    X, y = separable(rng, n=3, d=5)
    np.testing.assert_allclose(margin.quasi_norm_max_margin(X, y, 2), margin.l1_max_margin(X, y), atol=1e-8)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_quasi_norm_solution_is_stationary_and_its_neighbours_are_not(rng, depth):
    X, y = separable(rng, n=3, d=5)
    best = margin.quasi_norm_max_margin(X, y, depth)
    assert margin.stationarity(7 * best, X, y, depth) <= 1e-8
    assert margin.stationarity(rng.normal(size=5), X, y, depth) > 1e-2


def test_what_cannot_be_separated_is_refused():
    X, y = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([1, -1])
    for solve in (margin.l1_max_margin, margin.l2_max_margin, margin.dft_l1_max_margin,
                  lambda X, y: margin.quasi_norm_max_margin(X, y, 3)):
        with pytest.raises(ValueError, match="margin 1"):
            solve(X, y)
    with pytest.raises(ValueError, match="y must hold"):
        margin.l1_max_margin(X, [0, 1])
    with pytest.raises(ValueError, match=r"X must have shape"):
        margin.l1_max_margin(X, [1, 1, 1])
    with pytest.raises(ValueError, match="depth"):
        margin.quasi_norm_max_margin(X, y, 1)


def test_angle():
    assert margin.angle([1, 0], [0, 3]) == pytest.approx(90)
    assert margin.angle([1, 1e-12], [1, 0]) == pytest.approx(np.degrees(1e-12), rel=1e-6)
    assert margin.angle([1, 0], [-2, 0]) == pytest.approx(180)


# ------------------------------------------------------------------------------------------------------- Q of Yun et al.


@pytest.mark.parametrize("depth", [2, 3, 4, 5, 7])
def test_h_solves_its_differential_equation(depth):
    end = min(0.9 * bias.blow_up(depth), 2.0)

    def field(_, state):
        p, q = state
        return [p ** (depth - 2) * q, p ** (depth - 1)]

    p, q = solve_ivp(field, (0, end), [1, 0], rtol=1e-12, atol=1e-13).y[:, -1]
    assert bias.h(end, depth) == pytest.approx(p ** (depth - 1) * q, rel=1e-8)
    assert bias.h(-end, depth) == -bias.h(end, depth)


@pytest.mark.parametrize("depth", [2, 3, 4, 6])
def test_h_inverse_and_q(depth):
    t = np.array([-1e6, -2.0, -1e-9, 0.0, 1e-100, 1e-3, 1.0, 50.0])
    np.testing.assert_allclose(bias.h(bias.h_inverse(t, depth), depth), t, rtol=1e-8)
    assert bias.q_value([1.7], depth, 1.0, [1.0]) == pytest.approx(
        quad(lambda u: float(bias.h_inverse(u, depth)), 0, 1.7)[0], rel=1e-10)
    integral = quad(lambda u: (1 + u**2) ** (-(depth - 1) / 2), 0, np.inf)[0] if depth > 2 else np.inf
    assert bias.blow_up(depth) == pytest.approx(integral)


def test_q_of_depth_two_is_the_published_form():
    t = 1.3
    published = (2 * t * np.arcsinh(2 * t) - np.sqrt(4 * t * t + 1) + 1) / 4
    assert bias.q_value([t], 2, 1.0, [1.0]) == pytest.approx(published, rel=1e-13)


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("alpha", [0.01, 0.3, 3.0])
def test_interpolation_limit_minimizes_q(rng, depth, alpha):
    features, y, eta = rng.normal(size=(2, 5)), rng.normal(size=2), rng.uniform(0.5, 1.5, 5)
    rho = bias.interpolation_limit(features, y, depth, alpha, eta)
    np.testing.assert_allclose(features @ rho, y, atol=1e-9)
    assert bias.q_residual(rho, features, depth, alpha, eta) <= 1e-9
    null = np.linalg.svd(features)[2][2:]
    least = bias.q_value(rho, depth, alpha, eta)
    for scale in (1e-3, 1e-1, 1):
        other = rho + scale * rng.normal(size=3) @ null
        assert bias.q_value(other, depth, alpha, eta) > least
        assert bias.q_residual(other, features, depth, alpha, eta) > 1e-6


def test_interpolation_limit_interpolates_between_norms():
    X = np.array([[1.0, 2.0]])
    np.testing.assert_allclose(bias.interpolation_limit(X, [1.0], 3, 1e-3, 1.0), [0, 0.5], atol=1e-6)
    np.testing.assert_allclose(bias.interpolation_limit(X, [1.0], 3, 30.0, 1.0), [0.2, 0.4], atol=1e-6)


def test_interpolation_limit_refuses():
    with pytest.raises(ValueError, match="depth"):
        bias.interpolation_limit([[1.0, 2.0]], [1.0], 1, 1.0, 1.0)
    with pytest.raises(ValueError, match="alpha and eta"):
        bias.interpolation_limit([[1.0, 2.0]], [1.0], 2, 0.0, 1.0)
    with pytest.raises(ValueError, match="alpha and eta"):
        bias.interpolation_limit([[1.0, 2.0]], [1.0], 2, 1.0, [1.0, -1.0])
    with pytest.raises(ValueError, match="full row rank"):
        bias.interpolation_limit([[1.0, 2.0], [2.0, 4.0]], [1.0, 1.0], 2, 1.0, 1.0)


# ---------------------------------------------------------------------------------------------------------------- kappa


def sparse_problem(rng, m=9, n=20):
    A = rng.normal(size=(m, n)) / np.sqrt(m)
    x = np.zeros(n)
    x[rng.choice(n, 2, replace=False)] = [1.2, -0.7]
    return A, x


def flow(B, y, start, eta, kind, end=3000.0):
    """w and r at the end of the flow of (r, v) for depth 2, from its definition; plain for kind None."""
    def field(_, state):
        r, v = state[0], state[1:]
        w = r * v
        G = 2 * w * (B.T @ (B @ (w * w) - y))
        p = v @ G
        # EWN: d alpha/dt = -eta r p, so that dr/dt = -eta r^2 p.
        return np.append(-eta * p * (r**2 if kind == "ewn" else 1), -r * (G - p * v))

    def plain(_, w):
        return -2 * w * (B.T @ (B @ (w * w) - y))

    options = dict(method="LSODA", rtol=1e-10, atol=1e-13)
    if kind is None:
        return solve_ivp(plain, (0, end), start, **options).y[:, -1], None
    r = np.linalg.norm(start)
    state = solve_ivp(field, (0, end), np.append(r, start / r), **options).y[:, -1]
    return state[0] * state[1:], state[0]


def test_basis_pursuit(rng):
    A, x = sparse_problem(rng)  # too few rows for x itself to be recovered in every draw
    found = bias.basis_pursuit(A, A @ x)
    np.testing.assert_allclose(A @ found, A @ x, atol=1e-10)
    null = np.linalg.svd(A)[2][9:]
    others = [x] + [found + scale * rng.normal(size=11) @ null for scale in np.geomspace(1e-4, 1, 500)]
    assert np.abs(others).sum(1).min() >= np.abs(found).sum() * (1 - 1e-12)
    A, x = sparse_problem(rng, m=40, n=60)
    np.testing.assert_allclose(bias.basis_pursuit(A, A @ x), x, atol=1e-10)
    with pytest.raises(ValueError, match="basis_pursuit"):
        bias.basis_pursuit(np.zeros((1, 3)), [1.0])


@pytest.mark.parametrize("scale", [1e-12, 0.05, 2.0])
def test_entropic_projection_satisfies_its_conditions(rng, scale):
    A, x = sparse_problem(rng)
    B, start = bias.two_sided(A), scale * rng.uniform(0.5, 2, 40)
    z = bias.entropic_projection(B, A @ x, start)
    np.testing.assert_allclose(B @ z, A @ x, atol=1e-9)
    slope = np.log(z) - 2 * np.log(start)
    assert np.linalg.norm(slope - B.T @ np.linalg.lstsq(B.T, slope, rcond=None)[0]) <= 1e-8 * np.linalg.norm(slope)


def test_entropic_projection_is_the_limit_of_plain_flow(rng):
    A, x = sparse_problem(rng)
    B, start = bias.two_sided(A), rng.uniform(0.1, 0.3, 40)
    w, _ = flow(B, A @ x, start, 1.0, None)
    np.testing.assert_allclose(bias.entropic_projection(B, A @ x, start), w**2, atol=1e-6)


@pytest.mark.parametrize("kind, eta", [("swn", 0.4), ("swn", 1.5), ("ewn", 0.5), ("ewn", 1.0)])
def test_predicted_limit_and_invariant_of_normalized_flow(rng, kind, eta):
    A, x = sparse_problem(rng)
    B, start = bias.two_sided(A), rng.uniform(0.1, 0.3, 40)
    w, r = flow(B, A @ x, start, eta, kind)
    kappa, limit = bias.predicted_limit(B, A @ x, start, eta, kind)
    assert bias.kappa(r, np.linalg.norm(start), eta, kind) == pytest.approx(kappa, rel=1e-5)
    np.testing.assert_allclose(limit, w**2, atol=1e-6)
    assert bias.invariant_residual(w, start, kappa, B, 2) <= 1e-5
    assert bias.invariant_residual(w, start, 1.2 * kappa, B, 2) > 1e-3


def test_kappa_refuses_other_kinds():
    with pytest.raises(ValueError, match="kind"):
        bias.kappa(1.0, 1.0, 1.0, "unit")
