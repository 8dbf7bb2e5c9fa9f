"""Steps inside the backward against the same steps after it, in float64, and what is refused."""

import contextlib
import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from wnkernels import _C, reference
from wnkernels.optim import PolarAdam, PolarAdamW, PolarSGD, in_backward, polar_groups, to_parametrized

OPTIONS = [
    dict(lr=0.5),
    dict(lr=0.1, weight_decay=0.1, radius_lr_ratio=0.3),
    dict(lr=0.2, radius_weight_decay=0.05, radius_lr_ratio=2.0),
    dict(lr=0.2, retraction="renormalize"),
    dict(lr=0.005, maximize=True),
    dict(lr=0.05, momentum=0.9),
    dict(lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.02, radius_weight_decay=0.05),
    dict(lr=0.1, momentum=0.7, dampening=0.4, radius_lr_ratio=0.3),
    dict(lr=0.05, momentum=0.8, retraction="renormalize"),
    dict(lr=0.002, momentum=0.5, maximize=True, weight_decay=0.1),
    dict(make=PolarAdamW, lr=0.003, eps=1e-3),
    dict(make=PolarAdam, lr=0.003, eps=1e-3, weight_decay=0.01, radius_weight_decay=0.02, betas=(0.8, 0.9)),
    dict(make=PolarAdamW, lr=0.003, eps=1e-3, radius_weight_decay=0.1, radius_lr_ratio=0.3),
    dict(make=PolarAdam, lr=0.003, eps=1e-3, retraction="renormalize"),
    dict(make=PolarAdamW, lr=0.001, eps=1e-3, maximize=True),
]
WITH_BUFFERS = [dict(momentum=0.9, lr=0.05), dict(make=PolarAdamW, lr=0.003, eps=1e-3)]


def mlp(*widths, bias=True):
    layers = [m for a, b in zip(widths, widths[1:]) for m in (nn.Linear(a, b, bias=bias), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def optimizer_of(model, kind="swn", make=PolarSGD, **options):
    groups = polar_groups(model, kind, plain={"lr": 0.05}) if kind else model.parameters()
    return make(groups, **{"lr": 0.1, **({} if kind else {"kind": None}), **options})


def twins(model, kind="swn", make=PolarSGD, **options):
    """(model, optimizer) stepped afterwards, and a copy stepped inside its backward, with the handle."""
    other = copy.deepcopy(model)
    optimizer = optimizer_of(other, kind, make, **options)
    return (model, optimizer_of(model, kind, make, **options)), (other, optimizer), in_backward(other, optimizer)


def batch_for(model, batch):
    first, last = model[0], [m for m in model if hasattr(m, "weight")][-1]
    return torch.randn(batch, first.weight.shape[1]).double(), torch.randn(batch, len(last.weight)).double().tanh()


def step(model, optimizer, x, y):
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def distance(a, b):
    """The largest difference of parameters, relative to the largest element."""
    return max(((p - q).abs().max() / p.abs().max()).item() for p, q in zip(a.parameters(), b.parameters()))


def layer_state(linear):
    return linear.__dict__["_layer"]


# ------------------------------------------------------------------------------------------------------- trajectories


@pytest.mark.parametrize("kind", ["swn", "ewn", "unit", None])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_five_hundred_steps_are_those_of_the_optimizer(kind, options):
    plain, inside, handle = twins(mlp(7, 13, 9, 3), kind, **options)
    batch = 1 + 4 * (len(str(options)) % 2)
    for _ in range(50 if "maximize" in options else 500):  # which diverges, and magnifies rounding
        x, y = batch_for(plain[0], batch)
        assert step(*plain, x, y) == pytest.approx(step(*inside, x, y), rel=1e-10)
        assert all(p.grad is None for p in inside[0].parameters())
    assert distance(plain[0], inside[0]) < 1e-10
    for p, q in zip(*(m.parameters() for m in (plain[0], inside[0]))):
        for name, value in plain[1].state.get(p, {}).items():
            least = 1e-10 * value.abs().max().item() if "momentum" in name or "exp_avg" in name else 0
            torch.testing.assert_close(value, inside[1].state[q][name], rtol=1e-10, atol=least)


@pytest.mark.parametrize("kind", ["swn", "ewn"])
def test_the_scale_is_folded_back_many_times(kind):
    plain, inside, _ = twins(mlp(7, 13, 3), kind, lr=0.2, weight_decay=0.1)
    rho, folds = layer_state(inside[0][0]).rho.clone(), 0
    for _ in range(500):
        x, y = batch_for(plain[0], 4)
        step(*plain, x, y)
        step(*inside, x, y)
        now = layer_state(inside[0][0]).rho
        assert ((now.abs() >= 0.5) & (now.abs() <= 2)).all()
        folds += ((now / rho - 1).abs() > 0.4).sum().item()
        rho = now.clone()
    assert folds > 13 * 3
    assert distance(plain[0], inside[0]) < 1e-10


@pytest.mark.parametrize("batch", [1, 3, 40, 600])  # |G|^2 by the Gram matrix or the new rows; own products, or not
@pytest.mark.parametrize("width", [(11, 17), (520, 600)])
@pytest.mark.parametrize("kind", ["ewn", None])
@pytest.mark.parametrize("options", [{}, *WITH_BUFFERS], ids=str)
def test_every_path_of_the_product(batch, width, kind, options):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        lr = options.get("lr", 0.3) / (1 if kind else 30)  # plain weights diverge sooner
        plain, inside, _ = twins(mlp(*width, 5), kind, **{**options, "lr": lr})
        for _ in range(12):
            x, y = batch_for(plain[0], batch)
            dx = []
            for model, optimizer in (plain, inside):
                leaf = x.clone().requires_grad_()
                step(model, optimizer, leaf, y)
                dx.append(leaf.grad)
            torch.testing.assert_close(*dx, rtol=1e-11, atol=1e-14)
    finally:
        torch.set_num_threads(threads)
    assert distance(plain[0], inside[0]) < 1e-12


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch, rows, width", [
    (1, 1, 1), (1, 65, 130), (7, 1, 64), (2, 64, 1), (16, 33, 100), (33, 70, 65), (31, 16, 1057), (40, 35, 2100),
    (300, 21, 90), (600, 21, 90),
])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_products_of_any_size(threads, dtype, batch, rows, width, decay):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # Neither is contiguous.
        x, dy = torch.randn(width, batch, dtype=dtype).t(), torch.randn(batch, 2 * rows, dtype=dtype)[:, ::2]
        u, bias, scale = (torch.randn(size, dtype=dtype) for size in ((rows, width), (rows,), (rows,)))
        y, z = _C.in_backward_linear(x, u, scale, bias, True)
        old, numbers = u.clone(), [0.1, 0.0, decay, 0.0, 0.0, 0.0]
        dx = _C.in_backward_sgd_(dy, x, None, u, None, None, None, None, None, None, "swn", numbers, False, False, False,
                                 True)
        same = old.clone()
        nothing = _C.in_backward_sgd_(dy, x, None, same, None, None, None, None, None, None, "swn", numbers, False, False,
                                      False, False)
    finally:
        torch.set_num_threads(before)
    assert nothing.numel() == 0 and torch.equal(same, u)
    x, dy, old, scale, bias = (t.double() for t in (x, dy, old, scale, bias))
    expected = {"z": (z, x @ old.t(), x.abs() @ old.abs().t()),
                "y": (y, x @ old.t() * scale + bias, x.abs() @ old.abs().t() * scale.abs() + bias.abs()),
                "dx": (dx, dy @ old, dy.abs() @ old.abs()),
                "u": (u, (1 - 0.1 * decay) * old - 0.1 * dy.t() @ x, old.abs() + dy.t().abs() @ x.abs())}
    for name, (got, exact, size) in expected.items():  # errors of sums are bounded by the sums of magnitudes
        assert ((got - exact).abs() <= 20 * torch.finfo(dtype).eps * size).all(), name


