"""wnkernels.theory.spherical, and the experiments of wnkernels.papers.wan on it."""

import math

import numpy as np
import pytest
import torch

from wnkernels.papers import wan
from wnkernels.papers.claims import Options
from wnkernels.theory import spherical


def simulate(w0, lr, decay, steps, squared=1.0):
    """|w| and angles of SGD with weight decay, for gradients across w of constant length at |w| = 1."""
    norms, angles = [w0], []
    for _ in range(steps):
        kept, side = (1 - lr * decay) * norms[-1], lr * math.sqrt(squared) / norms[-1]
        norms.append(math.hypot(kept, side))
        angles.append(math.atan2(side, kept))
    return np.array(norms), np.array(angles)


@pytest.mark.parametrize("lr, decay", [(0.1, 1e-3), (0.5, 0.02), (0.3, 1.0)])
def test_equilibrium_of_sgd(lr, decay):
    norms, angles = simulate(1.0, lr, decay, round(12 / (4 * lr * decay)) + 50, squared=3.0)
    assert angles[-1] == pytest.approx(spherical.exact_equilibrium_angle(lr, decay), rel=1e-5)
    assert norms[-1] == pytest.approx(spherical.equilibrium_norm(3.0, lr, decay), rel=1e-5)
    exact = spherical.exact_equilibrium_angle(lr, decay)
    assert exact / spherical.equilibrium_angle(lr, decay) - 1 == pytest.approx(lr * decay / 12, rel=0.1)


def test_transients():
    lr, decay, k = 0.1, 1e-3, 10
    start = float(spherical.equilibrium_norm(2.0, lr, decay))
    norms, angles = simulate(start, lr / k, decay, 20_000, squared=2.0)
    t = np.array([0, 100, 3000, 19_999])
    np.testing.assert_allclose(norms[t], spherical.norm_transient(t, start, 2.0, lr / k, decay), rtol=1e-3)
    new = spherical.equilibrium_angle(lr / k, decay)
    np.testing.assert_allclose(angles[t] / new, spherical.transient_ratio(k, lr / k * decay * t), rtol=1e-3)
    assert spherical.transient_ratio(k, 0) == pytest.approx(k**-0.5)
    # The paper's corollary 3.1 and the closed form: at its number of steps the ratio is .957.
    steps = spherical.steps_after_decay(k, lr / k, decay)
    assert spherical.transient_ratio(k, lr / k * decay * steps) == pytest.approx(0.957, abs=1e-3)
    for ratio, xt in ((0.9, 0.912), (0.95, 1.106), (0.99, 1.524)):
        assert spherical.transient_time(k, ratio) == pytest.approx(xt, abs=1e-3)
    # At its new equilibrium from the first step on
    rescaled, _ = simulate(start * float(spherical.rescale_factor(k)), lr / k, decay, 1000, squared=2.0)
    np.testing.assert_allclose(rescaled, rescaled[0], rtol=1e-4)


def test_numbers_of_the_paper():
    assert spherical.equilibrium_angle(0.2, 1e-4) == pytest.approx(6.32e-3, rel=1e-3)
    assert spherical.equilibrium_angle(0.2, 1e-4, 0.9) == pytest.approx(4.59e-3, rel=1e-3)
    stages = spherical.equilibrium_angle(0.1 / 10.0 ** np.arange(4), 1e-4, 0.9)
    np.testing.assert_allclose(stages, [3.24e-3, 1.03e-3, 3.2e-4, 1.0e-4], rtol=0.03)


def test_theory_refuses():
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1.0"):
        spherical.rate(0.1, 1e-3, 1.0)
    with pytest.raises(ValueError, match="weight_decay must be positive, got 0.0"):
        spherical.equilibrium_angle(0.1, 0.0)
    with pytest.raises(ValueError, match="after must have the shape of before"):
        spherical.angular_update(np.ones(3), np.ones(2))


def test_angular_update():
    for angle in (1e-11, 1e-4, 2.0):
        after = np.array([[math.cos(angle), math.sin(angle), 0]]) * 7
        assert spherical.angular_update([[2.0, 0, 0]], after)[0] == pytest.approx(angle, rel=1e-5)


# ------------------------------------------------------------------------------------------------ experiments


@pytest.mark.parametrize("constant", [False, True])
def test_walks_of_both_backends_are_one(constant):
    settings = [wan.Setting(0.1, 0.02, 0.7), wan.Setting(0.3, 0.01, 0.7)]
    ours, theirs = (
        wan.walk(settings, 200, 100, backend=backend, constant=constant, rows=2, size=9)
        for backend in ("wnkernels", "torch")
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_walk_refuses():
    with pytest.raises(ValueError, match="settings must share one momentum, got .0.5, 0.9."):
        wan.walk([wan.Setting(0.1, 0.1, 0.5), wan.Setting(0.1, 0.1, 0.9)], 1, 1, backend="torch")


@pytest.mark.parametrize("normalization", ["layer", "row"])
@pytest.mark.parametrize("rescale", [False, True])
def test_training_is_that_of_torch(normalization, rescale):
    """Angle by angle, through the decay of the rate: the polar step on the plain net, and torch on its v."""
    ours, theirs = (
        wan.train(
            wan.Setting(0.1, 1e-2, 0.9), normalization, 40, backend=backend, decay_at=20, rescale=rescale,
            dtype=torch.float64,
        )
        for backend in ("wnkernels", "torch")
    )
    assert list(ours) == list(theirs) == ["0.weight", "2.weight", "4.weight"]
    for name in ours:
        np.testing.assert_allclose(ours[name].norm, theirs[name].norm, rtol=1e-9)
        np.testing.assert_allclose(ours[name].angle, theirs[name].angle, rtol=1e-6, atol=1e-12)


def test_batchnorm_is_kind_unit():
    """The plain step under BatchNorm is the step on v at a fixed radius, but for BatchNorm's eps."""
    ours, theirs = (
        wan.train(wan.Setting(0.05, 1e-2, 0.9), "batch", 20, backend=backend, dtype=torch.float64)
        for backend in ("wnkernels", "torch")
    )
    for name in ours:
        np.testing.assert_allclose(ours[name].norm, theirs[name].norm, rtol=2e-3)
        np.testing.assert_allclose(ours[name].angle, theirs[name].angle, rtol=2e-2)


def test_claims_follow_the_measurement(monkeypatch):
    """The verdict is computed: with another prediction the same run fails."""
    options = Options(only=frozenset({"P3-2"}))
    (claim,) = wan.claims(options)
    assert claim.holds is True and claim.id == "P3-2"
    monkeypatch.setattr(spherical, "exact_equilibrium_angle", spherical.equilibrium_angle)
    (claim,) = wan.claims(options)
    assert claim.holds is False


def test_growth():
    assert wan.growth_error(20, backend="wnkernels") < 1e-12
    assert wan.growth_error(20, backend="torch") < 1e-12


def test_batches_are_noisy_and_repeatable():
    first, second = ([(x.clone(), y.clone()) for x, y in wan.batches(200, 3)] for _ in range(2))
    assert all(torch.equal(a, b) for pair in zip(first, second) for a, b in zip(*pair))
    x, y = wan.digits()
    nearest = [torch.cdist(inputs, x).argmin(1) for inputs, _ in first]
    wrong = torch.cat([y[near] != targets for near, (_, targets) in zip(nearest, first)]).double().mean()
    assert 0.07 < wrong < 0.12  # of a tenth drawn anew a tenth is right; noise displaces few inputs
