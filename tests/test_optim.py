"""The polar optimizers against torch.optim on the reparametrized model, and torch.optim's conventions."""

import copy
import io
import math
import operator
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import wnkernels
from wnkernels import reference
from wnkernels.optim import (
    PolarAdam,
    PolarAdamW,
    PolarSGD,
    describe,
    from_parametrized,
    polar_groups,
    to_parametrized,
)

TORCH = {PolarSGD: torch.optim.SGD, PolarAdam: torch.optim.Adam, PolarAdamW: torch.optim.AdamW}
RADIUS_OPTIONS = ("radius_lr_ratio", "radius_weight_decay")
SGD = [
    dict(lr=0.05),
    dict(lr=0.05, momentum=0.9, radius_lr_ratio=0.3),
    dict(lr=0.05, momentum=0.8, dampening=0.3, weight_decay=0.02),
    dict(lr=0.03, momentum=0.9, nesterov=True, weight_decay=0.05, radius_weight_decay=0.05),
    dict(lr=0.05, maximize=True, radius_weight_decay=0.03),
]
ADAM = [
    dict(lr=0.01),
    dict(lr=0.01, betas=(0.8, 0.95), eps=1e-2, weight_decay=0.1, radius_weight_decay=0.04),
    dict(lr=0.01, amsgrad=True, weight_decay=0.1, radius_lr_ratio=0.4),
    dict(lr=0.01, maximize=True),
]
CASES = [
    *((PolarSGD, options) for options in SGD),
    *((PolarAdam, options) for options in ADAM),
    *((PolarAdamW, options) for options in ADAM),
]
case_id = lambda x: x.__name__ if isinstance(x, type) else None if isinstance(x, int) else str(x)  # noqa: E731


def linear_net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(10, 6), torch.randn(10, 3)


def conv_net():
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 9, 3))
    return net, torch.randn(5, 4, 5, 5), torch.randn(5, 3)


def transposed_net():
    net = nn.Sequential(nn.ConvTranspose1d(3, 4, 3), nn.Tanh(), nn.Conv1d(4, 2, 3))
    return net, torch.randn(5, 3, 6), torch.randn(5, 2, 6)


NETS = {"linear": linear_net, "conv": conv_net, "transposed": transposed_net}


