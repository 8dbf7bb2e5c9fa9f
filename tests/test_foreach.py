"""Weights of lists and of whole models in one call: the same numbers as one by one, under everything that may happen."""
import copy
import gc
import io
import threading

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import wnkernels
from wnkernels import foreach
from wnkernels import functional as wF

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# shape, dim, kind, dtype: rows, columns, interior dims, short and long, one row, empty
WEIGHTS = [
    ((16, 16), 0, "swn", f32), ((16, 16), 0, "ewn", f32), ((7, 5), 1, "swn", f32), ((3, 40), -1, "ewn", f32),
    ((8, 4, 3, 3), 0, "ewn", f32), ((4, 6, 3), 1, "swn", f32), ((9, 11), None, "ewn", f32), ((300, 170), 0, "swn", f32),
    ((2, 70000), 0, "ewn", f32), ((0, 4), 0, "swn", f32), ((4, 0), 0, "swn", f32),
    ((5, 33), 0, "swn", f64), ((5, 33), 0, "ewn", bf16), ((12, 8), 1, "swn", f16), ((6, 2, 2), -2, "swn", f64),
]


def draw(weights=WEIGHTS, requires_grad=True):
    vs, gs = [], []
    for shape, dim, kind, dtype in weights:
        v = torch.randn(shape, dtype=f64)
        front = None if dim is None else dim % len(shape)
        size = () if front is None else tuple(n if i == front else 1 for i, n in enumerate(shape))
        g = torch.randn(size, dtype=f64) * (0.3 if kind == "ewn" else 1)
        vs.append(v.to(dtype).requires_grad_(requires_grad))
        gs.append(g.to(dtype).requires_grad_(requires_grad))
    return vs, gs, [dim for _, dim, _, _ in weights], [kind for *_, kind, _ in weights]


def one_by_one(vs, gs, dims, kinds, out_dtype=None):
    return [wF.weight_norm(v, g, d, k, out_dtype) for v, g, d, k in zip(vs, gs, dims, kinds)]


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------ functional


def test_bits_are_those_of_single_calls():
    vs, gs, dims, kinds = draw()
    vs[4] = vs[4].detach().to(memory_format=torch.channels_last).requires_grad_()
    vs[0] = torch.randn(16, 32)[:, ::2].requires_grad_()  # not dense
    ws, expected = wF.foreach_weight_norm(vs, gs, dims, kinds), one_by_one(vs, gs, dims, kinds)
    assert isinstance(ws, tuple)
    assert_same(ws, expected)
    grads = [torch.randn_like(w) for w in ws]
    grads[4] = grads[4].contiguous()
    assert_same(torch.autograd.grad(ws, vs + gs, grads), torch.autograd.grad(expected, vs + gs, grads))
    with torch.no_grad():
        assert_same(wF.foreach_weight_norm(vs, gs, dims, kinds), expected)
    detached = wF.foreach_weight_norm([v.detach() for v in vs], [g.detach() for g in gs], dims, kinds)
    assert_same(detached, expected)
    assert not any(w.requires_grad for w in detached)


def test_one_dim_and_kind_for_all():
    vs, gs, _, _ = draw([((6, 5), -1, "ewn", f32), ((3, 4, 2), -1, "ewn", f32)])
    assert_same(wF.foreach_weight_norm(vs, gs, -1, "ewn"), one_by_one(vs, gs, [-1] * 2, ["ewn"] * 2))
    scalars = [torch.tensor(2.0), torch.tensor(3.0)]
    assert_same(wF.foreach_weight_norm(vs, scalars, None), one_by_one(vs, scalars, [None] * 2, ["swn"] * 2))
    rows = [torch.randn(6), torch.randn(3)]
    assert_same(wF.foreach_weight_norm(vs, rows), one_by_one(vs, rows, [0] * 2, ["swn"] * 2))
    assert wF.foreach_weight_norm([], []) == ()


def test_out_dtype():
    vs, gs, dims, kinds = draw([w for w in WEIGHTS if w[3] == f32])
    ws, expected = wF.foreach_weight_norm(vs, gs, dims, kinds, bf16), one_by_one(vs, gs, dims, kinds, bf16)
    assert_same(ws, expected)
    grads = [torch.randn_like(w) for w in ws]
    assert_same(torch.autograd.grad(ws, vs + gs, grads), torch.autograd.grad(expected, vs + gs, grads))


