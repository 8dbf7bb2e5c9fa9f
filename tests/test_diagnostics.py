"""wnkernels.dynamics.diagnostics, wnkernels.models.two_layer and wnkernels.theory.two_homogeneous."""

import math

import numpy as np
import pytest
import torch

from wnkernels.dynamics import diagnostics, polar_flow
from wnkernels.models.two_layer import TwoLayer
from wnkernels.optim import PolarAdam, PolarSGD, to_parametrized
from wnkernels.papers import kumar
from wnkernels.theory import implicit_bias
from wnkernels.theory import two_homogeneous as theory

F64 = torch.float64


def close(a, b, rtol=1e-10, atol=0.0):
    a, b = (torch.as_tensor(x, dtype=F64) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# -------------------------------------------------------------------------------------------------- of a step


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("kind", ["swn", "ewn", "unit"])
def test_telemetry_and_gradient_agree(kind, dim):
    w = torch.nn.Parameter(torch.randn(5, 3, 2, dtype=F64))
    w.grad = torch.randn_like(w)
    expected = diagnostics.from_gradient(w, w.grad, dim)
    before = w.detach().clone()
    optimizer = PolarSGD([w], lr=1e-9, kind=kind, dim=dim, telemetry=True)
    optimizer.step()
    found = diagnostics.from_telemetry(optimizer.telemetry()["0.0"])
    for name, value in expected.items():  # the radius in the telemetry is that after a tiny step
        close(found[name], value, rtol=1e-7)
    rows = before.movedim(dim, 0).flatten(1) if dim is not None else before.reshape(1, -1)
    grads = w.grad.movedim(dim, 0).flatten(1) if dim is not None else w.grad.reshape(1, -1)
    close(expected["norm"], rows.norm(dim=1))
    close(expected["gradient_norm"], grads.norm(dim=1))
    close(expected["cosine"], torch.cosine_similarity(rows, grads), atol=1e-12)
    close(expected["product"], rows.norm(dim=1) * grads.norm(dim=1))
    close(expected["ratio"], grads.norm(dim=1) / rows.norm(dim=1))
    close(found["angular_update"], diagnostics.angular_update(before, w, dim), rtol=1e-6)


def test_cosine_of_a_negative_radius():
    """g has crossed 0: w points against v, and the cosine is that of w."""
    w = torch.nn.Parameter(torch.tensor([[0.1, 0.0], [0.0, 0.2]], dtype=F64))
    optimizer = PolarSGD([w], lr=1.0, kind="swn", direction_norm=1.0, telemetry=True)
    w.grad = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=F64)
    optimizer.step()
    close(w, [[-0.9, 0.0], [0.0, -0.8]])
    w.grad = torch.tensor([[1e-9, 2e-9], [1e-9, 0.0]], dtype=F64)
    expected = diagnostics.from_gradient(w, w.grad)["cosine"]
    optimizer.step()
    close(diagnostics.from_telemetry(optimizer.telemetry()["0.0"])["cosine"], expected, rtol=1e-6)
    close(expected, [-1 / math.sqrt(5), 0.0])


def test_unit_gradient_is_that_of_v():
    v = torch.randn(4, 6, dtype=F64, requires_grad=True)
    s = torch.tensor([2.0, -3.0, 0.5, 1.0], dtype=F64)
    w = s[:, None] * v / v.norm(dim=1, keepdim=True)
    G = torch.randn(4, 6, dtype=F64)
    w.backward(G)
    close(diagnostics.from_gradient(w, G)["unit_gradient"], v.grad.norm(dim=1) * v.detach().norm(dim=1))


def test_zero_rows_and_shapes():
    w = torch.zeros(2, 3, dtype=F64)
    found = diagnostics.from_gradient(w, torch.ones_like(w))
    assert all(x.isfinite().all() for x in found.values())
    assert (found["norm"] == 0).all() and (found["cosine"] == 0).all()
    with pytest.raises(ValueError, match=r"grad must have the shape of w, \(2, 3\), got \(3, 2\)"):
        diagnostics.from_gradient(w, w.T)


@pytest.mark.parametrize("angle", [1e-12, 1e-7, 1e-3, 1.0, 3.0, math.pi])
def test_angular_update(angle):
    a = torch.tensor([[2.0, 0.0]], dtype=F64)
    b = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=F64) * 5
    close(diagnostics.angular_update(a, b), [angle], rtol=1e-7)


