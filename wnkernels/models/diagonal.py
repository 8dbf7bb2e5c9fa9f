"""Diagonal linear nets x = w^L, elementwise, and signed ones x = u^L - v^L: Chou, Rauhut and Ward (arXiv:2305.05448).

Many instances are the rows of one weight: the norm of a row (``dim=0``) is then that of one instance's whole vector,
and a step with rates per row runs them all at once.
"""

import torch
from torch import Tensor, nn

from ..parametrize import weight_norm

__all__ = ["DiagonalNet"]


class DiagonalNet(nn.Module):
    """R instances of y = A x with x = w^L, or x = u^L - v^L for w = (u, v).

    Args:
        start: (R, N), or (R, 2N) for two_sided: the weight w to begin with; positive, for x to be able to grow.
        depth: L >= 2.
        two_sided: whether signals have signs.
        kind: "swn" or "ewn" to normalize the weight (`wnkernels.weight_norm`), or None.
        dim: of the norm; 0 for one of each instance, None for one of all.

    Attributes: weight (R, N or 2N).

    Raises: ValueError or TypeError for arguments that are not as above.
    """

    def __init__(self, start: Tensor, depth: int, two_sided: bool = False, kind: str | None = None,
                 dim: int | None = 0) -> None:
        super().__init__()
        if not isinstance(depth, int) or depth < 2:
            raise ValueError(f"depth must be an integer of at least 2, got {depth!r}")
        if start.ndim != 2 or (two_sided and start.shape[1] % 2):
            raise ValueError(f"start must have shape (R, N), or (R, 2N) for two_sided, got {tuple(start.shape)}")
        self.depth, self.two_sided = depth, two_sided
        self.weight = nn.Parameter(start.detach().clone())
        if kind is not None:
            weight_norm(self, "weight", dim, kind)

    def signal(self, weight: Tensor | None = None) -> Tensor:
        """x (R, N), of the given weight or of the module's own."""
        power = (self.weight if weight is None else weight) ** self.depth
        if not self.two_sided:
            return power
        positive, negative = power.chunk(2, dim=-1)
        return positive - negative

    def forward(self, A: Tensor) -> Tensor:
        """A x: (R, M), for A of shape (M, N), or (R, M, N) with one matrix for each instance."""
        return _apply(A, self.signal())

    def matrix(self, A: Tensor) -> Tensor:
        """The matrix that acts on w^L: A, or [A, -A] for two_sided; (M, N or 2N), or (R, M, N or 2N)."""
        return torch.cat([A, -A], -1) if self.two_sided else A

    def gradient(self, weight: Tensor, matrix: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of sum ||A x - y||^2/2 at `weight`, in closed form: L w^{L-1} * matrix^T (A x - y).

        Args:
            weight: (R, N) or (R, 2N), without a graph.
            matrix: of A, see `matrix`.
            y: (M,) or (R, M).

        Returns: the gradient, of weight's shape, and the residual A x - y, (R, M).
        """
        before = weight if self.depth == 2 else weight ** (self.depth - 1)
        residual = _apply(matrix, before * weight) - y
        slope = residual @ matrix if matrix.ndim == 2 else torch.bmm(residual[:, None], matrix)[:, 0]
        return slope.mul_(before).mul_(self.depth), residual

    def extra_repr(self) -> str:
        return f"depth={self.depth}, two_sided={self.two_sided}"


def _apply(A: Tensor, x: Tensor) -> Tensor:
    return x @ A.mT if A.ndim == 2 else torch.bmm(A, x[:, :, None])[:, :, 0]
