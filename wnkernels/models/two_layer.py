"""Two-layer networks that are homogeneous of degree two in all of their weights."""

import torch
from torch import Tensor, nn

__all__ = ["TwoLayer"]

ACTIVATIONS = ("squared_relu", "relu")


class TwoLayer(nn.Module):
    """H(x) = sum_j h(x; w_j), with H(x; c w) = c^2 H(x; w) for c >= 0 (Kumar and Haupt, arXiv:2402.09226).

    All weights are one parameter, whose norm is that of the network: a polar step with dim=0 has a radius for
    each neuron, or, with instances, for each network; with dim=None one for all.

    Args:
        in_features: d.
        neurons: m.
        activation: "squared_relu", h(x; u) = max(0, <u, x>)^2, where a neuron is u, of dimension d; or
            "relu", h(x; (u, a)) = a max(0, <u, x>), where it is (u, a), of dimension d + 1.
        instances: None, or how many independent networks there are.
        scale: the standard deviation of the weights.
        dtype, device: as torch's.

    Parameters: weight, (m, d or d + 1), or (instances, m, d or d + 1).

    Raises: ValueError for another activation.
    """

    def __init__(
        self,
        in_features: int,
        neurons: int,
        activation: str = "squared_relu",
        *,
        instances: int | None = None,
        scale: float = 1.0,
        dtype=None,
        device=None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            allowed = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"activation must be one of {allowed}, got {activation!r}")
        self.in_features, self.activation, self.scale = in_features, activation, scale
        shape = neurons, in_features + (activation == "relu")
        if instances is not None:
            shape = instances, *shape
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """x: (n, d), or with instances also (instances, n, d). Returns H(x): (n,), or (instances, n).

        Raises: ValueError for an x of another last dimension.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} features, got shape {tuple(x.shape)}")
        active = torch.relu(x @ self.weight[..., : self.in_features].mT)  # (..., n, m)
        if self.activation == "relu":
            return (active @ self.weight[..., self.in_features :]).squeeze(-1)
        return active.square().sum(-1)

    def extra_repr(self) -> str:
        shape = tuple(self.weight.shape)
        return f"in_features={self.in_features}, weight={shape}, activation={self.activation!r}"