@pytest.mark.parametrize("kind", ["swn", "ewn"])
def test_momentum_gradient(kind):
    """Against the v and the momentum buffer of torch's optimizer on the parametrized model."""
    model = torch.nn.Linear(4, 3, bias=False, dtype=F64)
    optimizer = PolarSGD([("weight", model.weight)], lr=0.1, momentum=0.8, kind=kind)
    inputs = torch.randn(4, 7, 4, dtype=F64)
    for x in inputs[:3]:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    twin, theirs = to_parametrized(model, optimizer)
    for net, opt in ((model, optimizer), (twin, theirs)):
        opt.zero_grad()
        net(inputs[3]).square().sum().backward()
    v = twin.parametrizations.weight.original1
    m = theirs.state[v]["momentum_buffer"]
    expected = (v.grad.square().sum(1) + 2 * 0.8 * (m * v.grad).sum(1)) * v.detach().square().sum(1)
    close(diagnostics.momentum_gradient(optimizer)["weight"], expected)


def test_monitor():
    w = torch.nn.Parameter(torch.randn(3, 4, dtype=F64))
    u = torch.nn.Parameter(torch.randn(2, 4, dtype=F64))
    groups = [{"params": [("w", w)], "weight_decay": 0.5}, {"params": [("u", u)], "telemetry": False}]
    optimizer = PolarSGD(groups, lr=1e-3, momentum=0.6, kind="ewn", telemetry=True)
    monitor = diagnostics.Monitor(optimizer, every=2)
    norms = []
    for step in range(4):
        w.grad, u.grad = torch.randn_like(w), torch.randn_like(u)
        monitor.log_loss = -float(step)
        optimizer.step()
        norms.append(w.detach().norm(dim=1).numpy())
    monitor.remove()
    optimizer.step()
    steps, values = monitor.series("norm", "w")
    assert steps.tolist() == [2, 4]
    np.testing.assert_allclose(values, [norms[1], norms[3]], rtol=1e-12)
    assert {line["weight"] for line in monitor.table()} == {"w"}
    assert {line["log_loss"] for line in monitor.table()} == {-1.0, -3.0}
    np.testing.assert_allclose(monitor.series("equilibrium_angle")[1], math.sqrt(2 * 0.5 * 1e-3 / 1.6))
    adam = PolarAdam([w], lr=1e-3, weight_decay=0.5, kind="swn", telemetry=True)
    monitor = diagnostics.Monitor(adam)
    adam.step()
    assert monitor.series("angular_update")[1].shape == (1, 3)
    with pytest.raises(ValueError, match="equilibrium_angle"):  # another law, which the paper does not give
        monitor.series("equilibrium_angle")
    with pytest.raises(ValueError, match="every"):
        diagnostics.Monitor(optimizer, every=0)


# ----------------------------------------------------------------------------------------------- of a network


def test_concentration():
    n = torch.tensor([[1.0, 1, 1, 1], [2, 0, 0, 0], [0, 0, 0, 0]], dtype=F64)
    for scale in (1.0, 1e-200, 1e200):
        close(diagnostics.participation_ratio(n * scale), [4.0, 1.0, 0.0])
        close(diagnostics.top_share(n * scale, 1), [0.25, 1.0, 0.0])


def test_normalized_margin():
    scores, signs = torch.tensor([3.0, -2.0, 5.0]), torch.tensor([1.0, -1.0, 1.0])
    assert diagnostics.normalized_margin(scores, signs, 2.0, 3).item() == pytest.approx(2 / 8)
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 5.0]])
    assert diagnostics.normalized_margin(logits, torch.tensor([0, 1]), 1.0, 2).item() == -4.0


def test_layer_invariants_are_conserved_by_the_flow():
    start = [torch.randn(4, 3, dtype=F64), torch.randn(2, 4, dtype=F64)]
    x, y = torch.randn(6, 3, dtype=F64), torch.randn(6, 2, dtype=F64)

    def gradient(weights):
        leaves = [w.clone().requires_grad_() for w in weights]
        with torch.enable_grad():
            return torch.autograd.grad((x @ leaves[0].T @ leaves[1].T - y).square().sum(), leaves)

    from wnkernels.dynamics import weight_flow

    end = [w[-1] for w in weight_flow(gradient, start, 0.5).weight]
    assert (end[0] - start[0]).norm() > 0.1
    close(diagnostics.layer_invariants(end), diagnostics.layer_invariants(start), rtol=1e-7)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("kind", ["swn", "ewn"])
