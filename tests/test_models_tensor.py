"""Diagonal nets and linear tensor networks: their functions, gradients, ensembles, and normalization."""

import pytest
import torch

import wnkernels
from wnkernels.models.diagonal import DiagonalNet
from wnkernels.models.tensor import CircularConvNet, DecomposableNet, DiagonalTensorNet, FullyConnectedNet, TensorNet

F64 = torch.float64


def draw(*shape):
    return torch.randn(*shape, dtype=F64)


def orthonormal(k, m):
    return torch.linalg.qr(draw(k, m))[0]


def nets(kind=None, dim=0, rows=3):
    start = [draw(rows, k) for k in (3, 4, 5)]
    vectors = [draw(rows, 5) for _ in range(3)]
    return [
        TensorNet(draw(6, 3, 4, 5), start, kind, dim),
        DecomposableNet(draw(3, 6), [orthonormal(k, 3) for k in (3, 4, 5)], start, kind, dim),
        DiagonalTensorNet(vectors, kind, dim),
        CircularConvNet(vectors, kind, dim),
        FullyConnectedNet([draw(rows, 5, 4), draw(rows, 4, 3), draw(rows, 3)], kind, dim),
    ]


def test_coefficients_by_their_definitions():
    tensor, decomposable, diagonal, conv, dense = nets()
    a, b, c = tensor.layers
    expected = torch.einsum("dijk,ri,rj,rk->rd", tensor.tensor, a, b, c)
    torch.testing.assert_close(tensor.coefficients(), expected)
    a, b, c = decomposable.layers
    U = [getattr(decomposable, f"factor{l}") for l in (1, 2, 3)]
    full = torch.einsum("md,im,jm,km->dijk", decomposable.transform, *U)  # its data tensor
    torch.testing.assert_close(decomposable.coefficients(), torch.einsum("dijk,ri,rj,rk->rd", full, a, b, c))
    a, b, c = diagonal.layers
    torch.testing.assert_close(diagonal.coefficients(), a * b * c)
    a, b, c = conv.layers
    index = torch.arange(5)
    expected = torch.stack([
        sum(a[:, i] * b[:, j] * c[:, (n - i - j) % 5] for i in index for j in index) for n in index
    ], 1)
    torch.testing.assert_close(conv.coefficients(), expected)
    a, b, c = dense.layers
    torch.testing.assert_close(dense.coefficients(), torch.einsum("rij,rjk,rk->ri", a, b, c))


def test_forward_is_linear_in_x():
    for net in nets():
        x = draw(7, net.coefficients().shape[1])
        torch.testing.assert_close(net(x), net.coefficients() @ x.T)


def test_pullback_is_the_gradient_of_the_coefficients():
    for net in nets():
        layers = [w.detach().requires_grad_() for w in net.layers]
        u = draw(*net.coefficients().shape)
        expected = torch.autograd.grad((net.coefficients(layers) * u).sum(), layers)
        for mine, theirs in zip(net.pullback(layers, u), expected, strict=True):
            torch.testing.assert_close(mine, theirs)
        one = net.pullback(layers, u[0])  # one u for all instances
        torch.testing.assert_close(one[1][0], expected[1][0])


def test_instances_do_not_see_each_other():
    for net in nets():
        alone = [w[1:2] for w in net.layers]
        torch.testing.assert_close(net.coefficients(alone)[0], net.coefficients()[1])


@pytest.mark.parametrize("kind", ["swn", "ewn"])
@pytest.mark.parametrize("dim", [0, None])
def test_normalization_keeps_the_function_and_the_radius_per_instance(kind, dim):
    torch.manual_seed(1)
    plain = nets()
    torch.manual_seed(1)
    for net, other in zip(plain, nets(kind, dim)):
        torch.testing.assert_close(other.coefficients(), net.coefficients(), rtol=1e-12, atol=1e-12)
        radius = other.parametrizations["layer1"].original0
        assert radius.numel() == (3 if dim == 0 else 1)
        norm = net.layers[0].detach().flatten(1).norm(dim=1) if dim == 0 else net.layers[0].detach().norm()
        value = radius.detach().reshape(norm.shape)
        torch.testing.assert_close(value.exp() if kind == "ewn" else value, norm)
        wnkernels.fold(other)
        torch.testing.assert_close(other.coefficients(), net.coefficients(), rtol=1e-12, atol=1e-12)
        assert not hasattr(other, "parametrizations")


def test_a_negative_radius_is_a_negative_layer():
    net = DiagonalTensorNet([draw(2, 3), draw(2, 3)], "swn")
    before = net.coefficients().detach()
    with torch.no_grad():
        net.parametrizations["layer1"].original0[1].neg_()
    torch.testing.assert_close(net.coefficients()[0], before[0])
    torch.testing.assert_close(net.coefficients()[1], -before[1])


