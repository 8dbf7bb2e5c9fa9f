"""The operators on CPU kernels against the specification in float64: values, derivatives, transforms, errors."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd import forward_ad as fwAD

from wnkernels import functional as wF
from wnkernels import reference

KINDS = ["swn", "ewn"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PAIRS = [(d, d) for d in DTYPES] + [
    (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
]
# Every path of the engine: contiguous rows short, long and few; columns narrow, wide and split; interior dims with a
# small and a large inner part; one row, one column, nothing.
SHAPES = [
    ((7,), 0), ((1, 1), 0), ((1, 37), 0), ((37, 1), 0), ((5, 7), 0), ((5, 7), 1), ((5, 7), -1), ((5, 7), -2),
    ((33, 77), None), ((130, 31), 0), ((33, 32), 0), ((70, 700), 0), ((9, 4097), 0), ((2, 70001), 0), ((40000,), None),
    ((777, 300), 1), ((9000, 5), 1), ((2, 3000), 1), ((8, 6, 3, 3), 0), ((8, 6, 3, 3), 1), ((4, 5, 40), 1),
    ((3, 4, 5), 2), ((3, 4, 5), -2), ((2, 3, 4, 5, 6), 2), ((2, 3, 4, 5, 6), 4), ((2, 3, 4, 5), None),
    ((0, 5), 0), ((3, 0), 0), ((3, 0), 1), ((0,), None), ((2, 0, 3), 2),
]


def radius_shape(shape, dim):
    return () if dim is None else tuple(n if i == dim % len(shape) else 1 for i, n in enumerate(shape))


def draw(shape, dim, dtype, out_dtype=None):
    """v, g and a gradient; the radius stays where e^alpha is of order 1."""
    return (torch.randn(shape).to(dtype), torch.randn(radius_shape(shape, dim)).to(dtype),
            torch.randn(shape).to(out_dtype or dtype))


def leaves(*tensors):
    return [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]


def oracle(v, g, G, dim, kind):
    """w, dv, dg in float64, by autograd of the specification."""
    v, g = leaves(v.double(), g.double())
    w = reference.weight_norm(v, g, dim, kind)
    return [t.detach() for t in (w, *torch.autograd.grad(w, (v, g), G.double()))]


def ours(v, g, G, dim, kind, out_dtype=None):
    v, g = leaves(v, g)
    w = wF.weight_norm(v, g, dim, kind, out_dtype)
    return [t.detach() for t in (w, *torch.autograd.grad(w, (v, g), G))]


def unit_roundoff(dtype):
    return torch.finfo(dtype).eps / 2


def assert_accurate(got, expected, scale, dtype, roundings):
    """|got - expected| <= roundings * unit roundoff * scale, element by element, above the smallest normal number."""
    bound = roundings * unit_roundoff(dtype) * scale.abs() + torch.finfo(dtype).smallest_normal
    error = (got.double() - expected).abs()
    assert got.shape == expected.shape
    assert bool((error <= bound).all()), f"largest error over its bound: {(error / bound).max().item():.3g}"


@pytest.mark.parametrize("width", [7, 255, 700, 4103])  # tiles of rows, and rows that some processors round themselves
def test_rounding_to_bfloat16_is_torchs(width):
    v = torch.randn(64, width)
    g = torch.logspace(-42, 37, 64).unsqueeze(1)  # subnormal and huge elements
    expected = wF.weight_norm(v, g).bfloat16()
    assert (expected[:8] != 0).any() and torch.equal(wF.weight_norm(v, g, out_dtype=torch.bfloat16), expected)
    g[3] = math.nan
    v[5, 2] = math.inf
    low = wF.weight_norm(v, g, out_dtype=torch.bfloat16)
    assert torch.equal(low.isnan(), wF.weight_norm(v, g).isnan()) and low[3].isnan().all() and not low[4].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype,out_dtype", PAIRS)
@pytest.mark.parametrize("shape,dim", SHAPES)
def test_values_and_gradients(shape, dim, dtype, out_dtype, kind):
    v, g, G = draw(shape, dim, dtype, out_dtype)
    w, dv, dg = ours(v, g, G, dim, kind, out_dtype)
    w_ref, dv_ref, dg_ref = oracle(v, g, G, dim, kind)
    assert (w.dtype, dv.dtype, dg.dtype) == (out_dtype, dtype, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Sums are kept in `wide`, in lanes and pieces: their relative error grows like the length of one lane at worst.
    length = max(1, math.prod(shape) // max(1, g.numel()))
    sums = (8 + min(length, 4096) / 32) * unit_roundoff(wide) / unit_roundoff(dtype)
    assert_accurate(w, w_ref, w_ref, out_dtype, 1 + sums * unit_roundoff(dtype) / unit_roundoff(out_dtype))
    dims = [i for i in range(len(shape)) if dim is None or i != dim % len(shape)]
    row = (lambda x: x.square().sum(dims, keepdim=True).sqrt()) if dims else (lambda x: x.abs())
    s = g.double() if kind == "swn" else g.double().exp()
    n = row(v.double())
    size = (s / n).abs() * (G.double().abs() + row(G.double()) * v.double().abs() / n)
    assert_accurate(dv, dv_ref, size, dtype, 2 + 2 * sums)
    p_size = (row(G.double()) * (1 if kind == "swn" else s)).reshape(dg.shape)
    assert_accurate(dg, dg_ref, p_size, dtype, 2 + 2 * sums)


def memory_formats(shape):
    """The same logical tensor in several layouts; each maker takes a contiguous tensor."""
    makers = {
        "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1:-2],
        "strided": lambda t: torch.stack([t, torch.full_like(t, math.nan)], -1)[..., 0],
        "expanded": lambda t: t[:1].expand(t.shape),
    }
    if len(shape) == 4:
        makers["channels_last"] = lambda t: t.contiguous(memory_format=torch.channels_last)
    if len(shape) == 5:
        makers["channels_last_3d"] = lambda t: t.contiguous(memory_format=torch.channels_last_3d)
    return makers.items()


@pytest.mark.parametrize("shape", [(9, 40), (8, 6, 3, 3), (2, 3, 4, 5, 6), (4, 5, 6)])
def test_layouts(shape):
    for dim in (*range(len(shape)), None):
        v0, g, G = draw(shape, dim, torch.float64)
        for name, make in memory_formats(shape):
            v = make(v0)
            for gradient in (G, make(G), G[:1].expand(G.shape)):
                for got, expected in zip(ours(v, g, gradient, dim, "swn"), oracle(v, g, gradient, dim, "swn")):
                    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13, msg=f"{name} dim={dim}")
            if name.startswith("channels_last"):
                assert wF.weight_norm(v, g, dim).stride() == v.stride()
            torch.testing.assert_close(wF.row_norm(v, dim), reference.row_norm(v, dim), rtol=1e-13, atol=0)


def test_radius_shapes_agree():
    v, g, G = draw((4, 5, 6), 1, torch.float64)
    full, flat = ours(v, g, G, 1, "ewn"), ours(v, g.flatten(), G, 1, "ewn")
    assert torch.equal(full[0], flat[0]) and torch.equal(full[1], flat[1]) and torch.equal(full[2].flatten(), flat[2])
    v, g, G = draw((4, 5), None, torch.float64)
    assert torch.equal(ours(v, g, G, None, "swn")[0], ours(v, g.reshape(1, 1), G, None, "swn")[0])
    assert wF.row_norm(v, None).shape == () and wF.row_norm(v, 1).shape == (5,)


def test_radius_in_float32_beside_a_16bit_weight():
    v, g, G = draw((6, 50), 0, torch.bfloat16)
    g = g.float() * (1 + 1e-4)  # lost in bfloat16
    w, dv, dg = ours(v, g, G, 0, "swn")
    w_ref, _, dg_ref = oracle(v, g, G, 0, "swn")
    assert (w.dtype, dv.dtype, dg.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert_accurate(w, w_ref, w_ref, torch.bfloat16, 1.01)
    torch.testing.assert_close(dg.double(), dg_ref, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------- low precision against torch


def errors(got, expected):
    """Root-mean-square and largest error."""
    e = got.double() - expected
    return e.square().mean().sqrt().item(), e.abs().max().item()


@settings(max_examples=60, deadline=None)
@given(width=st.integers(2, 700), kind=st.sampled_from(KINDS), dtype=st.sampled_from([torch.bfloat16, torch.float16]),
       seed=st.integers(0, 2**31), spread=st.floats(-3, 3))
def test_errors_are_within_those_of_torch(width, kind, dtype, seed, spread):
    """Root-mean-square error at most 1.05 times torch's in the same precision, largest at most twice or one ulp."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(100, 20000 // width)  # enough entries for a root mean square to settle
    v = (torch.randn(rows, width, generator=generator) * 10**spread).to(dtype)
    g = torch.randn(rows, 1, generator=generator).to(dtype)
    G = torch.randn(rows, width, generator=generator).to(dtype)
    v1, g1 = leaves(v, g)
    w_torch = torch._weight_norm(v1, g1 if kind == "swn" else g1.exp(), 0)
    theirs = (w_torch.detach(), *torch.autograd.grad(w_torch, (v1, g1), G))
    for name, got, torchs, expected in zip(("w", "dv", "dg"), ours(v, g, G, 0, kind), theirs, oracle(v, g, G, 0, kind)):
        rms, largest = errors(got, expected)
        rms_torch, largest_torch = errors(torchs, expected)
        ulp = expected.abs().max().item() * torch.finfo(dtype).eps
        assert rms <= 1.05 * rms_torch, (name, rms, rms_torch)
        assert largest <= max(2 * largest_torch, ulp), (name, largest, largest_torch)


