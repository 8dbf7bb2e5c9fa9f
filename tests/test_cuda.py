"""The CUDA kernels on a GPU against the specification in float64; skipped, with the reason, where there is none."""

import pytest
import torch
from test_foreach import WEIGHTS, assert_same, one_by_one
from test_foreach import draw as draw_list
from test_functional import KINDS, PAIRS, SHAPES, draw, leaves, oracle, unit_roundoff

from wnkernels import foreach_weight_norm
from wnkernels import functional as wF
from wnkernels import nn as wn
from wnkernels.optim import PolarAdamW, PolarSGD, in_backward, polar_groups

pytestmark = pytest.mark.cuda

# Rows beyond registers, shared memory and clusters, and fewer rows than multiprocessors.
LONG = [((5, 9001), 0), ((3, 40000), 0), ((2, 300001), 0), ((300, 20000), 0), ((20000, 3), 1), ((64, 70, 33), 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype,out_dtype", PAIRS)
@pytest.mark.parametrize("shape,dim", SHAPES + LONG)
def test_values_and_gradients(cuda, shape, dim, dtype, out_dtype, kind):
    v, g, G = draw(shape, dim, dtype, out_dtype)
    v1, g1 = leaves(v.to(cuda), g.to(cuda))
    w = wF.weight_norm(v1, g1, dim, kind, out_dtype)
    got = (w.detach(), *torch.autograd.grad(w, (v1, g1), G.to(cuda)))
    for t, expected, precision in zip(got, oracle(v, g, G, dim, kind), (out_dtype, dtype, dtype)):
        scale = max(1.0, G.double().norm().item()) * (expected.abs().max().item() if expected.numel() else 0.0)
        torch.testing.assert_close(t.cpu().double(), expected, rtol=0, atol=20 * unit_roundoff(precision) * scale + 1e-6 * (precision == torch.float32))
    torch.testing.assert_close(wF.row_norm(v1, dim).cpu().double(), wF.row_norm(v.double(), dim), rtol=1e-6, atol=0)
    buffer = G.to(cuda, copy=True)
    dg = wF.project_(buffer, v1.detach(), g1.detach(), dim, kind)
    assert torch.equal(dg, got[2])
    again = torch.autograd.grad(wF.weight_norm(v1, g1, dim, kind, out_dtype), (v1, g1), G.to(cuda))
    assert torch.equal(again[0], got[1]) and torch.equal(again[1], got[2])  # the same bits every time


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("materialize", [True, False])
def test_linear(cuda, kind, materialize):
    torch.manual_seed(1)
    x, layer = torch.randn(7, 300, device=cuda), wn.Linear(300, 500, kind=kind, device=cuda, dtype=torch.float64)
    tensors = (x.double().requires_grad_(), layer.weight_v, getattr(layer, "weight_g" if kind == "swn" else "weight_alpha"))
    y = wF.weight_norm_linear(*tensors, layer.bias, kind, materialize)
    expected = torch.nn.functional.linear(tensors[0], wF.weight_norm(*tensors[1:], 0, kind), layer.bias)
    torch.testing.assert_close(y, expected)
    G = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, tensors, G), torch.autograd.grad(expected, tensors, G))


def test_side_stream_and_graph(cuda):
    v, g = torch.randn(64, 256, device=cuda), torch.rand(64, 1, device=cuda)
    wF.weight_norm(v, g)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        w = wF.weight_norm(v, g)
    v.normal_()
    graph.replay()
    torch.testing.assert_close(w, wF.weight_norm(v, g))


@pytest.mark.parametrize("device_weights", ["small", "all"])
def test_lists(cuda, device_weights):
    """The bits of single calls, forward and backward, for rows that share a launch and for those that do not."""
    weights = WEIGHTS + ([((5, 9001), 0, "swn", torch.float32), ((3, 300001), 0, "ewn", torch.float32),
                          ((500, 300), 1, "swn", torch.bfloat16)] if device_weights == "all" else [])
    vs, gs, dims, kinds = draw_list(weights)
    vs, gs = [[t.detach().to(cuda).requires_grad_() for t in list_] for list_ in (vs, gs)]
    results = []
    for ws in (wF.foreach_weight_norm(vs, gs, dims, kinds), one_by_one(vs, gs, dims, kinds)):
        torch.manual_seed(1)
        results.append([*ws, *torch.autograd.grad(ws, vs + gs, [torch.randn_like(w) for w in ws])])
    assert_same(*results)


