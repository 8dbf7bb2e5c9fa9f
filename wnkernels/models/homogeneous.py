"""Positively homogeneous networks: f(x; c w) = c^d f(x; w) for c > 0, of relu, relu^2 or linear units.

`mlp` and `convnet` build plain models; `normalize` gives them one radius per row or filter, per layer, or for
the vector of all weights, SWN or EWN, and takes it away again, and the function stays what it is. Morwani and
Ramaswamy (arXiv:2010.12909) study these; the first layer may have a bias, of the degree of its weight.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import functional, parametrize
from .. import nn as layers

__all__ = ["SquaredReLU", "WholeVector", "convnet", "degree", "mlp", "normalize"]


class SquaredReLU(nn.Module):
    """relu(x)^2, of degree 2."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).square()


ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and their degree
    "relu": (nn.ReLU, 1),
    "relu2": (SquaredReLU, 2),
    "linear": (nn.Identity, 1),
}


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {name!r}")
    return ACTIVATIONS[name][0]()


def _draw(module: nn.Module, seed: int | None) -> None:
    """He's normal initialization, in float32 as torch draws it, and biases of 0."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for layer in module:
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            drawn = torch.empty(layer.weight.shape, dtype=torch.float32)
            with torch.no_grad():
                layer.weight.copy_(nn.init.kaiming_normal_(drawn, nonlinearity="relu", generator=generator))
                if layer.bias is not None:
                    layer.bias.zero_()


def mlp(
    widths: Sequence[int],
    activation: str = "relu",
    *,
    bias: bool = False,
    seed: int | None = None,
    dtype=None,
    device=None,
) -> nn.Sequential:
    """Linear layers with activations between them.

    Args:
        widths: of input, hidden layers and output.
        activation: "relu", "relu2" (the square of relu) or "linear".
        bias: give the first layer a bias, with which the net is still homogeneous.
        seed: of He's normal initialization; None draws from torch's generator.
        dtype, device: of the parameters.

    Raises: ValueError for fewer than two widths, or another activation.
    """
    if len(widths) < 2:
        raise ValueError(f"widths must have at least an input and an output, got {list(widths)}")
    modules = []
    for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:])):
        modules += [_activation(activation)] if i else []
        modules.append(nn.Linear(fan_in, fan_out, bias=bias and i == 0, dtype=dtype, device=device))
    model = nn.Sequential(*modules)
    _draw(model, seed)
    return model


def convnet(
    channels: Sequence[int],
    classes: int,
    pool_after: Sequence[int] = (),
    activation: str = "relu",
    *,
    image: int,
    bias: bool = False,
    seed: int | None = None,
    dtype=None,
    device=None,
) -> nn.Sequential:
    """3x3 convolutions with padding 1, 2x2 max pooling after some of them, and a linear layer without bias.

    The paper's net for CIFAR-10 is channels=(3, 64, 64, 128, 128, 256, 256, 256, 512, ...), pool_after=(2, 4,
    7, 10, 13).

    Args:
        channels: of the input and of every convolution.
        classes: outputs of the linear layer.
        pool_after: after which convolutions (counted from 1) to pool.
        image: height and width of the input.
        activation, bias, seed, dtype, device: as of `mlp`.

    Raises: ValueError for no convolution, for another activation, and for an image that pooling makes empty.
    """
    if len(channels) < 2:
        raise ValueError(f"channels must have at least an input and an output, got {list(channels)}")
    modules, size = [], image
    for i, (fan_in, fan_out) in enumerate(zip(channels, channels[1:]), 1):
        modules.append(
            nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=bias and i == 1, dtype=dtype, device=device)
        )
        modules.append(_activation(activation))
        if i in pool_after:
            modules.append(nn.MaxPool2d(2))
            size //= 2
    if size == 0:
        raise ValueError(
            f"image must be at least {2 ** len(pool_after)} for {len(pool_after)} poolings, got {image}"
        )
    modules += [
        nn.Flatten(),
        nn.Linear(channels[-1] * size * size, classes, bias=False, dtype=dtype, device=device),
    ]
    model = nn.Sequential(*modules)
    _draw(model, seed)
    return model


def degree(model: nn.Module) -> int:
    """The d of f(x; c w) = c^d f(x; w), for a chain of linear or convolutional layers and activations.

    Raises: ValueError for a module that is not homogeneous, such as a second layer with a bias.
    """
    chain = model.model if isinstance(model, WholeVector) else model
    result = 0
    for module in chain:
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            if result and module.bias is not None:
                raise ValueError("only the first layer of a homogeneous net may have a bias")
            result += 1
        elif isinstance(module, SquaredReLU):
            result *= 2
        elif not isinstance(
            module, (nn.ReLU, nn.LeakyReLU, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.Flatten)
        ):
            raise ValueError(f"{type(module).__name__} is not known to be positively homogeneous")
    return result


# ---------------------------------------------------------------------------------------------- normalization


class WholeVector(nn.Module):
    """A model of which all weights together are one vector w = g v/|v| or e^alpha v/|v|.

    Biases and other parameters of one dim are left as they are.

    Args:
        model: a plain model; it is kept as ``model``, and its weights are computed.
        kind: "swn" or "ewn".

    Parameters: radius () and v (N,), with |v| = |w| at first.
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        layers.check_kind(kind)
        weights = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
        if not weights:
            raise ValueError("model must have weights of two dims or more, got none")
        self.kind, self.shapes = kind, {name: p.shape for name, p in weights.items()}
        v = torch.cat([p.detach().reshape(-1) for p in weights.values()])
        self.radius = nn.Parameter(layers.radius_of(v, None, kind).to(v.dtype))
        self.v = nn.Parameter(v)
        for name in weights:  # they are computed now, and no parameters
            owner, _, key = name.rpartition(".")
            model.get_submodule(owner)._parameters[key] = None
        self.model = model

    def weights(self) -> dict[str, Tensor]:
        """The weights by their names, with a graph."""
        w = functional.weight_norm(self.v, self.radius, None, self.kind)
        parts = w.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items())}

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.model, self.weights(), (x,))

    def plain(self) -> nn.Module:
        """The model with its weights as parameters again; self must not be used afterwards."""
        with torch.no_grad():
            for name, w in self.weights().items():
                owner, _, key = name.rpartition(".")
                self.model.get_submodule(owner)._parameters[key] = nn.Parameter(w.clone())
        return self.model