# --------------------------------------------------------------------------------------------------------- derivatives

DERIVATIVE_SHAPES = [((3, 4), 0), ((3, 4), 1), ((3, 4), -1), ((3, 4), None), ((2, 3, 4), 1), ((2, 3, 2, 2), 0),
                     ((2, 3, 2, 2), -2), ((2, 2, 1, 2, 2), 4), ((5,), 0), ((5,), None)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape,dim", DERIVATIVE_SHAPES)
def test_gradcheck(shape, dim, kind):
    v, g, _ = draw(shape, dim, torch.float64)
    f = lambda v, g: wF.weight_norm(v, g, dim, kind)  # noqa: E731
    assert gradcheck(f, leaves(v, g), check_forward_ad=True)
    assert gradgradcheck(f, leaves(v, g), check_fwd_over_rev=True)


@pytest.mark.parametrize("layout", ["sliced", "channels_last"])
def test_gradcheck_of_other_layouts(layout):
    v, g, _ = draw((2, 3, 2, 2), 0, torch.float64)
    v = dict(memory_formats(v.shape))[layout](v)
    f = lambda v, g: wF.weight_norm(v, g, 0, "ewn")  # noqa: E731
    assert gradcheck(f, leaves(v, g)) and gradgradcheck(f, leaves(v, g))


def test_second_derivative_is_right_where_that_of_torch_is_wrong():
    v, g, _ = draw((3, 4), 0, torch.float64)
    assert gradgradcheck(lambda v, g: wF.weight_norm(v, g, 0), leaves(v, g))
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        gradgradcheck(lambda v, g: torch._weight_norm_interface(v, g, 0)[0], leaves(v, g))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_linear_and_row_norm(kind):
    x, v, b = (torch.randn(s, dtype=torch.float64) for s in ((2, 4), (3, 4), (3,)))
    g = torch.randn(3, 1, dtype=torch.float64)
    for materialize in (True, False):
        f = lambda x, v, g, b: wF.weight_norm_linear(x, v, g, b, kind, materialize)  # noqa: E731, B023
        assert gradcheck(f, leaves(x, v, g, b), check_forward_ad=True)
        assert gradgradcheck(f, leaves(x, v, g, b), check_fwd_over_rev=True)
    for dim in (0, 1, None):
        assert gradcheck(lambda v: wF.row_norm(v, dim), leaves(v), check_forward_ad=True)  # noqa: B023
        assert gradgradcheck(lambda v: wF.row_norm(v, dim), leaves(v), check_fwd_over_rev=True)  # noqa: B023


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_get_no_gradient(kind):
    v, g, G = draw((4, 6), 0, torch.float64)
    _, dv, dg = oracle(v, g, G, 0, kind)
    [v1] = leaves(v)
    torch.testing.assert_close(torch.autograd.grad(wF.weight_norm(v1, g, 0, kind), v1, G)[0], dv)
    [g1] = leaves(g)
    torch.testing.assert_close(torch.autograd.grad(wF.weight_norm(v, g1, 0, kind), g1, G)[0], dg)
    assert not wF.weight_norm(v, g, 0, kind).requires_grad
    x = torch.randn(2, 6, dtype=torch.float64)
    for materialize in (True, False):
        y = wF.weight_norm_linear(x, v1, g, None, kind, materialize)
        torch.testing.assert_close(torch.autograd.grad(y, v1, torch.ones_like(y))[0],
                                   oracle(v, g, x.sum(0).expand(4, 6), 0, kind)[1])


def test_transforms():
    v, g, G = draw((3, 4), 0, torch.float64)
    loss = lambda v, g: wF.weight_norm(v, g, 0, "ewn").sin().sum()  # noqa: E731
    plain = lambda v, g: reference.weight_norm(v, g, 0, "ewn").sin().sum()  # noqa: E731
    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd, torch.func.jacrev):
        torch.testing.assert_close(transform(loss)(v, g), transform(plain)(v, g))
    vs, gs = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(5, 3, 1, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(vs, gs),
                               torch.stack([torch.func.grad(plain)(a, b) for a, b in zip(vs, gs)]))
    with fwAD.dual_level():
        tangent = fwAD.unpack_dual(wF.weight_norm(fwAD.make_dual(v, G), g, 0, "swn")).tangent
    expected = torch.func.jvp(lambda v: reference.weight_norm(v, g, 0, "swn"), (v,), (G,))[1]
    torch.testing.assert_close(tangent, expected)