def test_one_launch_for_the_weights_of_a_model(cuda):
    model = torch.nn.Sequential(*(wn.Linear(20 + i, 21 + i, bias=False, device=cuda) for i in range(40)))
    foreach_weight_norm(model)
    x = torch.randn(4, 20, device=cuda)
    model(x).sum().backward()
    names = kernel_names(lambda: model(x).sum().backward())
    assert sum("row_table_kernel" in name for name in names) == 2  # forward and backward: all rows are short
    assert not any("row_kernel" in name for name in names)


@pytest.mark.parametrize("gradients", [True, False])
def test_captured_forward_sees_new_parameters(cuda, gradients):
    model = torch.nn.Sequential(*(wn.Linear(16, 16, device=cuda) for _ in range(5)))
    foreach_weight_norm(model)
    x = torch.randn(4, 16, device=cuda)
    with torch.set_grad_enabled(gradients):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        with torch.no_grad():
            model[2].weight_v.normal_()
        graph.replay()
        torch.testing.assert_close(y, model(x))


# ---- polar steps: the same on the CPU, whose kernels tests/test_steps.py holds against torch -------------------------

OPTIMIZERS = [(PolarSGD, dict(lr=0.05)), (PolarSGD, dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)),
              (PolarAdamW, dict(lr=0.01)), (PolarAdamW, dict(lr=0.01, amsgrad=True))]
# Short rows, rows of blocks, clusters and splits, one row, columns, and a 4-dimensional weight.
STEP_SHAPES = [((64, 33), 0), ((300, 5000), 0), ((200, 30000), 0), ((3, 300001), 0), ((70, 90), None), ((500, 300), 1),
               ((9, 7, 3, 3), 0), ((9, 7, 3, 3), 1), ((5, 1), 0)]


def step_on(device, cls, options, shape, dim, dtype, kind, steps):
    generator = torch.Generator().manual_seed(3)
    p = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype))
    optimizer = cls([p], kind=kind, dim=dim, telemetry=True, **options)
    for _ in range(steps):
        p.grad = torch.randn(shape, generator=generator, dtype=torch.float64).mul_(0.1).to(device, dtype)
        optimizer.step()
    return p.detach(), optimizer