def test_unused_and_frozen_weights():
    vs, gs, dims, kinds = draw()
    for t in (vs[1], gs[1], vs[2], gs[3]):  # all of 1, the direction of 2, the radius of 3
        t.requires_grad_(False)
    results = []
    for f in (wF.foreach_weight_norm, one_by_one):
        ws = f(vs, gs, dims, kinds)
        assert [w.requires_grad for w in ws[:4]] == [True, False, True, True]
        for t in vs + gs:
            t.grad = None
        sum(w.float().sin().sum() for w in ws[1:]).backward()  # 0 is not used
        results.append([t.grad for t in vs + gs])
    assert_same(*results)
    assert results[0][0] is None and results[0][len(vs)] is None


def test_derivatives_of_every_order_and_mode():
    weights = [((3, 4), 0, "swn", f64), ((2, 3, 2), 1, "ewn", f64), ((3, 3), None, "ewn", f64)]
    vs, gs, dims, kinds = draw(weights)
    f = lambda *t: wF.foreach_weight_norm(t[:3], t[3:], dims, kinds)  # noqa: E731
    assert gradcheck(f, (*vs, *gs), check_forward_ad=True)
    assert gradgradcheck(f, (*vs, *gs), check_fwd_over_rev=True)


def test_transforms():
    vs, gs, dims, kinds = draw([((3, 4), 0, "swn", f64), ((2, 5), 1, "ewn", f64)], requires_grad=False)
    for f in (torch.func.grad, torch.func.jacfwd, torch.func.jacrev):
        loss = lambda v, op: sum(w.sin().sum() for w in op([v, vs[1]], gs, dims, kinds))  # noqa: E731
        torch.testing.assert_close(f(lambda v: loss(v, wF.foreach_weight_norm))(vs[0]),  # noqa: B023
                                   f(lambda v: loss(v, one_by_one))(vs[0]))  # noqa: B023
    many = torch.randn(6, 3, 4, dtype=f64)
    torch.testing.assert_close(
        torch.vmap(lambda v: wF.foreach_weight_norm([v, vs[1]], gs, dims, kinds)[0])(many),
        torch.stack([wF.weight_norm(v, gs[0]) for v in many]))


