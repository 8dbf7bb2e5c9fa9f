"""Flows, losses in the log domain, descents, pruning, records, and the homogeneous models."""

import csv
import math

import numpy as np
import pytest
import torch
from torch import nn

import wnkernels
from wnkernels.dynamics import (
    Recorder,
    losses,
    multi_stage,
    normalized_descent,
    objective,
    polar_flow,
    polar_weights,
    pruning,
    weight_flow,
)
from wnkernels.dynamics.diagnostics import angular_update
from wnkernels.models import homogeneous
from wnkernels.papers import read_data

F64 = torch.float64


def randn(*shape):
    return torch.randn(shape, dtype=F64)


# ------------------------------------------------------------------------------------------------------ flows


def quadratic(shape):
    n = math.prod(shape)
    A = randn(n, n)
    A, target = A @ A.T / n + torch.eye(n, dtype=F64), randn(*shape)
    return lambda w: (A @ (w - target).reshape(-1)).view(shape)


@pytest.mark.parametrize("kind", ["swn", "ewn"])
@pytest.mark.parametrize("dim", [0, 1, -1, None])
@pytest.mark.parametrize("norm, radius_rate, direction_rate", [(1.0, 1.0, 1.0), (1.7, 0.3, 1.5)])
def test_polar_flow_is_the_flow_in_w(kind, dim, norm, radius_rate, direction_rate):
    gradient, w0 = quadratic((3, 5)), randn(3, 5)
    options = dict(kind=kind, dim=dim, norm=norm, radius_rate=radius_rate, direction_rate=direction_rate)
    times = [0.0, 0.1, 0.5]
    polar, plain = polar_flow(gradient, w0, times, **options), weight_flow(gradient, w0, times, **options)
    assert polar.success and polar.t.tolist() == times
    torch.testing.assert_close(polar.weight, plain.weight, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(polar.weight[0], w0, rtol=1e-14, atol=1e-14)
    lengths = torch.stack([wnkernels.functional.row_norm(v, dim) for v in polar.direction])
    torch.testing.assert_close(lengths, torch.full_like(lengths, norm), rtol=1e-8, atol=0)  # conserved


def test_polar_flow_of_a_list_and_an_event():
    gradient, w0 = quadratic((2, 3)), [randn(2, 3), randn(4, 3)]

    def both(w):
        return [gradient(w[0]), w[1]]

    def small(_, w):
        return w[1].norm().item() - 0.5 * w0[1].norm().item()

    small.terminal = True
    flow = polar_flow(both, w0, 10.0, kind="swn", events=small)
    assert [w.shape[1:] for w in flow.weight] == [(2, 3), (4, 3)]
    assert flow.t_events[0].size == 1 and flow.t[-1] < 10
    assert flow.weight[1][-1].norm() == pytest.approx(0.5 * w0[1].norm().item(), rel=1e-6)
    alone = polar_flow(lambda w: w, w0[1], float(flow.t[-1]), kind="swn")
    torch.testing.assert_close(alone.weight[-1], flow.weight[1][-1], rtol=1e-7, atol=1e-9)


def test_a_stiff_method_and_plain_flow():
    w0 = randn(2, 2)
    flow = weight_flow(lambda w: w, w0, 1.0, method="LSODA")
    torch.testing.assert_close(flow.weight[-1], w0 * math.exp(-1), rtol=1e-7, atol=1e-9)
    assert flow.radius is None and flow.direction is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "unit"}, "kind must be"),
        ({"t": -1.0}, "t must be"),
        ({"t": [0.0, 1.0, 1.0]}, "t must be"),
        ({"norm": 0.0}, "norm must be"),
        ({"radius_rate": 0.0}, "radius_rate must be"),
        ({"dim": 2}, "dim must be"),
        ({"w0": torch.zeros(2, 3)}, "zero row"),
        ({"w0": torch.full((2, 3), math.nan)}, "finite"),
    ],
)
def test_polar_flow_refuses(change, message):
    arguments = {"gradient": lambda w: w, "w0": randn(2, 3), "t": 1.0, "kind": "swn"} | change
    with pytest.raises(ValueError, match=message):
        polar_flow(**arguments)