def normalize(model: nn.Module, kind: str | None, per: str = "row", exclude=None) -> nn.Module:
    """Gives the weights of a model polar coordinates, or others, or none; the function stays what it is.

    A negative g of SWN becomes a direction of the other sign in EWN. For SWN and EWN the new v is w, except
    that an unchanged (kind, per) changes nothing.

    Args:
        model: plain, or what this function returned. It is changed; use the result.
        kind: "swn", "ewn", or None for a plain model.
        per: "row" or "filter" (one radius for each output), "layer" (one for each weight), or "vector" (one
            in all).
        exclude: names of layers that stay plain, as of `wnkernels.convert`; not with "vector".

    Returns: the model, or a `WholeVector` around it.

    Raises: ValueError for another kind or per, for a row of zeros with EWN, and for exclude with "vector".
    """
    if per not in ("row", "filter", "layer", "vector"):
        raise ValueError(f"per must be 'row', 'filter', 'layer' or 'vector', got {per!r}")
    if kind is not None:
        layers.check_kind(kind)
    if per == "vector" and exclude is not None:
        raise ValueError("exclude must be None for per='vector', which takes all weights")
    if isinstance(model, WholeVector):
        if (model.kind, "vector") == (kind, per):
            return model
        model = model.plain()
    dim = None if per == "layer" else 0
    kept = {
        name
        for name, m in model.named_modules()
        if per != "vector"
        and isinstance(m, layers.WeightNormed)
        and (m.kind, m.dim) == (kind, dim)
        and (exclude is None or not parametrize._matches(exclude, name, m))
    }
    for name, module in model.named_modules():
        if isinstance(module, layers.WeightNormed) and name not in kept:
            module.give_back()
    if kind is None:
        return model
    if per == "vector":
        return WholeVector(model, kind)
    parametrize.convert(model, kind, dim, exclude=exclude)
    return model