def test_a_parameter_that_was_written_before_the_backward_is_noticed():
    vs, gs, dims, kinds = draw(WEIGHTS[:3])
    ws = wF.foreach_weight_norm(vs, gs, dims, kinds)
    with torch.no_grad():
        vs[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(w.sum() for w in ws).backward()


def test_opcheck_and_compile():
    vs, gs, dims, kinds = draw([w for w in WEIGHTS if w[3] in (f32, f64) and w[1] is not None])
    codes = [["swn", "ewn"].index(k) for k in kinds]
    front = [d % v.ndim for d, v in zip(dims, vs)]
    torch.library.opcheck(torch.ops.wnkernels.foreach_weight_norm.default, (vs, gs, front, codes, None))
    grads = [torch.randn_like(v) for v in vs]
    detached = [v.detach() for v in vs], [g.detach() for g in gs]
    torch.library.opcheck(torch.ops.wnkernels.foreach_weight_norm_backward.default, (grads, *detached, front, codes))
    f = torch.compile(lambda: wF.foreach_weight_norm(vs, gs, dims, kinds), fullgraph=True, backend="aot_eager")
    assert_same(f(), one_by_one(vs, gs, dims, kinds))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_for_any_number_of_threads(threads):
    vs, gs, dims, kinds = draw()
    before = torch.get_num_threads()
    results = []
    try:
        for n in (before, threads):
            torch.set_num_threads(n)
            ws = wF.foreach_weight_norm(vs, gs, dims, kinds)
            results.append([*ws, *torch.autograd.grad(ws, vs + gs, [torch.ones_like(w) for w in ws])])
    finally:
        torch.set_num_threads(before)
    assert_same(*results)


def test_devices_without_kernels():
    meta = [torch.randn(4, 5, device="meta")], [torch.randn(4, 1, device="meta")]
    [w] = wF.foreach_weight_norm(*meta, out_dtype=bf16)
    assert w.is_meta and w.shape == (4, 5) and w.dtype == bf16


v, g = torch.randn(4, 5), torch.randn(4, 1)
ERRORS = [
    (ValueError, "gs must have one entry for each of the 2 vs, got 1", lambda: wF.foreach_weight_norm([v, v], [g])),
    (ValueError, "dims must have one entry for each of the 3 vs, or one for all, got 2",
     lambda: wF.foreach_weight_norm([v] * 3, [g] * 3, [0, 0])),
    (ValueError, "kinds must have one entry", lambda: wF.foreach_weight_norm([v] * 3, [g] * 3, 0, ["swn"] * 2)),
    (ValueError, "kinds must be 'swn'.*got 'wn'", lambda: wF.foreach_weight_norm([v], [g], 0, "wn")),
    (ValueError, r"dims must be None or in \[-2, 1\].*got -3", lambda: wF.foreach_weight_norm([v], [g], -3)),
    (ValueError, r"dim must be None or in \[-2, 1\].*got 2", lambda: wF.foreach_weight_norm([v], [g], 2)),
    (ValueError, "g must have shape", lambda: wF.foreach_weight_norm([v, v], [g, g[:2]])),
    (TypeError, "v must be float32", lambda: wF.foreach_weight_norm([v.int()], [g])),
    (TypeError, "out_dtype must have v's dtype", lambda: wF.foreach_weight_norm([v], [g], out_dtype=f64)),
    (TypeError, r"v must be List\[Tensor\], got list", lambda: wF.foreach_weight_norm([3], [g])),
    (RuntimeError, "g must be on v's device", lambda: wF.foreach_weight_norm([v], [g.to("meta")])),
]


@pytest.mark.parametrize("error, message, call", ERRORS)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()


# ---------------------------------------------------------------------------------------------------------------- models


class Net(nn.Module):
    """Layers of both forms, kinds and several dims; one layer is used twice, one is too large to be shared."""

    def __init__(self, dtype=f64):
        super().__init__()
        self.conv = wnkernels.nn.Conv1d(3, 6, 3, padding=1, kind="ewn", dtype=dtype)
        self.first = wnkernels.nn.Linear(24, 16, kind="swn", dtype=dtype)
        self.twice = wnkernels.nn.Linear(16, 16, dim=1, kind="ewn", dtype=dtype)
        self.whole = wnkernels.nn.Linear(16, 12, dim=None, dtype=dtype)
        self.parametrized = wnkernels.weight_norm(nn.Linear(12, 8, dtype=dtype), kind="ewn")
        self.large = wnkernels.nn.Linear(8, foreach.SMALL // 8 + 1, dtype=dtype)
        self.unused = wnkernels.nn.Linear(4, 4, dtype=dtype)

    def forward(self, x):
        x = self.conv(x).tanh().flatten(1)
        x = self.twice(self.twice(self.first(x).tanh()).tanh())
        return self.large(self.parametrized(self.whole(x).tanh()))


def nets(dtype=f64):
    """A model with shared weights, its handle, and the same model without."""
    torch.manual_seed(torch.randint(2**31, ()).item())
    alone = Net(dtype)
    shared = copy.deepcopy(alone)
    return shared, wnkernels.foreach_weight_norm(shared), alone


def inputs(dtype=f64, n=5):
    return torch.randn(n, 3, 4, dtype=dtype)


class Counter:
    """How often the weights of a model are computed."""

    def __init__(self, handle, monkeypatch):
        self.count = 0
        compute = foreach.ForeachWeightNorm.compute

        def counted(this):
            self.count += this is handle
            return compute(this)

        monkeypatch.setattr(foreach.ForeachWeightNorm, "compute", counted)


def assert_same_gradients(shared, alone):
    for (name, p), q in zip(shared.named_parameters(), alone.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12, msg=name)


def test_forward_and_gradients(monkeypatch):
    shared, handle, alone = nets()
    counter = Counter(handle, monkeypatch)
    assert len(handle.places) == 6 and shared.large not in handle.places
    for count in (1, 2):  # the second adds to the gradients of the first
        x = inputs()
        y, expected = shared(x), alone(x)
        assert torch.equal(y, expected)
        y.sin().sum().backward()
        expected.sin().sum().backward()
        assert_same_gradients(shared, alone)
        assert counter.count == count
    assert shared.unused.weight_v.grad is None


def test_bits_of_a_chain_of_layers():
    alone = nn.Sequential(*(wnkernels.nn.Linear(9, 9, kind=k) for k in ("swn", "ewn") * 3))
    shared = copy.deepcopy(alone)
    wnkernels.foreach_weight_norm(shared)
    x = torch.randn(4, 9)
    y, expected = shared(x), alone(x)
    assert torch.equal(y, expected)
    y.sin().sum().backward()
    expected.sin().sum().backward()
    assert_same([p.grad for p in shared.parameters()], [p.grad for p in alone.parameters()])


def test_forwards_before_a_backward(monkeypatch):
    shared, handle, alone = nets()
    counter = Counter(handle, monkeypatch)
    x1, x2 = inputs(), inputs()
    losses = [[m(x).sin().sum() for x in (x1, x2)] for m in (shared, alone)]
    assert counter.count == 2
    for a, b in losses:
        b.backward()
        a.backward()
    assert_same_gradients(shared, alone)


def test_edits_are_picked_up(monkeypatch):
    shared, handle, alone = nets()
    counter = Counter(handle, monkeypatch)
    x = inputs()

    def edit(f):
        for model in (shared, alone):
            torch.manual_seed(3)
            with torch.no_grad():
                f(model)

    def replace(m):
        m.twice.weight_v = nn.Parameter(torch.randn_like(m.twice.weight_v))

    edits = [
        lambda m: m.first.weight_v.mul_(torch.rand(16, 1, dtype=f64)), lambda m: m.conv.weight_alpha.add_(0.5),
        lambda m: m.first.weight.fill_(0.2), replace, lambda m: m.load_state_dict(Net().state_dict()),
        lambda m: setattr(m.whole.weight_v, "data", torch.randn(12, 16, dtype=f64)),
        lambda m: m.parametrized.parametrizations.weight.original1.normal_(),
        lambda m: setattr(m.parametrized, "weight", torch.randn(8, 12, dtype=f64)),
    ]
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            for f in edits:
                shared(x)
                edit(f)
                assert torch.equal(shared(x), alone(x))
    assert counter.count == 1 + len(edits) + 2 * len(edits)  # without gradients only after an edit


def test_without_gradients_weights_are_kept(monkeypatch):
    shared, handle, alone = nets()
    counter = Counter(handle, monkeypatch)
    x = inputs()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for _ in range(3):
                assert torch.equal(shared(x), alone(x))
    assert counter.count == 1
    shared(x)  # recording gradients forgets them
    assert counter.count == 2 and not handle.kept
    with torch.no_grad():
        assert torch.equal(shared(x), alone(x))
    assert counter.count == 3


def test_an_optimizer_that_hides_its_writing():
    shared, _, alone = nets(f32)
    for model in (shared, alone):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        for _ in range(2):
            with torch.no_grad():
                model(inputs(f32))
            optimizer.zero_grad()
            model(inputs(f32)).sin().sum().backward()
            optimizer.step()
    with torch.no_grad():
        x = inputs(f32)
        torch.testing.assert_close(shared(x), alone(x))


def test_frozen_models_record_nothing():
    shared, _, alone = nets()
    for model in (shared, alone):
        model.requires_grad_(False)
        model.first.requires_grad_(True)
    x = inputs()
    y, expected = shared(x), alone(x)
    assert torch.equal(y, expected) and y.requires_grad
    y.sum().backward()
    expected.sum().backward()
    assert_same_gradients(shared, alone)
    shared.requires_grad_(False)
    assert not shared(x).requires_grad


class Modes(nn.Module):
    """A model that changes grad mode and autocast, and writes a weight, inside of its forward."""

    def __init__(self):
        super().__init__()
        self.frozen, self.low, self.high = (wnkernels.nn.Linear(8, 8, kind="ewn") for _ in range(3))
        self.parametrized = wnkernels.weight_norm(nn.Linear(8, 8))
        self.edited = wnkernels.nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            x = self.frozen(x)
        with torch.autocast("cpu", bf16):
            x = self.parametrized(self.low(x))
        x = self.edited(self.high(x.float()))
        with torch.no_grad():
            self.edited.weight_v.add_(0.25)
        return x + self.edited(x.detach()).detach()


def test_modes_inside_of_the_forward():
    alone = Modes()
    shared = copy.deepcopy(alone)
    wnkernels.foreach_weight_norm(shared)
    x = torch.randn(4, 8)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(shared(x), alone(x))
    for context in (torch.enable_grad(), torch.autocast("cpu", f16)):
        with context:
            assert torch.equal(shared(x), alone(x))


def test_autocast():
    shared, _, alone = nets(f32)
    x = inputs(f32)
    for dtype in (bf16, f16):
        with torch.autocast("cpu", dtype):
            y, expected = shared(x), alone(x)
            assert y.dtype == dtype and torch.equal(y, expected)
        y.float().sum().backward()
        expected.float().sum().backward()
    for p, q in zip(shared.parameters(), alone.parameters()):
        if q.grad is not None:  # the layer that is used twice adds its gradients in 16 bits
            torch.testing.assert_close(p.grad, q.grad, rtol=0.05, atol=0.05 * q.grad.abs().max().item())
    assert torch.equal(shared(x), alone(x))


def test_weights_live_no_longer_than_the_graph(monkeypatch):
    shared, handle, _ = nets()
    storages = []
    weight_of = foreach._Forward.weight_of

    def watched(this, layer, *given):
        w = weight_of(this, layer, *given)
        if w is not None:
            storages.append(StorageWeakRef(w.untyped_storage()))
        return w

    monkeypatch.setattr(foreach._Forward, "weight_of", watched)
    gc.disable()  # nothing may wait for the collector
    try:
        y = shared(inputs())
        assert wnkernels.nn.running.forward is None and not handle.kept
        assert len(storages) == 6 and any(not s.expired() for s in storages)
        del y
        assert all(s.expired() for s in storages)
        shared(inputs()).sum().backward()
        assert len(storages) == 12 and all(s.expired() for s in storages)
    finally:
        gc.enable()


def test_errors_in_the_forward_leave_nothing_behind():
    shared, _, alone = nets()
    with pytest.raises(RuntimeError):
        shared(torch.randn(2, 5, 4, dtype=f64))
    assert wnkernels.nn.running.forward is None
    x = inputs()
    assert torch.equal(shared(x), alone(x))


def test_layers_outside_of_a_forward_of_the_model(monkeypatch):
    shared, handle, alone = nets()
    counter = Counter(handle, monkeypatch)
    x = torch.randn(2, 24, dtype=f64)
    assert torch.equal(shared.first(x), alone.first(x))
    assert torch.equal(shared.parametrized.weight, alone.parametrized.weight)
    assert counter.count == 0


def test_threads_have_their_own_forward():
    shared, _, alone = nets()
    x = [inputs() for _ in range(8)]
    results = [None] * len(x)
    def work(i):
        y = shared(x[i])
        grads = torch.autograd.grad(y.sin().sum(), shared.first.weight_v)
        results[i] = y.detach(), *grads
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(x))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (y, gradient) in enumerate(results):
        expected = alone(x[i])
        assert torch.equal(y, expected.detach())
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.sin().sum(), alone.first.weight_v)[0],
                                   rtol=1e-12, atol=1e-12)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.a, self.b, self.c = (wnkernels.nn.Linear(8, 8, dtype=f64) for _ in range(3))

    def forward(self, x):
        x = self.a(x).tanh()
        x = checkpoint(lambda x: self.b(x).tanh(), x, use_reentrant=self.reentrant)
        return self.c(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    alone = Checkpointed(reentrant)
    shared = copy.deepcopy(alone)
    wnkernels.foreach_weight_norm(shared)
    x = torch.randn(4, 8, dtype=f64)
    for model in (shared, alone):
        model(x).sin().sum().backward()
    assert_same_gradients(shared, alone)


def test_functional_call_and_transforms():
    shared, _, alone = nets()
    x = inputs()
    other = {name: p.detach() + 0.1 for name, p in alone.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(shared, other, x), torch.func.functional_call(alone, other, x))
    gradients = [torch.func.grad(lambda p: torch.func.functional_call(m, p, x).sin().sum())(other)  # noqa: B023
                 for m in (shared, alone)]
    for name in other:
        torch.testing.assert_close(gradients[0][name], gradients[1][name])
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(p, torch.ones_like(p)) for name, p in other.items()}
        tangents = [forward_ad.unpack_dual(torch.func.functional_call(m, dual, x)).tangent for m in (shared, alone)]
    torch.testing.assert_close(*tangents)
    assert torch.equal(shared(x), alone(x))