def test_the_length_of_rows_is_measured_now_and_then(monkeypatch):
    monkeypatch.setattr("wnkernels.in_backward.REFRESH", 7)
    plain, inside, _ = twins(mlp(5, 6, 2), "swn", lr=0.3)
    for _ in range(30):
        x, y = batch_for(plain[0], 4)
        step(*plain, x, y)
        step(*inside, x, y)
        first = layer_state(inside[0][0])
        if first.refresh == 0:
            length = (first.rho.unsqueeze(1) * first.weight.detach()).norm(dim=1)
            torch.testing.assert_close(length, inside[1].state[first.weight]["norm"], rtol=1e-15, atol=0)
    assert distance(plain[0], inside[0]) < 1e-12


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch, rows, width", [
    (1, 1, 1), (7, 1, 64), (2, 64, 1), (16, 33, 100), (33, 70, 65), (31, 16, 1057), (300, 21, 90),
])
@pytest.mark.parametrize("nesterov", [False, True])
def test_products_with_momentum_of_any_size(threads, dtype, batch, rows, width, nesterov):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, dy = torch.randn(batch, width, dtype=dtype), torch.randn(batch, rows, dtype=dtype)
        u, m, bias, bias_m = (torch.randn(size, dtype=dtype) for size in ((rows, width), (rows, width), (rows,), (rows,)))
        old = [t.to(torch.float64, copy=True) for t in (u, m, bias, bias_m)]
        dx = _C.in_backward_buffers_(
            dy, x, None, u, None, None, None, None, bias, [m], [], [bias_m], "swn", [0.1, 0.0, 0.3, 0.0, 0.9, 0.6],
            [0.2, 0.5, 0.8, 1.0], False, nesterov, True, False, True)
    finally:
        torch.set_num_threads(before)
    x, dy = x.double(), dy.double()

    def expected(p, m, grad, lr, decay, momentum, weight):
        grad = decay * p - grad
        m_new = momentum * m + weight * grad
        return p - lr * (grad + momentum * m_new if nesterov else m_new), m_new

    u_size, m_size = old[0].abs() + dy.t().abs() @ x.abs() + old[1].abs(), old[1].abs() + dy.t().abs() @ x.abs() + old[0].abs()
    u_new, m_new = expected(*old[:2], dy.t() @ x, 0.1, 0.3, 0.9, 0.6)
    bias_new, bias_m_new = expected(*old[2:], dy.sum(0), 0.2, 0.5, 0.8, 1.0)
    bias_size = old[2].abs() + dy.abs().sum(0) + old[3].abs()
    for got, exact, size in ((u, u_new, u_size), (m, m_new, m_size), (bias, bias_new, bias_size),
                             (bias_m, bias_m_new, bias_size), (dx, dy @ old[0], dy.abs() @ old[0].abs())):
        assert ((got - exact).abs() <= 20 * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("options", WITH_BUFFERS, ids=str)
def test_buffers_go_without_a_gradient(options):
    seen = []
    plain, inside, _ = twins(mlp(5, 6, 2), "swn", **options)
    for p in inside[0].parameters():
        p.register_hook(seen.append)
    for _ in range(3):
        x, y = batch_for(plain[0], 4)
        step(*plain, x, y)
        step(*inside, x, y)
    assert seen and all(grad is None for grad in seen)
    assert distance(plain[0], inside[0]) < 1e-13
    for p, q in zip(plain[0].parameters(), inside[0].parameters()):
        assert plain[1].state[p].keys() == inside[1].state[q].keys()


@pytest.mark.parametrize("switch", [3, 4, 9])
def test_adam_by_turns_with_and_without_a_gradient(switch):
    plain, inside, handle = twins(mlp(5, 6, 2), "swn", PolarAdamW, lr=0.01, eps=1e-3)
    for i in range(12):
        x, y = batch_for(plain[0], 600 if i % switch == 1 else 7)
        step(*plain, x, y)
        step(*inside, x, y)
        if i == 6:
            handle.remove()
            handle = in_backward(*inside)
        if i == 9:
            for _, optimizer in (plain, inside):
                optimizer.load_state_dict(optimizer.state_dict())
    handle.remove()
    for _ in range(3):
        x, y = batch_for(plain[0], 5)
        step(*plain, x, y)
        step(*inside, x, y)
    assert distance(plain[0], inside[0]) < 1e-12
    for p, q in zip(plain[0].parameters(), inside[0].parameters()):
        assert plain[1].state[p]["step"] == inside[1].state[q]["step"] == 15


@pytest.mark.parametrize("of_bias", [dict(momentum=0.0), dict(momentum=0.5), dict(momentum=0.5, nesterov=True)], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_bias_with_a_momentum_of_its_own(of_bias, momentum):
    def made(model):
        options = {"momentum": momentum, "kind": "swn"}
        return PolarSGD([{"params": [m.weight for m in model if hasattr(m, "weight")], **options},
                         {"params": [m.bias for m in model if hasattr(m, "bias")], "kind": None, **of_bias}], lr=0.1)

    model = mlp(5, 6, 2)
    other = copy.deepcopy(model)
    plain, inside = (model, made(model)), (other, made(other))
    in_backward(*inside)
    for _ in range(20):
        x, y = batch_for(model, 4)
        step(*plain, x, y)
        step(*inside, x, y)
    assert distance(model, other) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [3, 16])  # |G|^2 by the Gram matrix, or the new rows
@pytest.mark.parametrize("options", [dict(lr=0.3), *WITH_BUFFERS], ids=str)
def test_float32_drifts_no_more_than_the_optimizer_does(dtype, batch, options):
    exact, _, _ = twins(mlp(40, 50, 10), "swn", **options)
    model = copy.deepcopy(exact[0]).to(dtype)
    plain, inside, _ = twins(model, "swn", **options)
    for _ in range(300):
        x, y = batch_for(exact[0], batch)
        step(*exact, x, y)
        step(*plain, x.to(dtype), y.to(dtype))
        step(*inside, x.to(dtype), y.to(dtype))
    error = lambda m: distance(exact[0], m)  # noqa: E731
    assert error(inside[0]) <= 3 * error(plain[0]) + 1e-13


def test_inputs_of_any_shape_and_layout():
    plain, inside, _ = twins(mlp(6, 4), "swn")
    for x in (torch.randn(6), torch.randn(2, 3, 6), torch.randn(3, 2, 6).transpose(0, 1), torch.randn(0, 6)):
        for model, optimizer in (plain, inside):
            out = model(x.double())
            out.sum().backward()  # an expanded gradient
            optimizer.step()
            optimizer.zero_grad()
        assert out.shape == x.shape[:-1] + (4,)
    assert distance(plain[0], inside[0]) < 1e-13


@pytest.mark.parametrize("make, options", [
    (PolarSGD, dict(momentum=0.9)),
    (PolarSGD, dict(momentum=0.9, nesterov=True, weight_decay=0.1)),
    (PolarSGD, dict(retraction="geodesic")),
    (PolarAdam, dict(lr=0.01, eps=1e-3)),  # which keeps the noise of a bias before BatchNorm small
    (PolarAdam, dict(lr=0.01, telemetry=True, eps=1e-3)),
    (PolarAdamW, dict(lr=0.01, amsgrad=True)),
], ids=str)  # fmt: skip
def test_everything_else_goes_by_its_gradient(make, options):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)).double()
    plain, inside, _ = twins(model, "swn", make, **options)
    for _ in range(20):
        x, y = torch.randn(6, 2, 5, 5).double(), torch.randn(6, 3).double()
        assert step(*plain, x, y) == pytest.approx(step(*inside, x, y), rel=1e-12)
    assert distance(plain[0], inside[0]) < 1e-12


