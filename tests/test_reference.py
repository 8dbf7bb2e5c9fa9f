"""The specification against the textbook formula, against finite differences, and against torch.optim."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from wnkernels import reference

KINDS = ["swn", "ewn"]
SHAPES_AND_DIMS = [
    ((4, 5), 0), ((4, 5), 1), ((4, 5), -1), ((4, 5), -2), ((4, 5), None),
    ((7,), 0), ((7,), None), ((1, 6), 0), ((6, 1), 0),
    ((3, 2, 4), 0), ((3, 2, 4), 1), ((3, 2, 4), 2), ((3, 2, 4), None),
    ((3, 2, 2, 3), 1), ((2, 3, 2, 2, 2), 3), ((2, 3, 2, 2, 2), -5),
]  # fmt: skip


def keepdim_shape(shape, dim):
    return [1 if dim is None or i != dim % len(shape) else size for i, size in enumerate(shape)]


def make(shape, dim, kind, dtype=torch.float64):
    v = torch.randn(shape, dtype=dtype)
    g = torch.randn(keepdim_shape(shape, dim), dtype=dtype)
    return v.requires_grad_(), g.requires_grad_()


def naive(v, g, dim, kind):
    dims = [i for i in range(v.ndim) if dim is None or i != dim % v.ndim]
    n = (v * v).sum(dims, keepdim=True).sqrt() if dims else v.abs()
    return (g.exp() if kind == "ewn" else g) * v / n


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape, dim", SHAPES_AND_DIMS)
class TestEveryDim:
    def test_value_and_gradients_are_the_textbook_formula(self, shape, dim, kind):
        v, g = make(shape, dim, kind)
        G = torch.randn(shape, dtype=torch.float64)
        w, expected = reference.weight_norm(v, g, dim, kind), naive(v, g, dim, kind)
        torch.testing.assert_close(w, expected, rtol=1e-14, atol=1e-14)
        formula = reference.weight_norm_backward(G, v, g, dim, kind)
        for ours, theirs, explicit in zip(
            torch.autograd.grad(w, (v, g), G), torch.autograd.grad(expected, (v, g), G), formula
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(explicit, theirs, rtol=1e-12, atol=1e-13)

    def test_all_orders_and_forward_mode(self, shape, dim, kind):
        v, g = make(shape, dim, kind)

        def f(v, g):
            return reference.weight_norm(v, g, dim, kind)

        assert gradcheck(f, (v, g), check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(f, (v, g), check_fwd_over_rev=True)

    def test_flat_g(self, shape, dim, kind):
        v, g = make(shape, dim, kind)
        flat = g.reshape(() if dim is None else (-1,))
        assert torch.equal(reference.weight_norm(v, flat, dim, kind), reference.weight_norm(v, g, dim, kind))
        _, dg = reference.weight_norm_backward(torch.randn_like(v), v, flat, dim, kind)
        assert dg.shape == flat.shape

    def test_in_place_operations(self, shape, dim, kind):
        v, g = (x.detach() for x in make(shape, dim, kind))
        G = torch.randn_like(v)
        dv, dg = reference.weight_norm_backward(G, v, g, dim, kind)
        overwritten = G.clone()
        torch.testing.assert_close(reference.project_(overwritten, v, g, dim, kind), dg, rtol=0, atol=0)
        torch.testing.assert_close(overwritten, dv, rtol=0, atol=0)

        w, norms = v.clone(), torch.rand_like(reference.row_norm(v, dim)) + 0.5
        assert reference.normalize_(w, dim, norms) is w
        torch.testing.assert_close(reference.row_norm(w, dim), norms)
        unit = reference.row_norm(reference.normalize_(w, dim), dim)
        torch.testing.assert_close(unit, torch.ones_like(unit))


def test_the_backward_formula_is_differentiable():
    v, g = make((3, 4), 0, "ewn")
    G = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for kind in KINDS:
        assert gradcheck(lambda *a: reference.weight_norm_backward(*a, 0, kind), (G, v, g), check_forward_ad=True)


@pytest.mark.parametrize(
    "dtype, exponent",
    [(torch.float32, e) for e in (-90, -70, 70, 123)] + [(torch.float64, e) for e in (-900, -600, 600, 1019)],
)
def test_huge_and_tiny_rows_are_exact_to_rounding(dtype, exponent):
    """Scaling v and G by a power of two rounds nothing, so the results must scale without the change of a bit."""
    unit, g, G = torch.rand(5, 9, dtype=dtype) - 0.5, torch.rand(5, 1, dtype=dtype), torch.rand(5, 9, dtype=dtype) / 16
    scale = 2.0**exponent
    results = []
    for v, grad in ((unit, G), (unit * scale, G * scale)):
        v.requires_grad_()
        w, n = reference.weight_norm(v, g), reference.row_norm(v)
        (dv,) = torch.autograd.grad(w, v, grad, retain_graph=True)
        explicit, dg = reference.weight_norm_backward(grad, v, g)
        results.append([w, n, dv, explicit, dg])
    (w, n, dv, explicit, dg), (scaled_w, scaled_n, *scaled_dv, scaled_dg) = results
    assert torch.equal(w, scaled_w) and torch.equal(n * scale, scaled_n) and torch.equal(dg * scale, scaled_dg)
    assert torch.equal(dv, scaled_dv[0]) and torch.equal(explicit, scaled_dv[1])


def test_subnormal_rows_have_a_norm():
    v = torch.tensor([[3e-45, 0.0, 4e-45]])  # multiples 2 and 3 of the smallest subnormal
    torch.testing.assert_close(reference.weight_norm(v, torch.ones(1)), torch.tensor([[2.0, 0.0, 3.0]]) / 13**0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_row_is_zero_in_every_order(kind):
    v, g = make((3, 4), 0, kind)
    with torch.no_grad():
        v[1] = 0
    w = reference.weight_norm(v, g, 0, kind)
    dv, dg = torch.autograd.grad(w, (v, g), torch.randn_like(w), create_graph=True)
    second = torch.autograd.grad((dv * torch.randn_like(dv)).sum() + (dg * torch.randn_like(dg)).sum(), (v, g))
    for x in (w, dv, dg, *second):
        assert x.isfinite().all()
        assert (x[1] == 0).all() and (x[0] != 0).any()
    _, tangent = torch.func.jvp(lambda v: reference.weight_norm(v, g, 0, kind), (v,), (torch.ones_like(v),))
    assert tangent.isfinite().all() and (tangent[1] == 0).all()
    for x in reference.weight_norm_backward(torch.randn_like(w), v, g, 0, kind):
        assert x.isfinite().all() and (x[1] == 0).all()
    (dn,) = torch.autograd.grad(reference.row_norm(v).sum(), v)
    assert dn.isfinite().all() and (dn[1] == 0).all()
    assert (reference.normalize_(v.detach().clone())[1] == 0).all()


def test_a_nan_stays_in_its_row():
    v, g = (x.detach() for x in make((3, 4), 0, "swn"))
    G = torch.randn_like(v)
    G[1, 2] = math.nan
    for x in reference.weight_norm_backward(G, v, g):
        assert x[1].isnan().any() and x[[0, 2]].isfinite().all()
    v[0, 0] = math.inf
    assert reference.weight_norm(v, g)[1:].isfinite().all()


@pytest.mark.parametrize(
    "shape, dim", [((3, 0), 0), ((0, 3), 0), ((0, 3), 1), ((3, 0), None), ((0,), 0), ((2, 0, 3), 2)]
)
def test_empty_tensors(shape, dim):
    v, g = make(shape, dim, "swn")
    w = reference.weight_norm(v, g, dim)
    assert w.shape == v.shape
    dv, dg = torch.autograd.grad(w, (v, g), torch.ones_like(w))
    assert dv.shape == v.shape and (dg == 0).all()
    assert reference.row_norm(v, dim).shape == g.reshape(() if dim is None else (-1,)).shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_is_computed_in_float32_and_rounded_once(dtype):
    v, g = make((6, 40), 0, "swn", dtype)
    exact = reference.weight_norm(v.double(), g.double()).detach()
    w = reference.weight_norm(v, g)
    assert w.dtype == dtype
    torch.testing.assert_close(w, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    assert reference.row_norm(v).dtype == torch.float32
    mixed = reference.weight_norm(v, g.detach().float())
    assert torch.equal(mixed, w)
    dv, dg = reference.weight_norm_backward(torch.randn_like(v), v, g.detach().float())
    assert (dv.dtype, dg.dtype) == (dtype, torch.float32)
    single = v.detach().float()
    assert torch.equal(
        reference.weight_norm(single, g.detach().float(), out_dtype=dtype),
        reference.weight_norm(single, g.detach().float()).to(dtype),
    )


def test_linear():
    v, g = make((3, 5), 0, "ewn")
    x, bias = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    for kind in KINDS:
        y = reference.weight_norm_linear(x, v, g, bias, kind)
        torch.testing.assert_close(y, x @ naive(v, g, 0, kind).T + bias)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda v, g: reference.weight_norm(v, g, kind="wn"), ValueError, "kind must be one of 'swn', 'ewn', got 'wn'"),
        (lambda v, g: reference.weight_norm(v, g, 2), ValueError, r"dim must be None or in \[-2, 1\].*got 2"),
        (lambda v, g: reference.weight_norm(v, g, -3), ValueError, "dim must be"),
        (lambda v, g: reference.weight_norm(v, g, 0.0), TypeError, "dim must be an int or None"),
        (lambda v, g: reference.weight_norm(v, g, 1), ValueError, r"g must have shape \(1, 4\) or \(4,\).*\(3, 1\)"),
        (lambda v, g: reference.weight_norm(v, g.T), ValueError, "g must have shape"),
        (lambda v, g: reference.weight_norm(v.int(), g), TypeError, "v must be a floating point tensor"),
        (lambda v, g: reference.weight_norm(v, 1.0), TypeError, "g must be a tensor, got float"),
        (lambda v, g: reference.weight_norm_backward(v.T, v, g), ValueError, "grad must have the shape of v"),
        (lambda v, g: reference.weight_norm_linear(v, v[0], g), ValueError, "v must be a matrix"),
        (lambda v, g: reference.row_norm(v, 5), ValueError, "dim must be"),
        (lambda v, g: reference.normalize_(v, 0, torch.ones(2)), ValueError, "must have shape"),
        (
            lambda v, g: reference.polar_sgd_step(v, v, g[:, 0], g[:, 0], lr=1.0, kind="polar"),
            ValueError,
            "'swn', 'ewn', 'unit'",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.randn(3, 4), torch.randn(3, 1))


# ------------------------------------------------------------------------------------------------------- polar steps


def follow(step, make_optimizer, kind, dim, shape, steps=20, radius_options=None, maximize=False):
    """The largest difference, over all steps, between the polar step on W and torch's step on (radius, v)."""
    v = torch.randn(shape, dtype=torch.float64)
    r = torch.randn(keepdim_shape(shape, dim), dtype=torch.float64)
    W = reference.weight_norm(v, r, dim, kind)
    flat = r.reshape(() if dim is None else (-1,))
    radius, norm, state = flat.clone(), reference.row_norm(v, dim), None

    v, r = nn.Parameter(v), nn.Parameter(r)
    optimizer = make_optimizer([{"params": [v]}, {"params": [r], **(radius_options or {})}])
    target, scale = torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64) + 0.5

    def loss(w):
        return (-1 if maximize else 1) * ((scale * (w - target) ** 2).mean() + (w.sin() ** 2).sum() / 7)

    worst = 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        loss(reference.weight_norm(v, r, dim, kind)).backward()
        optimizer.step()

        W.requires_grad_()
        (G,) = torch.autograd.grad(loss(W), W)
        W, radius, norm, state = step(W.detach(), G, radius, norm, state, kind=kind, dim=dim)
        for ours, theirs in (
            (W, reference.weight_norm(v, r, dim, kind)),
            (radius, r.reshape(flat.shape)),
            (norm, reference.row_norm(v, dim)),
        ):
            worst = max(worst, (ours - theirs).abs().max().item())
    return worst