class Twin:
    """The model that a polar optimizer stands for, in torch alone: (radius, v) for every polar weight, torch.optim."""

    def __init__(self, model, optimizer):
        names = {p: name for name, p in model.named_parameters()}
        self.model, self.weights, self.plain, groups = model, {}, {}, []
        for group in optimizer.param_groups:
            shared = {k: x for k, x in group.items() if k in TORCH[type(optimizer)]([torch.ones(1)]).defaults}
            for p in group["params"]:
                if group["kind"] is None or p.ndim < 2:
                    self.plain[names[p]] = nn.Parameter(p.detach().clone())
                    groups.append({**shared, "params": [self.plain[names[p]]]})
                    continue
                norm = group["direction_norm"]
                length = reference.row_norm(p.detach(), group["dim"])
                v = p.detach().clone()
                if norm != "weight":
                    reference.normalize_(v, group["dim"], norm)
                v, r = nn.Parameter(v), nn.Parameter(length.log() if group["kind"] == "ewn" else length)
                self.weights[names[p]] = (v, r, group["dim"], "ewn" if group["kind"] == "ewn" else "swn")
                groups.append({**shared, "params": [v]})
                if group["kind"] != "unit":
                    rate, decay = group["lr"] * group["radius_lr_ratio"], group["radius_weight_decay"]
                    groups.append({**shared, "params": [r], "lr": rate, "weight_decay": decay})
        self.optimizer = TORCH[type(optimizer)](groups)

    def tensors(self):
        weights = {name: reference.weight_norm(*parts) for name, parts in self.weights.items()}
        return {**weights, **self.plain}

    def __call__(self, x):
        return functional_call(self.model, self.tensors(), (x,))

    def step(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def largest_difference(self, optimizer):
        """From the parameters and |v| of the optimizer's model."""
        ours = dict(self.model.named_parameters())
        worst = max((ours[name] - x).abs().max().item() for name, x in self.tensors().items())
        for name, (v, _, dim, _) in self.weights.items():
            n = optimizer.state[ours[name]]["norm"].reshape(() if dim is None else (-1,))
            worst = max(worst, (n - reference.row_norm(v, dim)).abs().max().item())
        return worst


def train(model, optimizer, x, y, steps=1, loss_function=F.mse_loss):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_function(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_state(a, b, **tolerance):
    """Of two optimizers, in the order of their parameters."""
    parameters = [[p for group in opt.param_groups for p in group["params"]] for opt in (a, b)]
    for p, q in zip(*parameters, strict=True):
        torch.testing.assert_close(p, q, **tolerance)
        assert a.state[p].keys() == b.state[q].keys()
        for name, x in a.state[p].items():
            torch.testing.assert_close(x, b.state[q][name], **tolerance)


EXACT = dict(rtol=0, atol=0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are small, and threads that wait for each other take longer than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------- equal to torch's parametrized


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", ["swn", "ewn", "unit"])
@pytest.mark.parametrize("optimizer_class, options", CASES, ids=case_id)
def test_steps_are_torchs_on_the_reparametrized_model(optimizer_class, options, kind, net):
    model, x, y = NETS[net]()
    model, x, y = model.double(), x.double(), y.double()
    optimizer = optimizer_class(polar_groups(model, kind, transpose_dim=1), **options)
    twin = Twin(model, optimizer)
    sign = -1 if options.get("maximize") else 1
    for _ in range(12):
        (ours,) = train(model, optimizer, x, y, 1, lambda out, y: sign * F.mse_loss(out, y))
        theirs = twin.step(sign * F.mse_loss(twin(x), y))
        assert abs(ours - theirs) < 1e-12
        assert twin.largest_difference(optimizer) < 1e-12


@pytest.mark.parametrize("kind", ["swn", "ewn"])
@pytest.mark.parametrize("optimizer_class, options", [(c, o) for c, o in CASES if not o.get("maximize")], ids=case_id)
def test_two_hundred_steps(optimizer_class, options, kind):
    """Well-conditioned: |v| = 2 and little decay of v keep the rate lr (s/|v|)^2 below the edge of stability."""
    model = nn.Linear(8, 4).double()
    options = {k: x / 10 if k == "weight_decay" else x for k, x in options.items()}
    x = torch.linalg.qr(torch.randn(24, 8).double()).Q * 24**0.5  # a Hessian of one eigenvalue
    y = x @ torch.randn(8, 4).double() + 0.1 * torch.randn(24, 4).double()
    optimizer = optimizer_class(polar_groups(model, kind, direction_norm=2.0), **options)
    twin = Twin(model, optimizer)
    losses = train(model, optimizer, x, y, 200)
    for ours in losses:
        assert abs(ours - twin.step(F.mse_loss(twin(x), y))) < 1e-10
    assert twin.largest_difference(optimizer) < 1e-10
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dim", [1, -1, None])
@pytest.mark.parametrize("norm", [1.0, 3])
def test_dim_and_direction_norm(dim, norm):
    model, x, y = linear_net()
    model, x, y = model.double(), x.double(), y.double()
    weights, others = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    groups = [{"params": weights, "dim": dim, "direction_norm": norm}, {"params": others, "kind": None}]
    optimizer = PolarSGD(groups, lr=0.1, momentum=0.5)
    twin = Twin(model, optimizer)
    for _ in range(10):
        train(model, optimizer, x, y)
        twin.step(F.mse_loss(twin(x), y))
    assert twin.largest_difference(optimizer) < 1e-12


def test_bare_parameters_are_polar_from_two_dims_on():
    model, x, y = conv_net()
    model, x, y = model.double(), x.double(), y.double()
    optimizer = PolarAdamW(model.parameters(), lr=0.01, kind="ewn")
    assert describe(optimizer).count("ewn, dim 0") == 2 and describe(optimizer).count("plain") == 2
    twin = Twin(model, optimizer)
    for _ in range(5):
        train(model, optimizer, x, y)
        twin.step(F.mse_loss(twin(x), y))
    assert len(twin.weights) == 2 and twin.largest_difference(optimizer) < 1e-12


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    where=st.integers(-1, 3),
    kind=st.sampled_from(["swn", "ewn"]),
    lr=st.floats(1e-4, 0.2),
    ratio=st.floats(0, 2),
    momentum=st.sampled_from([0.0, 0.5, 0.95]),
    nesterov=st.booleans(),
    decays=st.tuples(st.floats(0, 0.1), st.floats(0, 0.1)),
    adam=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_hyperparameters(shape, where, kind, lr, ratio, momentum, nesterov, decays, adam, seed):
    torch.manual_seed(seed)
    weight = nn.Parameter(torch.randn(shape).double())
    dim = None if where < 0 else where % len(shape)
    decay = dict(weight_decay=decays[0], radius_weight_decay=decays[1])
    options = dict(kind=kind, dim=dim, lr=lr, radius_lr_ratio=ratio, **decay)
    if not adam:
        options.update(momentum=momentum, nesterov=nesterov and momentum > 0)
    optimizer = (PolarAdamW if adam else PolarSGD)([weight], **options)
    rule = dict(lr=lr, radius_lr=lr * ratio, kind=kind, dim=dim, **decay)
    if not adam:
        rule.update(momentum=momentum, nesterov=options["nesterov"])
    step = reference.polar_adam_step if adam else reference.polar_sgd_step
    norm = reference.row_norm(weight.detach(), dim)
    expected = reference.PolarStep(weight.detach().clone(), norm.log() if kind == "ewn" else norm, norm, None)
    for _ in range(3):
        weight.grad = torch.randn_like(weight) / weight.numel() ** 0.5  # alpha grows by s p: no explosion of e^alpha
        expected = step(expected.weight, weight.grad, *expected[1:], **rule)
        optimizer.step()
    state = optimizer.state[weight]
    for ours, theirs in ((weight, expected.weight), (state["radius"], expected.radius), (state["norm"], expected.norm)):
        torch.testing.assert_close(ours.detach().reshape(-1), theirs.reshape(-1), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["swn", "ewn"])
@pytest.mark.parametrize(
    "optimizer_class, options", [(PolarSGD, dict(lr=0.05, momentum=0.9)), (PolarAdamW, dict(lr=0.01))]
)
def test_float32_is_as_near_as_two_orderings_of_one_sum(optimizer_class, options, kind):
    """torch against torch with the inputs permuted is the rounding that fp32 has anyway."""
    weight, x, y = torch.randn(16, 64), torch.randn(128, 64), torch.randn(128, 16)
    order = torch.randperm(64)
    radius = weight.norm(dim=1, keepdim=True)

    def by_torch(columns):
        v = nn.Parameter(weight[:, columns])
        r = nn.Parameter(radius.log() if kind == "ewn" else radius.clone())
        optimizer = TORCH[optimizer_class]([v, r], **options, weight_decay=0.0)
        for _ in range(30):
            optimizer.zero_grad()
            w = (r.exp() if kind == "ewn" else r) * v / v.norm(dim=1, keepdim=True)
            F.mse_loss(x[:, columns] @ w.T, y).backward()
            optimizer.step()
        return ((r.exp() if kind == "ewn" else r) * v / v.norm(dim=1, keepdim=True)).detach()

    torchs = by_torch(slice(None))
    permuted = torch.empty_like(torchs)
    permuted[:, order] = by_torch(order)
    model = nn.Linear(64, 16, bias=False)
    model.weight.data.copy_(weight)
    train(model, optimizer_class(polar_groups(model, kind), **options, weight_decay=0.0), x, y, 30)
    rms = lambda a: a.double().square().mean().sqrt().item()  # noqa: E731
    assert rms(model.weight.detach() - torchs) <= 4 * rms(permuted - torchs)


# ------------------------------------------------------------------------------------------------------- difficult rows


def one_step(weight, grad, kind, steps=1, **options):
    """After some steps with the same gradient, ours and the specification's in float64: (weight, radius, norm)."""
    p = nn.Parameter(weight.clone())
    optimizer = PolarSGD([p], kind=kind, **options)
    exact = weight.double()
    norm = reference.row_norm(exact)
    expected = reference.PolarStep(exact, norm.log() if kind == "ewn" else norm, norm, None)
    rule = {k: x for k, x in options.items() if k not in ("telemetry", "radius_lr_ratio")}
    rule["radius_lr"] = options["lr"] * options.get("radius_lr_ratio", 1.0)
    for _ in range(steps):
        p.grad = grad.clone()
        optimizer.step()
        expected = reference.polar_sgd_step(expected.weight, grad.double(), *expected[1:], kind=kind, **rule)
    state = optimizer.state[p]
    return (p.detach(), state["radius"], state["norm"]), expected[:3], optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_g_crosses_zero(dtype):
    weight = torch.randn(4, 9, dtype=dtype)
    outward = weight / weight.norm(dim=1, keepdim=True)
    ours, expected, _ = one_step(weight, outward + 0.1 * torch.randn_like(weight), "swn", steps=30, lr=0.4)
    assert (ours[1] < -1).all()
    assert (F.cosine_similarity(ours[0].double(), weight.double()) < 0).all()
    torch.testing.assert_close(ours[0].double(), expected[0], rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-4)
    for a, b in zip(ours[1:], expected[1:]):
        torch.testing.assert_close(a, b, rtol=1e-11 if dtype == torch.float64 else 1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("kind", ["swn", "ewn"])
def test_radius_near_zero_and_far_from_it(kind, scale):
    weight, grad = torch.randn(4, 9) * scale, torch.randn(4, 9) / scale
    # The direction moves by lr (s/n) G/n = lr G/|w|, and the radius of SWN by lr G: rates that suit the scale.
    options = dict(lr=0.1 * scale**2, radius_lr=0.1 * (scale**2 if kind == "swn" else 1))
    p = nn.Parameter(weight.clone())
    optimizer = PolarSGD([p], kind=kind, lr=options["lr"], radius_lr_ratio=options["radius_lr"] / options["lr"])
    p.grad = grad
    optimizer.step()
    exact = weight.double()
    norm = reference.row_norm(exact)
    radius = norm.log() if kind == "ewn" else norm
    expected = reference.polar_sgd_step(exact, grad.double(), radius, norm, kind=kind, **options)
    torch.testing.assert_close(p.detach().double() / scale, expected.weight / scale, rtol=1e-5, atol=1e-5)
    assert not torch.equal(p.detach(), weight)


def test_an_underflowing_radius_loses_the_direction_and_is_counted():
    weight = torch.randn(3, 8)
    p = nn.Parameter(weight.clone())
    optimizer = PolarSGD([("w", p)], kind="ewn", lr=1.0, telemetry=True)
    grad = torch.zeros(3, 8)
    grad[1] = weight[1] / weight[1].norm() * 200 / weight[1].norm()  # d alpha = s p = 200: e^-200 is no float32
    for _ in range(3):
        p.grad = grad.clone()
        optimizer.step()
        grad = 0.01 * torch.randn(3, 8)
    assert (p[1] == 0).all() and (p[[0, 2]] != 0).all() and p.isfinite().all()
    values = optimizer.telemetry()["w"]
    assert values["lost_rows"] == 1 and values["radius"].eq(0).tolist() == [False, True, False]


@pytest.mark.parametrize("kind", ["swn", "ewn"])
def test_huge_steps_turn_by_nearly_a_right_angle(kind):
    weight, grad = torch.randn(5, 40), torch.randn(5, 40)
    grad -= (grad * weight).sum(1, keepdim=True) / weight.square().sum(1, keepdim=True) * weight
    ours, expected, optimizer = one_step(weight, grad, kind, lr=1e4, radius_lr_ratio=0.0, telemetry=True)
    torch.testing.assert_close(ours[0].double(), expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[2], expected[2], rtol=1e-5, atol=0)
    angle = optimizer.telemetry()["0.0"]["angular_update"]
    assert ((angle > 1.5) & (angle < math.pi / 2)).all()


@pytest.mark.parametrize("kind", ["swn", "ewn"])
def test_one_column_has_a_radius_and_nothing_to_turn(kind):
    weight = torch.tensor([[1.5], [-0.5], [2.0]]).double()
    ours, expected, _ = one_step(weight, torch.randn(3, 1).double(), kind, steps=3, lr=0.02)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours[2], weight.abs()[:, 0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("make", [lambda p: PolarSGD(p, lr=0.1, momentum=0.9), lambda p: PolarAdamW(p, lr=0.1)])
def test_a_bad_gradient_stays_in_its_row(make, bad):
    p, q = (nn.Parameter(x) for x in torch.randn(4, 300).repeat(2, 1, 1))
    optimizers = make([p]), make([q])
    for i in range(2):
        q.grad = torch.randn(4, 300)
        p.grad = q.grad.clone()
        if i == 0:
            p.grad[2, 7] = bad
        for optimizer in optimizers:
            optimizer.step()
    others = [0, 1, 3]
    assert torch.equal(p[others], q[others]) and p[others].isfinite().all()
    for name, x in optimizers[0].state[p].items():
        if x.ndim:
            assert torch.equal(x[others], optimizers[1].state[q][name][others])


@pytest.mark.parametrize("angle", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("aligned", [False, True])
def test_tiny_angles_are_right_in_float32(angle, aligned):
    """aligned: G is nearly parallel to w, so that |G|^2 - p^2 would be noise."""
    weight = torch.randn(6, 200).double()
    theta = weight / weight.norm(dim=1, keepdim=True)
    tangent = torch.randn_like(weight)
    tangent -= (tangent * theta).sum(1, keepdim=True) * theta
    tangent *= angle / tangent.norm(dim=1, keepdim=True)
    # lr = |w| here, so that the angle is |tangent|; and along w a gradient that the step does not see.
    grad = tangent + (theta if aligned else 0)
    scale = weight.norm(dim=1, keepdim=True)
    p = nn.Parameter((weight / scale).float())
    optimizer = PolarSGD([p], kind="unit", lr=1.0, telemetry=True)
    exact = p.detach().double()
    p.grad = grad.float()
    norm = reference.row_norm(exact)
    expected = reference.polar_sgd_step(exact, p.grad.double(), norm, norm, kind="unit", lr=1.0)
    optimizer.step()
    before, after = (x / x.norm(dim=1, keepdim=True) for x in (exact, expected.weight))
    true_angle = 2 * ((after - before).norm(dim=1) / 2).asin()
    values = optimizer.telemetry()["0.0"]
    torch.testing.assert_close(values["angular_update"], true_angle, rtol=0.01, atol=0)
    torch.testing.assert_close(values["tangential_gradient"], true_angle.tan(), rtol=0.01, atol=0)


# --------------------------------------------------------------------------------------------------------- real models


def digits(dtype=torch.float64):
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data / 16 - 0.5, dtype=dtype), torch.tensor(data.target)


class ResidualNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.first, self.first_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 4, 10)

    def forward(self, x):
        x = self.norm(self.stem(x.view(-1, 1, 8, 8))).relu()
        x = (x + self.second_norm(self.second(self.first_norm(self.first(x)).relu()))).relu()
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.mark.parametrize("kind", ["swn", "ewn"])
@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), ResidualNet])
@pytest.mark.parametrize(
    "optimizer_class, options",
    [(PolarSGD, dict(lr=0.1, momentum=0.9, weight_decay=1e-4)), (PolarAdamW, dict(lr=1e-2))],
)
def test_digits_train_the_same_both_ways(make, kind, optimizer_class, options):
    x, y = digits()
    model = make().double()
    optimizer = optimizer_class(polar_groups(model, kind), **options)
    if isinstance(model, ResidualNet):
        assert describe(optimizer).count(kind) == 4
    other, others_optimizer = to_parametrized(model, optimizer)
    curves = [], []
    for i in range(30):
        batch = slice(i * 32, i * 32 + 32)
        for curve, net, opt in zip(curves, (model, other), (optimizer, others_optimizer)):
            curve += train(net, opt, x[batch], y[batch], loss_function=F.cross_entropy)
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=1e-7, atol=1e-9)
    assert sum(curves[0][-5:]) < sum(curves[0][:5])


