"""Layers under autocast on 16-bit weights that the polar step has written."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wnkernels.optim import PolarAdamW, PolarSGD, autocast_copy, in_backward, polar_groups

MAKERS = {
    "sgd": lambda groups: PolarSGD(groups, lr=0.1),
    "momentum": lambda groups: PolarSGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda groups: PolarAdamW(groups, lr=0.01, amsgrad=True),
}


def net():
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(45, 7), nn.Tanh(), nn.Linear(7, 3))


def twins(make=MAKERS["sgd"], dtype=torch.bfloat16, **options):
    model = net()
    other = copy.deepcopy(model)
    optimizers = [make(polar_groups(m, "ewn")) for m in (model, other)]
    return (model, optimizers[0]), (other, optimizers[1]), autocast_copy(other, optimizers[1], dtype, **options)


def step(model, optimizer, x, y, dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype):
        loss = F.mse_loss(model(x).float(), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def batch():
    return torch.randn(6, 2, 5, 5), torch.randn(6, 3)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def copies(handle):
    return list(handle.optimizer._copies.values())


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_training_is_bitwise_that_of_the_casts(make, dtype, low):
    plain, copied, handle = twins(make, dtype, low_gradients=low)
    for _ in range(15):
        x, y = batch()
        assert torch.equal(step(*plain, x, y, dtype), step(*copied, x, y, dtype))
        for c in copies(handle):
            assert torch.equal(c.tensor, c.weight.to(dtype)) and c.mark == (c.weight._version, c.weight.data_ptr())
    assert same(plain[0], copied[0])


def test_the_forward_casts_no_weight(monkeypatch):
    _, (model, optimizer), handle = twins()
    x, y = batch()
    step(model, optimizer, x, y)
    for c in copies(handle):
        c.weight.data.fill_(0)  # unseen: whoever reads the float32 weight now gets zeros
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert all(layer(torch.randn(*shape)).abs().sum() > 1 for layer, shape in
                   ((model[0], (6, 2, 5, 5)), (model[3], (6, 45)), (model[5], (6, 7))))  # fmt: skip


def test_low_gradients_stay_low():
    _, (model, _), handle = twins(low_gradients=True)
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        F.mse_loss(model(x).float(), y).backward()
    assert all(c.weight.grad.dtype == torch.bfloat16 for c in copies(handle))
    handle.remove()
    assert model[3].weight.grad.dtype == torch.float32 and type(model[3]) is nn.Linear
    model.zero_grad()
    model(x).sum().backward()
    assert model[3].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("edit", [
    lambda model: model[3].weight.mul_(1.5),
    lambda model: model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}),
    lambda model: nn.init.normal_(model[0].weight),
    lambda model: setattr(model[0].weight, "data", model[0].weight.data * 2),
], ids=["in place", "loaded", "initialized", "data replaced"])  # fmt: skip
def test_edits_reach_the_copies(edit):
    plain, copied, _ = twins()
    for i in range(8):
        x, y = batch()
        step(*plain, x, y)
        step(*copied, x, y)
        if i in (2, 5):
            for model, _ in (plain, copied):
                torch.manual_seed(i)
                with torch.no_grad():
                    edit(model)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(plain[0](x), copied[0](x))
    assert same(plain[0], copied[0])


def test_repeated_forwards_other_dtypes_and_none():
    plain, copied, _ = twins()
    for _ in range(3):
        x, y = batch()
        step(*plain, x, y)
        step(*copied, x, y)
        for context in (torch.no_grad(), torch.enable_grad()):
            with context:
                assert torch.equal(plain[0](x), copied[0](x))
                for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
                    with torch.autocast("cpu", dtype):
                        assert torch.equal(plain[0](x), copied[0](x))


def test_the_gradients_of_several_uses_add_up_in_float32():
    plain, copied, _ = twins()
    (x, y), (other, _) = batch(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        (copied[0](x).float().sum() + copied[0](other).float().square().sum()).backward()
    for part, loss in ((x, torch.sum), (other, lambda out: out.square().sum())):
        with torch.autocast("cpu", torch.bfloat16):  # in one context torch casts once, and adds in bfloat16
            loss(plain[0](part).float()).backward()
    for p, q in zip(plain[0].parameters(), copied[0].parameters()):
        if p.ndim > 1:
            assert torch.equal(p.grad, q.grad)


def test_a_skipped_step_leaves_no_old_copy():
    plain, copied, _ = twins(dtype=torch.float16)
    for i in range(6):
        x, y = batch()
        for model, optimizer in (plain, copied):
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            with torch.autocast("cpu", torch.float16):
                loss = F.mse_loss(model(x).float(), y)
            scaler.scale(loss).backward()
            if i == 3:
                model[3].weight.grad[0, 0] = float("inf")
                with torch.no_grad():
                    model[3].weight.mul_(1.25)
            scaler.step(optimizer)
            optimizer.zero_grad()
            with torch.no_grad(), torch.autocast("cpu", torch.float16):
                out = model(x)
        if i != 3:
            assert torch.equal(step(*plain, x, y, torch.float16), step(*copied, x, y, torch.float16))
    assert same(plain[0], copied[0]) and out.isfinite().all()


def test_state_and_copies_know_nothing_of_it():
    plain, (model, optimizer), _ = twins()
    x, y = batch()
    step(*plain, x, y)
    step(model, optimizer, x, y)
    assert model.state_dict().keys() == plain[0].state_dict().keys()
    assert optimizer.state_dict().keys() == plain[1].state_dict().keys()
    assert [m for m in model.buffers()] == []
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[3]) is nn.Linear and same(other, model)
    assert isinstance(model[0], nn.Conv2d) and isinstance(model[3], nn.Linear)
    model.double()
    torch.testing.assert_close(model(x.double()), copy.deepcopy(plain[0]).double()(x.double()))


def test_with_the_steps_inside_the_backward():
    plain, copied, _ = twins()
    in_backward(copied[0], copied[1])
    for _ in range(5):
        x, y = batch()
        step(*plain, x, y)
        step(*copied, x, y)
    assert same(plain[0], copied[0])


def test_what_is_refused():
    model = net()
    optimizer = PolarSGD(polar_groups(model))
    with pytest.raises(TypeError, match="optimizer must be PolarSGD"):
        autocast_copy(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(TypeError, match="dtype must be torch.bfloat16 or torch.float16, got torch.float32"):
        autocast_copy(model, optimizer, torch.float32)
    with pytest.raises(ValueError, match="has none"):
        autocast_copy(nn.Sequential(nn.Linear(2, 3)), optimizer)
    autocast_copy(model, optimizer)
    with pytest.raises(RuntimeError, match="has 16-bit copies already"):
        autocast_copy(model, optimizer)