# ------------------------------------------------------------------------------------------------- compile and export


def operators():
    o = torch.ops.wnkernels
    v, g, G = draw((3, 4), 0, torch.float64)
    x, b, s = torch.randn(2, 4).double(), torch.randn(3).double(), torch.rand(3).double()
    for grad in (False, True):
        v, g, x, b = (t.detach().clone().requires_grad_(grad) for t in (v, g, x, b))
        for kind in KINDS:
            yield o.weight_norm, (v, g, 0, kind)
            yield o.weight_norm, (v.detach().float().requires_grad_(grad), g.detach().float(), 0, kind, torch.bfloat16)
            yield o.weight_norm_backward, (G, v, g, 0, kind)
            yield o.radius_backward, (G, v, g, 0, kind)
            yield o.linear_forward, (x, v, g, b, kind)
            yield o.linear_backward, (torch.randn(2, 3).double(), x, v, g, s, kind, True, True)
            for materialize in (None, True, False):
                yield o.weight_norm_linear, (x, v, g, b, kind, materialize)
        yield o.weight_norm, (v, g.flatten()[0], None, "swn")
        yield o.row_norm, (v, 1)
        yield o.row_scale, (v.detach(), g.detach(), "ewn")
    yield o.project_, (G.clone(), v.detach(), g.detach(), 0, "swn")
    yield o.normalize_, (G.clone(), 0, None, 2.0)