# ------------------------------------------------------------------------------------------------------- 16-bit weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_radius_is_not_rounded_away(dtype):
    """2000 steps of d alpha = 5e-4 make an e-fold; rounded to bfloat16 none of them would be seen."""
    weight = torch.randn(3, 32).to(dtype)
    p = nn.Parameter(weight.clone())
    optimizer = PolarSGD([p], kind="ewn", lr=5e-4)
    for _ in range(2000):
        w = optimizer.state[p]["master"].double()
        p.grad = (-w / w.square().sum(1, keepdim=True)).to(dtype)  # s <G, theta> = -1
        optimizer.step()
    growth = reference.row_norm(p.detach().double()) / reference.row_norm(weight.double())
    torch.testing.assert_close(growth, torch.full_like(growth, math.e), rtol=0.01, atol=0)
    torch.testing.assert_close(optimizer.state[p]["master"].to(dtype), p.detach(), **EXACT)


@pytest.mark.parametrize("make", [lambda p: PolarSGD(p, lr=0.1, momentum=0.9), lambda p: PolarAdamW(p, lr=0.01)])
def test_sixteen_bit_steps_are_those_of_the_master_copy(make):
    p = nn.Parameter(torch.randn(5, 20).bfloat16())
    q = nn.Parameter(p.detach().double())
    ours, exact = make([p]), make([q])
    for _ in range(20):
        p.grad = torch.randn(5, 20).bfloat16()
        q.grad = p.grad.double()
        ours.step()
        exact.step()
    torch.testing.assert_close(ours.state[p]["master"].double(), q.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(p, ours.state[p]["master"].bfloat16())


def test_edits_of_sixteen_bit_weights_are_picked_up():
    p = nn.Parameter(torch.randn(4, 8).bfloat16())
    optimizer = PolarSGD([p], lr=1e-4)
    for _ in range(3):
        p.grad = torch.randn(4, 8).bfloat16()
        optimizer.step()
    master = optimizer.state[p]["master"].clone()
    with torch.no_grad():
        p[1] = torch.randn(8).bfloat16() * 7
        p[2].clamp_(-0.1, 0.1)
    edited = p.detach().float()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    # What was left alone is not rounded to 16 bits, which would show at 1e-3.
    torch.testing.assert_close(optimizer.state[p]["master"][[0, 3]], master[[0, 3]], rtol=1e-6, atol=0)
    torch.testing.assert_close(optimizer.state[p]["master"][1:3], edited[1:3], rtol=1e-2, atol=1e-3)
    length = reference.row_norm(optimizer.state[p]["master"].double())
    torch.testing.assert_close(optimizer.state[p]["radius"], length, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------ edits of the weights


@pytest.mark.parametrize("kind", ["swn", "ewn"])
def test_edits_between_steps_are_picked_up(kind):
    p = nn.Parameter(torch.randn(4, 8).double())
    optimizer = PolarSGD([p], kind=kind, lr=0.1)
    p.grad = torch.randn_like(p)
    optimizer.step()
    norm = optimizer.state[p]["norm"].clone()
    with torch.no_grad():
        p[1] *= 3
        p[2] = torch.randn(8)
    length = reference.row_norm(p.detach())
    radius = length.log() if kind == "ewn" else length
    p.grad = torch.randn_like(p)
    expected = reference.polar_sgd_step(p.detach().clone(), p.grad, radius, norm, kind=kind, lr=0.1)
    optimizer.step()
    torch.testing.assert_close(p.detach(), expected.weight, rtol=1e-12, atol=1e-12)


def test_weights_loaded_before_the_first_step_are_the_first_weights():
    model, loaded = nn.Linear(6, 4).double(), nn.Linear(6, 4).double()
    optimizer = PolarSGD(polar_groups(model, "ewn"), lr=0.1)
    model.load_state_dict(loaded.state_dict())
    from_the_start = PolarSGD(polar_groups(loaded, "ewn"), lr=0.1)
    x, y = torch.randn(5, 6).double(), torch.randn(5, 4).double()
    train(model, optimizer, x, y, 3)
    train(loaded, from_the_start, x, y, 3)
    assert_same_state(optimizer, from_the_start, **EXACT)


# ------------------------------------------------------------------------------------------- torch.optim's conventions

MAKE = {
    "sgd": lambda params, **o: PolarSGD(params, **{"lr": 0.05, "momentum": 0.9, "dampening": 0.1, **o}),
    "adam": lambda params, **o: PolarAdam(params, **{"lr": 0.01, "weight_decay": 0.01, **o}),
    "adamw": lambda params, **o: PolarAdamW(params, **{"lr": 0.01, "amsgrad": True, **o}),
}


@pytest.fixture(params=MAKE)
def make(request):
    return MAKE[request.param]


def setup(make, kind="ewn", dtype=torch.float32, **options):
    model, x, y = conv_net()
    model, x, y = model.to(dtype), x.to(dtype), y.to(dtype)
    return model, make(polar_groups(model, kind), **options), x, y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_resumed_run_is_bitwise_the_same(make, dtype):
    model, optimizer, x, y = setup(make, dtype=dtype)
    train(model, optimizer, x, y, 4)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file)
    resumed, again, _, _ = setup(make, "swn", dtype)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    for group in again.param_groups[:-1]:
        assert group["kind"] == "ewn"
    train(model, optimizer, x, y, 4)
    train(resumed, again, x, y, 4)
    assert_same_state(optimizer, again, **EXACT)


def test_a_state_dict_loads_into_another_dtype(make):
    model, optimizer, x, y = setup(make)
    train(model, optimizer, x, y, 3)
    wide, again, _, _ = setup(make, dtype=torch.float64)
    wide.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    low, lower, _, _ = setup(make, dtype=torch.bfloat16)
    low.load_state_dict(model.state_dict())
    lower.load_state_dict(optimizer.state_dict())
    train(model, optimizer, x, y, 2)
    train(wide, again, x.double(), y.double(), 2)
    train(low, lower, x.bfloat16(), y.bfloat16(), 2)
    for p, q in zip(model.parameters(), wide.parameters()):
        torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=1e-5)
    for p in low.parameters():
        wanted = torch.float32 if p.ndim > 1 else torch.bfloat16
        assert all(x.dtype == wanted for name, x in lower.state[p].items() if x.shape == p.shape and p.ndim > 1)
        assert p.isfinite().all()