def test_no_two_gradients_of_weights_are_alive_at_once():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    optimizer = PolarAdam(polar_groups(model), lr=0.01)
    in_backward(model, optimizer)
    most = 0

    def count(p):
        nonlocal most
        most = max(most, sum(q.grad is not None for q in weights))

    weights = [m.weight for m in model]
    for p in weights:
        p.register_post_accumulate_grad_hook(count)  # after the one that steps
    model(torch.randn(3, 8)).sum().backward()
    assert most == 0 and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make", [PolarSGD, PolarAdamW])
def test_vectors_wait_for_the_step(make):
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)).double()
    plain, inside, handle = twins(model, "swn", make, lr=0.01, eps=1e-3) if make is PolarAdamW else twins(model, "swn")
    for _ in range(10):
        x, y = batch_for(model, 4)
        step(*plain, x, y)
        F.mse_loss(inside[0](x), y).backward()
        assert all((p.grad is not None) == (name in ("1.weight", "1.bias")) for name, p in inside[0].named_parameters())
        inside[1].step()
        assert all(p.grad is None for p in inside[0].parameters())
    handle.remove()
    assert distance(plain[0], inside[0]) < 1e-12


def test_embeddings_and_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.hidden, self.out = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)
            self.out.weight = self.embedding.weight
            self.second = nn.Linear(6, 6)
            self.second.bias = self.hidden.bias

        def forward(self, x):
            return self.out(self.second(self.hidden(self.embedding(x)).tanh()).tanh())

    plain, inside, _ = twins(Tied().double(), "ewn")
    assert type(inside[0].out) is nn.Linear and type(inside[0].hidden) is not nn.Linear
    for _ in range(20):
        x = torch.randint(9, (5,))
        for model, optimizer in (plain, inside):
            F.cross_entropy(model(x), x).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(plain[0], inside[0]) < 1e-13


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters_stay(frozen):
    plain, inside, _ = twins(mlp(5, 6, 2), "swn")
    for model in (plain[0], inside[0]):
        getattr(model[0], frozen).requires_grad_(False)
    before = getattr(inside[0][0], frozen).clone()
    for _ in range(5):
        x, y = batch_for(plain[0], 3)
        step(*plain, x, y)
        step(*inside, x, y)
    assert distance(plain[0], inside[0]) < 1e-13
    assert torch.equal(before, getattr(inside[0][0], frozen))


def test_rates_are_read_in_the_backward():
    plain, inside, _ = twins(mlp(5, 6, 2), "swn")
    for _, optimizer in (plain, inside):
        optimizer.param_groups[0]["lr"] = torch.tensor(0.3)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for _, o in (plain, inside)]
    for i in range(20):
        x, y = batch_for(plain[0], 3)
        for (model, optimizer), scheduler in zip((plain, inside), schedulers):
            loss = F.mse_loss(model(x), y)
            optimizer.param_groups[0]["weight_decay"] = 0.01 * i  # between forward and backward
            optimizer.param_groups[0]["momentum"] = 0.5 * (i > 12) * (i != 16)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    assert distance(plain[0], inside[0]) < 1e-12


def test_rates_for_each_row_go_by_the_gradient():
    model = nn.Linear(4, 6, bias=False).double()
    plain, inside, _ = twins(nn.Sequential(model), "swn", lr=torch.linspace(0.1, 0.5, 6))
    for _ in range(5):
        x, y = batch_for(plain[0], 3)
        step(*plain, x, y)
        step(*inside, x, y)
    assert distance(plain[0], inside[0]) < 1e-13


@pytest.mark.parametrize("batch", [4, 60])
@pytest.mark.parametrize("options", [dict(lr=0.2), *WITH_BUFFERS], ids=str)
def test_telemetry(batch, options):
    plain, inside, _ = twins(mlp(5, 6, 2), "ewn", weight_decay=0.1, telemetry=True, **options)
    for _ in range(10):
        x, y = batch_for(plain[0], batch)
        step(*plain, x, y)
        step(*inside, x, y)
    ours, theirs = inside[1].telemetry(), plain[1].telemetry()
    for name in theirs:
        for quantity, value in theirs[name].items():
            torch.testing.assert_close(ours[name][quantity], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 17, 2100])
def test_the_gram_matrix_in_parts_of_the_rows(threads, rows):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plain, inside, _ = twins(mlp(7, rows), "swn", lr=0.1, telemetry=True)  # telemetry wants |G|
        for _ in range(3):
            x, y = batch_for(plain[0], 41)
            step(*plain, x, y)
            step(*inside, x, y)
        assert distance(plain[0], inside[0]) < 1e-12
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------------- the operator


