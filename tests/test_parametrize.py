"""weight_norm on a module by name, and convert, fold, unfold on whole models."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import parametrize as torch_parametrize

import wnkernels.nn as wn
from wnkernels import reference
from wnkernels.parametrize import Folded, convert, fold, unfold, weight_norm

KINDS = ["swn", "ewn"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def perturb(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return module


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- parametrization

MODULES = [
    (lambda: nn.Linear(5, 4), "weight", (3, 5)),
    (lambda: nn.Conv2d(4, 6, 3), "weight", (2, 4, 6, 6)),
    (lambda: nn.ConvTranspose1d(4, 6, 3), "weight", (2, 4, 6)),
    (lambda: nn.LSTM(4, 5), "weight_hh_l0", (3, 2, 4)),
]


@pytest.mark.parametrize("make, name, shape", MODULES)
@pytest.mark.parametrize("dim", [0, 1, -2, None])
def test_the_function_stays_and_gradients_are_the_specifications(make, name, shape, dim, kind):
    plain = make().double()
    m = weight_norm(copy.deepcopy(plain), name, dim, kind)
    x = torch.randn(shape, dtype=torch.float64)
    before = getattr(plain, name)
    torch.testing.assert_close(getattr(m, name), before.detach(), rtol=1e-14, atol=0)
    perturb(m)
    originals = m.parametrizations[name]
    r, v = originals.original0, originals.original1
    assert r.shape == torch.norm_except_dim(before, 2, -1 if dim is None else dim % before.ndim).shape
    w, spec = getattr(m, name), reference.weight_norm(v, r, dim, kind)
    torch.testing.assert_close(w, spec, rtol=1e-13, atol=1e-14)
    G = torch.randn_like(w)
    for a, b in zip(torch.autograd.grad(w, (r, v), G), torch.autograd.grad(spec, (r, v), G)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert isinstance(m, type(plain)) and m(x) is not None


def test_names_are_torchs(kind):
    m = weight_norm(nn.Linear(5, 4), kind=kind)
    t = parametrizations.weight_norm(nn.Linear(5, 4))
    assert [n for n, _ in m.named_parameters()] == [n for n, _ in t.named_parameters()]
    marker = ["parametrizations.weight.0._extra_state"] if kind == "ewn" else []
    assert list(m.state_dict()) == list(t.state_dict()) + marker


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))

    def forward(self, x):
        return x @ self.a @ self.b


def test_several_tensors_of_one_module():
    m = Pair()
    x = torch.randn(3, 4)
    expected = m(x)
    weight_norm(m, "a")
    weight_norm(m, "b", kind="ewn")
    close(m(x), expected)
    close(pickle.loads(pickle.dumps(m))(x), expected)
    torch_parametrize.remove_parametrizations(m, "a")
    close(copy.deepcopy(m)(x), expected)
    m.load_state_dict(m.state_dict())
    close(m(x), expected)


def test_refusals():
    m = nn.Linear(5, 4)
    with pytest.raises(ValueError, match="dim=-1 is refused: torch's weight_norm takes it for dim=None"):
        weight_norm(m, dim=-1)
    with pytest.raises(ValueError, match="kind must be 'swn' or 'ewn', got 'wn'"):
        weight_norm(m, kind="wn")
    with pytest.raises(ValueError, match=r"dim must be None or in \[-2, 1\]"):
        weight_norm(m, dim=2)
    with pytest.raises(ValueError, match="Linear has no parameter or buffer 'wait'"):
        weight_norm(m, "wait")
    with pytest.raises(ValueError, match="Linear has no parameter or buffer 'bias'"):
        weight_norm(nn.Linear(5, 4, bias=False), "bias")
    with pytest.raises(ValueError, match="no parameter or buffer 'weight'"):
        weight_norm(wn.Linear(5, 4))
    m.register_buffer("count", torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="'count' must be a floating point tensor, got torch.int64"):
        weight_norm(m, "count")
    with torch.no_grad():
        m.weight[2] = 0
    with pytest.raises(ValueError, match="row 2 of the weight is zero"):
        weight_norm(m, kind="ewn")
    assert type(m) is nn.Linear
    weight_norm(m)
    assert (m.weight[2] == 0).all()
    with pytest.raises(ValueError, match="'weight' of ParametrizedLinear is parametrized already"):
        weight_norm(m)


def test_assignment_and_removal(kind):
    m = weight_norm(nn.Linear(5, 4), kind=kind)
    w = torch.randn(4, 5)
    m.weight = w
    close(m.weight, w)
    perturb(m)
    assert not torch.equal(m.parametrizations.weight.original1, w)
    x, w = torch.randn(3, 5), m.weight.detach()
    y = m(x)
    torch_parametrize.remove_parametrizations(m, "weight")
    assert type(m) is nn.Linear and isinstance(m.weight, nn.Parameter) and torch.equal(m.weight, w)
    close(m(x), y)
    m.load_state_dict({"weight": 2 * w, "bias": m.bias.detach()})
    assert torch.equal(m.weight, 2 * w)


@pytest.mark.parametrize("duplicate", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy], ids=["pickle", "copy"])
def test_copies_are_independent_also_in_removal(duplicate, kind):
    m = perturb(weight_norm(nn.Sequential(nn.Linear(5, 4))[0], kind=kind, dim=None))
    m.eval()
    x = torch.randn(3, 5)
    y = m(x)
    other = duplicate(nn.Sequential(m))[0]
    assert torch.equal(other(x), y) and not other.training
    assert other.state_dict().keys() == m.state_dict().keys()
    torch_parametrize.remove_parametrizations(m, "weight")
    assert torch.equal(other(x), y)
    perturb(other)
    close(m(x), y)
    twice = duplicate(duplicate(other))
    assert torch.equal(twice(x), other(x))
    twice.load_state_dict(m.state_dict())
    close(twice(x), y)


def test_state_dicts_of_all_forms_load(kind):
    sources = [perturb(parametrizations.weight_norm(nn.Linear(5, 4))), nn.Linear(5, 4)]
    for other in KINDS:
        sources += [perturb(weight_norm(nn.Linear(5, 4), kind=other)), perturb(wn.Linear(5, 4, kind=other))]
    for source in sources:
        for assign in (False, True):
            m = nn.Sequential(weight_norm(nn.Linear(5, 4), kind=kind))
            result = m.load_state_dict(nn.Sequential(source).state_dict(), assign=assign)
            assert not result.missing_keys and not result.unexpected_keys
            close(m[0].weight, source.weight.detach())
            assert torch.equal(m[0].bias, source.bias)


def test_strict_loading_names_the_keys(kind):
    m = weight_norm(nn.Linear(5, 4), kind=kind)
    state = m.state_dict()
    del state["parametrizations.weight.original0"]
    with pytest.raises(RuntimeError, match="Missing key.*parametrizations.weight.original0"):
        m.load_state_dict(state)
    result = m.load_state_dict({"bias": state["bias"], "weight_g": torch.ones(4, 1)}, strict=False)
    assert result.unexpected_keys == ["weight_g"]
    assert "parametrizations.weight.original1" in result.missing_keys
    with pytest.raises(RuntimeError, match="size mismatch for weight: the state dict has shape"):
        m.load_state_dict({"bias": state["bias"], "weight": torch.ones(2, 2)})


def test_torch_refuses_our_alpha_and_takes_our_g():
    t = parametrizations.weight_norm(nn.Linear(5, 4))
    m = perturb(weight_norm(nn.Linear(5, 4)))
    t.load_state_dict(m.state_dict())
    close(t.weight, m.weight)
    with pytest.raises(RuntimeError, match="Unexpected key.*_extra_state"):
        t.load_state_dict(weight_norm(nn.Linear(5, 4), kind="ewn").state_dict())


def test_a_wrong_marker_is_refused():
    m = weight_norm(nn.Linear(5, 4), kind="ewn")
    with pytest.raises(ValueError, match="must be the bytes of 'ewn'"):
        m.parametrizations.weight[0].set_extra_state(torch.zeros(3, dtype=torch.uint8))


def test_compile_without_graph_breaks(kind):
    torch._dynamo.reset()
    m = perturb(weight_norm(nn.Linear(5, 4), kind=kind))
    x = torch.randn(3, 5)
    close(torch.compile(m, fullgraph=True, backend="aot_eager")(x), m(x))


def test_sixteen_bit_and_frozen(kind):
    m = weight_norm(nn.Linear(50, 4).bfloat16().requires_grad_(False), kind=kind)
    assert m.weight.dtype == torch.bfloat16 and not any(p.requires_grad for p in m.parameters())
    m = weight_norm(nn.Linear(5, 4), kind=kind)
    m.parametrizations.weight.original0.requires_grad_(False)
    m(torch.randn(3, 5)).sum().backward()
    assert m.parametrizations.weight.original0.grad is None and m.parametrizations.weight.original1.grad is not None


# -------------------------------------------------------------------------------------------------------- whole models


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        self.line = nn.Conv1d(4, 4, 3)
        self.cube = nn.Conv3d(1, 2, 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.body(x).flatten(2)
        x = (x + self.cube(x[:, None, None, :, :8].expand(-1, 1, 2, -1, -1)).mean()).contiguous()
        x = self.line(x).transpose(1, 2)
        return self.head(self.attention(x, x, x)[0].mean(1))


X = (2, 3, 8, 8)


def test_convert_and_fold_a_model(kind):
    net = Net().eval()
    keys, modules = list(net.state_dict()), {name: id(m) for name, m in net.named_modules()}
    calls = []
    net.head.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(X)
    y = net(x)
    names = convert(net, kind)
    assert names == ["body.0", "body.3", "line", "cube", "head"]  # not attention.out_proj, a subclass
    assert {name: id(m) for name, m in net.named_modules()} == modules
    assert all(isinstance(net.get_submodule(name), wn.WeightNormed) for name in names)
    close(net(x), y)
    assert len(calls) == 2
    assert convert(net, kind) == []

    perturb(net)
    y = net(x)
    folded = fold(net)
    assert folded == {name + ".weight": Folded(kind, 0, True) for name in names}
    assert list(net.state_dict()) == keys
    assert not any(isinstance(m, wn.WeightNormed) for m in net.modules())
    close(net(x), y)
    assert fold(net) == {}
    unfold(net, folded)
    assert fold(net) == folded
    close(net(x), y)
    plain = Net().eval()
    plain.load_state_dict(net.state_dict())
    close(plain(x), y)


def test_convert_filters(kind):
    assert convert(Net(), kind, include="body.*") == ["body.0", "body.3"]
    assert convert(Net(), kind, include=["body.0", "head"]) == ["body.0", "head"]
    assert convert(Net(), kind, exclude=["body*", "line"]) == ["cube", "head"]
    assert convert(Net(), kind, include="body.*", exclude="*.3") == ["body.0"]
    assert convert(Net(), kind, exclude=lambda name, m: m.weight.ndim > 2) == ["head"]


def test_convert_a_layer_and_a_shared_module(kind):
    layer = nn.Linear(5, 4)
    x = torch.randn(3, 5)
    y = layer(x)
    assert convert(layer, kind, dim=1) == [""]
    assert type(layer) is wn.Linear and layer.dim == 1
    close(layer(x), y)
    assert fold(layer) == {"weight": Folded(kind, 1, True)} and type(layer) is nn.Linear

    shared = nn.Linear(5, 5)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    y = net(x)
    assert convert(net, kind) == ["0"]
    assert net[0] is net[2]
    close(net(x), y)


def test_convert_changes_nothing_when_it_refuses():
    net = Net()
    with torch.no_grad():
        net.head.weight[1] = 0
    before = repr(net)
    with pytest.raises(ValueError, match="layer 'head': row 1 of the weight is zero"):
        convert(net, "ewn")
    with pytest.raises(ValueError, match="layer 'head': dim must be None or in"):
        convert(net, dim=2)
    with pytest.raises(ValueError, match="kind must be"):
        convert(net, "unit")
    assert repr(net) == before
    tied = nn.ModuleDict({"embedding": nn.Embedding(6, 5), "head": nn.Linear(5, 6, bias=False)})
    tied["head"].weight = tied["embedding"].weight
    with pytest.raises(ValueError, match="embedding.weight and head.weight are one parameter: exclude layer 'head'"):
        convert(tied)
    assert convert(tied, exclude="head") == []


def test_lazy_layers_after_their_first_batch(kind):
    net = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    x = torch.randn(3, 5)
    y = net(x)
    assert convert(net, kind) == ["0", "2"]
    close(net(x), y)


def test_fold_mixed_frozen_and_parametrized():
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.LSTM(3, 2))
    weight_norm(net[0], dim=None, kind="ewn")
    weight_norm(net[1].requires_grad_(False))
    weight_norm(net[2], "weight_ih_l0", dim=1)
    parametrizations.orthogonal(net[2], "weight_hh_l0")
    x = torch.randn(6, 2, 5)
    y = net(x)[0]
    folded = fold(net)
    assert folded == {
        "0.weight": Folded("ewn", None, False),
        "1.weight": Folded("swn", 0, False),
        "2.weight_ih_l0": Folded("swn", 1, False),
    }
    close(net(x)[0], y)
    assert isinstance(net[1].weight, nn.Parameter) and not net[1].weight.requires_grad
    assert torch_parametrize.is_parametrized(net[2], "weight_hh_l0")  # not ours, and kept
    unfold(net, folded)
    close(net(x)[0], y)
    assert fold(net) == folded


def test_unfold_and_fold_refusals():
    with pytest.raises(TypeError, match="module '0' must be a plain layer to unfold, got ReLU"):
        unfold(nn.Sequential(nn.ReLU()), {"0.weight": Folded("swn", 0, True)})

    class Special(wn.Linear):
        pass

    net = nn.Sequential(wn.Linear(3, 2), Special(3, 2))
    with pytest.raises(TypeError, match="module '1' is a Special, for which no plain layer is known"):
        fold(net)
    assert type(net[0]) is wn.Linear


def test_a_frozen_layer_stays_frozen(kind):
    net = nn.Sequential(nn.Linear(5, 4).requires_grad_(False))
    convert(net, kind)
    assert not any(p.requires_grad for p in net.parameters())
    fold(net)
    assert not any(p.requires_grad for p in net.parameters())


def test_the_order_of_parameters_is_that_of_a_model_built_with_our_layers(kind):
    """So that the state of an optimizer, which counts parameters, fits both."""
    converted = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    convert(converted, kind)
    built = nn.Sequential(wn.Linear(5, 4, kind=kind), wn.Linear(4, 3, kind=kind))
    assert [n for n, _ in converted.named_parameters()] == [n for n, _ in built.named_parameters()]