def test_loading_shares_nothing_and_keeps_the_precision_of_radii(make):
    model, optimizer, x, y = setup(make)
    train(model, optimizer, x, y, 2)
    _, other, _, _ = setup(make)
    other.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict()["state"])
    weight, theirs = optimizer.param_groups[0]["params"][0], other.param_groups[0]["params"][0]
    assert optimizer.state[weight]["radius"].dtype == other.state[theirs]["radius"].dtype == torch.float64
    for values in other.state.values():
        for value in values.values():
            value.zero_()
    torch.testing.assert_close(optimizer.state_dict()["state"], before, **EXACT)


def test_the_state_of_another_optimizer_is_refused():
    model, optimizer, _, _ = setup(MAKE["sgd"])
    plain = torch.optim.SGD([{"params": g["params"]} for g in optimizer.param_groups], lr=0.1)
    with pytest.raises(ValueError, match="state_dict must come from a polar optimizer"):
        optimizer.load_state_dict(plain.state_dict())


def test_load_hooks_see_and_make_the_state():
    model, optimizer, x, y = setup(MAKE["sgd"])
    train(model, optimizer, x, y)
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda opt, d: seen.append(len(d["state"])))
    optimizer.register_load_state_dict_post_hook(
        lambda opt: seen.append(opt.state[opt.param_groups[0]["params"][0]]["radius"].dtype)
    )
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [4, torch.float64]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alike(make, copied):
    model, optimizer, x, y = setup(make)
    train(model, optimizer, x, y, 2)
    twin, others = copied((model, optimizer))
    train(model, optimizer, x, y, 3)
    before = copy.deepcopy(optimizer.state_dict())
    train(twin, others, x, y, 3)
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], **EXACT)
    assert_same_state(optimizer, others, **EXACT)