CASES = [((4, 6), 0), ((6, 4), 1), ((3, 2, 3, 3), 0), ((4, 3, 2), None)]
SGD = [
    dict(),
    dict(momentum=0.9),
    dict(momentum=0.8, dampening=0.3),
    dict(momentum=0.9, nesterov=True),
    dict(momentum=0.9, nesterov=True, weight_decay=0.05),
    dict(weight_decay=0.1, maximize=True),
]
ADAM = [
    dict(),
    dict(betas=(0.5, 0.9), eps=1e-3),
    dict(weight_decay=0.1),
    dict(weight_decay=0.1, amsgrad=True),
    dict(maximize=True),
]


def with_options(step, options, radius_options):
    renamed = {"radius_" + name: value for name, value in radius_options.items()}
    return lambda *args, **where: step(*args, **where, **{**options, **renamed})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape, dim", CASES)
@pytest.mark.parametrize("radius_options", [{}, dict(lr=0.02, weight_decay=0.07)], ids=["same", "own"])
class TestPolarStepsAreTorchsStepsOnTheReparametrizedWeight:
    @pytest.mark.parametrize("options", SGD, ids=str)
    def test_sgd(self, kind, shape, dim, radius_options, options):
        options = {"lr": 0.05, **options}
        theirs = {"weight_decay": 0.0, **radius_options}
        step = with_options(reference.polar_sgd_step, options, radius_options)
        maximize = options.get("maximize", False)
        make = lambda groups: torch.optim.SGD(groups, **options)  # noqa: E731
        assert follow(step, make, kind, dim, shape, radius_options=theirs, maximize=maximize) < 1e-12

    @pytest.mark.parametrize("options", ADAM, ids=str)
    @pytest.mark.parametrize("decoupled", [True, False], ids=["AdamW", "Adam"])
    def test_adam(self, kind, shape, dim, radius_options, options, decoupled):
        options = {"lr": 0.01, "weight_decay": 0.0, **options}
        theirs = {"weight_decay": 0.0, **radius_options}
        step = with_options(reference.polar_adam_step, {**options, "decoupled": decoupled}, radius_options)
        maximize = options.get("maximize", False)
        make = lambda groups: (torch.optim.AdamW if decoupled else torch.optim.Adam)(groups, **options)  # noqa: E731
        assert follow(step, make, kind, dim, shape, radius_options=theirs, maximize=maximize) < 1e-12