def one_step(kind, u, rho, radius, norm, dy, x, numbers, **flags):
    """(u, rho, scale, radius, norm, dx) after the operator."""
    s = radius.exp() if kind == "ewn" else radius.clone()
    u, rho, radius, norm, scale = u.clone(), rho.clone(), radius.clone(), norm.clone(), s * rho / norm
    flags = {"maximize": False, "keep_norm": False, "refresh": False, "need_x": True, **flags}
    dx = _C.in_backward_sgd_(dy, x, None, u, scale, rho, radius, norm, None, None, kind, numbers, *flags.values())
    return u, rho, scale, radius, norm, dx


@pytest.mark.parametrize("kind", ["swn", "ewn"])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])  # the latter give every sign of c
@pytest.mark.parametrize("batch", [2, 50])
def test_one_step_from_any_state(kind, size, batch):
    rows, width = 20, 9
    u, radius = torch.randn(rows, width).double(), torch.randn(rows).double()
    rho = torch.empty(rows).double().uniform_(0.5, 2) * torch.randn(rows).sign()
    norm = rho.abs() * u.norm(dim=1)
    x, dy = torch.randn(batch, width).double(), size * torch.randn(batch, rows).double()
    s = radius.exp() if kind == "ewn" else radius
    w = (s * rho / norm).unsqueeze(1) * u
    radius_lr = 0.1 / size**2  # or e^alpha is infinite
    numbers = [0.3, radius_lr, 0.2, 0.05, 0.0, 0.0]
    c = 1 - 0.3 * 0.2 + 0.3 * (s / norm) * ((dy.t() @ x) * w).sum(1) / s / norm
    assert size == 1 or (c < 0).any() and (c > 2).any()
    expected = reference.polar_sgd_step(w, dy.t() @ x, radius, norm, kind=kind, lr=0.3, radius_lr=radius_lr,
                                        weight_decay=0.2, radius_weight_decay=0.05)
    u, rho, scale, radius, norm, dx = one_step(kind, u, rho, radius, norm, dy, x, numbers)
    torch.testing.assert_close(dx, dy @ w, rtol=1e-12, atol=1e-12 * size)
    close = dict(rtol=1e-9, atol=1e-11 * size)
    torch.testing.assert_close(scale.unsqueeze(1) * u, expected.weight, **close)
    torch.testing.assert_close(radius, expected.radius, **close)
    torch.testing.assert_close(norm, expected.norm, **close)
    torch.testing.assert_close(rho.abs() * u.norm(dim=1), norm, rtol=1e-12, atol=0)
    assert ((rho.abs() >= 0.5) & (rho.abs() <= 2)).all()


@pytest.mark.parametrize("kind", ["swn", "ewn", "unit"])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("options", [dict(momentum=0.9), dict(momentum=0.9, nesterov=True), dict(momentum=0.5, dampening=1.0)],
                         ids=str)
def test_one_step_with_momentum_from_any_state(kind, size, options):
    rows, width, batch = 20, 9, 7
    u, radius, norm = torch.randn(rows, width).double(), torch.randn(rows).double(), torch.rand(rows).double() + 0.5
    rho = norm / u.norm(dim=1) * torch.randn(rows).sign()
    m, radius_m = torch.randn(rows, width).double(), torch.randn(rows).double()
    x, dy = torch.randn(batch, width).double(), size * torch.randn(batch, rows).double()
    s = radius.exp() if kind == "ewn" else radius
    w, radius_lr = (s * rho / norm).unsqueeze(1) * u, 0.1 / size**2
    expected = reference.polar_sgd_step(
        w, dy.t() @ x, radius, norm, {"momentum_buffer": m.clone(), "radius_momentum_buffer": radius_m.clone()}, kind=kind,
        lr=0.3, radius_lr=radius_lr, weight_decay=0.2, radius_weight_decay=0.05, **options)
    numbers = [0.3, radius_lr, 0.2, 0.05, options["momentum"], 1 - options.get("dampening", 0.0)]
    scale = s * rho / norm
    dx = _C.in_backward_buffers_(dy, x, None, u, scale, rho, radius, norm, None, [m], [radius_m], [], kind, numbers, [],
                                 False, options.get("nesterov", False), False, False, True)
    torch.testing.assert_close(dx, dy @ w, rtol=1e-12, atol=1e-12 * size)
    close = dict(rtol=1e-9, atol=1e-11 * size)
    torch.testing.assert_close(scale.unsqueeze(1) * u, expected.weight, **close)
    torch.testing.assert_close(m, expected.state["momentum_buffer"], **close)
    for got, name in ((radius, "radius"), (norm, "norm")):
        torch.testing.assert_close(got, getattr(expected, name), **close)
    torch.testing.assert_close(rho * u.norm(dim=1), norm, rtol=1e-12, atol=0)
    if kind != "unit":
        torch.testing.assert_close(radius_m, expected.state["radius_momentum_buffer"], **close)