def test_schedulers_keep_the_ratio_of_the_radius():
    model, x, y = linear_net()
    model, x, y = model.double(), x.double(), y.double()
    optimizer = PolarSGD(polar_groups(model, "swn", radius_lr_ratio=0.25), lr=0.1, momentum=0.9)
    twin = Twin(model, optimizer)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(opt, [g["lr"] * 2 for g in opt.param_groups], total_steps=12)
        for opt in (optimizer, twin.optimizer)
    ]
    for _ in range(11):
        train(model, optimizer, x, y)
        twin.step(F.mse_loss(twin(x), y))
        for scheduler in schedulers:
            scheduler.step()
    assert twin.largest_difference(optimizer) < 1e-11


def test_closures_and_hooks(make):
    model, optimizer, x, y = setup(make)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        calls.append("closure")
        return loss

    first = optimizer.step(closure).item()
    assert calls == ["before", "closure", "after"]
    assert optimizer.step(closure).item() < first
    optimizer.zero_grad()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    assert optimizer.step() is None  # no gradients, nothing to do
    torch.testing.assert_close(optimizer.state_dict()["state"], before, **EXACT)


def test_steps_show_in_profiles_and_to_hooks_of_all_optimizers(make):
    model, optimizer, x, y = setup(make)
    train(model, optimizer, x, y, 1)
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("after")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert calls == ["before", "after"]
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert f"Optimizer.step#{type(optimizer).__name__}.step" in {event.key for event in profile.key_averages()}
    assert all(p.requires_grad for p in model.parameters()) and torch.is_grad_enabled()


def test_parameters_without_gradients_wait(make):
    """A weight that joins later is stepped as one of its own age."""
    model, optimizer, x, y = setup(make, dtype=torch.float64)
    twin, others, _, _ = setup(make, dtype=torch.float64)
    twin.load_state_dict(model.state_dict())
    twin.requires_grad_()
    alone = [make([{"params": [p], "kind": "ewn"}]) for p in twin.parameters()]
    for i in range(6):
        for net in (model, twin):
            net.zero_grad()
            F.mse_loss(net(x), y).backward()
            if i % 3 == 0:
                net[0].weight.grad = None
            if i == 4:
                net[3].weight.grad = net[3].bias.grad = None
        optimizer.step()
        for one in alone:
            one.step()
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_one_call_with_the_same_lists_for_weights_of_one_kind(make, monkeypatch):
    calls = []

    class Recorded:
        def __init__(self, params, *rest):
            self.count, self.lists = len(params), StepLists(params, *rest)

        def __getattr__(self, name):
            calls.append(self)
            return getattr(self.lists, name)

    StepLists = wnkernels._C.StepLists
    monkeypatch.setattr(wnkernels._C, "StepLists", Recorded)
    weights = [nn.Parameter(torch.randn(3, 4, dtype=t)) for t in (torch.float32, torch.float64, torch.bfloat16) * 3]
    optimizer = make([{"params": weights[:6], "kind": "swn"}, {"params": weights[6:], "kind": "ewn"}])
    for i in range(4):
        for p in weights:
            p.grad = torch.randn_like(p)
        if i == 0:
            weights[0].grad = None
        calls.clear()
        optimizer.step()
        if i == 2:
            before = calls.copy()
    # Adam's count of steps sets the late weight apart; the momentum of SGD knows only the first step.
    apart = isinstance(optimizer, PolarAdam)
    assert sorted(lists.count for lists in calls) == ([1] * 5 + [2] * 2 if apart else [1] * 3 + [2] * 3)
    assert all(map(operator.is_, calls, before))


def test_parameters_whose_tensors_are_swapped(make):
    p = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    optimizer = make([p])
    p.grad = torch.randn_like(p)
    optimizer.step()
    p.grad = None
    torch.utils.swap_tensors(p, nn.Parameter(torch.randn(3, 4, dtype=torch.float64)))
    before, p.grad = p.detach().clone(), torch.randn_like(p)
    optimizer.step()
    assert not p.equal(before)


def test_gradients_that_come_and_go(make):
    weights = [nn.Parameter(torch.randn(3, 4, dtype=torch.float64)) for _ in range(2)]
    twins = [nn.Parameter(p.detach().clone()) for p in weights]
    optimizer, alone = make(weights), [make([p]) for p in twins]
    for present in ((0,), (0, 1), (0, 1), (1,), (), (0, 1)):
        for p, q in zip(weights, twins):
            p.grad = q.grad = None
        for i in present:
            weights[i].grad = torch.randn(3, 4, dtype=torch.float64)
            twins[i].grad = weights[i].grad.clone()
        optimizer.step()
        for i in present:
            alone[i].step()
        for p, q in zip(weights, twins):
            torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


def test_channels_last_weights(make):
    model, optimizer, x, y = setup(make, dtype=torch.float64)
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    others = make(polar_groups(twin, "ewn"))
    train(model, optimizer, x, y, 4)
    train(twin, others, x.to(memory_format=torch.channels_last), y, 4)
    assert twin[0].weight.is_contiguous(memory_format=torch.channels_last)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def test_a_step_between_forward_and_backward_is_noticed(make):
    """As with torch's optimizers, by the version of the weights."""
    model, optimizer, x, y = setup(make)
    loss = F.mse_loss(model(x), y)
    train(model, optimizer, x, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_added_groups_are_stepped_and_checked(make):
    model, x, y = linear_net()
    optimizer = make([model[0].weight, model[0].bias])
    train(model, optimizer, x, y)
    optimizer.add_param_group({"params": [model[2].weight], "kind": "ewn", "lr": 1e-3})
    before = model[2].weight.detach().clone()
    train(model, optimizer, x, y)
    assert not torch.equal(before, model[2].weight)
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": [model[2].weight]})
    with pytest.raises(ValueError, match="row 2 of parameter '2.0' is zero"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.eye(3)[:, :2].contiguous())]})
    assert len(optimizer.param_groups) == 2


def test_gradient_accumulation(make):
    model, optimizer, x, y = setup(make, dtype=torch.float64)
    twin, others = copy.deepcopy((model, optimizer))
    for _ in range(3):
        optimizer.zero_grad()
        for part in (slice(0, 2), slice(2, 5)):
            F.mse_loss(model(x[part]), y[part], reduction="sum").backward()
        optimizer.step()
        train(twin, others, x, y, 1, lambda a, b: F.mse_loss(a, b, reduction="sum"))
    assert_same_state(optimizer, others, rtol=1e-10, atol=1e-11)