def test_opcheck():
    for operator, arguments in operators():
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind):
    def f(x, v, g):
        return wF.weight_norm_linear(x, wF.weight_norm(v, g, 1, kind), g.flatten()[: v.shape[0]], None, kind).sum()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, width in ((5, 7), (6, 9), (8, 8)):
        x, v, g = torch.randn(3, width), torch.randn(rows, width), torch.randn(1, width)
        a, b = leaves(x, v, g), leaves(x, v, g)
        torch.testing.assert_close(torch.autograd.grad(compiled(*a), a), torch.autograd.grad(f(*b), b))


def test_inductor_compiles():
    f = torch.compile(lambda v, g: wF.weight_norm(v * 2, g, 0, "ewn").relu().sum(), fullgraph=True)
    v, g = leaves(torch.randn(6, 7), torch.randn(6, 1))
    got = torch.autograd.grad(f(v, g), (v, g))
    expected = torch.autograd.grad(reference.weight_norm(v * 2, g, 0, "ewn").relu().sum(), (v, g))
    torch.testing.assert_close(got, expected)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x, v, g):
            return wF.weight_norm_linear(x, v, g, None, "swn")

    arguments = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5, 1)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Module(), arguments, dynamic_shapes=({0: batch}, None, None))
    x = torch.randn(9, 6)
    torch.testing.assert_close(program.module()(x, *arguments[1:]), Module()(x, *arguments[1:]))


# --------------------------------------------------------------------------------------------- range, zeros, non-finite


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape,dim", [((4, 5000), 0), ((4, 20), 0), ((300, 4), 1), ((3, 80000), 0), ((4, 4, 50), 1)])
@pytest.mark.parametrize("dtype,sizes", [(torch.float32, (1e-30, 1e30, 1e-38, 1.0)), (torch.float64, (1e-300, 1e300, 1e-200, 1.0)),
                                         (torch.bfloat16, (1e-30, 1e30, 1e-37, 1.0))])
def test_huge_and_tiny_rows(shape, dim, dtype, sizes, kind):
    v, g, G = draw(shape, dim, torch.float64)
    row_size = torch.tensor(sizes[: shape[dim]], dtype=torch.float64).reshape(radius_shape(shape, dim))
    v, g = (v * row_size).to(dtype), g.to(dtype)
    G = (G * row_size).to(dtype)  # so that dL/dv stays in range
    w, dv, dg = ours(v, g, G, dim, kind)
    # The oracle sees the same rounded numbers, scaled by powers of two that undo the size.
    unit = torch.exp2(row_size.log2().round())
    w_ref, dv_ref, dg_ref = oracle(v.double() / unit, g, G.double() / unit, dim, kind)
    rtol = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3}[dtype]
    size = g.double().abs().max().item() if kind == "swn" else g.double().exp().max().item()
    for got, expected, largest in ((w, w_ref, w_ref.abs().max().item()), (dv, dv_ref, dv_ref.abs().max().item()),
                                   (dg.double() / unit, dg_ref, max(1, size) * (G.double() / unit).norm().item())):
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=rtol * largest)
    n = wF.row_norm(v, dim).double()
    torch.testing.assert_close(n, reference.row_norm(v.double() / unit, dim) * unit.flatten(), rtol=rtol, atol=0)