@pytest.mark.parametrize("kind", ["swn", "ewn", "unit"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_one_step_of_adam_from_any_state(kind, decoupled):
    rows, width, batch = 20, 9, 7
    u, radius, norm = torch.randn(rows, width).double(), torch.randn(rows).double(), torch.rand(rows).double() + 0.5
    rho = norm / u.norm(dim=1) * torch.randn(rows).sign()
    averages = [torch.randn(rows, width).double(), torch.rand(rows, width).double()]
    of_radius = [torch.randn(rows).double(), torch.rand(rows).double()]
    x, dy = torch.randn(batch, width).double(), torch.randn(batch, rows).double()
    s = radius.exp() if kind == "ewn" else radius
    w = (s * rho / norm).unsqueeze(1) * u
    names = "exp_avg", "exp_avg_sq"
    state = {"step": 4} | {k + n: t.clone() for k, ts in (("", averages), ("radius_", of_radius)) for n, t in zip(names, ts)}
    expected = reference.polar_adam_step(
        w, dy.t() @ x, radius, norm, state, kind=kind, lr=0.3, radius_lr=0.1, weight_decay=0.2, radius_weight_decay=0.05,
        betas=(0.8, 0.9), eps=1e-2, decoupled=decoupled)
    scale = s * rho / norm
    dx = _C.in_backward_buffers_(dy, x, None, u, scale, rho, radius, norm, None, averages, of_radius, [], kind,
                                 [0.3, 0.1, 0.2, 0.05, 0.8, 0.9, 1e-2, 5.0], [], True, decoupled, False, False, True)
    close = dict(rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(dx, dy @ w, **close)
    torch.testing.assert_close(scale.unsqueeze(1) * u, expected.weight, **close)
    for i, name in enumerate(names):
        torch.testing.assert_close(averages[i], expected.state[name], **close)
        if kind != "unit":
            torch.testing.assert_close(of_radius[i], expected.state["radius_" + name], **close)
    torch.testing.assert_close(radius, expected.radius, **close)
    torch.testing.assert_close(norm, expected.norm, **close)
    torch.testing.assert_close(rho * u.norm(dim=1), norm, rtol=1e-12, atol=0)


@pytest.mark.parametrize("option", [False, True])
@pytest.mark.parametrize("averages", [False, True])
def test_a_lost_row_keeps_what_it_has(averages, option):
    u, m = torch.randn(3, 4), [torch.rand(3, 4) for _ in range(1 + averages)]
    u[1] = 0
    rho, radius, norm = torch.tensor([1.0, 0.0, 1.0]).double(), torch.ones(3).double(), torch.ones(3).double()
    scale, of_radius = torch.tensor([1.0, 0.0, 1.0]), [torch.rand(3).double() for _ in m]
    before = [t[1].clone() for t in (radius, norm, *of_radius)]
    rule = [0.8, 0.9, 1e-8, 5.0] if averages else [0.9, 1.0]
    _C.in_backward_buffers_(torch.randn(2, 3), torch.randn(2, 4), None, u, scale, rho, radius, norm, None, m, of_radius, [],
                            "swn", [0.1] * 4 + rule, [], averages, option, False, False, True)
    assert (u[1] == 0).all() and rho[1] == 0 and scale[1] == 0
    for value, t in zip(before, (radius, norm, *of_radius)):
        assert value == t[1]
    assert all(t.isfinite().all() for t in (u, *m, rho, scale))


def test_a_batch_of_none_only_decays():
    u, norm = torch.randn(3, 4).double(), torch.ones(3).double()
    state = one_step("swn", u, norm / u.norm(dim=1), norm, norm, torch.randn(0, 3).double(), torch.randn(0, 4).double(),
                     [0.5, 0.5, 0.2, 0.1, 0.0, 0.0])
    torch.testing.assert_close(state[3], torch.full((3,), 0.95).double())
    torch.testing.assert_close(state[4], torch.full((3,), 0.9).double())


@pytest.mark.parametrize("options", [dict(lr=0.3), *WITH_BUFFERS], ids=str)
def test_one_column_has_nothing_to_turn(options):
    plain, inside, _ = twins(mlp(1, 5, 2), "swn", **options)
    for _ in range(20):
        x, y = batch_for(plain[0], 3)
        step(*plain, x, y)
        step(*inside, x, y)
    assert distance(plain[0], inside[0]) < 1e-13


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, *WITH_BUFFERS], ids=str)
def test_a_bad_gradient_stays_in_its_row(bad, options):
    torch.manual_seed(3)
    model = mlp(4, 6)
    inside = in_backward(model, optimizer_of(model, **options))
    other = model[0](torch.randn(3, 4).double())
    grad = torch.randn_like(other)
    grad[1, 2] = bad
    other.backward(grad)
    finite = model[0].weight.isfinite().all(dim=1)
    assert finite.tolist() == [i != 2 for i in range(6)]
    inside.remove()


@pytest.mark.parametrize("size", [1e-30, 1e18])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradients_at_the_ends_of_float32_give_finite_weights(size, momentum):
    model = nn.Sequential(nn.Linear(8, 6))
    in_backward(model, PolarSGD(polar_groups(model), lr=1e-3, momentum=momentum))
    for _ in range(3):
        y = model(torch.randn(4, 8))
        y.backward(size * torch.randn_like(y))
        next(iter(model)).__dict__["_layer"].inside.optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    state = layer_state(model[0])
    assert state.rho.isfinite().all() and state.scale.isfinite().all()


@pytest.mark.parametrize("options", [dict(lr=0.3), *WITH_BUFFERS], ids=str)
def test_a_radius_of_zero_and_below(options):
    model, other = mlp(6, 4), None
    plain, inside, handle = twins(model, "swn", **options)
    for _, optimizer in (plain, inside):
        for p, state in optimizer.state.items():
            if "radius" in state:
                state["radius"].mul_(-1)
    handle.settle()
    for _ in range(30):
        x, y = batch_for(plain[0], 3)
        step(*plain, x, y)
        step(*inside, x, y)
    assert distance(plain[0], inside[0]) < 1e-11
    inside[1].state[inside[0][0].weight]["radius"][0] = 0.0  # held as a direction, it survives
    other = layer_state(inside[0][0])
    other.stale = True
    x, y = batch_for(plain[0], 3)
    step(*inside, x, y)
    assert all(p.isfinite().all() for p in inside[0].parameters())


def arguments(**changes):
    rows, width, batch = 3, 4, 2
    made = dict(
        grad=torch.randn(batch, rows), x=torch.randn(batch, width), z=None, weight=torch.randn(rows, width),
        scale=torch.ones(rows), rho=torch.ones(rows).double(), radius=torch.ones(rows).double(),
        norm=torch.ones(rows).double(), bias=torch.zeros(rows), telemetry=None, kind="swn", numbers=[0.1] * 6,
        maximize=False, keep_norm=False, refresh=False, need_x=True,
    )  # fmt: skip
    return {**made, **changes}


@pytest.mark.parametrize("changes, error, words", [
    (dict(grad=torch.randn(2, 4)), ValueError, "grad must have shape"),
    (dict(grad=torch.randn(2, 3).double()), TypeError, "grad must have the weight's dtype"),
    (dict(x=torch.randn(2, 5)), ValueError, "x must have shape"),
    (dict(x=torch.randn(2, 4).double()), TypeError, "x must have the weight's dtype"),
    (dict(weight=torch.randn(4, 3).t()), ValueError, "weight must be contiguous"),
    (dict(weight=torch.randn(3, 4).bfloat16()), TypeError, "weight must be float32 or float64"),
    (dict(scale=torch.ones(2)), ValueError, "scale must be contiguous of shape"),
    (dict(rho=torch.ones(3)), TypeError, "rho must be float64"),
    (dict(norm=torch.ones(4).double()), ValueError, "norm must be contiguous with 3"),
    (dict(radius=None), ValueError, "radius must be given with scale"),
    (dict(scale=None), ValueError, "rho must be given with scale"),
    (dict(z=torch.ones(3, 2)), ValueError, "z must be contiguous"),
    (dict(bias=torch.zeros(2)), ValueError, "bias must be contiguous of shape"),
    (dict(telemetry=torch.zeros(3, 5).double()), ValueError, "telemetry must be contiguous with 12"),
    (dict(numbers=[0.1] * 5), ValueError, "numbers must have 6"),
    (dict(kind="polar"), ValueError, "kind must be"),
], ids=lambda x: None)  # fmt: skip
def test_bad_arguments_are_named_and_nothing_is_written(changes, error, words):
    given = arguments(**changes)
    before = copy.deepcopy(given)
    with pytest.raises(error, match=words):
        _C.in_backward_sgd_(*given.values())
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("size", [1e19, 1e25])
@pytest.mark.parametrize("batch", [2, 4])  # |G|^2 by the Gram matrix, or the new rows
def test_a_gradient_whose_square_leaves_float32_is_measured(size, batch):
    """x x^T is infinite then, and x x^T dy not even a number; with 1e25 so are the squares of the new rows."""
    u, radius = torch.randn(20, 9), torch.ones(20).double()
    x, dy = size * torch.randn(batch, 9), torch.randn(batch, 20)
    norm = u.double().norm(dim=1)
    numbers = [1e-3, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert ((x @ x.t()) @ dy).isnan().any()
    w, G = u.double() / norm.unsqueeze(1), dy.double().t() @ x.double()
    expected = reference.polar_sgd_step(w, G, radius, norm, kind="swn", lr=1e-3, radius_lr=0.0)
    scale, rho, norm, radius = (1 / norm).float(), torch.ones(20).double(), norm.clone(), radius.clone()
    _C.in_backward_sgd_(dy, x, None, u, scale, rho, radius, norm, None, None, "swn", numbers, False, False, False, False)
    torch.testing.assert_close(norm, expected.norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(scale.double().unsqueeze(1) * u.double(), expected.weight, rtol=1e-4, atol=1e-5)


def with_buffers(**changes):
    made, given = {}, arguments()
    del given["telemetry"], given["refresh"], given["numbers"]
    for name, value in given.items():
        if name == "kind":
            made |= dict(buffers=[torch.zeros(3, 4)], radius_buffers=[torch.zeros(3).double()],
                         bias_buffers=[torch.zeros(3)])
        if name == "maximize":
            made |= dict(numbers=[0.1] * 6, bias_numbers=[0.1] * 4, averages=False, option=False)
        made[name] = value
    return {**made, **changes}


@pytest.mark.parametrize("changes, error, words", [
    (dict(grad=torch.randn(2, 4)), ValueError, "grad must have shape"),
    (dict(numbers=[0.1] * 5), ValueError, "numbers must have 6"),
    (dict(averages=True), ValueError, "numbers must have 8"),
    (dict(averages=True, numbers=[0.1] * 8), ValueError, "buffers must hold 2 tensors, got 1"),
    (dict(bias_numbers=[0.1] * 2), ValueError, "bias_numbers must have 4"),
    (dict(buffers=[torch.zeros(4, 3)]), ValueError, "buffers must be contiguous of shape"),
    (dict(buffers=[torch.zeros(4, 3).t()]), ValueError, "buffers must be contiguous of shape"),
    (dict(buffers=[torch.zeros(3, 4).double()]), TypeError, "buffers must have the dtype Float"),
    (dict(radius_buffers=[]), ValueError, "radius_buffers must hold 1"),
    (dict(radius_buffers=[torch.zeros(3)]), TypeError, "radius_buffers must be float64"),
    (dict(bias_buffers=[torch.zeros(2)]), ValueError, "bias_buffers must be contiguous of shape"),
    (dict(bias=None), ValueError, "bias_buffers must hold 0"),
    (dict(grad=torch.randn(513, 3), x=torch.randn(513, 4)), ValueError, "batches of 1 to 512 on a CPU, got a batch of 513"),
], ids=lambda x: None)  # fmt: skip
def test_bad_buffers_are_named_and_nothing_is_written(changes, error, words):
    given = with_buffers(**changes)
    before = copy.deepcopy(given)
    with pytest.raises(error, match=words):
        _C.in_backward_buffers_(*given.values())
    for name, value in given.items():
        pairs = [(value, before[name])] if isinstance(value, torch.Tensor) else zip(value, before[name]) if "buffers" in name else ()
        assert all(torch.equal(*pair) for pair in pairs)


def test_opcheck():
    given = arguments()
    torch.library.opcheck(torch.ops.wnkernels.in_backward_sgd_.default, tuple(given.values()))
    torch.library.opcheck(torch.ops.wnkernels.in_backward_buffers_.default, tuple(with_buffers().values()))
    torch.library.opcheck(torch.ops.wnkernels.in_backward_linear.default,
                          (*(given[name] for name in ("x", "weight", "scale", "bias")), True))


# ------------------------------------------------------------------------------------------- graphs, and what is refused


def test_a_layer_used_twice_in_a_forward():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(self.b(self.a(x).tanh()).tanh())

    plain, inside, _ = twins(Twice().double(), "ewn", lr=0.3)
    for _ in range(30):
        x, y = torch.randn(3, 4).double(), torch.randn(3, 4).double()
        assert step(*plain, x, y) == pytest.approx(step(*inside, x, y), rel=1e-11)
    assert distance(plain[0], inside[0]) < 1e-12


def test_graphs_that_are_not_used_do_no_harm():
    plain, inside, _ = twins(mlp(5, 6, 2), "swn")
    kept = []
    for i in range(12):
        x, y = batch_for(plain[0], 3)
        if i % 3 == 1:
            kept.append(inside[0](x))  # alive, and never used
        if i % 3 == 2:
            inside[0](x)  # gone at once
        with torch.no_grad():
            inside[0](x)
        step(*plain, x, y)
        step(*inside, x, y)
    assert distance(plain[0], inside[0]) < 1e-13


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    plain, inside, _ = twins(mlp(5, 6, 5), "swn")
    for _ in range(10):
        x, y = batch_for(plain[0], 3)
        for model, optimizer in (plain, inside):
            out = checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)
            F.mse_loss(out, y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(plain[0], inside[0]) < 1e-13


def test_accumulation_is_refused_before_anything_is_written():
    model = mlp(4, 3)
    optimizer = optimizer_of(model)
    in_backward(model, optimizer)
    x, y = batch_for(model, 2)
    F.mse_loss(model(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="call optimizer.step"):
        F.mse_loss(model(x), y).backward()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    conv = nn.Conv1d(2, 3, 2)
    in_backward(conv, PolarSGD(conv.parameters()))
    conv(torch.randn(1, 2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="call optimizer.step"):
        conv(torch.randn(1, 2, 4)).sum().backward()


def test_a_stale_backward_is_refused():
    model = mlp(4, 3)
    optimizer = optimizer_of(model)
    in_backward(model, optimizer)
    x, y = batch_for(model, 2)
    loss = F.mse_loss(model(x), y)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="one forward goes with one backward"):
        loss.backward()
    losses = [F.mse_loss(model(x), y) for _ in range(2)]
    losses[0].backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="one forward goes with one backward"):
        losses[1].backward()
    loss = F.mse_loss(model(x), y)
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="one forward goes with one backward"):
        loss.backward()


def test_a_penalty_on_the_weight_is_refused():
    model = mlp(4, 3)
    in_backward(model, optimizer_of(model))
    x, y = batch_for(model, 2)
    with pytest.raises(RuntimeError):
        (F.mse_loss(model(x), y) + model[0].weight.sum()).backward()


def test_double_backward_is_refused():
    model = mlp(4, 3)
    in_backward(model, optimizer_of(model))
    x = torch.randn(2, 4).double().requires_grad_()
    grad = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_loss_scaling_is_refused():
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = PolarSGD(polar_groups(model))
    in_backward(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.randn(2, 4)).sum()).backward()
    with pytest.raises(RuntimeError, match="GradScaler must see all gradients"):
        scaler.step(optimizer)


def test_more_than_one_process_is_refused(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = PolarSGD(polar_groups(model))
    inside = in_backward(model, optimizer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="single process"):
        model(torch.randn(2, 4))
    inside.remove()
    with pytest.raises(RuntimeError, match="single process"):
        in_backward(model, optimizer)


def test_wrong_optimizers_are_refused():
    model = mlp(4, 3)
    with pytest.raises(TypeError, match="optimizer must be PolarSGD"):
        in_backward(model, torch.optim.SGD(model.parameters()))
    optimizer = optimizer_of(model)
    in_backward(model, optimizer)
    with pytest.raises(RuntimeError, match="steps in a backward already"):
        in_backward(model, optimizer)
    other = mlp(4, 3)
    other(torch.randn(2, 4).double()).sum().backward()
    with pytest.raises(RuntimeError, match="has a gradient"):
        in_backward(other, optimizer_of(other))


# ------------------------------------------------------------------------------------------------- the weights are true


READ = {
    "attribute": lambda model: {"0.weight": model[0].weight},
    "parameters": lambda model: dict(model.named_parameters()),
    "state_dict": lambda model: model.state_dict(),
    "get_parameter": lambda model: {"0.weight": model.get_parameter("0.weight")},
    "deepcopy": lambda model: copy.deepcopy(model).state_dict(),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)).state_dict(),
    "to": lambda model: model.to(torch.float64).state_dict(),
}