# ----------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    "loss, each",
    [
        (losses.exponential, lambda m: torch.exp(-m)),
        (losses.logistic, lambda m: torch.log1p(torch.exp(-m))),
    ],
)
def test_margin_losses_against_autograd(loss, each):
    m = (3 * randn(4, 7)).requires_grad_()
    total = each(m).sum(-1)
    (exact,) = torch.autograd.grad(total.sum(), m)
    log_loss, gradient = loss(m.detach())
    torch.testing.assert_close(log_loss, total.log().detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, exact / total.detach()[:, None], rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_against_autograd(reduction):
    f, y = (3 * randn(9, 5)).requires_grad_(), torch.randint(5, (9,))
    total = nn.functional.cross_entropy(f, y, reduction=reduction)
    (exact,) = torch.autograd.grad(total, f)
    log_loss, gradient = losses.cross_entropy(f.detach(), y, reduction)
    assert log_loss.item() == pytest.approx(math.log(total.item()), rel=1e-13, abs=1e-13)
    torch.testing.assert_close(gradient, exact / total.detach(), rtol=1e-12, atol=1e-16)
    batched, slopes = losses.cross_entropy(torch.stack([f.detach(), 2 * f.detach()]), y, reduction)
    assert batched.shape == (2,) and torch.equal(slopes[0], gradient)


@pytest.mark.parametrize("scale", [50.0, 300.0, 1e4, 1e6])
def test_losses_far_beyond_underflow(scale):
    """m = scale + d: log L = -scale + log sum e^-d, and the shares are those of d, to the rounding of m."""
    d = randn(6).abs()
    for loss in (losses.exponential, losses.logistic):
        log_loss, gradient = loss(scale + d)
        assert log_loss.item() == pytest.approx(-scale + torch.logsumexp(-d, 0).item(), rel=1e-14)
        torch.testing.assert_close(gradient, -torch.softmax(-d, 0), rtol=max(1e-12, 1e-15 * scale), atol=0)
    f = torch.stack([scale + d, torch.zeros(6, dtype=F64)], 1)  # two classes: the logistic loss
    log_loss, gradient = losses.cross_entropy(f, torch.zeros(6, dtype=torch.int64), "sum")
    expected, slope = losses.logistic(scale + d)
    assert log_loss.item() == pytest.approx(expected.item(), rel=1e-14)
    torch.testing.assert_close(
        gradient, torch.stack([slope, -slope], 1), rtol=max(1e-12, 1e-15 * scale), atol=0
    )


def test_losses_of_hopeless_examples_are_finite():
    m = torch.tensor([-1e4, 1e4, 0.0], dtype=F64)
    log_loss, gradient = losses.logistic(m)
    assert (
        log_loss.item() == pytest.approx(math.log(1e4 + math.log(2)), rel=1e-12) and gradient.isfinite().all()
    )
    log_loss, gradient = losses.exponential(m)
    assert log_loss.item() == 1e4 and gradient.isfinite().all()


def test_streaming_is_the_whole():
    net = homogeneous.mlp([5, 8, 3], bias=True, dtype=F64)
    with torch.no_grad():
        net[2].weight *= 1e3  # losses of batches that are hundreds of decades apart
    x, y = randn(23, 5), torch.randint(3, (23,))
    whole = losses.model_gradient(net, x, losses.cross_entropy, y, "sum")
    expected = [p.grad.clone() for p in net.parameters()]
    batches = zip(x.split(5), y.split(5))
    streamed = losses.streamed_gradient(net, batches, lambda f, t: losses.cross_entropy(f, t, "sum"))
    torch.testing.assert_close(streamed, whole, rtol=1e-13, atol=0)
    for p, exact in zip(net.parameters(), expected):
        torch.testing.assert_close(p.grad, exact, rtol=1e-11, atol=1e-13)
    with pytest.raises(ValueError, match="batches must not be empty"):
        losses.streamed_gradient(net, [])


def test_losses_refuse():
    with pytest.raises(TypeError, match="margins must be floating point"):
        losses.logistic(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="must not be empty"):
        losses.exponential(torch.empty(0))
    with pytest.raises(ValueError, match="target must have shape"):
        losses.cross_entropy(randn(4, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="reduction"):
        losses.cross_entropy(randn(4, 3), torch.zeros(4, dtype=torch.int64), "none")


# --------------------------------------------------------------------------------------------------- descents


@pytest.mark.parametrize("retraction", ["project", "renormalize"])
@pytest.mark.parametrize("dims", [0, 1, None])
def test_backends_take_the_same_steps(retraction, dims):
    start = [randn(4, 3), randn(1, 3), randn(5, 1), randn(2, 6)]
    kinds = ["swn", "ewn", None, "ewn"]
    options = dict(dims=dims, radius_lr_ratio=0.3, retraction=retraction, norm=1.3)
    ours, theirs = (polar_weights(start, kinds, backend=b, **options) for b in ("wnkernels", "torch"))
    for _ in range(20):
        grads = [randn(*w.shape) for w in start]
        for point in (ours, theirs):
            point.step(grads, 0.05)
    for a, b in zip(
        (*ours.weights, *ours.radius, *ours.norm), (*theirs.weights, *theirs.radius, *theirs.norm)
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_the_torch_backend_is_torchs_own_sgd():
    w, G = randn(4, 3), randn(4, 3)
    layer = nn.Linear(3, 4, bias=False, dtype=F64)
    with torch.no_grad():
        layer.weight.copy_(w)
    nn.utils.parametrizations.weight_norm(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    point = polar_weights([w], "swn", norm="weight", backend="torch")
    for _ in range(5):
        optimizer.zero_grad()
        (layer.weight * G).sum().backward()
        optimizer.step()
        point.step([G], 0.1)
    torch.testing.assert_close(point.weights[0], layer.weight.detach(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("backend", ["wnkernels", "torch"])
def test_rollback_is_exact(backend):
    point = polar_weights([randn(6, 3), randn(3, 2)], ["ewn", None], instances=3, backend=backend)
    point.step([randn(6, 3), randn(3, 2)], 0.1)
    point.keep([randn(6, 3), randn(3, 2)])

    def state():
        return *point.weights, *point.grads, point.radius[0], point.norm[0]

    before = [x.clone() for x in state()]
    point.snapshot()
    point.step(point.grads, torch.tensor([0.1, 0.2, 0.3], dtype=F64))
    point.keep([randn(6, 3), randn(3, 2)])
    after = [x.clone() for x in state()]
    point.rollback(torch.tensor([True, False, True]))
    for x, old, new in zip(state(), before, after):
        rows = torch.tensor([True, False, True]).repeat_interleave(len(x) // 3)
        assert torch.equal(x[rows], old[rows]) and torch.equal(x[~rows], new[~rows])
        assert not torch.equal(x[~rows], old[~rows])
    point.rollback()
    for x, old in zip(state(), before):
        assert torch.equal(x, old)


def separable(E, n=6, d=3):
    x, y = randn(n, d), torch.tensor([1.0, -1.0], dtype=F64).repeat(n // 2)
    x = torch.where((x[:, :1] * y[:, None]) < 0, -x, x)  # by the first axis

    def log_domain(weights):
        log_loss, slope = losses.logistic(y * (weights[0] @ x.T))
        return (log_loss if E > 1 else log_loss[0]), [(slope * y) @ x]

    return log_domain


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("kind", ["swn", "ewn", None, {"ewn": 1, None: 2, "swn": 2}])
@pytest.mark.parametrize("backend", ["wnkernels", "torch"])
def test_many_instances_are_each_alone(kind, backend, shrink):
    """With rates below the edge of stability, where rounding is not amplified."""
    log_domain, start = separable(5), randn(5, 3)
    frac, cap = torch.tensor([1.0, 2.0, 1.5, 3.0, 1.2], dtype=F64), torch.linspace(0.1, 0.2, 5, dtype=F64)
    options = dict(lr=0.1, stop=-2.0, max_steps=400)
    point = polar_weights([start], kind, instances=5, backend=backend)
    many = normalized_descent(log_domain, point, lr_cap=cap, frac=frac, shrink=shrink, **options)
    assert many.reached.any() and len(set(many.steps.tolist())) > 1  # some end before the others
    assert torch.equal(many.reached, many.log_loss <= -2)
    kinds = [k for k, count in kind.items() for _ in range(count)] if isinstance(kind, dict) else [kind] * 5
    for i in range(5):

        def alone(weights):
            log_loss, grads = log_domain(weights)
            return log_loss[0], grads

        point = polar_weights([start[i : i + 1]], kinds[i], backend=backend)
        one = normalized_descent(alone, point, lr_cap=cap[i].item(), frac=frac[i].item(), **options)
        assert one.steps == many.steps[i] and one.lr.item() == pytest.approx(many.lr[i].item())
        torch.testing.assert_close(one.weights[0][0], many.weights[0][i], rtol=1e-8, atol=1e-10)


def test_the_loss_falls_at_every_accepted_step_and_levels_are_kept():
    log_domain, seen = separable(1), []
    run = normalized_descent(
        log_domain,
        polar_weights([randn(1, 3)], "ewn"),
        lr=0.5,
        lr_cap=50.0,
        frac=0,
        stop=-40.0,
        max_steps=5000,
        levels=(-10.0, -30.0),
        callback=lambda step, log_loss, point, grads: seen.append((step, log_loss.item())),
    )
    steps, values = zip(*seen)
    assert run.reached and steps[0] == 0 and list(values) == sorted(values, reverse=True)
    assert run.steps > len(values) - 1  # some were undone
    assert list(run.snapshots) == [-10.0, -30.0]
    for level, weights in run.snapshots.items():
        first = next(v for v in values if v <= level)
        assert log_domain(weights)[0].item() == first


def test_patience_ends_what_cannot_fall():
    bowl = objective(lambda w: (w[0].square().sum() + 1).log()[None], lambda f: (f[0], torch.ones_like(f)))
    run = normalized_descent(
        bowl, polar_weights([randn(2, 2)], None), lr=0.1, lr_cap=1.0, frac=0, stop=-5.0, patience=50
    )
    assert not run.reached and run.steps < 1000


def test_descent_refuses():
    log_domain = separable(1)
    for change, message in (
        ({"frac": 0.5}, "frac must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"levels": (-1.0,)}, "levels must be empty"),
        ({"shrink": True, "callback": print}, "callback must be None"),
    ):
        E = 2 if "levels" in change else 1
        point = polar_weights([randn(E, 3)], "swn", instances=E)
        with pytest.raises(ValueError, match=message):
            normalized_descent(
                separable(E), point, **({"lr": 0.1, "lr_cap": 1.0, "frac": 0, "stop": -1.0} | change)
            )
    with pytest.raises(ValueError, match="one log L for each of 3 instances"):
        normalized_descent(
            log_domain, polar_weights([randn(3, 3)], "swn", instances=3), lr=1, lr_cap=1, frac=0, stop=-1
        )
    for change, message in (
        ({"kind": "unit"}, "kind must be"),
        ({"backend": "jax"}, "backend must be"),
        ({"norm": -1.0}, "norm must be"),
        ({"retraction": "geodesic", "backend": "torch"}, "retraction must be"),
        ({"instances": 2}, "instances=2"),
        ({"instances": 3, "kind": {"swn": 2}}, "kind must have counts above 0 that sum to instances=3"),
        ({"instances": 3, "kind": {"swn": 2, "unit": 1}}, "kind must be 'swn', 'ewn' or None, got 'unit'"),
        ({"telemetry": True, "backend": "torch"}, "telemetry must be"),
        ({"dims": [0, 0]}, "one entry for each"),
    ):
        with pytest.raises(ValueError, match=message):
            polar_weights([randn(3, 2)], **({"kind": "swn"} | change))
    with pytest.raises(ValueError, match="zero or not finite"):
        polar_weights([torch.zeros(2, 2)], "swn")
    with pytest.raises(TypeError, match="float32 or float64"):
        polar_weights([torch.ones(2, 2, dtype=torch.bfloat16)], "swn")
    with pytest.raises(RuntimeError, match="snapshot"):
        polar_weights([randn(2, 2)], "swn").rollback()


def test_telemetry_of_a_point_that_mixes_kinds():
    w = randn(6, 5)
    point = polar_weights([w], {"ewn": 1, None: 1, "swn": 1}, norm=1.5, instances=3, telemetry=True)
    grad = randn(6, 5)
    point.step([grad], 0.1)
    (values,) = point.telemetry()
    rows = torch.tensor([0, 1, 4, 5])
    theta = w / w.norm(dim=1, keepdim=True)
    expected = {
        "radius": point.weights[0].norm(dim=1),
        "norm": point.norm[0],
        "radial_gradient": (grad * theta).sum(1),
        "tangential_gradient": (grad - (grad * theta).sum(1, keepdim=True) * theta).norm(dim=1),
        "angular_update": angular_update(w, point.weights[0]),
    }
    assert values.keys() == expected.keys()
    for name, value in values.items():
        torch.testing.assert_close(value[rows], expected[name][rows], rtol=1e-9, atol=0)
        assert value[2:4].isnan().all()
    assert polar_weights([w], None, telemetry=True).telemetry() == [None]
    with pytest.raises(RuntimeError, match="telemetry=True"):
        polar_weights([w], "swn").telemetry()


@pytest.mark.parametrize("kind, share", [("ewn", (0.85, 1.0)), ("swn", (0.0, 0.5))])
def test_xor_from_the_public_interface(kind, share):
    """The study of XOR in a few lines."""
    data = read_data("xor")
    x, y, out, w = (torch.tensor(data[key], dtype=F64) for key in ("x", "y", "output_weights", "w1"))
    fall = objective(lambda w: y * (torch.relu(x @ w[0].T) @ out), losses.logistic)
    run = normalized_descent(
        fall,
        polar_weights([w], kind),
        lr=data["lr"],
        lr_cap=data["lr_cap"][kind],
        frac=data["frac"][kind],
        stop=-50,
    )
    square = run.weights[0].square().sum(1)
    assert run.reached and share[0] <= (square.topk(4).values.sum() / square.sum()).item() <= share[1]


def test_linsep_from_the_public_interface():
    """To a loss of e^-300, where all neurons that are alive are anti-parallel to their gradients."""
    data = read_data("linsep")
    x, y = (torch.tensor(data[key], dtype=F64) for key in ("x", "y"))
    layers = [torch.tensor(data[key], dtype=F64) for key in ("w1", "w2")]
    fall = objective(lambda w: y * (torch.relu(x @ w[0].T).square() @ w[1][0]), losses.logistic)
    run = normalized_descent(fall, polar_weights(layers, "ewn"), lr=0.01, lr_cap=0.01, frac=30, stop=-300)
    log_loss, gradients = fall(run.weights)
    assert run.reached and log_loss <= -300
    for w, G in zip(run.weights, gradients):
        alive = w.norm(dim=1) >= w.norm(dim=1).max() / 2
        assert (torch.cosine_similarity(w, G)[alive] <= -0.96).all()


def test_stages_divide_the_rate_and_rescale():
    layer = nn.Linear(3, 4, bias=False, dtype=F64)
    optimizer = wnkernels.optim.PolarSGD(layer.parameters(), lr=1.0, momentum=0.5, weight_decay=0.1)
    schedule = multi_stage(optimizer, [2, 3], 10.0, rescale=True)
    norms = []
    for _ in range(4):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
        norms.append(optimizer.state[layer.weight]["norm"].clone())
        schedule.step()
        norms.append(optimizer.state[layer.weight]["norm"].clone())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    ratios = [(after / before)[0].item() for before, after in zip(norms[::2], norms[1::2])]
    assert ratios == pytest.approx([1, 10**-0.25, 10**-0.25, 1])
    with pytest.raises(ValueError, match="polar"):
        multi_stage(torch.optim.SGD(layer.parameters(), lr=1.0), [1], rescale=True)
    with pytest.raises(ValueError, match="milestones increasing"):
        multi_stage(optimizer, [3, 2])


# -------------------------------------------------------------------------------------------- models, pruning


@pytest.mark.parametrize("activation, expected", [("relu", 3), ("relu2", 7), ("linear", 3)])
def test_nets_are_homogeneous(activation, expected):
    net = homogeneous.mlp([4, 6, 5, 2], activation, bias=True, dtype=F64)
    with torch.no_grad():
        net[0].bias.normal_()
    x, c = randn(9, 4), 1.7
    before = net(x)
    with torch.no_grad():
        for p in net.parameters():
            p *= c
    assert homogeneous.degree(net) == expected
    torch.testing.assert_close(net(x), before * c**expected, rtol=1e-12, atol=1e-12)


def test_a_convolutional_net_is_homogeneous_and_seeded():
    make = lambda: homogeneous.convnet([2, 4, 6], 3, (1, 2), image=8, bias=True, seed=3, dtype=F64)
    net, x = make(), randn(2, 2, 8, 8)
    assert all(map(torch.equal, net.parameters(), make().parameters())) and homogeneous.degree(net) == 3
    before = net(x)
    with torch.no_grad():
        for p in net.parameters():
            p *= 2
    torch.testing.assert_close(net(x), before * 8, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (homogeneous.mlp([5, 7, 4, 3], bias=True, dtype=F64), randn(6, 5)),
        lambda: (homogeneous.convnet([2, 4, 3], 5, (2,), image=6, dtype=F64), randn(3, 2, 6, 6)),
    ],
)
def test_normalization_preserves_the_function(make):
    net, x = make()
    expected = net(x)
    for per in ("row", "layer", "vector", "filter"):
        for kind in ("swn", "ewn", "swn", None, "ewn"):
            net = homogeneous.normalize(net, kind, per)
            torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-13)
            layers = [m for m in net.modules() if isinstance(m, wnkernels.nn.WeightNormed)]
            assert bool(layers) == (kind is not None and per != "vector")
            assert all(m.kind == kind and m.dim == (None if per == "layer" else 0) for m in layers)
    assert homogeneous.degree(net) == homogeneous.degree(homogeneous.normalize(net, "swn", "vector"))


def test_negative_g_survives_conversion():
    net, x = homogeneous.normalize(homogeneous.mlp([4, 5, 2], dtype=F64), "swn"), randn(6, 4)
    with torch.no_grad():
        net[0].weight_g[1::2] *= -1
    expected = net(x)
    net = homogeneous.normalize(net, "ewn")
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-13)


def test_the_whole_vector_learns_with_one_radius():
    net, x = homogeneous.normalize(homogeneous.mlp([4, 5, 2], dtype=F64), "ewn", "vector"), randn(6, 4)
    net(x).square().sum().backward()
    w, G = net.weights(), randn(1)
    plain = {name: value.detach().requires_grad_() for name, value in w.items()}
    torch.func.functional_call(net.model, plain, (x,)).square().sum().backward()
    G = torch.cat([p.grad.reshape(-1) for p in plain.values()])
    assert net.radius.grad.item() == pytest.approx((G @ net.v.detach()).item(), rel=1e-12)
    assert (net.v.detach() @ net.v.grad).abs() < 1e-12 * net.v.norm() * net.v.grad.norm()


@pytest.mark.parametrize("kind", [None, "swn", "ewn"])
@pytest.mark.parametrize("per", ["row", "layer"])
def test_pruned_nets_are_the_masked_ones(kind, per):
    net, x = (
        homogeneous.normalize(homogeneous.mlp([5, 9, 4, 3], bias=True, dtype=F64), kind, per),
        randn(6, 5),
    )
    with torch.no_grad():
        net[0].bias.normal_()
    for first, second, width in ((0, 2, 9), (2, 4, 4)):
        keep = pruning.largest(pruning.norms(net[first]), 0.5)
        mask = torch.zeros(width, dtype=F64)
        mask[keep] = 1
        h = x
        for i, module in enumerate(net):
            h = module(h) * mask if i == second - 1 else module(h)
        small = pruning.prune(net, first, second, keep)
        torch.testing.assert_close(small(x), h, rtol=1e-12, atol=1e-13)
        assert (
            small[first].weight.shape[0]
            == small[second].weight.shape[1]
            == len(keep)
            == small[first].out_features
        )
        assert type(small[first]) is type(net[first])


def test_pruned_filters_before_a_linear_layer():
    net, x = homogeneous.convnet([2, 4, 6], 3, (1, 2), image=8, dtype=F64), randn(2, 2, 8, 8)
    keep = torch.tensor([0, 2, 5])
    h = net[:5](x)
    h[:, [1, 3, 4]] = 0
    small = pruning.prune(net, 3, 7, keep)
    torch.testing.assert_close(small(x), net[5:](h), rtol=1e-12, atol=1e-13)
    for wrong, message in (
        (torch.tensor([6]), "keep must be"),
        (torch.tensor([], dtype=torch.int64), "keep must be"),
    ):
        with pytest.raises(ValueError, match=message):
            pruning.prune(net, 3, 7, wrong)
    with pytest.raises(TypeError, match="second must be"):
        pruning.prune(net, 3, 4, keep)


def test_scores():
    before, after = (
        torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]]),
        torch.tensor([[3.0, 4.0], [0.0, 3.0], [0.0, 1.0]]),
    )
    assert pruning.norms(after).tolist() == [5, 3, 1] and pruning.growth(after, before).tolist() == [0, 2, -1]
    assert pruning.largest(pruning.growth(after, before), 1 / 3).tolist() == [1]
    with pytest.raises(ValueError, match="fraction"):
        pruning.largest(torch.ones(3), 0.0)


# ----------------------------------------------------------------------------------------------------- record


def test_a_recorder_keeps_a_tidy_table(tmp_path):
    recorder = Recorder(every=3, names=["first"])
    log_domain = separable(1)
    run = normalized_descent(
        log_domain,
        polar_weights([randn(1, 3)], "ewn"),
        lr=0.1,
        lr_cap=1.0,
        frac=4,
        stop=-15.0,
        callback=recorder,
    )
    table = recorder.table()
    assert list(table[0]) == ["step", "log_loss", "weight", "row", "quantity", "value"]
    steps, norms = recorder.series("norm", "first")
    assert (
        steps[0] == 0 and norms.shape == (len(steps), 1) and norms[-1] <= run.weights[0].norm().item() + 1e-12
    )
    np.testing.assert_allclose(recorder.series("product")[1], norms * recorder.series("gradient_norm")[1])
    recorder.plot(tmp_path / "plot.png", "norm", "direction_norm")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.DictWriter(file, list(table[0])).writerows(table)
    with pytest.raises(ValueError, match="quantity must have been recorded"):
        recorder.series("speed")