def test_compile_and_trace(monkeypatch):
    shared, handle, alone = nets(f32)
    counter = Counter(handle, monkeypatch)
    x = inputs(f32)
    with torch.no_grad():
        shared(x)
        compiled = torch.compile(shared, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), alone(x))
        traced = torch.jit.trace(shared, (x,))
        for model in (shared, alone):
            model.first.weight_v.add_(1)
        torch.testing.assert_close(traced(x), alone(x))
        torch.testing.assert_close(compiled(x), alone(x))
    compiled(x).sin().sum().backward()
    alone(x).sin().sum().backward()
    for p, q in zip(shared.parameters(), alone.parameters()):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)
    assert counter.count == 1


def test_fake_tensors_are_not_kept():
    shared, handle, alone = nets(f32)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        shared(mode.from_tensor(inputs(f32)))
    assert not handle.kept
    with torch.no_grad():
        x = inputs(f32)
        assert torch.equal(shared(x), alone(x))


def test_remove_and_state_dict():
    alone = Net()
    shared = copy.deepcopy(alone)
    before = set(vars(shared))
    handle = wnkernels.foreach_weight_norm(shared)
    assert wnkernels.foreach_weight_norm(shared) is handle
    assert list(shared.state_dict()) == list(alone.state_dict())
    x = inputs()
    with torch.no_grad():
        shared(x)
    handle.remove()
    assert not shared._forward_hooks and not shared._forward_pre_hooks and not shared._forward_hooks_always_called
    assert set(vars(shared)) == before and not handle.kept
    assert torch.equal(shared(x), alone(x))
    assert wnkernels.foreach_weight_norm(shared) is not handle


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how, monkeypatch):
    shared, handle, alone = nets()
    x = inputs()
    with torch.no_grad():
        shared(x)
    if how == "deepcopy":
        other = copy.deepcopy(shared)
    else:
        buffer = io.BytesIO()
        torch.save(shared, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    theirs = wnkernels.foreach_weight_norm(other)
    assert theirs is not handle and not theirs.kept
    assert set(theirs.places) <= set(other.modules())
    counter, ours = Counter(theirs, monkeypatch), Counter(handle, monkeypatch)
    with torch.no_grad():
        other.first.weight_v.add_(1)
        assert not torch.equal(other(x), alone(x))
        alone.first.weight_v.add_(1)
    assert torch.equal(other(x), alone(x))
    assert (counter.count, ours.count) == (2, 0)
    theirs.remove()
    assert not other._forward_pre_hooks and shared._forward_pre_hooks
    assert torch.equal(other(x), alone(x))


def test_fold_to_and_new_layers():
    shared, handle, alone = nets()
    x = inputs()
    for model in (shared, alone):
        wnkernels.fold(model.first)
        model.twice = wnkernels.nn.Linear(16, 16, bias=False, dtype=f64)
        model.twice.weight = torch.eye(16, dtype=f64)
    assert torch.equal(shared(x), alone(x))
    for model in (shared, alone):
        model.float()
    assert torch.equal(shared(x.float()), alone(x.float()))
    handle.remove()


def test_nested_models():
    alone = nn.Sequential(Net(), nn.Tanh(), wnkernels.nn.Linear(foreach.SMALL // 8 + 1, 3, dtype=f64))
    shared = copy.deepcopy(alone)
    wnkernels.foreach_weight_norm(shared[0])
    wnkernels.foreach_weight_norm(shared)
    x = inputs()
    y, expected = shared(x), alone(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    assert_same_gradients(shared, alone)


def test_a_model_without_such_layers():
    for model in (nn.Linear(3, 3), wnkernels.nn.Linear(foreach.SMALL, 2)):
        with pytest.raises(ValueError, match="must have a layer of wnkernels.nn or a tensor under"):
            wnkernels.foreach_weight_norm(model)