@pytest.mark.parametrize("how", READ)
@pytest.mark.parametrize("when", ["after", "between"])
def test_reading_gives_the_true_weight(how, when):
    plain, inside, _ = twins(mlp(5, 6, 2), "ewn", lr=0.5)
    for _ in range(10):
        x, y = batch_for(plain[0], 3)
        step(*plain, x, y)
        model, optimizer = inside
        loss = F.mse_loss(model(x), y)
        if when == "between":
            READ[how](model)
        loss.backward()
        optimizer.step()
        expected = plain[0].state_dict()
        for name, value in READ[how](model).items() if when == "after" else ():
            torch.testing.assert_close(value.detach(), expected[name], rtol=1e-12, atol=1e-13)
    assert distance(plain[0], inside[0]) < 1e-12


def test_copies_are_plain_and_share_nothing():
    model = mlp(5, 6, 2)
    optimizer = optimizer_of(model)
    in_backward(model, optimizer)
    x, y = batch_for(model, 3)
    step(model, optimizer, x, y)
    clone = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (clone, torch.load(buffer, weights_only=False)):
        assert type(other[0]) is nn.Linear and isinstance(model[0], nn.Linear)
        torch.testing.assert_close(other(x), model(x))
        other(x).sum().backward()
        assert other[0].weight.grad is not None
    assert model[0].weight.grad is None


