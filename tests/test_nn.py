"""The layers against torch's plain layers and against the specification in float64."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import wnkernels.nn as wn
from wnkernels import reference
from wnkernels.parametrize import weight_norm

KINDS = ["swn", "ewn"]
LAYERS = {
    "Linear": (wn.Linear, nn.Linear, (5, 4), (3, 5)),
    "Conv1d": (wn.Conv1d, nn.Conv1d, (4, 6, 3), (2, 4, 9)),
    "Conv2d": (wn.Conv2d, nn.Conv2d, (4, 6, (3, 2)), (2, 4, 7, 6)),
    "Conv3d": (wn.Conv3d, nn.Conv3d, (2, 3, 2), (2, 2, 4, 5, 4)),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=LAYERS)
def layer(request):
    """(our class, torch's class, constructor arguments, shape of an input)"""
    return LAYERS[request.param]


def radius_name(kind):
    return {"swn": "weight_g", "ewn": "weight_alpha"}[kind]


def perturb(module):
    """Away from the initial v = w, where mistakes could cancel."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return module


def spec_weight(m, dtype=torch.float64):
    v, r = m.weight_v.to(dtype), getattr(m, radius_name(m.kind)).to(dtype)
    return reference.weight_norm(v, r, m.dim, m.kind)


# ----------------------------------------------------------------------------------------------------- construction


def test_it_is_torchs_layer_and_the_same_seed_is_the_same_function(layer, kind):
    ours, plain, args, shape = layer
    torch.manual_seed(11)
    p = plain(*args)
    after_plain = torch.rand(3)
    torch.manual_seed(11)
    m = ours(*args, kind=kind)
    assert torch.equal(torch.rand(3), after_plain)  # no number more or less was drawn
    assert isinstance(m, plain)
    assert torch.equal(m.weight_v, p.weight) and torch.equal(m.bias, p.bias)
    torch.testing.assert_close(m.weight, p.weight.detach(), rtol=3e-7, atol=0)
    x = torch.randn(shape)
    torch.testing.assert_close(m(x), p(x))

    torch.manual_seed(12)
    p.reset_parameters()
    torch.manual_seed(12)
    perturb(m)
    torch.manual_seed(12)
    m.reset_parameters()
    assert torch.equal(m.weight_v, p.weight) and torch.equal(m.bias, p.bias)
    torch.testing.assert_close(m.weight, p.weight.detach(), rtol=3e-7, atol=0)


def test_parameters_and_repr(layer, kind):
    ours, plain, args, _ = layer
    m, p = ours(*args, kind=kind), plain(*args)
    assert [name for name, _ in m.named_parameters()] == [radius_name(kind), "weight_v", "bias"]
    assert m.radius is getattr(m, radius_name(kind))
    assert m.radius.shape == torch.norm_except_dim(p.weight, 2, 0).shape
    assert repr(m) == repr(p)[:-1] + f", kind='{kind}', dim=0)"
    assert "bias" not in dict(ours(*args, bias=False, kind=kind).named_parameters())


def test_constructor_arguments_are_torchs():
    m = wn.Conv2d(4, 8, 3, 2, 1, 1, 2, False, "reflect", None, torch.float64, kind="ewn")
    p = nn.Conv2d(4, 8, 3, 2, 1, 1, 2, False, "reflect", None, torch.float64)
    m.weight = p.weight
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(m(x), p(x))
    assert wn.Linear(3, 2, False, None, torch.bfloat16).weight_g.dtype == torch.bfloat16


@pytest.mark.parametrize("dim", [0, 1, -1, -2, None])
@pytest.mark.parametrize("name", LAYERS)
def test_dims_and_gradients_against_the_specification(name, dim, kind):
    ours, _, args, shape = LAYERS[name]
    m = perturb(ours(*args, kind=kind, dim=dim, dtype=torch.float64))
    assert m.dim == (None if dim is None else dim % m.weight_v.ndim)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = m(x)
    expected = F.linear(x, spec_weight(m), m.bias) if name == "Linear" else m._conv_forward(x, spec_weight(m), m.bias)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    inputs = (x, *m.parameters())
    G = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, inputs, G), torch.autograd.grad(expected, inputs, G)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_wrong_kind_and_dim(layer):
    ours, _, args, _ = layer
    with pytest.raises(ValueError, match="kind must be 'swn' or 'ewn', got 'wn'"):
        ours(*args, kind="wn")
    with pytest.raises(ValueError, match=r"dim must be None or in \[.*\] for a weight of shape .*got 7"):
        ours(*args, dim=7)
    with pytest.raises(TypeError, match="dim must be an int or None, got '0'"):
        ours(*args, dim="0")
    with pytest.raises(TypeError, match="positional"):
        wn.Linear(3, 2, True, None, None, "ewn")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_elements(kind):
    for size in ((0, 3), (3, 0)):
        m, p = wn.Linear(*size, kind=kind), nn.Linear(*size)
        p.bias = m.bias
        x = torch.randn(2, size[0])
        assert torch.equal(m(x), p(x))


# ---------------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_linear_takes_any_leading_shape(leading, bias, kind):
    m = perturb(wn.Linear(6, 4, bias, kind=kind))
    x = torch.randn(*leading, 6, requires_grad=True)
    y = m(x)
    expected = F.linear(x.double(), spec_weight(m), None if m.bias is None else m.bias.double())
    assert y.shape == expected.shape
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    inputs = (x, *m.parameters())
    for a, b in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_layers(layer, kind, dtype):
    ours, _, args, shape = layer
    m = perturb(ours(*args, kind=kind)).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    y = m(x)
    assert y.dtype == dtype and m.weight.dtype == dtype
    exact = copy.deepcopy(m).double()(x.double())
    # Rounding w and y once each, over sums of at most 24 terms.
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps * exact.abs().max().item())


@pytest.mark.parametrize("dim", [0, 1, None])
def test_autocast(layer, kind, dim):
    ours, _, args, shape = layer
    m = perturb(ours(*args, kind=kind, dim=dim))
    x = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        y = m(x)
    assert y.dtype == torch.bfloat16
    exact = copy.deepcopy(m).double()(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=4 * 2**-8 * exact.abs().max().item())
    y.float().square().sum().backward()
    for p in m.parameters():
        assert p.grad.dtype == torch.float32
    reference_m = copy.deepcopy(m).double()
    reference_m.zero_grad()
    reference_m(x.double()).square().sum().backward()
    for p, q in zip(m.parameters(), reference_m.parameters()):
        assert (p.grad - q.grad).norm() <= 0.05 * q.grad.norm() + 1e-6

    with torch.autocast("cpu", torch.bfloat16):  # float64 stays out of autocast, as in torch
        assert m.double()(x.double()).dtype == torch.float64
        assert m.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_frozen_parameters_get_no_gradient(layer, kind):
    ours, _, args, shape = layer
    m = perturb(ours(*args, kind=kind))
    x = torch.randn(shape)
    m(x).square().sum().backward()
    full = {name: p.grad.clone() for name, p in m.named_parameters()}
    for frozen in full:
        m.zero_grad()
        m.requires_grad_(True).get_parameter(frozen).requires_grad_(False)
        m(x).square().sum().backward()
        for name, p in m.named_parameters():
            assert p.grad is None if name == frozen else torch.equal(p.grad, full[name])
    m.requires_grad_(False)
    assert not m(x).requires_grad


def test_channels_last(kind):
    m = perturb(wn.Conv2d(4, 6, 3, kind=kind))
    x = torch.randn(2, 4, 8, 8)
    y = m(x)
    m.to(memory_format=torch.channels_last)
    assert m.weight_v.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(m(x.to(memory_format=torch.channels_last)), y, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- the effective weight


def test_assignment_sets_the_parameters(layer, kind):
    ours, plain, args, shape = layer
    m = perturb(ours(*args, kind=kind))
    before = {name: id(p) for name, p in m.named_parameters()}
    w = torch.randn_like(m.weight_v)
    for value in (w, nn.Parameter(2 * w)):
        m.weight = value
        assert torch.equal(m.weight_v, value)
        torch.testing.assert_close(m.weight, value.detach(), rtol=5e-7, atol=0)
    assert {name: id(p) for name, p in m.named_parameters()} == before  # optimizers still hold them

    m.weight = nn.Parameter(w.double())
    assert m.weight_v.dtype == torch.float64 and m.radius.dtype == torch.float64
    assert list(dict(m.named_parameters())) == [radius_name(kind), "weight_v", "bias"]


def test_assignment_of_nonsense(layer, kind):
    ours, _, args, _ = layer
    m = ours(*args, kind=kind)
    with pytest.raises(ValueError, match="weight must have shape"):
        m.weight = torch.randn(2, 2)
    with pytest.raises(TypeError, match="weight must be a tensor, got NoneType"):
        m.weight = None
    with pytest.raises(TypeError, match="without a graph"):
        m.weight = m.weight_v * 2


def test_a_zero_row_keeps_its_direction_or_is_refused(layer):
    ours, _, args, _ = layer
    m = ours(*args)
    direction = m.weight_v.detach().clone()
    w = torch.randn_like(direction)
    w[1] = 0
    m.weight = w
    assert torch.equal(m.weight, w) or (m.weight - w).abs().max() < 1e-6
    assert (m.radius[1] == 0).all() and torch.equal(m.weight_v[1], direction[1])
    m.weight.sum().backward()
    assert m.radius.grad[1].abs().sum() > 0  # it can still learn

    m = ours(*args, kind="ewn")
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError, match="row 1 of the weight is zero: its alpha would be log 0"):
        m.weight = w
    assert all(torch.equal(before[k], x) for k, x in m.state_dict().items())


INITS = [
    nn.init.normal_, nn.init.uniform_, nn.init.ones_, nn.init.kaiming_uniform_, nn.init.kaiming_normal_,
    nn.init.xavier_uniform_, nn.init.xavier_normal_, nn.init.orthogonal_, nn.init.trunc_normal_,
]  # fmt: skip


@pytest.mark.parametrize("init", INITS, ids=lambda f: f.__name__)
def test_init_functions_work(init, layer, kind):
    ours, plain, args, _ = layer
    m, p = ours(*args, kind=kind), plain(*args)
    for module in (m, p):
        torch.manual_seed(3)
        init(module.weight)
    torch.testing.assert_close(m.weight, p.weight.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(m.weight_v, p.weight, rtol=1e-5, atol=1e-6)


def edit_add(w):
    w += 1


def edit_index(w):
    w[1:, 0] = 5.0


def edit_data_assign(w):
    w.data = w.data * 2


EDITS = [
    lambda w: w.mul_(2),
    lambda w: w[0].fill_(3),
    lambda w: w.view(-1)[:2].add_(1),
    lambda w: w.data.mul_(0.5).add_(1),
    lambda w: w.data[1].neg_(),
    lambda w: w.detach().copy_(torch.arange(w.numel()).view_as(w) + 1.0),
    lambda w: w.unbind(0)[1].add_(2),
    lambda w: torch.add(w, 1, out=w),
    lambda w: torch._foreach_mul_([w], 3),
    lambda w: w.data.masked_fill_(w < 0, 0.5),
    lambda w: w.transpose(0, 1).div_(2),
    edit_add,
    edit_index,
    edit_data_assign,
]


@pytest.mark.parametrize("number", range(len(EDITS)))
def test_in_place_edits_reach_the_parameters(number, layer, kind):
    ours, plain, args, _ = layer
    m, p = perturb(ours(*args, kind=kind)), plain(*args)
    with torch.no_grad():
        p.weight.copy_(m.weight)
        for module in (m, p):
            EDITS[number](module.weight)
    torch.testing.assert_close(m.weight, p.weight.detach(), rtol=1e-5, atol=1e-6)


def test_an_edit_is_made_on_the_current_weight():
    m = wn.Linear(3, 2)
    w = m.weight.data
    with torch.no_grad():
        m.weight_g.mul_(5)
        now = m.weight.clone()
        w.mul_(2)
    torch.testing.assert_close(m.weight, 2 * now)


def test_edits_that_would_be_lost_raise():
    m = wn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="requires grad, and is edited in place: do so under torch.no_grad"):
        m.weight.mul_(2)
    with pytest.raises(RuntimeError, match="requires_grad_ on the effective weight of a Linear would be lost"):
        m.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="would be lost"):
        m.weight.requires_grad = False
    with pytest.raises(RuntimeError, match="would be lost"):
        m.weight.grad = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="would be lost"):
        nn.Parameter(m.weight)


def test_the_effective_weight_is_otherwise_a_tensor():
    m = perturb(wn.Linear(3, 2))
    w = m.weight
    assert type(w + 1) is torch.Tensor and type(w.clone()) is torch.Tensor
    x = torch.randn(4, 3)
    F.linear(x, w).sum().backward()
    assert m.weight_v.grad is not None and m.weight_g.grad is not None
    assert torch.equal(pickle.loads(pickle.dumps(w)), w)
    assert torch.equal(nn.Parameter(w.detach().clone()), w)
    other = torch.zeros(2, 3)
    other.add_(w.detach())
    assert torch.equal(other, w) and torch.equal(m.weight, w)
    assert repr(w)


def test_a_missing_parameter_is_named():
    m = wn.Linear(3, 2)
    del m.weight_v
    with pytest.raises(RuntimeError, match="cannot be computed.*weight_v"):
        m.weight


# ------------------------------------------------------------------------------------------------------- state, copies


def saved(obj):
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize(
    "duplicate",
    [
        lambda m: pickle.loads(pickle.dumps(m)),
        copy.deepcopy,
        lambda m: torch.load(saved(m), weights_only=False),
    ],
    ids=["pickle", "deepcopy", "torch.save"],
)
def test_copies_are_independent(duplicate, layer, kind):
    ours, _, args, shape = layer
    m = perturb(ours(*args, kind=kind, dim=None))
    x = torch.randn(shape)
    y = m(x)
    other = duplicate(m)
    assert type(other) is ours and (other.kind, other.dim) == (kind, None)
    assert torch.equal(other(x), y)
    perturb(other)
    assert torch.equal(m(x), y) and not torch.equal(other(x), y)


def state_dicts(ours, plain, args, dim):
    """Every form of state dict, with the weight and bias that it stands for."""
    forms = {}
    p = plain(*args)
    forms["plain"] = p.state_dict(), p
    for kind in KINDS:
        m = perturb(ours(*args, kind=kind, dim=dim))
        forms[kind] = m.state_dict(), m
        m = perturb(weight_norm(plain(*args), dim=dim, kind=kind))
        forms["parametrized " + kind] = m.state_dict(), m
    m = perturb(parametrizations.weight_norm(plain(*args), dim=dim))
    forms["torch"] = m.state_dict(), m
    flat = {k: v.flatten() if k == "weight_g" else v for k, v in forms["swn"][0].items()}
    forms["flat g"] = flat, forms["swn"][1]
    return {name: (copy.deepcopy(state), m.weight.detach(), m.bias.detach()) for name, (state, m) in forms.items()}


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("assign", [False, True])
def test_every_state_dict_loads(layer, kind, dim, assign):
    ours, plain, args, shape = layer
    for form, (state, weight, bias) in state_dicts(ours, plain, args, dim).items():
        m = nn.Sequential(ours(*args, kind=kind, dim=dim))
        state = {"0." + key: value for key, value in state.items()}
        keys = set(state)
        result = m.load_state_dict(state, assign=assign)
        assert not result.missing_keys and not result.unexpected_keys
        assert set(state) == keys, "the caller's dictionary was changed"
        torch.testing.assert_close(m[0].weight, weight, rtol=2e-6, atol=1e-7, msg=lambda text: f"{form}: {text}")
        assert torch.equal(m[0].bias, bias)
        assert m[0].radius.shape == ours(*args, kind=kind, dim=dim).radius.shape
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in m[0]._parameters.values())


def test_own_state_dict_round_trips_bitwise(layer, kind):
    ours, _, args, _ = layer
    m, other = perturb(ours(*args, kind=kind)), ours(*args, kind=kind)
    other.load_state_dict(torch.load(saved(m.state_dict())))
    for a, b in zip(m.parameters(), other.parameters()):
        assert torch.equal(a, b)


def test_strict_loading_names_the_keys(layer, kind):
    ours, _, args, _ = layer
    m = ours(*args, kind=kind)
    v = {"weight_v": m.weight_v.detach()}
    bias = {"bias": m.bias.detach()}
    result = m.load_state_dict({**v, **bias, "nonsense": v["weight_v"]}, strict=False)
    assert result.missing_keys == [radius_name(kind)] and result.unexpected_keys == ["nonsense"]
    assert m.load_state_dict({}, strict=False).missing_keys == [radius_name(kind), "weight_v", "bias"]
    assert m.load_state_dict({"weight": v["weight_v"]}, strict=False).missing_keys == ["bias"]
    both = {**m.state_dict(), "weight": v["weight_v"]}
    assert m.load_state_dict(both, strict=False).unexpected_keys == ["weight"]
    with pytest.raises(RuntimeError, match="Missing key.*weight_v"):
        m.load_state_dict(bias)
    with pytest.raises(RuntimeError, match="size mismatch for weight_v"):
        m.load_state_dict({**m.state_dict(), "weight_v": torch.ones(2, 2)})
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: the state dict has shape \(2, 2\)"):
        m.load_state_dict({**bias, "weight": torch.ones(2, 2)})


def test_loading_rows_without_a_logarithm():
    source = perturb(wn.Linear(5, 4))
    with torch.no_grad():
        source.weight_g[2].neg_()
    m = wn.Linear(5, 4, kind="ewn")
    m.load_state_dict(source.state_dict())  # a negative g turns v around
    torch.testing.assert_close(m.weight, source.weight)
    with torch.no_grad():
        source.weight_g[2] = 0
    with pytest.raises(RuntimeError, match="row 2 of 0.weight_g is zero"):
        nn.Sequential(m).load_state_dict(nn.Sequential(source).state_dict())


def test_a_sixteen_bit_weight_keeps_its_length_in_float32():
    w = torch.randn(8, 100).bfloat16()
    m = wn.Linear(100, 8, bias=False)
    m.load_state_dict({"weight": w})
    torch.testing.assert_close(m.weight, w.float(), rtol=5e-7, atol=0)


# ------------------------------------------------------------------------------------------------------- torch's tools


def test_skip_init_meta_and_to_empty(layer, kind):
    ours, _, args, shape = layer
    m = torch.nn.utils.skip_init(ours, *args, kind=kind)
    assert not m.weight_v.is_meta
    m.reset_parameters()
    assert m(torch.randn(shape)).isfinite().all()

    m = ours(*args, kind=kind, device="meta")
    assert m.weight_v.is_meta and m.radius.is_meta and m(torch.randn(shape, device="meta")).is_meta
    source = perturb(ours(*args, kind=kind))
    for state in (source.state_dict(), {"weight": source.weight.detach().clone(), "bias": source.bias.detach()}):
        empty = copy.deepcopy(m).to_empty(device="cpu")
        empty.reset_parameters()
        empty.load_state_dict(state)
        torch.testing.assert_close(empty.weight, source.weight)
        assigned = copy.deepcopy(m)
        assigned.load_state_dict(state, assign=True)
        torch.testing.assert_close(assigned.weight, source.weight)
    m.weight = nn.Parameter(source.weight.detach().clone())
    torch.testing.assert_close(m.weight, source.weight)


def test_functional_call_and_transforms(layer, kind):
    ours, _, args, shape = layer
    m, other = perturb(ours(*args, kind=kind)), perturb(ours(*args, kind=kind))
    x = torch.randn(shape)
    parameters = {name: p.detach() for name, p in other.named_parameters()}
    before = m(x)
    torch.testing.assert_close(torch.func.functional_call(m, parameters, x), other(x))
    assert torch.equal(m(x), before)

    def loss(p, x):
        return torch.func.functional_call(m, p, x).square().sum()

    grads = torch.func.grad(loss)(parameters, x)
    other(x).square().sum().backward()
    for name, p in other.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-4)

    def through_the_weight(p):
        with torch.nn.utils.stateless._reparametrize_module(m, p):
            return m.weight.square().sum()

    assert torch.func.grad(through_the_weight)(parameters)["weight_v"].isfinite().all()


def test_vmap_over_an_ensemble(kind):
    members = [perturb(wn.Linear(5, 4, kind=kind)) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(members)
    x = torch.randn(6, 5)
    y = torch.vmap(lambda p: torch.func.functional_call(members[0], p, x))(stacked)
    torch.testing.assert_close(y, torch.stack([m(x) for m in members]), rtol=1e-5, atol=1e-5)


def test_compile_without_graph_breaks(layer, kind):
    ours, _, args, shape = layer
    torch._dynamo.reset()  # its limit of recompilations is per code object, and all layers share theirs
    m = perturb(ours(*args, kind=kind))
    compiled = torch.compile(copy.deepcopy(m), fullgraph=True, backend="aot_eager")
    x = torch.randn(shape)
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", torch.bfloat16)):
        m.zero_grad()
        compiled.zero_grad()
        with context:
            y, expected = compiled(x), m(x)
        torch.testing.assert_close(y, expected)
        y.float().square().sum().backward()
        expected.float().square().sum().backward()
        for p, q in zip(compiled.parameters(), m.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def tied(x):
        return (m.weight * x).sum()

    torch.testing.assert_close(tied(torch.ones_like(m.weight_v)), m.weight.sum())


def test_export_and_symbolic_tracing(layer, kind):
    ours, _, args, shape = layer
    m = perturb(ours(*args, kind=kind)).requires_grad_(False)
    x = torch.randn(shape)
    for traced in (torch.export.export(m, (x,)).module(), torch.fx.symbolic_trace(m)):
        torch.testing.assert_close(traced(x), m(x))


def test_in_torchs_transformer_and_data_parallel_replicas(kind):
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 8)
    expected = block.eval()(x)
    block.linear1 = wn.Linear.from_plain(block.linear1, kind)
    block.linear2 = wn.Linear.from_plain(block.linear2, kind)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)

    m = wn.Linear(5, 4, kind=kind)
    replica = m._replicate_for_data_parallel()  # what nn.DataParallel makes: parameters are plain attributes
    for name, p in m.named_parameters():
        setattr(replica, name, p * 1)
    x = torch.randn(3, 5)
    assert torch.equal(replica(x), m(x))


def test_training_equals_the_specification(layer, kind):
    """Ten steps of SGD with momentum in float64, the layer against plain tensors under the specification."""
    ours, _, args, shape = layer
    m = perturb(ours(*args, kind=kind, dtype=torch.float64))
    twin = copy.deepcopy(m)
    x = torch.randn(shape, dtype=torch.float64)
    target = torch.randn_like(m(x))

    def spec(x):
        w = spec_weight(twin)
        return F.linear(x, w, twin.bias) if isinstance(twin, nn.Linear) else twin._conv_forward(x, w, twin.bias)

    optimizers = [torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9) for module in (m, twin)]
    for _ in range(10):
        for forward, optimizer in zip((m, spec), optimizers):
            optimizer.zero_grad()
            ((forward(x) - target) ** 2).mean().backward()
            optimizer.step()
    for p, q in zip(m.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("dim", [0, 1, None])
def test_from_plain(layer, kind, dim):
    ours, plain, args, shape = layer
    p = plain(*args)
    p.bias.requires_grad_(False)
    x = torch.randn(shape)
    y = p(x)
    m = ours.from_plain(p, kind, dim)
    assert type(m) is ours and type(p) is plain
    torch.testing.assert_close(m(x), y)
    assert not m.bias.requires_grad and m.weight_v.requires_grad
    assert list(m.state_dict()) == list(ours(*args, kind=kind, dim=dim).state_dict())
    perturb(m)
    assert torch.equal(p(x), y), "the plain layer shares memory with the new one"


def test_from_plain_refusals(layer):
    ours, plain, args, _ = layer
    with pytest.raises(TypeError, match=f"module must be a torch.nn.{plain.__name__}, got ReLU"):
        ours.from_plain(nn.ReLU())
    with pytest.raises(TypeError, match="module must be"):
        ours.from_plain(ours(*args))
    p = plain(*args)
    with torch.no_grad():
        p.weight[2] = 0
    with pytest.raises(ValueError, match="row 2 of the weight is zero"):
        ours.from_plain(p, "ewn")
    m = ours.from_plain(p)
    assert (m.weight[2] == 0).all() and (m.weight_v[2] != 0).all()
    with pytest.raises(ValueError, match="kind must be"):
        ours.from_plain(p, "EWN")


def test_initial_scale_is_that_of_torch(layer, kind):
    """The same distribution, not only for one seed: mean square of many draws against torch's bound."""
    ours, plain, args, _ = layer
    m = ours(*args, kind=kind)
    fan_in = m.weight_v[0].numel()
    draws = torch.stack([ours(*args, kind=kind).weight.detach() for _ in range(60)])
    expected = 1 / (3 * fan_in)  # of U(-b, b), b = 1/sqrt(fan_in)
    standard_error = expected * math.sqrt(0.8 / draws.numel())
    assert abs(draws.square().mean() - expected) < 5 * standard_error