@pytest.mark.parametrize("cls,options", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape,dim", STEP_SHAPES)
def test_polar_steps(cuda, shape, dim, dtype, cls, options):
    kind = "ewn" if dtype == torch.float32 else "swn"
    w, optimizer = step_on(cuda, cls, options, shape, dim, dtype, kind, 3)
    expected, on_cpu = step_on("cpu", cls, options, shape, dim, dtype, kind, 3)
    # Adam divides by the root of its second moment, which is near 0 where a gradient is.
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    state, wanted = (next(iter(x.state.values())) for x in (optimizer, on_cpu))
    for name, value in wanted.items():
        scale = value.abs().max().item() or 1.0
        torch.testing.assert_close(state[name].cpu(), value, rtol=tolerance, atol=tolerance * scale, msg=name)
    if dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(w, state["master"].to(dtype))
    else:
        torch.testing.assert_close(w.cpu(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    again, _ = step_on(cuda, cls, options, shape, dim, dtype, kind, 3)
    assert torch.equal(w, again)  # the same bits every time


def kernel_names(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("cls,options", OPTIMIZERS)
def test_one_launch_for_a_model(cuda, cls, options):
    """Forty layers in one kernel, whatever their shapes."""
    model = torch.nn.Sequential(*(torch.nn.Linear(64 + i, 65 + i, bias=False, device=cuda) for i in range(40)))
    optimizer = cls(polar_groups(model), **options)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.step()
    names = kernel_names(optimizer.step)
    assert sum("step_kernel" in name for name in names) == 1
    assert len(names) <= 2, "Adam's count, and the step"


@pytest.mark.parametrize("cls,options", OPTIMIZERS)
def test_steps_do_not_wait_for_the_device(cuda, cls, options):
    model = torch.nn.Linear(30, 40, device=cuda)
    optimizer = cls(polar_groups(model), **options, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0, device=cuda), torch.zeros((), device=cuda)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(train, model, optimizer, x, warmup):
    """The graph of a training step on x, after steps on the inputs of `warmup`, outside of the current stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for input in warmup:
            x.copy_(input)
            train(model, optimizer, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(model, optimizer, x)
    return graph


@pytest.mark.parametrize("cls,options", OPTIMIZERS)
def test_a_captured_training_step(cuda, cls, options):
    """Replays of a graph of forward, backward and step go on as eager steps do, and see a new lr in its tensor."""
    def make():
        torch.manual_seed(4)
        model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 5)).to(cuda)
        lr = torch.tensor(options["lr"], device=cuda)
        return model, lr, cls(polar_groups(model, telemetry=True), capturable=True, **options | {"lr": lr})

    inputs = torch.randn(12, 8, 20, device=cuda)
    (model, lr, optimizer), (eager, eager_lr, eager_optimizer) = make(), make()
    x = inputs[0].clone()

    def train(model, optimizer, x):
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        optimizer.step()

    graph = captured(train, model, optimizer, x, inputs[:3])
    for i in range(12):
        if i == 7:
            lr.mul_(0.5)
            eager_lr.mul_(0.5)
        train(eager, eager_optimizer, inputs[i])
        if i >= 3:
            x.copy_(inputs[i])
            graph.replay()
    for p, q in zip(model.parameters(), eager.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    for name, values in eager_optimizer.telemetry().items():
        torch.testing.assert_close(optimizer.telemetry()[name]["norm"], values["norm"], rtol=1e-6, atol=0)


def test_state_is_not_made_in_a_capture(cuda):
    p = torch.nn.Parameter(torch.randn(4, 5, device=cuda))
    p.grad = torch.randn_like(p)
    optimizer = PolarAdamW([p])
    with pytest.raises(RuntimeError, match="take two steps before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.parametrize("cls,options", OPTIMIZERS)
def test_grad_scaler_skips_on_the_device(cuda, cls, options):
    p = torch.nn.Parameter(torch.randn(6, 7, device=cuda))
    optimizer = cls([p], **options)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    (scaler.scale(p.square().sum())).backward()
    scaler.step(optimizer)
    scaler.update()
    before = p.detach().clone()
    p.grad[2, 3] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p, before) and scaler.get_scale() == 4.0


def test_devices_of_numbers(cuda):
    w, r = torch.randn(3, 4, device=cuda), torch.ones(3, dtype=torch.float64, device=cuda)
    arguments = dict(kind="swn", dims=[0], radius_lr=0.1)
    wF.polar_sgd_([w], [w.clone()], [r], [r.clone()], lr=torch.tensor(0.1), **arguments)  # 0-d on the CPU: a number
    with pytest.raises(RuntimeError, match="lr must be a number, or on the weight's device"):
        wF.polar_sgd_([w], [w.clone()], [r], [r.clone()], lr=torch.full((3,), 0.1), **arguments)


# ---- steps inside the backward: the same on the CPU, which tests/test_in_backward.py holds against the optimizer ------

IN_BACKWARD = [("swn", dict(lr=0.3)), ("ewn", dict(lr=0.2, weight_decay=0.1, radius_lr_ratio=0.3)),
               ("unit", dict(lr=0.2)), ("swn", dict(lr=0.2, retraction="renormalize")), (None, dict(lr=0.05))]


def inside_on(device, kind, options, dtype, widths=(70, 130, 33), telemetry=False):
    """A model that steps inside its backward, and its optimizer."""
    torch.manual_seed(6)
    model = torch.nn.Sequential(*(m for a, b in zip(widths, widths[1:]) for m in (torch.nn.Linear(a, b), torch.nn.Tanh())))
    model = model.to(device, dtype)
    groups = polar_groups(model, kind, telemetry=telemetry) if kind else model.parameters()
    optimizer = PolarSGD(groups, **options, **({} if kind else {"kind": None}))
    in_backward(model, optimizer)
    return model, optimizer


def train_inside(model, optimizer, x):
    model(x).square().mean().backward()
    optimizer.step()


def assert_same_weights(model, other, tolerance):
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p.detach().cpu(), q.detach().cpu(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind, options", IN_BACKWARD, ids=str)
@pytest.mark.parametrize("batch", [1, 16, 100, 3000])  # |G|^2 by the Gram matrix or not, and sums over pieces of the batch
def test_in_backward_on_both_devices(cuda, batch, kind, options, dtype):
    (model, optimizer), (other, on_cpu) = (inside_on(device, kind, options, dtype) for device in (cuda, "cpu"))
    assert type(model[0]).__name__ == "_Linear"
    for _ in range(20):
        x = torch.randn(batch, 70, dtype=dtype)
        train_inside(model, optimizer, x.to(cuda))
        train_inside(other, on_cpu, x)
        assert all(p.grad is None for p in model.parameters())
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert_same_weights(model, other, tolerance)
    for state, wanted in zip(optimizer.state.values(), on_cpu.state.values()):
        for name, value in wanted.items():
            torch.testing.assert_close(state[name].cpu(), value, rtol=tolerance, atol=tolerance)


def test_in_backward_repeats_its_bits_and_its_telemetry(cuda):
    results = []
    for _ in range(2):
        model, optimizer = inside_on(cuda, "swn", dict(lr=0.3), torch.float32, (300, 520, 40), telemetry=True)
        torch.manual_seed(8)
        for _ in range(5):
            train_inside(model, optimizer, torch.randn(2000, 300, device=cuda))
        results.append([*model.parameters(), *(v for values in optimizer.telemetry().values() for v in values.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_in_backward_under_autocast(cuda):
    (model, optimizer), (other, on_cpu) = (inside_on(device, "swn", dict(lr=0.1), torch.float32) for device in (cuda, "cpu"))
    for _ in range(10):
        x = torch.randn(16, 70)
        for m, o, device in ((model, optimizer, "cuda"), (other, on_cpu, "cpu")):
            with torch.autocast(device, torch.bfloat16):
                loss = m(x.to(device)).float().square().mean()
            loss.backward()
            o.step()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert_same_weights(model, other, 1e-2)


@pytest.mark.parametrize("batch", [16, 3000])
@pytest.mark.parametrize("kind, options", IN_BACKWARD, ids=str)
def test_in_backward_does_not_wait_for_the_device(cuda, batch, kind, options):
    model, optimizer = inside_on(cuda, kind, options, torch.float32)
    x = torch.randn(batch, 70, device=cuda)
    for _ in range(2):
        train_inside(model, optimizer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_inside(model, optimizer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind, options", IN_BACKWARD, ids=str)
def test_in_backward_in_a_captured_training_step(cuda, kind, options):
    """Replays go on as eager steps do, and weights that are read in between are true."""
    inputs = torch.randn(12, 8, 70, device=cuda, dtype=torch.float64)
    (model, optimizer), (eager, eager_optimizer) = (inside_on(cuda, kind, options, torch.float64) for _ in range(2))
    x = inputs[0].clone()
    graph = captured(train_inside, model, optimizer, x, inputs[:3])
    for i in range(12):
        train_inside(eager, eager_optimizer, inputs[i])
        if i >= 3:
            x.copy_(inputs[i])
            graph.replay()
        if i in (5, 6, 9):
            assert_same_weights(model, eager, 1e-10)
    assert_same_weights(model, eager, 1e-10)


def test_in_backward_a_rate_on_the_device_goes_by_the_gradient(cuda):
    lr = torch.tensor(0.1, device=cuda)
    model, optimizer = inside_on(cuda, "swn", dict(lr=lr), torch.float32)
    assert type(model[0]) is torch.nn.Linear
    train_inside(model, optimizer, torch.randn(4, 70, device=cuda))
    assert all(p.grad is None for p in model.parameters())