def test_remove_leaves_what_the_optimizer_goes_on_with():
    plain, inside, handle = twins(mlp(5, 6, 2), "ewn", lr=0.3)
    for i in range(20):
        x, y = batch_for(plain[0], 3)
        step(*plain, x, y)
        step(*inside, x, y)
        if i == 9:
            handle.remove()
            assert type(inside[0][0]) is nn.Linear and type(inside[0][0]._parameters) is dict
            inside[0](x).sum().backward()
            assert inside[0][0].weight.grad is not None
            inside[1].zero_grad()
    assert distance(plain[0], inside[0]) < 1e-12


def test_edits_are_picked_up_or_refused():
    plain, inside, handle = twins(mlp(5, 6, 2), "swn", lr=0.3)
    x, y = batch_for(plain[0], 3)
    kept = inside[0][0].weight
    for i in range(6):
        step(*plain, x, y)
        step(*inside, x, y)
        if i == 3:
            with torch.no_grad():
                for model in (plain[0], inside[0]):
                    model[0].weight[1].mul_(1.7)
                    model[2].weight.copy_(torch.arange(12.0).reshape(2, 6) / 10 + 0.1)
    assert distance(plain[0], inside[0]) < 1e-12
    step(*inside, x, y)
    with torch.no_grad():
        kept.mul_(2)
    with pytest.raises(RuntimeError, match="held it up to a factor"):
        inside[0](x)


@pytest.mark.parametrize("options", [dict(lr=0.3), *WITH_BUFFERS], ids=str)
@pytest.mark.parametrize("kind", ["swn", "ewn", None])
def test_edits_by_data_are_picked_up_where_the_weight_came_from_the_module(kind, options):
    plain, inside, _ = twins(mlp(5, 6, 2), kind, **options)
    for i in range(6):
        x, y = batch_for(plain[0], 3)
        if i == 3:
            for model in (plain[0], inside[0]):
                model[0].weight.data.clamp_(-0.2, 0.2)
                for p in model[2].parameters():
                    p.data *= 1.5
        assert step(*plain, x, y) == pytest.approx(step(*inside, x, y), rel=1e-12)
    assert distance(plain[0], inside[0]) < 1e-12


