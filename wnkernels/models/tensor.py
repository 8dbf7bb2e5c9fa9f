"""Linear tensor networks, f(x) = M(x) o (w_1, ..., w_L): Yun, Krishnan and Mobahi (arXiv:2010.02501).

M(x) is a tensor of order L that is linear in x, so that f is linear in x and in every layer: f(x) = <beta, x> with
coefficients beta(w_1, ..., w_L). Fully connected, diagonal and circular convolutional linear nets are of this kind.

Layer l is a parameter ``layer<l>`` of shape (R, ...): its row r belongs to the r-th of R independent instances, so that
weight normalization with ``dim=0`` has one norm for each layer of each instance.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..parametrize import weight_norm

__all__ = ["CircularConvNet", "DecomposableNet", "DiagonalTensorNet", "FullyConnectedNet", "TensorNet"]


class LinearTensorNet(nn.Module):
    """What the networks share; a subclass says what its coefficients are.

    Args:
        start: the layers to begin with, (R, *shape of a layer) each.
        kind: "swn" or "ewn" to normalize every layer (`wnkernels.weight_norm`), or None.
        dim: of the norms; 0 for one of each instance, None for one of the whole parameter.
    """

    def __init__(self, start: Sequence[Tensor], kind: str | None = None, dim: int | None = 0) -> None:
        super().__init__()
        if len(start) < 1 or len({len(w) for w in start}) != 1:
            raise ValueError("start must hold the layers, all of the same number of instances, got shapes "
                             f"{[tuple(w.shape) for w in start]}")
        self.depth = len(start)
        for l, w in enumerate(start, 1):
            self.register_parameter(f"layer{l}", nn.Parameter(w.detach().clone()))
            if kind is not None:
                weight_norm(self, f"layer{l}", dim, kind)

    @property
    def layers(self) -> list[Tensor]:
        """The weights of the layers, normalized where they are."""
        return [getattr(self, f"layer{l}") for l in range(1, self.depth + 1)]

    def coefficients(self, layers: Sequence[Tensor] | None = None) -> Tensor:
        """beta (R, d), of the given layers or of the module's own."""
        return self._coefficients(self.layers if layers is None else list(layers))

    def _coefficients(self, layers: list[Tensor]) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """f(x): (R, n) for x (n, d)."""
        return self.coefficients() @ x.mT

    def pullback(self, layers: Sequence[Tensor], u: Tensor) -> list[Tensor]:
        """The gradient of <beta, u> in every layer, M(u) o (all other layers).

        Args:
            layers: of the shapes of the module's own.
            u: (R, d) or (d,).
        """
        with torch.enable_grad():
            leaves = [w.detach().requires_grad_() for w in layers]
            beta = self._coefficients(leaves)
            return list(torch.autograd.grad(beta, leaves, u.expand_as(beta)))


class TensorNet(LinearTensorNet):
    """Any data tensor: M(x) = sum_i x_i T_i.

    Args:
        tensor: (d, k_1, ..., k_L).
        start: L layers, (R, k_l) each.
        kind, dim: see `LinearTensorNet`.
    """

    def __init__(self, tensor: Tensor, start: Sequence[Tensor], kind: str | None = None, dim: int | None = 0) -> None:
        if tuple(w.shape[-1] for w in start) != tuple(tensor.shape[1:]):
            raise ValueError(f"start must have layers of shape (R, k) for k in {tuple(tensor.shape[1:])}, got "
                             f"{[tuple(w.shape) for w in start]}")
        super().__init__(start, kind, dim)
        self.register_buffer("tensor", tensor)

    def _coefficients(self, layers: list[Tensor]) -> Tensor:
        value = self.tensor.flatten(0, -2) @ layers[-1].mT  # the last order contracted; instances come last
        for w in reversed(layers[:-1]):
            value = (value.view(-1, w.shape[1], w.shape[0]) * w.mT).sum(1)
        return value.mT


class DecomposableNet(LinearTensorNet):
    """Orthogonally decomposable: M(x) = sum_j (S x)_j u_{1,j} (x) ... (x) u_{L,j}, a diagonal net in inputs S x.

    Args:
        transform: S, (m, d).
        factors: U_1, ..., U_L, each (k_l, m) with orthonormal columns u_{l,j}.
        start: L layers, (R, k_l) each.
        kind, dim: see `LinearTensorNet`.
    """

    def __init__(self, transform: Tensor, factors: Sequence[Tensor], start: Sequence[Tensor], kind: str | None = None,
                 dim: int | None = 0) -> None:
        m = transform.shape[0]
        if [tuple(U.shape) for U in factors] != [(w.shape[-1], m) for w in start]:
            raise ValueError(f"factors must have shapes {[(w.shape[-1], m) for w in start]} for these transform and "
                             f"start, got {[tuple(U.shape) for U in factors]}")
        for l, U in enumerate(factors, 1):
            if not torch.allclose(U.mT @ U, torch.eye(m, dtype=U.dtype, device=U.device)):
                raise ValueError(f"the columns of factors must be orthonormal, those of U_{l} are not")
        super().__init__(start, kind, dim)
        self.register_buffer("transform", transform)
        for l, U in enumerate(factors, 1):
            self.register_buffer(f"factor{l}", U)

    def _factors(self) -> list[Tensor]:
        return [getattr(self, f"factor{l}") for l in range(1, self.depth + 1)]

    def rho(self, layers: Sequence[Tensor] | None = None) -> Tensor:
        """rho_j = prod_l (U_l^T w_l)_j, the coefficients of S x: (R, m)."""
        layers = self.layers if layers is None else layers
        return math.prod(w @ U for w, U in zip(layers, self._factors()))

    def _coefficients(self, layers: list[Tensor]) -> Tensor:
        return self.rho(layers) @ self.transform


class DiagonalTensorNet(LinearTensorNet):
    """f(x) = <x, w_1 * ... * w_L>. Args: start: L layers, (R, d) each; kind, dim: see `LinearTensorNet`."""

    def _coefficients(self, layers: list[Tensor]) -> Tensor:
        return math.prod(layers)

    @torch.no_grad()
    def pullback(self, layers: Sequence[Tensor], u: Tensor) -> list[Tensor]:
        """As in `LinearTensorNet`, by products from both ends: an order of magnitude less to call than autograd."""
        before = [u.expand_as(layers[0])]
        for w in layers[:-1]:
            before.append(before[-1] * w)
        after = layers[-1]
        gradients = [before[-1]]
        for w, product in zip(reversed(layers[:-1]), reversed(before[:-1])):
            gradients.append(product * after)
            after = after * w
        return gradients[::-1]


class CircularConvNet(LinearTensorNet):
    """Full-width circular convolutions: beta is the circular convolution of the layers.

    With the unitary transform F, (F beta)_j = d^{(L-1)/2} prod_l (F w_l)_j.
    Args: start: L layers, (R, d) each; kind, dim: see `LinearTensorNet`.
    """

    def _coefficients(self, layers: list[Tensor]) -> Tensor:
        return torch.fft.irfft(math.prod(torch.fft.rfft(w) for w in layers), n=layers[0].shape[-1])


class FullyConnectedNet(LinearTensorNet):
    """beta = W_1 W_2 ... W_L: f(x) = x^T W_1 ... W_L.

    Args: start: L - 1 matrices, (R, d_l, d_{l+1}) each, and a last vector (R, d_L); kind, dim: see `LinearTensorNet`.
    """

    def _coefficients(self, layers: list[Tensor]) -> Tensor:
        value = layers[-1][..., None]
        for W in reversed(layers[:-1]):
            value = W @ value
        return value[..., 0]