def test_gradient_far_smaller_than_the_weight():
    """<v, G> underflows in float32 although neither row does."""
    v, G = torch.randn(3, 100) * 1e-10, torch.randn(3, 100) * 1e-30
    g = torch.ones(3, 1)
    _, dv, dg = ours(v, g, G, 0, "swn")
    _, dv_ref, dg_ref = oracle(v, g, G, 0, "swn")
    torch.testing.assert_close(dv.double(), dv_ref, rtol=1e-4, atol=1e-5 * dv_ref.abs().max().item())
    torch.testing.assert_close(dg.double(), dg_ref, rtol=1e-4, atol=1e-5 * dg_ref.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape,dim", [((3, 5), 0), ((3, 5), 1), ((3, 5000), 0), ((2, 3, 40), 1), ((40, 3, 2), 1)])
def test_zero_row(shape, dim, kind, dtype):
    v, g, G = draw(shape, dim, dtype)
    v.select(dim, 1).zero_()
    w, dv, dg = ours(v, g, G, dim, kind)
    for t in (w, dv, dg):
        assert bool((t.select(dim, 1) == 0).all()) and bool(t.isfinite().all())
    assert bool((w.select(dim, 0) != 0).any()) and bool((dv.select(dim, 0) != 0).any())


def test_zero_row_has_finite_derivatives_of_every_order():
    v, g, _ = draw((3, 4), 0, torch.float64)
    v[1] = 0
    v, g = leaves(v, g)
    first = torch.autograd.grad(wF.weight_norm(v, g, 0, "ewn").sin().sum(), (v, g), create_graph=True)
    second = torch.autograd.grad(sum(t.square().sum() for t in first), (v, g))
    n = torch.autograd.grad(wF.row_norm(v).sum(), v)[0]
    assert all(bool(t.isfinite().all()) for t in (*first, *second, n)) and bool((n[1] == 0).all())


@pytest.mark.parametrize("alpha", [-1e4, -200.0, -90.0, 90.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_alpha_never_gives_nan(alpha, dtype):
    v, G = torch.randn(2, 9, dtype=dtype), torch.randn(2, 9, dtype=dtype)
    v[:, 0] = G[:, 0] = 0
    for t in ours(v, torch.full((2, 1), alpha, dtype=dtype), G, 0, "ewn"):
        assert not bool(t.isnan().any())
    w = wF.weight_norm(v, torch.full((2, 1), alpha, dtype=dtype), 0, "ewn")
    assert bool((w[:, 0] == 0).all())
    if alpha == -90.0:  # subnormal radius: right to the spacing of subnormal numbers
        expected = reference.weight_norm(v.double(), torch.full((2, 1), alpha).double(), 0, "ewn")
        torch.testing.assert_close(w.double(), expected, rtol=1e-6, atol=1.5e-45)


@pytest.mark.parametrize("columns", [1, 2000])
def test_exponential_radius_is_right_to_the_last_bits(columns):
    """e^alpha over its whole range, where rows are solved side by side and where they are not."""
    alpha = torch.linspace(-745.0, 709.7, 3001, dtype=torch.float64)[:, None] + torch.rand(3001, 1, dtype=torch.float64) * 0.05
    v = torch.zeros(3001, columns, dtype=torch.float64)
    v[:, 0] = 1
    w = wF.weight_norm(v, alpha, 0, "ewn")
    torch.testing.assert_close(w[:, :1], alpha.exp(), rtol=5e-16, atol=1e-323)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("shape,dim", [((4, 50), 0), ((50, 4), 1), ((4, 7), 0), ((2, 40000), 0)])
def test_non_finite_gradient_stays_in_its_row(shape, dim, value):
    v, g, G = draw(shape, dim, torch.float32)
    clean = ours(v, g, G, dim, "swn")
    G.select(dim, 1)[3] = value
    dirty = ours(v, g, G, dim, "swn")
    for row in range(shape[dim]):
        same = [torch.equal(a.select(dim, row), b.select(dim, row)) for a, b in zip(clean[1:], dirty[1:])]
        assert all(same) if row != 1 else not any(same)
    assert not bool(dirty[2].select(dim, 1).isfinite().any())


# ----------------------------------------------------------------------------------------------------- in-place, memory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype,out_dtype", PAIRS)
def test_project(kind, dtype, out_dtype):
    for shape, dim in (((6, 50), 0), ((50, 6), 1), ((3, 4, 5), 1), ((40,), None), ((4, 6, 3, 3), 0)):
        v, g, G = draw(shape, dim, dtype, out_dtype)
        buffer, version = G.clone(), 0
        dg = wF.project_(buffer, v, g, dim, kind)
        _, dv_ref, dg_ref = oracle(v, g, G, dim, kind)
        assert buffer.dtype == out_dtype and buffer._version > version
        tolerance = dict(rtol=0, atol=4 * unit_roundoff(out_dtype) * dv_ref.abs().max().item() + 1e-6 * (dtype != torch.float64))
        torch.testing.assert_close(buffer.double(), dv_ref, **tolerance)
        torch.testing.assert_close(dg.double(), dg_ref, rtol=4 * unit_roundoff(dtype), atol=20 * unit_roundoff(dtype))
    v, g, G = draw((4, 6, 3, 3), 0, torch.float64)
    expected = oracle(v, g, G, 0, kind)[1]
    last = G.contiguous(memory_format=torch.channels_last)
    wF.project_(last, v, g, 0, kind)
    torch.testing.assert_close(last, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalize(dtype):
    for shape, dim in (((6, 50), 0), ((50, 6), 1), ((3, 4, 5), 1), ((40,), None), ((9, 4), 0)):
        w0 = torch.randn(shape).to(dtype)
        w, version = w0.clone(), 0
        assert wF.normalize_(w, dim, 2.0) is w and w._version > version
        torch.testing.assert_close(wF.row_norm(w, dim).double(), torch.full_like(wF.row_norm(w, dim).double(), 2.0),
                                   rtol=10 * unit_roundoff(dtype), atol=0)
        rows = torch.rand(() if dim is None else (shape[dim],)) + 0.5
        expected = reference.weight_norm(w0.double(), rows.double().reshape(radius_shape(shape, dim)), dim, "swn")
        torch.testing.assert_close(wF.normalize_(w0.clone(), dim, rows).double(), expected,
                                   rtol=4 * unit_roundoff(dtype), atol=0)
    w = torch.zeros(2, 3, dtype=dtype)
    assert bool((wF.normalize_(w) == 0).all())


def test_memory_outside_of_views_is_untouched():
    for dtype in DTYPES:
        block = torch.full((7, 40), 3.0).to(dtype)
        view = block[2:5]
        view.copy_(torch.randn(3, 40))
        wF.normalize_(view, 0)
        wF.project_(view, torch.randn(3, 40).to(dtype), torch.ones(3, 1).to(dtype), 0)
        assert bool((block[:2] == 3).all()) and bool((block[5:] == 3).all())


def test_outputs_are_written_everywhere():
    """A fresh output often lies where an old one lay: fill freed memory with NaN first."""
    for shape, dim in SHAPES:
        v, g, G = draw(shape, dim, torch.float32)
        for _ in range(3):
            poison = [torch.full(shape, math.nan) for _ in range(3)]
            del poison
            assert all(bool(t.isfinite().all()) for t in ours(v, g, G, dim, "swn")), (shape, dim)


def test_linear_allocates_nothing_weight_sized_that_a_plain_layer_does_not():
    v, g, b = leaves(torch.randn(1024, 1024), torch.ones(1024, 1), torch.zeros(1024))
    w, = leaves(torch.randn(1024, 1024))
    x, = leaves(torch.randn(4, 1024))

    def weight_sized(f):
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            y = f()
            torch.autograd.grad(y, [t for t in (x, v, g, b, w) if t is not None], torch.ones_like(y), allow_unused=True)
        return sum(1 for e in profile.profiler.kineto_results.events()
                   if e.name() == "[memory]" and e.nbytes() >= v.numel() * 4)

    plain = weight_sized(lambda: torch.nn.functional.linear(x, w, b))
    assert plain >= 1
    assert weight_sized(lambda: wF.weight_norm_linear(x, v, g, b, "swn", False)) == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 17, 31, 32, 45, 255])
def test_short_rows_do_not_depend_on_their_neighbours(length, kind, dtype):
    v, g, G = draw((150, length), 0, dtype)
    v[40], v[90], v[91] = 0, math.nan, 1e30  # each solves its tile of rows one by one
    together = ours(v, g, G, 0, kind)
    for rows in (slice(0, 40), slice(41, 90), slice(92, 150), slice(3, 4)):
        for a, b in zip(together, ours(v[rows], g[rows], G[rows], 0, kind)):
            assert torch.equal(a[rows], b)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    regular = torch.arange(150) != 90
    for a, b in zip(together, oracle(v, g, G, 0, kind)):
        torch.testing.assert_close(a[regular].double(), b[regular], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype, out_dtype", [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("length", [1024, 4128, 1030])
def test_outputs_that_no_cache_holds_have_the_same_bits(dtype, out_dtype, length):
    """From 32 MB on, where rows begin with a line of memory, outputs are stored around the caches."""
    rows = (33 << 20) // (length * out_dtype.itemsize) + 1
    v, g, G = draw((rows, length), 0, dtype, out_dtype)
    v[::7] *= 1e-38  # subnormal elements, and rows that leave the range
    g.abs_().add_(0.5)

    def parts():
        for i in range(0, rows, rows // 5):
            yield ours(v[i:i + rows // 5], g[i:i + rows // 5], G[i:i + rows // 5], 0, "swn", out_dtype)

    for whole, part in zip(ours(v, g, G, 0, "swn", out_dtype), zip(*parts())):
        assert torch.equal(whole, torch.cat(part))


@pytest.mark.parametrize("shape,dim", [((1000, 300), 0), ((3, 70001), 0), ((5000, 30), 1), ((60, 40, 9), 1), ((70000, 9), 0)])
def test_same_bits_for_any_number_of_threads(shape, dim):
    v, g, G = draw(shape, dim, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append((*ours(v, g, G, dim, "ewn"), wF.row_norm(v, dim)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# ---------------------------------------------------------------------------------------------------------- linear


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (3,), (0,), (2, 5)])
@pytest.mark.parametrize("materialize", [None, True, False])
def test_linear(kind, dtype, lead, materialize):
    for rows, width in ((6, 9), (40, 300)):
        x, v, b = (torch.randn(s).to(dtype) for s in ((*lead, width), (rows, width), (rows,)))
        g = torch.rand(rows, 1).to(dtype)
        G = torch.randn(*lead, rows).to(dtype)
        for bias in (None, b):
            t = leaves(x, v, g, *([] if bias is None else [bias]))
            y = wF.weight_norm_linear(*t[:3], t[3] if bias is not None else None, kind, materialize)
            got = (y.detach(), *torch.autograd.grad(y, t, G))
            d = leaves(*(u.double() for u in t))
            y64 = torch.nn.functional.linear(d[0], reference.weight_norm(d[1], d[2], 0, kind), d[3] if bias is not None else None)
            for a, e in zip(got, (y64.detach(), *torch.autograd.grad(y64, d, G.double()))):
                assert a.dtype == dtype
                scale = e.abs().max().item() if e.numel() else 0.0
                torch.testing.assert_close(a.double(), e, rtol=0, atol=12 * unit_roundoff(dtype) * scale)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_linear_where_the_unscaled_product_leaves_the_range(size):
    x, v, g = torch.randn(3, 70) * 1e15, torch.randn(5, 70), torch.ones(5, 1)
    v[2] *= size
    x, v, g = leaves(x, v, g)
    y = wF.weight_norm_linear(x, v, g, None, "swn", False)
    expected = torch.nn.functional.linear(x.double(), reference.weight_norm(v.double(), g.double()))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    dx = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0]
    torch.testing.assert_close(dx.double(), torch.autograd.grad(expected, x, torch.ones_like(expected))[0].double(),
                               rtol=1e-4, atol=1e-5)


def test_linear_never_meets_a_stale_norm():
    x, v, g = torch.randn(3, 300), torch.randn(300, 300), torch.ones(300, 1)
    for _ in range(3):
        y = wF.weight_norm_linear(x, v, g, None, "swn", False)
        torch.testing.assert_close(y, x @ reference.weight_norm(v, g).t(), rtol=1e-4, atol=1e-5)
        v.data.mul_(3.0)  # does not bump the version counter


def test_autocast():
    x, v, g, b = leaves(torch.randn(4, 30), torch.randn(20, 30), torch.rand(20, 1), torch.randn(20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = wF.weight_norm_linear(x, v, g, b)
        w = wF.weight_norm(v, g)
    assert y.dtype == torch.bfloat16 and w.dtype == torch.float32
    grads = torch.autograd.grad(y, (x, v, g, b), torch.ones_like(y))
    assert [t.dtype for t in grads] == [torch.float32] * 4
    expected = torch.nn.functional.linear(x.double(), reference.weight_norm(v.double(), g.double()), b.double())
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=4e-2)


# ---------------------------------------------------------------------------------------------------------- errors

V, G1 = torch.randn(3, 4), torch.randn(3, 1)
BAD_CALLS = [
    (ValueError, "kind must be 'swn'", lambda: wF.weight_norm(V, G1, 0, "gwn")),
    (ValueError, "dim must be None or in \\[-2, 1\\]", lambda: wF.weight_norm(V, G1, 2)),
    (ValueError, "dim must be None or in \\[-2, 1\\]", lambda: wF.row_norm(V, -3)),
    (ValueError, "g must have shape \\(3,\\)", lambda: wF.weight_norm(V, torch.randn(4, 1))),
    (ValueError, "g must have shape \\(3,\\)", lambda: wF.weight_norm(V, torch.randn(1, 3))),
    (ValueError, "g must have shape \\(3,\\)", lambda: wF.weight_norm(V, torch.tensor(1.0))),
    (ValueError, "g must be 0-d or all ones", lambda: wF.weight_norm(V, G1, None)),
    (TypeError, "g must have v's dtype", lambda: wF.weight_norm(V, G1.double())),
    (TypeError, "v must be float32", lambda: wF.weight_norm(V.int(), G1)),
    (TypeError, "v must be float32", lambda: wF.weight_norm(V.to(torch.complex64), G1)),
    (TypeError, "out_dtype must have v's dtype", lambda: wF.weight_norm(V, G1, 0, "swn", torch.float64)),
    (TypeError, "out_dtype must be float32", lambda: wF.weight_norm(V, G1, 0, "swn", torch.int32)),
    (TypeError, "weight_norm: g must be Tensor, got int", lambda: wF.weight_norm(V, 3)),
    (TypeError, "weight_norm: dim must be", lambda: wF.weight_norm(V, G1, "0")),
    (TypeError, "weight_norm: out_dtype must be torch.dtype", lambda: wF.weight_norm(V, G1, 0, "swn", "bf16")),
    (TypeError, "weight_norm_linear: x must be Tensor", lambda: wF.weight_norm_linear([1.0], V, G1)),
    (ValueError, "x must have shape \\(..., 4\\)", lambda: wF.weight_norm_linear(torch.randn(2, 3), V, G1)),
    (ValueError, "v must have 2 dimensions", lambda: wF.weight_norm_linear(torch.randn(2, 3), V[0], G1)),
    (TypeError, "x must have v's dtype", lambda: wF.weight_norm_linear(torch.randn(2, 4).double(), V, G1)),
    (ValueError, "bias must have shape \\(3,\\)", lambda: wF.weight_norm_linear(torch.randn(2, 4), V, G1, torch.randn(4))),
    (ValueError, "grad must have v's shape", lambda: wF.project_(torch.randn(4, 3), V, G1)),
    (TypeError, "grad must have v's dtype", lambda: wF.project_(torch.randn(3, 4).double(), V, G1)),
    (ValueError, "grad must be dense", lambda: wF.project_(torch.randn(3, 8)[:, ::2], V, G1)),
    (RuntimeError, "grad must not share memory with v", lambda: wF.project_(V, V, G1)),
    (RuntimeError, "not differentiable", lambda: wF.project_(torch.randn(3, 4, requires_grad=True), V, G1)),
    (ValueError, "w must be dense", lambda: wF.normalize_(torch.randn(3, 8)[:, ::2])),
    (ValueError, "norm must be a number or a tensor of shape \\(3,\\)", lambda: wF.normalize_(torch.randn(3, 4), 0, torch.ones(4))),
    (RuntimeError, "not differentiable", lambda: wF.normalize_(torch.randn(3, 4, requires_grad=True))),
    (RuntimeError, "g must be on v's device", lambda: wF.weight_norm(V, G1.to("meta"))),
]


@pytest.mark.parametrize("error,message,call", BAD_CALLS, ids=[m for _, m, _ in BAD_CALLS])
def test_bad_arguments(error, message, call):
    before = V.clone(), G1.clone()
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(V, before[0]) and torch.equal(G1, before[1])


def test_devices_without_a_kernel_get_the_formula_and_one_warning():
    """No such device is at hand; sparse tensors take the same route, up to an operation that they lack."""
    script = (
        "import torch, warnings, wnkernels\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2):\n"
        "        try: wnkernels.functional.row_norm(torch.eye(3).to_sparse())\n"
        "        except (RuntimeError, NotImplementedError): pass\n"
        "assert len([s for s in seen if 'no kernels for' in str(s.message)]) == 1, [str(s.message) for s in seen]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    for name in ("weight_norm", "weight_norm_backward", "radius_backward", "row_norm", "project_", "normalize_"):
        assert "CompositeExplicitAutograd" in torch._C._dispatch_dump(f"wnkernels::{name}")
