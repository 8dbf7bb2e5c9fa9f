"""Weight normalization of existing modules, by name or for a whole model.

- `weight_norm` is torch.nn.utils.parametrizations.weight_norm on our kernels: for any module and tensor.
- `convert` turns the Linear and Conv layers of a model into those of `wnkernels.nn`, which are the faster form.
- `fold` takes both away again, and leaves a plain model with the same weights; `unfold` undoes `fold`.

All of them work in place and preserve the function that the model computes. Optimizers hold parameters: make them
afterwards.
"""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize

from . import functional
from . import nn as layers

LAYERS = {layer.plain: layer for layer in (layers.Linear, layers.Conv1d, layers.Conv2d, layers.Conv3d)}

Filter = Callable[[str, nn.Module], bool] | str | Iterable[str] | None


# ----------------------------------------------------------------------------------------------------- parametrization


class WeightNorm(nn.Module):
    """The parametrization w = g v/|v|, with original0 = g and original1 = v, as torch's."""

    kind = "swn"

    def __init__(self, dim: int | None) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, radius: Tensor, v: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and layers.running.forward is not None:
            w = layers.running.forward.weight_of(self, (radius, v))
            if w is not None:
                return w
        return functional.weight_norm(v, radius, self.dim, self.kind)

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        radius, v = layers.polar_parts(w, self.dim, self.kind)
        return radius.to(w.dtype), v

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, dim={self.dim}"


class ExponentialWeightNorm(WeightNorm):
    """The parametrization w = e^alpha v/|v|, with original0 = alpha and original1 = v.

    Its extra state tells a state dict's alpha from a g, which has the same name and shape.
    """

    kind = "ewn"

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(self.kind.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        if bytes(state.tolist()) != self.kind.encode():
            raise ValueError(f"the extra state of an EWN parametrization must be the bytes of 'ewn', got {state}")


def weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0, kind: str = "swn") -> nn.Module:
    """Normalizes the parameter `name` of `module`: w = g v/|v| (Salimans and Kingma 2016) or w = e^alpha v/|v|.

    As torch.nn.utils.parametrizations.weight_norm: the parameters are ``parametrizations.<name>.original0`` (g or
    alpha) and ``original1`` (v), ``torch.nn.utils.parametrize.remove_parametrizations`` takes it off, and state dicts
    are exchangeable with torch's for SWN. Beyond that the module pickles; a state dict with ``<name>_g`` or
    ``<name>_alpha`` and ``<name>_v``, or with a plain ``<name>``, loads; and SWN and EWN load each other's (EWN marks
    its own by ``parametrizations.<name>.0._extra_state``; without it original0 is a g). As with torch's, an edit of
    ``module.<name>`` in place is lost: assign to it.

    Args:
        module: any module.
        name: its parameter or buffer, of any shape.
        dim: the dimension that counts the rows; None for one norm of the whole tensor. Negative dims count from the
            end, but -1 is refused, because torch takes it for None.
        kind: "swn" or "ewn".

    Returns: module.

    Raises:
        ValueError: for a `name` that module does not have or that is parametrized already, a wrong `dim` or `kind`, or
            a row of zeros with EWN.
        TypeError: for a tensor that is not floating point, or a `dim` that is no int.
    """
    layers.check_kind(kind)
    if dim == -1:
        raise ValueError(
            "dim=-1 is refused: torch's weight_norm takes it for dim=None, the norm of the whole tensor. "
            "Say None, or the last dimension by its number"
        )
    if torch_parametrize.is_parametrized(module, name):
        raise ValueError(f"{name!r} of {type(module).__name__} is parametrized already: remove that one first")
    w = module._parameters.get(name, module._buffers.get(name))
    if w is None:
        raise ValueError(f"{type(module).__name__} has no parameter or buffer {name!r}")
    if not w.is_floating_point():
        raise TypeError(f"{name!r} must be a floating point tensor, got {w.dtype}")
    parametrization = (WeightNorm if kind == "swn" else ExponentialWeightNorm)(layers.check_dim(dim, w))
    torch_parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    _complete_class(type(module))
    return module


def _weight_norm_of(module: nn.Module, name: str) -> WeightNorm | None:
    first = module.parametrizations[name][0]
    return first if isinstance(first, WeightNorm) else None


def _complete_class(parametrized_class: type) -> None:
    """Adds pickling and loading to the class that torch makes for every parametrized module.

    pickle cannot find such a class, and torch forbids it; torch's deepcopy shares it between copies, so that removing a
    parametrization from one breaks the other. Both are told to make the class again instead.
    """
    parametrized_class.__reduce_ex__ = _reduce
    parametrized_class._load_from_state_dict = _load_from_state_dict
    for name in ("__getstate__", "__deepcopy__"):
        if name in vars(parametrized_class):
            delattr(parametrized_class, name)


def _reduce(self: nn.Module, protocol: int) -> tuple:
    plain = torch_parametrize.type_before_parametrizations(self)
    state = object.__reduce_ex__(self, max(protocol, 2))[2]
    return _rebuild, (plain, tuple(self.parametrizations)), state