def test_clip_grad_norm_sees_the_gradient_of_the_plain_weight():
    model, optimizer, x, y = setup(MAKE["sgd"], dtype=torch.float64)
    twin, others = copy.deepcopy((model, optimizer))
    for net in (model, twin):
        F.mse_loss(net(x), y).backward()
    total = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    gradients = torch.cat([p.grad.reshape(-1) for p in twin.parameters()])
    torch.testing.assert_close(total, gradients.norm())
    for p in twin.parameters():
        p.grad *= 0.1 / total
    optimizer.step()
    others.step()
    assert_same_state(optimizer, others, rtol=1e-6, atol=1e-9)  # clip adds 1e-6 to the total


@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler(make, fused):
    model, optimizer, x, y = setup(make, fused=fused)
    twin, others = copy.deepcopy((model, optimizer))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for i in range(8):
        for net, opt in ((model, optimizer), (twin, others)):
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.mse_loss(net(x).float(), y)
            if net is twin:
                if i not in (0, 4):
                    loss.backward()
                    opt.step()
                continue
            scaler.scale(loss).backward()
            if i in (0, 4):
                before = copy.deepcopy((list(model.parameters()), optimizer.state_dict()["state"]))
                model[0].weight.grad[1, 0, 0, 0] = math.inf
            if i == 5:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if i in (0, 4):
                after = list(model.parameters()), optimizer.state_dict()["state"]
                torch.testing.assert_close(after[0], before[0], **EXACT)
                for index, state in before[1].items():
                    torch.testing.assert_close({k: after[1][index][k] for k in state}, state, **EXACT)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_tensor_lr_and_rates_per_row(make):
    model, optimizer, x, y = setup(make, dtype=torch.float64)
    rate = optimizer.param_groups[0]["lr"]
    same, others, _, _ = setup(make, dtype=torch.float64, lr=torch.tensor(rate, dtype=torch.float64))
    same.load_state_dict(model.state_dict())
    train(model, optimizer, x, y, 3)
    train(same, others, x, y, 3)
    assert_same_state(optimizer, others, rtol=1e-12, atol=1e-12)

    p = nn.Parameter(torch.randn(3, 5).double())
    rates, gradients = torch.tensor([0.1, 0.02, 0.0]).double(), torch.randn(3, 3, 5).double()
    rows = [nn.Parameter(p.detach()[i : i + 1].clone()) for i in range(3)]
    together, alone = make([p], lr=rates), [make([row], lr=rate.item()) for row, rate in zip(rows, rates)]
    for grad in gradients:
        p.grad = grad.clone()
        for row, one in zip(grad, alone):
            one.param_groups[0]["params"][0].grad = row[None].clone()
            one.step()
        together.step()
    torch.testing.assert_close(p, torch.cat(rows), rtol=1e-12, atol=1e-13)


def test_sparse_gradients_are_refused(make):
    model = nn.Embedding(6, 3, sparse=True)
    optimizer = make([("table", model.weight)])
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="gradient of parameter 'table' must be dense"):
        optimizer.step()


def _ddp_worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/ddp", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, x, y = linear_net()
    model = nn.parallel.DistributedDataParallel(model)
    optimizer = PolarSGD(polar_groups(model, "ewn"), lr=0.1, momentum=0.9)
    half = slice(rank * 5, rank * 5 + 5)
    train(model, optimizer, x[half], y[half], 5)
    torch.save(list(model.parameters()), f"{folder}/{rank}.pt")
    torch.distributed.barrier()  # neither goes while the other still talks to it
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    torch.multiprocessing.spawn(_ddp_worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second, **EXACT)
    torch.manual_seed(0)
    model, x, y = linear_net()
    train(model, PolarSGD(polar_groups(model, "ewn"), lr=0.1, momentum=0.9), x, y, 5)
    torch.testing.assert_close(list(model.parameters()), first, rtol=1e-5, atol=1e-6)


def test_a_compiled_model_trains_as_the_plain_one():
    model, optimizer, x, y = setup(MAKE["sgd"], dtype=torch.float64)
    twin, others = copy.deepcopy((model, optimizer))
    train(torch.compile(model, backend="aot_eager", fullgraph=True), optimizer, x, y, 3)
    train(twin, others, x, y, 3)
    assert_same_state(optimizer, others, rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------------------------- retractions, undo, rescaling


@pytest.mark.parametrize("kind", ["swn", "ewn", "unit"])
@pytest.mark.parametrize("retraction", ["renormalize", "geodesic"])
def test_retractions(kind, retraction):
    p = nn.Parameter(torch.randn(4, 9).double())
    optimizer = PolarSGD([p], kind=kind, lr=0.2, retraction=retraction, direction_norm=1.5, telemetry=True)
    for _ in range(5):
        w, s = p.detach().clone(), reference.row_norm(p.detach())[:, None]
        p.grad = 0.3 * torch.randn_like(p)
        theta = w / s
        radial = (p.grad * theta).sum(1, keepdim=True)
        tangential = p.grad - radial * theta
        length = tangential.norm(dim=1, keepdim=True)
        gradient_angle = 0.2 * s / 1.5 * length / 1.5
        angle = gradient_angle if retraction == "geodesic" else gradient_angle.atan()
        new_s = {"swn": s - 0.2 * radial, "ewn": s * (-0.2 * s * radial).exp(), "unit": s}[kind]
        optimizer.step()
        expected = new_s * (angle.cos() * theta - angle.sin() * tangential / length)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(optimizer.telemetry()["0.0"]["angular_update"], angle[:, 0], rtol=1e-10, atol=0)
        if (new_s < 0).any():
            return  # from here on the direction is that of -w
    assert (optimizer.state[p]["norm"] == 1.5).all()


def test_adam_renormalizes_by_keeping_the_norm():
    p, q = (nn.Parameter(x) for x in torch.randn(4, 9).double().repeat(2, 1, 1))
    kept, grown = PolarAdamW([p], lr=0.1, retraction="renormalize"), PolarAdamW([q], lr=0.1)
    norm = kept.state[p]["norm"].clone()
    for i in range(3):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        kept.step()
        grown.step()
        if i == 0:
            torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)
    assert torch.equal(kept.state[p]["norm"], norm) and (grown.state[q]["norm"] != norm).all()
    assert not torch.allclose(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [0, 3])
def test_rollback_is_exact_and_repeatable(make, before, dtype):
    model, optimizer, x, y = setup(make, dtype=dtype)
    train(model, optimizer, x, y, before)
    twin, others = copy.deepcopy((model, optimizer))
    optimizer.snapshot()
    for steps in (1, 4):
        train(model, optimizer, x, y, steps)
        optimizer.rollback()
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), **EXACT)
    train(model, optimizer, x, y, 3)
    train(twin, others, x, y, 3)
    assert_same_state(optimizer, others, **EXACT)
    with pytest.raises(RuntimeError, match="needs a snapshot"):
        others.rollback()