def test_diagonal_invariant(kind, depth):
    A, y = torch.randn(3, 8, dtype=F64), torch.randn(3, dtype=F64)
    w0 = torch.rand(8, dtype=F64) * 0.2 + 0.2

    def gradient(w):
        return depth * w ** (depth - 1) * (A.T @ (A @ w**depth - y))

    flow = polar_flow(gradient, w0, 1.0, kind=kind, dim=None, radius_rate=0.3, rtol=1e-11)
    first, last = (
        diagnostics.diagonal_invariant(flow.direction[i], flow.radius[i], 0.3, kind, depth) for i in (0, -1)
    )
    assert (last - first).norm() > 1e-3
    assert diagnostics.row_space_residual(last - first, A) < 1e-7
    assert diagnostics.row_space_residual(flow.direction[-1] - flow.direction[0], A) > 1e-3
    radius = flow.radius[[0, -1]].exp() if kind == "ewn" else flow.radius[[0, -1]]
    close(diagnostics.effective_initialization(radius[1], radius[0], 0.3, kind),
          implicit_bias.kappa(float(radius[1]), float(radius[0]), 0.3, kind))
    with pytest.raises(ValueError, match="kind"):
        diagnostics.effective_initialization(radius[1], radius[0], 0.3, "unit")


# -------------------------------------------------------------------------------------------- two-homogeneous


@pytest.mark.parametrize("activation", theory.ACTIVATIONS)
def test_two_layer(activation):
    net = TwoLayer(3, 5, activation, dtype=F64)
    x, z = torch.randn(7, 3, dtype=F64), torch.randn(7, dtype=F64)
    W = net.weight.detach()
    close(net(x).detach(), theory.outputs(W, x, activation).sum(0))
    with torch.no_grad():
        expected = 9 * net(x)
        net.weight.mul_(3)
        close(net(x), expected)
    many = TwoLayer(3, 5, activation, instances=2, dtype=F64)
    with torch.no_grad():
        many.weight[1] = W
    close(many(x)[1].detach(), expected)
    close(many(torch.stack([x, 2 * x]))[1].detach(), many(2 * x)[1].detach())

    def forward(weight):
        return torch.func.functional_call(net, {"weight": weight}, (x,))

    value, residual = diagnostics.ncf(forward, W, z)
    close(value, theory.ncf(W, x, z, activation).sum() / W.square().sum(), rtol=1e-9)
    close(residual, theory.kkt_residual(W, x, z, activation), rtol=1e-9)
    (gradient,) = torch.autograd.grad((forward(net.weight) * z).sum(), net.weight)
    close(theory.ncf_gradient(net.weight.detach(), x, z, activation), gradient)


def test_two_layer_refuses():
    with pytest.raises(ValueError, match="activation must be one of 'squared_relu', 'relu', got 'gelu'"):
        TwoLayer(3, 5, "gelu")
    with pytest.raises(ValueError, match=r"x must have 3 features, got shape \(4, 2\)"):
        TwoLayer(3, 5)(torch.zeros(4, 2))


def _random_task(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(30, 2)), rng.normal(size=30)


@pytest.mark.parametrize("seed", range(4))
def test_kkt_directions_are_those_of_a_fine_grid(seed):
    X, z = _random_task(seed)
    angle = np.linspace(0, 2 * math.pi, 200_001)
    grid = theory.ncf(np.stack([np.cos(angle), np.sin(angle)], 1), X, z)
    inner = grid[1:-1]
    turns = ((inner - grid[:-2]) * (grid[2:] - inner) < 0).sum()
    found = theory.kkt_directions_in_plane(X, z)
    assert len(found) == turns + (((grid[0] - grid[-2]) * (grid[1] - grid[0])) < 0)
    assert found[0].value == pytest.approx(grid.max(), rel=1e-8)
    for u, value in found:
        assert theory.kkt_residual(u, X, z) < 1e-10
        assert theory.ncf(u, X, z) == pytest.approx(value, rel=1e-10)
    assert theory.ncf_maximum(X, z).value == pytest.approx(grid.max(), rel=1e-8)