def test_tensor_nets_refuse():
    with pytest.raises(ValueError, match="start must have layers of shape"):
        TensorNet(draw(2, 3, 4), [draw(1, 3), draw(1, 5)])
    with pytest.raises(ValueError, match="same number of instances"):
        DiagonalTensorNet([draw(2, 3), draw(1, 3)])
    with pytest.raises(ValueError, match="factors must have shapes"):
        DecomposableNet(draw(3, 6), [orthonormal(4, 2), orthonormal(4, 3)], [draw(1, 4), draw(1, 4)])
    with pytest.raises(ValueError, match="orthonormal"):
        DecomposableNet(draw(3, 6), [orthonormal(4, 3), draw(4, 3)], [draw(1, 4), draw(1, 4)])


# -------------------------------------------------------------------------------------------------------- diagonal nets


@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("own_matrix", [False, True])
def test_diagonal_net_and_its_gradient(depth, two_sided, own_matrix):
    net = DiagonalNet(torch.rand(3, 14, dtype=F64), depth, two_sided)
    size = 7 if two_sided else 14
    A = draw(3, 5, size) if own_matrix else draw(5, size)
    y = draw(3, 5) if own_matrix else draw(5)
    w = net.weight.detach()
    signal = w[:, :7] ** depth - w[:, 7:] ** depth if two_sided else w**depth
    torch.testing.assert_close(net.signal(), signal)
    torch.testing.assert_close(net(A), torch.einsum("...mn,rn->rm" if not own_matrix else "rmn,rn->rm", A, signal))
    loss = (net(A) - y).square().sum() / 2
    grad, residual = net.gradient(w, net.matrix(A), y)
    torch.testing.assert_close(grad, torch.autograd.grad(loss, net.weight)[0])
    torch.testing.assert_close(residual, net(A) - y)


@pytest.mark.parametrize("kind", ["swn", "ewn"])
@pytest.mark.parametrize("dim", [0, None])
def test_normalized_diagonal_net(kind, dim):
    start = torch.rand(3, 8, dtype=F64)
    net = DiagonalNet(start, 3, True, kind, dim)
    torch.testing.assert_close(net.signal(), start[:, :4] ** 3 - start[:, 4:] ** 3)
    assert net.parametrizations.weight.original0.numel() == (3 if dim == 0 else 1)


def test_diagonal_net_refuses():
    for depth in (1, 2.0):
        with pytest.raises(ValueError, match="depth"):
            DiagonalNet(torch.ones(1, 4), depth)
    with pytest.raises(ValueError, match="start"):
        DiagonalNet(torch.ones(1, 5), 2, two_sided=True)
    with pytest.raises(ValueError, match="start"):
        DiagonalNet(torch.ones(4), 2)
    with pytest.raises(ValueError, match="kind"):
        DiagonalNet(torch.ones(1, 4), 2, kind="unit")
    with pytest.raises(ValueError, match="row"):
        DiagonalNet(torch.zeros(1, 4), 2, kind="ewn")


# ---------------------------------------------------------------------------------------- the ensembles of the papers


@pytest.mark.parametrize("kind", ["swn", "ewn", None])
@pytest.mark.parametrize("depth", [2, 3])
def test_an_ensemble_is_its_members_and_pure_torch(kind, depth):
    chou = pytest.importorskip("wnkernels.papers.chou")
    data = chou.problem(3)
    lr, eta = torch.tensor([0.02, 0.01, 0.005], dtype=F64), torch.tensor([0.1, 1.0, 0.4], dtype=F64)
    start = chou.constant_start([0.1, 0.03, 0.3])
    together = chou.descend(data.A, data.y, start, depth, kind, lr, eta, 300)
    for i in range(3):
        alone = chou.descend(data.A, data.y, start[i:i + 1], depth, kind, lr[i], eta[i], 300)
        torch.testing.assert_close(together.weight[i], alone.weight[0], rtol=1e-10, atol=1e-12)
    theirs = chou.descend(data.A, data.y, start, depth, kind, lr, eta, 300, backend="torch")
    torch.testing.assert_close(together.weight, theirs.weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(together.norm, theirs.norm, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["diagonal L=2", "diagonal L=3", "fully connected", "convolutional L=2"])
def test_ewn_flow_from_equal_norms_is_plain_flow_in_another_time(name):
    yun = pytest.importorskip("wnkernels.papers.yun")
    net = yun.nets_on_the_plane(yun.draws(5))[name]
    ours, theirs = (yun.separate(net, *yun.PAIR, backend, margin=30.0) for backend in ("wnkernels", "torch"))
    count = min(len(ours[0]), len(theirs[0]))
    assert count > 50 and ours[0][-1] >= 30
    torch.testing.assert_close(torch.tensor(ours[1][:count]), torch.tensor(theirs[1][:count]), rtol=1e-5, atol=1e-6)