@pytest.mark.parametrize("k", [0.5, 3.0])
def test_rescaled_directions_go_on_with_the_rate_rescaled(k):
    """(n, m, lr) and (k n, m/k, k^2 lr) are the same state of the direction."""
    model, x, y = linear_net()
    model, x, y = model.double(), x.double(), y.double()
    optimizer = PolarSGD(polar_groups(model, "swn", weight_decay=0.01, radius_lr_ratio=0.5), lr=0.05, momentum=0.9)
    train(model, optimizer, x, y, 3)
    twin, others = copy.deepcopy((model, optimizer))
    others.rescale_direction(k)
    for group in others.param_groups:
        if group["kind"] is not None:
            group["lr"] *= k**2
            group["radius_lr_ratio"] /= k**2
            group["weight_decay"] /= k**2
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), **EXACT)
    ours, theirs = train(model, optimizer, x, y, 10), train(twin, others, x, y, 10)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-10, atol=0)
    for p, q in zip(model.parameters(), twin.parameters()):
        if p.ndim == 2:
            torch.testing.assert_close(k * optimizer.state[p]["norm"], others.state[q]["norm"], rtol=1e-10, atol=0)


# ------------------------------------------------------------------------------------------------------------ telemetry


@pytest.mark.parametrize("kind", ["swn", "ewn"])
def test_telemetry(make, kind):
    model, x, y = conv_net()
    model, x, y = model.double(), x.double(), y.double()
    optimizer = make(polar_groups(model, kind, telemetry=True))
    quiet_model, quiet = copy.deepcopy((model, optimizer))
    for group in quiet.param_groups:
        group["telemetry"] = False
    assert optimizer.telemetry()["0.weight"]["angular_update"].isnan().all()
    train(model, optimizer, x, y, 2)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, x, y)
    train(quiet_model, quiet, x, y, 3)
    assert_same_state(optimizer, quiet, **EXACT)  # it changes nothing
    values = optimizer.telemetry()
    assert list(values) == ["0.weight", "3.weight"]
    for name, seen in values.items():
        p = model.get_parameter(name)
        w, new, G = (x.detach().flatten(1) for x in (old[name], p, p.grad))
        theta, turned = (x / x.norm(dim=1, keepdim=True) for x in (w, new))
        radial = (G * theta).sum(1)
        expected = {
            "radius": new.norm(dim=1),
            "norm": optimizer.state[p]["norm"],
            "radial_gradient": radial,
            "tangential_gradient": (G - radial[:, None] * theta).norm(dim=1),
            "angular_update": 2 * ((turned - theta).norm(dim=1) / 2).asin(),
            "effective_lr": optimizer.param_groups[0]["lr"] / optimizer.state[p]["norm"] ** 2,
            "lost_rows": torch.tensor(0),
        }
        assert seen.keys() == expected.keys()
        torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match="telemetry=True"):
        quiet.telemetry()


# --------------------------------------------------------------------------------------------- choice and conversion


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.embedding, self.padded = nn.Embedding(10, 8), nn.Embedding(10, 8, padding_idx=0)
        self.conv, self.up = nn.Conv1d(8, 8, 3, groups=2), nn.ConvTranspose1d(8, 4, 3)
        self.attention, self.norm = nn.MultiheadAttention(8, 2), nn.LayerNorm(8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight


def test_polar_groups_choose_by_module_type(capsys):
    model = Everything()
    groups = polar_groups(model, "ewn", plain={"weight_decay": 0.0}, verbose=True, radius_lr_ratio=0.5)
    assert capsys.readouterr().out.strip() == describe(groups).strip()
    polar, plain = groups
    assert [name for name, _ in polar["params"]] == ["embedding.weight", "conv.weight", "attention.out_proj.weight"]
    assert (polar["kind"], polar["dim"], polar["radius_lr_ratio"]) == ("ewn", 0, 0.5)
    assert plain["kind"] is None and plain["weight_decay"] == 0.0
    assert len(polar["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert "token                      (1, 1, 8)  plain" in describe(PolarSGD(groups))

    groups = polar_groups(model, transpose_dim=1, exclude=["att*", "conv.weight"])
    assert [(g["dim"], [name for name, _ in g["params"]]) for g in groups[:-1]] == [
        (0, ["embedding.weight"]),
        (1, ["up.weight"]),
    ]


@pytest.mark.parametrize(
    "model",
    [
        wnkernels.nn.Linear(3, 4),
        nn.Sequential(wnkernels.weight_norm(nn.Linear(3, 4), kind="ewn")),
        nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4))),
    ],
)
def test_a_normalized_weight_is_refused(model):
    with pytest.raises(ValueError, match="is the v of a weight that is normalized already: fold"):
        polar_groups(nn.Sequential(nn.Linear(2, 3), model))
    assert len(polar_groups(nn.Sequential(nn.Linear(2, 3), model), exclude="1.*")[0]["params"]) == 1


def test_torchs_old_weight_norm_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.utils.weight_norm(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="'weight_v' is the v"):
        polar_groups(model)


@pytest.mark.parametrize("kind", ["swn", "ewn", "unit"])
def test_conversion_both_ways_continues_identically(make, kind):
    model, x, y = transposed_net()
    model, x, y = model.double(), x.double(), y.double()
    options = dict(radius_lr_ratio=0.3, radius_weight_decay=0.02, direction_norm=1.3)
    optimizer = make(polar_groups(model, kind, transpose_dim=1, **options))
    train(model, optimizer, x, y, 3)
    parametrized, theirs = to_parametrized(model, optimizer)
    assert type(theirs) is TORCH[type(optimizer)]
    losses = [train(model, optimizer, x, y, 5), train(parametrized, theirs, x, y, 5)]
    plain, again = from_parametrized(parametrized, theirs)
    assert type(again) is type(optimizer)
    weights = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, weights[name], rtol=1e-11, atol=1e-12)
        for key, value in optimizer.state[p].items():
            if kind != "unit" or not key.startswith("radius_"):
                torch.testing.assert_close(value, again.state[weights[name]][key], rtol=1e-10, atol=1e-12)
    for run in ((model, optimizer), (parametrized, theirs), (plain, again)):
        losses.append(train(*run, x, y, 5))
    for curve, expected in ((1, 0), (3, 2), (4, 2)):
        torch.testing.assert_close(torch.tensor(losses[curve]), torch.tensor(losses[expected]), rtol=1e-10, atol=1e-12)


def test_conversion_from_our_layers_and_after_edits():
    model = nn.Sequential(wnkernels.nn.Linear(6, 8, kind="ewn"), nn.Tanh(), wnkernels.nn.Linear(8, 3, dim=None))
    model = model.double()
    _, x, y = linear_net()
    x, y = x.double(), y.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    train(model, optimizer, x, y, 3)
    plain, polar = from_parametrized(model, optimizer)
    assert type(plain[0]) is nn.Linear and {g["radius_weight_decay"] for g in polar.param_groups} == {0.01, 0.0}
    losses = train(model, optimizer, x, y, 4), train(plain, polar, x, y, 4)
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        plain[0].weight[2] *= -3
    again, torchs = to_parametrized(plain, polar)
    torch.testing.assert_close(again(x), plain(x), rtol=1e-12, atol=1e-12)
    losses = train(plain, polar, x, y, 4), train(again, torchs, x, y, 4)
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-11, atol=1e-12)