def test_ncf_maximum_of_relu():
    X, z = _random_task(5)
    z = abs(z)
    angle = np.linspace(0, 2 * math.pi, 200_001)
    u = np.stack([np.cos(angle), np.sin(angle)], 1)
    best = theory.ncf_maximum(X, z, "relu")
    assert best.value == pytest.approx((np.maximum(u @ X.T, 0) @ z).max() / 2, rel=1e-7)
    assert np.linalg.norm(best.u[:2]) == pytest.approx(abs(best.u[2]))
    assert theory.kkt_residual(best.u, X, z, "relu") < 1e-5


def test_fit_neurons():
    t = kumar.task(3)
    neuron, rest = kumar.at_saddle(t)
    assert abs(theory.ncf_gradient(neuron, t.X, rest)).max() < 1e-10
    assert (rest**2).sum() < 0.7 * (t.y**2).sum()


def test_theory_refuses():
    with pytest.raises(ValueError, match=r"X must have shape \(n, 2\), got \(4, 3\)"):
        theory.kkt_directions_in_plane(np.zeros((4, 3)), np.zeros(4))
    with pytest.raises(ValueError, match=r"neurons must have shape \(\.\.\., 4\) for 'relu', got \(3,\)"):
        theory.ncf(np.zeros(3), np.zeros((4, 3)), np.zeros(4), "relu")
    with pytest.raises(ValueError, match="delta must be positive, got 0"):
        theory.escape_time(1.0, 0, 1.0)


# --------------------------------------------------------------------------------------------- papers: escape


def test_descent_in_polar_coordinates_is_the_plain_flow():
    """Against the flow in (log|W|, W/|W|) by scipy, and with plain descent; both first order in the rate."""
    t = kumar.task(0)
    X, y = torch.tensor(t.X), torch.tensor(t.y)
    start = t.start(1e-3)

    def gradient(w):  # over |w|^2, which changes the time to that of the plain flow
        with torch.enable_grad():
            leaf = w.clone().requires_grad_()
            (g,) = torch.autograd.grad(((X @ leaf.T).relu().square().sum(1) - y).square().sum() / 2, leaf)
        return g / w.square().sum()

    flow = polar_flow(gradient, torch.tensor(start), [0.02], kind="ewn", dim=None, rtol=1e-8, atol=1e-10)
    exact = flow.weight[-1]
    errors = {}
    for backend in ("wnkernels", "torch"):
        for lr in (5e-5, 2.5e-5):
            descent = kumar.Descent(t.X[None], t.y[None], [start[None]], lr, backend)
            for _ in range(round(0.02 / lr)):
                descent.step()
            errors[backend, lr] = np.linalg.norm(descent.weight()[0] - exact.numpy()) / exact.norm().item()
    for backend in ("wnkernels", "torch"):
        assert errors[backend, 5e-5] < 0.02
        assert errors[backend, 5e-5] / errors[backend, 2.5e-5] == pytest.approx(2, abs=0.1)
    assert errors["wnkernels", 5e-5] < errors["torch", 5e-5] / 3  # the growth is exact


def test_escape_from_far_below_the_range_of_squares():
    """|W| = 1e-150: |W|^4, which the loss has, underflows."""
    found = kumar.escape([0], [1e-150], lambda _: 1e-145, backend="wnkernels")
    best = theory.ncf_maximum(kumar.task(0).X, kumar.task(0).y).value
    late = kumar.escape([0], [1e-150], lambda _: 1e-146, backend="wnkernels")
    expected = theory.escape_time(1e-145, 1e-146, best)
    assert (found.time - late.time).item() == pytest.approx(expected, rel=1e-3)


def test_drops():
    steps = np.arange(400.0)
    two = 5 / (1 + np.exp(steps - 100)) + 3 / (1 + np.exp(steps - 250))
    at, level = kumar.drops(two)
    assert len(at) == 2 and abs(at - [100, 250]).max() <= 1 and level == pytest.approx(3, abs=1e-6)
    assert len(kumar.drops(two + 0 * steps - 3 / (1 + np.exp(steps - 250)))[0]) == 1