def _rebuild(plain: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    module = plain.__new__(plain)
    torch_parametrize._inject_new_class(module)
    for name in names:
        torch_parametrize._inject_property(module, name)
    _complete_class(type(module))
    return module


def _load_from_state_dict(self: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    for name in self.parametrizations:
        norm, originals = _weight_norm_of(self, name), self.parametrizations[name]
        if norm is None:
            continue
        try:
            parts = layers.take_from_state_dict(state_dict, prefix, name, norm.kind, norm.dim, originals.original1)
        except ValueError as error:
            args[-1].append(str(error))  # error_msgs: load_state_dict raises them together
            return
        if parts is not None:
            parametrized = f"{prefix}parametrizations.{name}."
            state_dict[parametrized + "original0"], state_dict[parametrized + "original1"] = parts
            if norm.kind == "ewn":
                state_dict[parametrized + "0._extra_state"] = norm.get_extra_state()
    torch_parametrize.type_before_parametrizations(self)._load_from_state_dict(self, state_dict, prefix, *args)


# -------------------------------------------------------------------------------------------------------- whole models


def _matches(filter: Filter, name: str, module: nn.Module) -> bool:
    if callable(filter):
        return filter(name, module)
    return any(fnmatchcase(name, pattern) for pattern in ([filter] if isinstance(filter, str) else filter))


def convert(
    model: nn.Module, kind: str = "swn", dim: int | None = 0, include: Filter = None, exclude: Filter = None
) -> list[str]:
    """Turns torch's Linear and Conv1d, 2d, 3d layers of a model into those of `wnkernels.nn`, in place.

    The modules stay the objects they are, with their hooks and biases. Subclasses of torch's layers are left alone, for
    they may compute something else; use `weight_norm` on those.

    Args:
        model: any module; may itself be a layer.
        kind, dim: of all converted layers.
        include: which layers: a function of (name, module), or one or several patterns as of `fnmatch` for the name.
            None for all.
        exclude: which of them not. None for no exception.

    Returns: the names of the converted layers, "" for the model itself.

    Raises: ValueError, before anything is changed, for a wrong kind or dim, for a weight that another parameter of the
    model is tied to (exclude it), and for a row of zeros with EWN.
    """
    layers.check_kind(kind)
    chosen = {
        name: module
        for name, module in model.named_modules()
        if type(module) in LAYERS
        and (include is None or _matches(include, name, module))
        and (exclude is None or not _matches(exclude, name, module))
    }
    uses = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                uses.setdefault(parameter, []).append(f"{name}.{key}".lstrip("."))
    for name, module in chosen.items():
        if len(uses[module.weight]) > 1:
            tied = " and ".join(uses[module.weight])
            raise ValueError(f"{tied} are one parameter: exclude layer {name!r}, or untie them")
        try:
            layers.radius_of(module.weight, layers.check_dim(dim, module.weight), kind)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
    for module in chosen.values():
        LAYERS[type(module)].take_over(module, kind, dim)
    return list(chosen)


class Folded(NamedTuple):
    """How a weight was normalized: `layer` tells a layer of `wnkernels.nn` from a parametrization."""

    kind: str
    dim: int | None
    layer: bool


def fold(model: nn.Module) -> dict[str, Folded]:
    """Replaces our layers by torch's, and removes the parametrizations of `weight_norm`, in place.

    What is left is a plain model with the weights that the normalized one had. The norm of v is forgotten.

    Args:
        model: any module; may itself be a layer.

    Returns: what was folded, for `unfold`: the name of the weight -> (kind, dim, layer).

    Raises: TypeError, before anything is changed, for a subclass of our layers, which has no plain form.
    """
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, layers.WeightNormed) and LAYERS.get(module.plain) is not type(module):
            raise TypeError(f"module {name!r} is a {type(module).__name__}, for which no plain layer is known")
    folded = {}
    for name, module in modules.items():
        prefix = f"{name}." if name else ""
        if isinstance(module, layers.WeightNormed):
            folded[prefix + "weight"] = Folded(module.kind, module.dim, layer=True)
            module.give_back()
        elif torch_parametrize.is_parametrized(module):
            for tensor in tuple(module.parametrizations):
                norm = _weight_norm_of(module, tensor)
                if norm is not None:
                    folded[prefix + tensor] = Folded(norm.kind, norm.dim, layer=False)
                    _remove(module, tensor)
    return folded


def _remove(module: nn.Module, name: str) -> None:
    originals = module.parametrizations[name]
    was_parameter = isinstance(originals.original1, nn.Parameter)
    torch_parametrize.remove_parametrizations(module, name)
    if was_parameter and name in module._buffers:  # where torch puts what needs no gradient
        frozen = nn.Parameter(module._buffers[name], requires_grad=False)
        delattr(module, name)
        module.register_parameter(name, frozen)


def unfold(model: nn.Module, folded: Mapping[str, Folded]) -> None:
    """Normalizes again what `fold` made plain, in place, from the weights as they are now (v = w).

    Args:
        model: the model that was folded, or one of the same structure.
        folded: what `fold` returned.

    Raises: AttributeError for a module that is not there; TypeError and ValueError as `convert` and `weight_norm`.
    """
    for path, (kind, dim, layer) in folded.items():
        name, _, tensor = path.rpartition(".")
        module = model.get_submodule(name)
        if not layer:
            weight_norm(module, tensor, dim, kind)
        elif type(module) in LAYERS:
            LAYERS[type(module)].take_over(module, kind, dim)
        else:
            raise TypeError(f"module {name!r} must be a plain layer to unfold, got {type(module).__name__}")