@pytest.mark.parametrize("batches", [[3] * 6, [3, 600, 3, 600, 3, 3]])  # 600: by the gradient, with buffers
@pytest.mark.parametrize("options", [dict(lr=0.3), *WITH_BUFFERS], ids=str)
def test_what_is_frozen_stays_until_it_is_thawed(options, batches):
    model = nn.Sequential(*mlp(8, 5), nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3), nn.Flatten(), *mlp(6, 2)).double()
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    plain, inside, _ = twins(model, "swn", **options)
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    for i, batch in enumerate(batches):
        if i == 2:
            for kept, p in zip(frozen, [p for p in inside[0].parameters() if not p.requires_grad], strict=True):
                assert torch.equal(kept, p)
            plain[0].requires_grad_(), inside[0].requires_grad_()
        x, y = batch_for(plain[0], batch)
        step(*plain, x, y)
        step(*inside, x, y)
        assert distance(plain[0], inside[0]) < 1e-12
    assert not torch.equal(frozen[0], inside[0][0].weight)


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("options", [dict(lr=0.3, weight_decay=0.1), *WITH_BUFFERS], ids=str)
def test_weights_loaded_before_the_first_step_have_their_own_length(options, seen):
    plain, inside, _ = twins(mlp(5, 6, 2), "swn", **options)
    loaded = {name: 1.7 * value for name, value in mlp(5, 6, 2).state_dict().items()}
    for model, optimizer in (plain, inside):
        if seen:  # by a forward, which is no step
            model(torch.randn(3, 5).double())
        model.load_state_dict(loaded)
    for _ in range(5):
        x, y = batch_for(plain[0], 3)
        step(*plain, x, y)
        step(*inside, x, y)
    assert distance(plain[0], inside[0]) < 1e-12
    for p, q in zip(plain[0].parameters(), inside[0].parameters()):
        for name in ("radius", "norm") if p.dim() > 1 else ():
            torch.testing.assert_close(plain[1].state[p][name], inside[1].state[q][name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [dict(lr=0.3), *WITH_BUFFERS], ids=str)
def test_resuming_from_state_dicts(options):
    plain, inside, _ = twins(mlp(5, 6, 2), "ewn", **options)
    batches = [batch_for(plain[0], 3) for _ in range(20)]
    for x, y in batches[:10]:
        step(*plain, x, y)
        step(*inside, x, y)
    saved = copy.deepcopy((inside[0].state_dict(), inside[1].state_dict()))
    for x, y in batches[10:]:
        step(*plain, x, y)
        step(*inside, x, y)
    for order in (0, 1):
        for part in (order, 1 - order):
            inside[part].load_state_dict(saved[part])
        for x, y in batches[10:]:
            step(*inside, x, y)
        assert distance(plain[0], inside[0]) < 1e-12


@pytest.mark.parametrize("options", [dict(lr=0.3), *WITH_BUFFERS], ids=str)
def test_the_optimizers_methods_see_true_weights(options):
    plain, inside, _ = twins(mlp(5, 6, 2), "ewn", **options)
    batches = [batch_for(plain[0], 3) for _ in range(12)]
    for model, optimizer in (plain, inside):
        for i, (x, y) in enumerate(batches):
            step(model, optimizer, x, y)
            if i == 3:
                optimizer.snapshot()
            if i == 6:
                optimizer.rollback()
            if i == 8:
                optimizer.rescale_direction(3.0)
    assert distance(plain[0], inside[0]) < 1e-12
    converted, _ = to_parametrized(*inside)
    torch.testing.assert_close(converted(batches[0][0]), plain[0](batches[0][0]), rtol=1e-12, atol=0)


def test_a_model_moves_to_another_dtype():
    model = mlp(5, 6, 2)
    optimizer = optimizer_of(model)
    in_backward(model, optimizer)
    x, y = batch_for(model, 3)
    step(model, optimizer, x, y)
    model.float()
    before = [p.clone() for p in model.parameters()]
    step(model, optimizer, x.float(), y.float())
    assert all(p.dtype == torch.float32 and not torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_other_parameters_make_it_a_plain_layer():
    model = mlp(5, 3)
    in_backward(model, optimizer_of(model))
    x, _ = batch_for(model, 3)
    others = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    torch.func.functional_call(model, others, x).sum().backward()
    assert all(p.grad is not None for p in others.values())
    model[0].weight = nn.Parameter(torch.ones(3, 5).double())
    model(x).sum().backward()
    assert model[0].weight.grad is not None


def test_a_compiled_model_trains_the_same():
    plain, inside, _ = twins(mlp(5, 6, 2), "swn", lr=0.3)
    compiled = torch.compile(inside[0], backend="eager")
    for _ in range(5):
        x, y = batch_for(plain[0], 3)
        step(*plain, x, y)
        step(compiled, inside[1], x, y)
    assert distance(plain[0], inside[0]) < 1e-12


def test_replays_that_the_host_does_not_see():
    """What a CUDA graph of a step leaves to the layer, whose own code does not run again."""
    plain, inside, handle = twins(mlp(5, 6), "ewn", lr=0.5)
    (model, optimizer), layer = inside, layer_state(inside[0][0])
    batches = [batch_for(model, 3) for _ in range(40)]
    step(model, optimizer, *batches[0])
    layer._capture()
    state, bias = optimizer.state[layer.weight], dict(model.named_parameters(remove_duplicate=False))["0.bias"]
    buffers = layer.weight, layer.scale, layer.rho, state["radius"], state["norm"], bias

    @torch.no_grad()
    def replay(x, y):
        out, z = _C.in_backward_linear(x, layer.weight, layer.scale, bias, True)
        before = [t._version for t in buffers]
        _C.in_backward_sgd_(2 * (out - y) / y.numel(), x, z, *buffers, None, "ewn", [0.5, 0.5, 0.0, 0.0, 0.05, 0.0], False,
                            False, True, False)
        for t, version in zip(buffers, before):
            torch._C._autograd._unsafe_set_version_counter((t,), (version,))

    def agree():
        assert distance(plain[0], model) < 1e-12

    for i, (x, y) in enumerate(batches):
        step(*plain, x, y)
        if i > 0:
            replay(x, y) if i % 4 else step(model, optimizer, x, y)  # eager ones in between
        if i % 3 == 2:
            agree()
            agree()
        if i == 20:
            optimizer.snapshot()
    assert layer.scale is buffers[1] and layer.rho is buffers[2]
    agree()
    with torch.no_grad():
        for m in (model, plain[0]):
            m[0].weight[2].mul_(3)
    step(*plain, *batches[0])
    step(model, optimizer, *batches[0])
    agree()
    replay(*batches[0])
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="held it up to a factor"):
        model(batches[0][0])


# ---------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("kind", ["swn", None])
def test_autocast_is_as_near_as_the_plain_layer(kind):
    """The weights after training under autocast, against float64."""
    exact = mlp(30, 40, 10)
    models = [copy.deepcopy(exact).float() for _ in range(2)]
    optimizers = [optimizer_of(m, kind) for m in models]
    reference_optimizer = optimizer_of(exact, kind)
    in_backward(models[1], optimizers[1])
    for _ in range(50):
        x, y = batch_for(exact, 12)
        step(exact, reference_optimizer, x, y)
        for model, optimizer in zip(models, optimizers):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.mse_loss(model(x.float()).float(), y.float())
            loss.backward()
            optimizer.step()
            assert all(p.grad is None or i == 0 for i, m in enumerate(models) for p in m.parameters())
            optimizer.zero_grad()
    errors = [torch.cat([(p - q).flatten() for p, q in zip(m.parameters(), exact.parameters())]).norm() for m in models]
    assert errors[1] <= 1.05 * errors[0]


def test_a_backward_under_autocast_and_evaluation():
    model = nn.Sequential(nn.Linear(8, 4))
    optimizer = PolarSGD(polar_groups(model), lr=0.1)
    in_backward(model, optimizer)
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        out.float().sum().backward()
        assert out.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
        with torch.no_grad():
            low = model(x)
    with torch.no_grad():
        torch.testing.assert_close(low.float(), model(x), rtol=0.05, atol=0.05)
    with contextlib.suppress(RuntimeError):
        optimizer.step()
    assert model[0].weight.dtype == torch.float32
