"""What torch's own tests ask of its weight_norm (test/nn/test_parametrization.py, test/test_nn.py), asked of ours.

Written anew after the behaviour that those tests check: weight_norm on a Linear by name and dim, dim=None, 16-bit
weights, exchange of state dicts between the three generations of names, deepcopy, and pickling, which torch refuses and
ours allows. Each case runs with torch's implementation beside ours where torch has one.
"""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from wnkernels.parametrize import weight_norm

OURS_AND_TORCHS = pytest.mark.parametrize(
    "normalize", [weight_norm, parametrizations.weight_norm], ids=["ours", "torch"]
)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def legacy_weight_norm(module, **options):
    """The hook-based weight_norm, whose state dicts have weight_g and weight_v."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(module, **options)


@OURS_AND_TORCHS
@pytest.mark.parametrize("dtype", DTYPES)
def test_normalizing_keeps_the_output_and_splits_the_weight(normalize, dtype):
    m = nn.Linear(12, 24, dtype=dtype)
    x = torch.randn(3, 12, dtype=dtype)
    expected = m(x)
    tolerance = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps}

    m = normalize(m)
    original0, original1 = m.parametrizations.weight.original0, m.parametrizations.weight.original1
    assert original0.shape == (24, 1) and original1.shape == m.weight.shape
    assert original0.dtype == original1.dtype == m.weight.dtype == dtype
    assert isinstance(original0, nn.Parameter) and isinstance(original1, nn.Parameter)
    assert "weight" not in m._parameters
    torch.testing.assert_close(m(x), expected, **tolerance)

    # The length is g, whatever v's is.
    with torch.no_grad():
        original0.fill_(2)
        original1.mul_(3)
    two = torch.full((24,), 2.0, dtype=torch.float64)
    torch.testing.assert_close(m.weight.double().norm(dim=1), two, rtol=2 * torch.finfo(dtype).eps, atol=0)

    m.weight = torch.ones(24, 12, dtype=dtype)
    torch.testing.assert_close(m.weight, torch.ones(24, 12, dtype=dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)
    parametrize.remove_parametrizations(m, "weight")
    assert type(m) is nn.Linear and not hasattr(m, "parametrizations")
    assert [name for name, _ in m.named_parameters()] == ["bias", "weight"]


@pytest.mark.parametrize("dim", [0, 1, 2, 3, None])
@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 4, (2, 5)), lambda: nn.ConvTranspose2d(3, 4, (2, 5))])
def test_every_dim_of_a_convolution_is_as_torchs(make, dim):
    plain = make().double()
    m = weight_norm(copy.deepcopy(plain), dim=dim)
    t = parametrizations.weight_norm(copy.deepcopy(plain), dim=dim)
    for a, b in zip(m.parameters(), t.parameters()):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
    with torch.no_grad():
        for a, b in zip(m.parameters(), t.parameters()):
            a.add_(torch.rand_like(a))
            b.copy_(a)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    y, expected = m(x), t(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    G = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, m.parameters(), G), torch.autograd.grad(expected, t.parameters(), G)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@OURS_AND_TORCHS
def test_dim_none_has_one_length(normalize):
    m = nn.Linear(12, 24)
    x = torch.randn(3, 12)
    expected = m(x)
    normalize(m, dim=None)
    assert m.parametrizations.weight.original0.numel() == 1
    torch.testing.assert_close(m.parametrizations.weight.original0.squeeze(), m.weight.norm())
    torch.testing.assert_close(m(x), expected)


def test_what_torch_makes_of_dim_minus_one_is_not_guessed():
    assert parametrizations.weight_norm(nn.Linear(3, 2), dim=-1).parametrizations.weight.original0.numel() == 1
    with pytest.raises(ValueError, match="dim=-1 is refused"):
        weight_norm(nn.Linear(3, 2), dim=-1)


@OURS_AND_TORCHS
def test_normalizing_twice_is_not_one_parametrization(normalize):
    m = normalize(nn.Linear(3, 2))
    with pytest.raises((ValueError, TypeError)):
        normalize(m)(torch.randn(1, 3))


GENERATIONS = {
    "legacy": legacy_weight_norm,
    "torch": parametrizations.weight_norm,
    "ours": weight_norm,
}


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("source", GENERATIONS)
@pytest.mark.parametrize("target", ["torch", "ours"])
def test_state_dicts_of_all_generations_load(source, target, dim):
    m, other = (GENERATIONS[which](nn.Linear(5, 4), dim=dim) for which in (source, target))
    x = torch.randn(3, 5)
    expected = m(x)
    assert not torch.allclose(other(x), expected)
    result = other.load_state_dict(m.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    torch.testing.assert_close(other(x), expected)
    nested = nn.Sequential(nn.Sequential(GENERATIONS[target](nn.Linear(5, 4), dim=dim)))
    nested.load_state_dict(nn.Sequential(nn.Sequential(m)).state_dict())
    torch.testing.assert_close(nested(x), expected)


@OURS_AND_TORCHS
def test_deepcopy(normalize):
    m = normalize(nn.Linear(5, 4))
    x = torch.randn(3, 5)
    m(x).sum().backward()
    other = copy.deepcopy(m)
    assert torch.equal(other(x), m(x))
    for (name, a), (other_name, b) in zip(m.named_parameters(), other.named_parameters()):
        assert name == other_name and a is not b and torch.equal(a, b)
    with torch.no_grad():
        other.parametrizations.weight.original0.mul_(2)
    assert not torch.equal(other(x), m(x))


def test_pickling_works_where_torch_refuses():
    x = torch.randn(3, 5)
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(parametrizations.weight_norm(nn.Linear(5, 4)))
    m = weight_norm(nn.Linear(5, 4))
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        other = pickle.loads(pickle.dumps(m, protocol))
        assert isinstance(other, nn.Linear) and torch.equal(other(x), m(x))
        assert parametrize.is_parametrized(other, "weight")
        assert [n for n, _ in other.named_parameters()] == [n for n, _ in m.named_parameters()]


def test_training_is_torchs_parameter_for_parameter():
    m = weight_norm(nn.Linear(6, 3).double())
    t = parametrizations.weight_norm(nn.Linear(6, 3).double())
    t.load_state_dict(m.state_dict())
    x, target = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9) for module in (m, t)]
    for _ in range(20):
        for module, optimizer in zip((m, t), optimizers):
            optimizer.zero_grad()
            nn.functional.mse_loss(module(x), target).backward()
            optimizer.step()
    for a, b in zip(m.parameters(), t.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@OURS_AND_TORCHS
def test_with_cached_parametrizations(normalize):
    m = normalize(nn.Linear(5, 4))
    with parametrize.cached():
        assert m.weight is m.weight
    assert m.weight is not m.weight


@OURS_AND_TORCHS
def test_a_module_that_is_moved_to_another_dtype(normalize):
    m = normalize(nn.Linear(5, 4)).double()
    assert m.weight.dtype == torch.float64
    assert m(torch.randn(3, 5, dtype=torch.float64)).dtype == torch.float64
