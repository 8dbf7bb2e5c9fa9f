"""The CUDA kernels on a GPU against the specification in float64; skipped, with the reason, where there is none."""

import pytest
import torch
from test_functional import KINDS, PAIRS, SHAPES, draw, leaves, oracle, unit_roundoff

from wnkernels import functional as wF
from wnkernels import nn as wn

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