def test_what_torch_cannot_do_is_not_converted():
    model = nn.Linear(3, 4)
    for options, words in (({"retraction": "geodesic"}, "retraction must be 'project'"), ({}, "float32 or float64")):
        net = copy.deepcopy(model) if options else copy.deepcopy(model).bfloat16()
        with pytest.raises((ValueError, TypeError), match=words):
            to_parametrized(net, PolarSGD(polar_groups(net), **options))
    with pytest.raises(TypeError, match="must be PolarSGD"):
        to_parametrized(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="must be one of the model"):
        to_parametrized(nn.Linear(3, 4), PolarSGD(polar_groups(model)))
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="0.weight and 1.weight are one parameter"):
        to_parametrized(tied, PolarSGD(polar_groups(tied)))
    with pytest.raises(TypeError, match="torch.optim's SGD, Adam or AdamW, got RMSprop"):
        from_parametrized(model, torch.optim.RMSprop(model.parameters()))
    normalized = wnkernels.weight_norm(nn.Linear(3, 4))
    originals = normalized.parametrizations.weight
    with pytest.raises(ValueError, match="original1' where it has"):
        from_parametrized(normalized, torch.optim.SGD([originals.original0]))
    groups = [{"params": [originals.original1]}, {"params": [originals.original0], "momentum": 0.5}]
    with pytest.raises(ValueError, match="momentum of 'parametrizations.weight.original0' must be that of its v"):
        from_parametrized(normalized, torch.optim.SGD(groups))


# --------------------------------------------------------------------------------------------------------------- errors


def weight():
    return nn.Parameter(torch.randn(3, 4))


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: PolarSGD([weight()], kind="wn"), ValueError, "kind must be one of .*'unit' or None, got 'wn'"),
        (lambda: PolarSGD([weight()], dim=2), ValueError, r"dim must be None or in \[-2, 1\].*got 2"),
        (lambda: PolarSGD([weight()], dim=1.0), TypeError, "dim must be an int or None"),
        (lambda: PolarSGD([weight()], lr=-1), ValueError, "lr must be at least 0, got -1"),
        (lambda: PolarSGD([weight()], lr=torch.ones(4)), ValueError, r"lr must be a number.*\(R,\).*got shape \(4,\)"),
        (lambda: PolarSGD([weight(), weight()], lr=torch.ones(3)), ValueError, "group of one weight"),
        (lambda: PolarSGD([weight()], momentum=-1), ValueError, "momentum must be at least 0, got -1"),
        (lambda: PolarSGD([weight()], nesterov=True), ValueError, "nesterov needs a momentum and no dampening"),
        (lambda: PolarSGD([weight()], weight_decay=-1), ValueError, "weight_decay must be at least 0"),
        (lambda: PolarSGD([weight()], radius_weight_decay=-1), ValueError, "radius_weight_decay must be at least 0"),
        (lambda: PolarSGD([weight()], radius_lr_ratio=-1), ValueError, "radius_lr_ratio must be at least 0"),
        (lambda: PolarSGD([weight()], retraction="exp"), ValueError, "retraction must be one of .*got 'exp'"),
        (lambda: PolarSGD([weight()], retraction="geodesic", momentum=0.9), ValueError, "momentum must be 0 for"),
        (lambda: PolarSGD([weight()], retraction="geodesic", weight_decay=0.9), ValueError, "weight_decay must be 0"),
        (lambda: PolarAdamW([weight()], retraction="geodesic"), ValueError, "for Adam, got 'geodesic'"),
        (lambda: PolarSGD([weight()], direction_norm=0), ValueError, "direction_norm must be 'weight' or a positive"),
        (lambda: PolarSGD([weight()], foreach=False), ValueError, "foreach must be None or True for kind='swn'"),
        (lambda: PolarSGD([weight()], fused=False), ValueError, "fused must be None or True for kind='swn'"),
        (lambda: PolarAdam([weight()], betas=(1.0, 0.5)), ValueError, r"betas must be in \[0, 1\)"),
        (lambda: PolarAdam([weight()], eps=-1), ValueError, "eps must be at least 0, got -1"),
        (lambda: PolarSGD([("w", nn.Parameter(torch.zeros(3, 4)))]), ValueError, "row 0 of parameter 'w' is zero"),
        (lambda: PolarSGD([nn.Parameter(torch.full((3, 4), math.nan))]), ValueError, "'0.0' is not finite"),
        (lambda: PolarSGD([nn.Parameter(torch.ones(3, 4, device="meta"))]), ValueError, "meta tensor"),
        (lambda: PolarSGD([nn.Parameter(torch.ones(3, 4, dtype=torch.cfloat))]), TypeError, "must be floating point"),
        (lambda: PolarSGD([weight()]).rescale_direction(0), ValueError, "k must be positive and finite, got 0"),
        (lambda: polar_groups(nn.Linear(2, 3), "wn"), ValueError, "kind must be one of"),
        (lambda: polar_groups(nn.BatchNorm1d(3)), ValueError, "BatchNorm1d has no weight of Linear"),
        (lambda: polar_groups(nn.LazyLinear(3)), ValueError, "'weight' has no shape yet"),
        (
            lambda: polar_groups(nn.Sequential(nn.ConvTranspose1d(4, 4, 3, groups=2)), transpose_dim=1),
            ValueError,
            "transpose_dim=1 must not meet groups=2 of '0'",
        ),
    ],
)
def test_wrong_arguments_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


# ------------------------------------------------------------------------------------------- loss scaling, capturable


@pytest.mark.parametrize("options", [dict(momentum=0.9), dict(momentum=0.9, dampening=0.5)])
def test_a_skipped_first_step_leaves_the_next_one_the_first(options):
    weight, gradients = torch.randn(4, 5), torch.randn(3, 4, 5)
    skipped, straight = (nn.Parameter(weight.clone()) for _ in range(2))
    for p, taken in ((skipped, [None, 1, 2]), (straight, [1, 2])):
        optimizer = PolarSGD([p], lr=0.1, **options)
        for i in taken:
            p.grad = torch.full((4, 5), math.inf) if i is None else gradients[i]
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(float(i is None))
            optimizer.step()
    assert torch.equal(skipped, straight)


def test_capturable_sgd_takes_the_fused_step_of_plain_parameters():
    results = []
    for options in (dict(capturable=True, lr=torch.tensor(0.1)), dict(fused=True, lr=0.1)):
        torch.manual_seed(1)
        layer = nn.Linear(6, 5)
        optimizer = PolarSGD(polar_groups(layer), momentum=0.9, **options)
        for _ in range(3):
            for p in layer.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append([p.detach() for p in layer.parameters()])
    torch.testing.assert_close(*results)
    with pytest.raises(ValueError, match="capturable=True is torch's fused step"):
        PolarSGD([nn.Parameter(torch.randn(2, 3))], capturable=True, foreach=True)