def test_unit_keeps_the_radius():
    W = reference.normalize_(torch.randn(4, 6, dtype=torch.float64), norm=2.5)
    radius, norm = torch.full((4,), 2.5, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for step in (reference.polar_sgd_step, reference.polar_adam_step):
        result = step(W, torch.randn_like(W), radius, norm, lr=0.1, kind="unit")
        assert torch.equal(result.radius, radius)
        torch.testing.assert_close(reference.row_norm(result.weight), radius, rtol=1e-14, atol=0)
        assert not torch.equal(result.weight, W)


def test_polar_steps_leave_their_arguments_alone():
    W, G = torch.randn(4, 6), torch.randn(4, 6)
    radius, norm = reference.row_norm(W), reference.row_norm(W)
    for step in (reference.polar_sgd_step, reference.polar_adam_step):
        options = {"momentum": 0.9} if step is reference.polar_sgd_step else {}
        state = step(W, G, radius, norm, lr=0.1, **options).state
        arguments = (W, G, radius, norm, state)
        before = copy.deepcopy(arguments)
        step(*arguments, lr=0.1, **options)
        torch.testing.assert_close(arguments, before, rtol=0, atol=0)


def test_a_zero_row_stays_zero_under_polar_steps():
    W = torch.randn(3, 4)
    W[1] = 0
    norm = reference.row_norm(W)
    for step in (reference.polar_sgd_step, reference.polar_adam_step):
        result = step(W, torch.randn(3, 4), norm, norm, lr=0.1)
        assert (result.weight[1] == 0).all() and result.weight.isfinite().all()
