"""Weight-normalized layers: subclasses of torch's, with the same arguments plus ``kind`` and ``dim``.

    layer = wnkernels.nn.Linear(512, 256, kind="ewn")

Their parameters are ``weight_v`` (the direction) and ``weight_g`` (SWN, w = g v/|v|) or ``weight_alpha`` (EWN,
w = e^alpha v/|v|); g and alpha have v's shape with 1 in the reduced dims, as in torch's weight_norm. A fresh layer has
v = w and g = |w| for the w that torch's layer draws, so that the same seed gives the same function.

``layer.weight`` is the effective weight w. Reading it computes it; assigning to it, or editing it in place as
``nn.init`` and ``layer.weight.data`` do, sets g (or alpha) and v to give that w. A row of zeros gets g = 0 and keeps
the direction it had, so that it can still learn; alpha has no such value, and an EWN layer refuses the row.

State dicts with a plain ``weight``, with ``weight_g``/``weight_v`` or ``weight_alpha``/``weight_v``, and with
``parametrizations.weight.original0``/``original1`` (of torch's or of `wnkernels.weight_norm`) all load, and are
converted where their kind is the other one.

There are no lazy layers: run one batch through ``torch.nn.LazyLinear`` and then `wnkernels.convert` the model.
"""

import copy
import threading
import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from . import functional

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Linear"]

# The name under which a kind keeps its radius parameter.
RADIUS_SUFFIX = {"swn": "_g", "ewn": "_alpha"}


# ----------------------------------------------------------------------------------- the parameters that stand for a w


def check_kind(kind: str) -> None:
    if kind not in RADIUS_SUFFIX:
        raise ValueError(f"kind must be 'swn' or 'ewn', got {kind!r}")


def check_dim(dim: int | None, w: Tensor) -> int | None:
    """`dim`, counted from the front."""
    if dim is None:
        return None
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an int or None, got {dim!r}")
    if not -w.ndim <= dim < w.ndim:
        raise ValueError(
            f"dim must be None or in [{-w.ndim}, {w.ndim - 1}] for a weight of shape {tuple(w.shape)}, got {dim}"
        )
    return dim % w.ndim


def radius_shape(w: Tensor, dim: int | None) -> tuple[int, ...]:
    """Of torch's g: w's shape with 1 in the reduced dims, or () where the norm is that of the whole tensor."""
    return () if dim is None else tuple(size if i == dim else 1 for i, size in enumerate(w.shape))


def log_radius(length: Tensor, source: str) -> Tensor:
    """alpha of rows that have these lengths."""
    zero = (length.reshape(-1) == 0).nonzero() if not length.is_meta else ()
    if len(zero):
        raise ValueError(
            f"row {zero[0].item()} of {source} is zero: its alpha would be log 0. "
            "EWN has no zero rows; use kind='swn', or give the row a length"
        )
    return length.log()


@torch.no_grad()
def radius_of(w: Tensor, dim: int | None, kind: str) -> Tensor:
    """|w| (SWN) or log |w| (EWN) of every row, in float32 or wider, of the shape of torch's g."""
    length = functional.row_norm(w, dim).reshape(radius_shape(w, dim))
    if kind == "swn":
        return length
    return log_radius(length, "the weight") if w.numel() else torch.zeros_like(length)  # no elements: any alpha will do


@torch.no_grad()
def polar_parts(w: Tensor, dim: int | None, kind: str, direction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(radius, v) that give w, with v = w except in zero rows, which take theirs from `direction`, or else (1, 1, ...).

    Raises: ValueError for a zero row and EWN.
    """
    radius = radius_of(w, dim, kind)
    if kind == "ewn":
        return radius, w.clone()
    if direction is None or direction.is_meta != w.is_meta:
        direction = torch.ones_like(w)
    return radius, torch.where(radius == 0, direction.to(w), w)


def radius_as(kind: str, radius: Tensor, v: Tensor, source_kind: str, source: str) -> tuple[Tensor, Tensor]:
    """(radius, v) of one kind as the (radius, v) of another that give the same w."""
    if kind == source_kind:
        return radius, v
    if kind == "swn":
        return radius.exp(), v
    return log_radius(radius.abs(), source), torch.where(radius < 0, -v, v)


@torch.no_grad()
def take_from_state_dict(
    state_dict: dict, prefix: str, name: str, kind: str, dim: int | None, direction: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Removes the weight `name`, in whichever form it is there, and returns its (radius, v) of `kind`, or None.

    ``original0`` is alpha if the marker ``parametrizations.<name>.0._extra_state``, which `wnkernels.weight_norm`
    writes for EWN, stands beside it; else it is g.

    Raises: ValueError for a plain weight of another shape than `direction`, and for a zero row and EWN.
    """
    parametrized = f"{prefix}parametrizations.{name}."
    marker = parametrized + "0._extra_state"
    forms = (
        *((k, (prefix + name + suffix, prefix + name + "_v")) for k, suffix in RADIUS_SUFFIX.items()),
        ("ewn" if marker in state_dict else "swn", (parametrized + "original0", parametrized + "original1")),
    )
    for source_kind, keys in forms:
        if all(key in state_dict for key in keys):
            radius, v = (state_dict.pop(key) for key in keys)
            state_dict.pop(marker, None)
            shape = radius_shape(v, dim)
            if radius.shape != shape and radius.numel() == torch.Size(shape).numel():
                radius = radius.reshape(shape)
            return radius_as(kind, radius, v, source_kind, keys[0])
    if prefix + name in state_dict:
        w = state_dict.pop(prefix + name)
        if w.shape != direction.shape:
            raise ValueError(
                f"size mismatch for {prefix}{name}: the state dict has shape {tuple(w.shape)}, "
                f"the module {tuple(direction.shape)}"
            )
        return polar_parts(w, dim, kind, direction)
    return None


# ------------------------------------------------------------------------------------------------ the effective weight

# What a computed tensor cannot have, because it would be lost with it.
_REFUSED = {"requires_grad_", "set_", "resize_", "resize_as_", "share_memory_"}


class EffectiveWeight(Tensor):
    """What ``layer.weight`` returns: the computed w, whose in-place edits reach the layer's parameters.

    w is not stored, so that an edit of it would be lost in silence. Instead it is made on the current w, and the result
    is assigned to the layer; this holds for views, ``.data`` and ``.detach()`` too, but not for what ``.numpy()``
    gives. Every other operation is that of a plain tensor, graph included, and gives plain tensors.
    """

    @staticmethod
    def of(w: Tensor, layer: nn.Module, whole: Tensor | None = None) -> "EffectiveWeight":
        """w, or a view of it, as the weight of `layer`; `whole` is all of w, without a graph."""
        alias = w.as_subclass(EffectiveWeight)
        alias._layer, alias._whole = layer, w.detach() if whole is None else whole
        return alias

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            edited = [x for x in _written_by(func, args, kwargs) if isinstance(x, cls)]
            if edited:
                return _edit(func, edited, args, kwargs)
            result = func(*args, **kwargs)
            source = next((x for x in args if isinstance(x, cls)), None)
            return result if source is None else _follow(result, source)

    def __reduce_ex__(self, protocol):
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__deepcopy__(memo)


def _written_by(func, args: tuple, kwargs: dict) -> list:
    """The arguments that torch's naming says `func` writes to."""
    name = func.__name__
    written = [kwargs["out"]] if kwargs.get("out") is not None else []
    in_place_operator = name.startswith("__i") and hasattr(Tensor, "__" + name[3:])  # __iadd__, and not __index__
    if in_place_operator or name in ("__set__", "__setitem__"):
        written.append(args[0])
    elif name.endswith("_") and not name.endswith("__"):
        written.append(args[0] if args else next(iter(kwargs.values())))
    return [x for group in written for x in (group if isinstance(group, (list, tuple)) else [group])]


def _edit(func, edited: list[EffectiveWeight], args: tuple, kwargs: dict):
    """Runs `func` on the current weight, and assigns what it made of it."""
    if func == Tensor.data.__set__:
        edited[0]._layer.weight = args[1]
        return None
    if func.__name__ in _REFUSED or func.__name__ == "__set__":
        raise RuntimeError(
            f"{func.__name__} on the effective weight of a {type(edited[0]._layer).__name__} would be lost, for it is "
            "computed from the layer's radius and weight_v: act on those, or on layer.weight.detach().clone()"
        )
    # The functions of nn.init turn recording off themselves.
    recorded = torch.is_grad_enabled() and getattr(func, "__module__", "") != "torch.nn.init"
    if recorded and any(x.requires_grad for x in edited):
        raise RuntimeError(
            f"{func.__name__}: the effective weight of a {type(edited[0]._layer).__name__} requires grad, and is "
            "edited in place: do so under torch.no_grad(), as with any parameter"
        )
    with torch.no_grad():
        for x in edited:
            x._whole.copy_(x._layer.effective_weight())
        result = func(*args, **kwargs)
        for x in edited:
            x._layer.weight = x._whole
    return result


def _follow(result, source: EffectiveWeight):
    """Views of a weight stay tied to its layer."""
    if type(result) in (tuple, list):
        return type(result)(_follow(x, source) for x in result)
    if type(result) is Tensor and result.untyped_storage()._cdata == source._whole.untyped_storage()._cdata:
        return EffectiveWeight.of(result, source._layer, source._whole)
    return result


# ----------------------------------------------------------------------------------------------------------- the layers


class _Running(threading.local):
    """The forward of a model that computes weights together (`wnkernels.foreach_weight_norm`), of this thread."""

    forward = None


running = _Running()
_compiling = torch.compiler.is_compiling


class WeightNormed(nn.Module):
    """What the layers share. It stands before torch's layer in the bases, whose constructor finds kind and dim set."""

    kind: str
    dim: int | None
    plain: type[nn.Module]  # torch's layer

    def _configure(self, kind: str, dim: int | None) -> None:
        check_kind(kind)
        self.kind, self.dim = kind, dim

    def __setattr__(self, name, value):
        if name == "weight":  # nn.Module would register a Parameter without asking the property
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def radius(self) -> Parameter:
        """The radius parameter: ``weight_g`` or ``weight_alpha``."""
        return self.weight_g if self.kind == "swn" else self.weight_alpha

    def effective_weight(self, out_dtype: torch.dtype | None = None) -> Tensor:
        """w as a plain tensor, differentiable, of out_dtype or the dtype of weight_v."""
        return functional.weight_norm(self.weight_v, self.radius, self.dim, self.kind, out_dtype)

    @property
    def weight(self) -> Tensor:
        """The effective weight w. In-place edits and assignments set the parameters (see the module's docstring)."""
        try:
            w = self.effective_weight()
        except AttributeError as error:  # nn.Module would report that there is no `weight`, and not what is missing
            raise RuntimeError(f"the effective weight of {type(self).__name__} cannot be computed: {error}") from error
        # Compilers and transforms trace plain tensors, and w is theirs to keep.
        traced = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
        return w if traced or type(w) is not Tensor else EffectiveWeight.of(w, self)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"weight must be a tensor, got {type(value).__name__}")
        if "weight_v" not in self._parameters:  # torch's constructor makes its weight
            self._register(value.new_empty(radius_shape(value, check_dim(self.dim, value))), value)
            return
        v = self.weight_v
        if value.shape != v.shape:
            raise ValueError(f"weight must have shape {tuple(v.shape)}, got {tuple(value.shape)}")
        if value.grad_fn is not None:
            raise TypeError("weight must be a tensor without a graph, which assigning would cut: detach() it first")
        radius, direction = polar_parts(value.detach(), self.dim, self.kind, v)
        if (value.dtype, value.device) == (v.dtype, v.device):
            with torch.no_grad():
                self.radius.copy_(radius)
                v.copy_(direction)
        else:
            self._register(radius.to(value.dtype), direction)

    def _register(self, radius: Tensor, v: Tensor) -> None:
        """(Re)places the parameters, before all others, as the weight comes first in torch's layers."""
        self.dim = check_dim(self.dim, v)
        old, others = self._parameters.get("weight_v"), dict(self._parameters)
        requires_grad = v.requires_grad if old is None else old.requires_grad
        self._parameters.clear()
        for name, value in (("weight" + RADIUS_SUFFIX[self.kind], radius), ("weight_v", v)):
            others.pop(name, None)
            self._parameters[name] = value if isinstance(value, Parameter) else Parameter(value, requires_grad)
        self._parameters.update(others)

    def reset_parameters(self) -> None:
        """Draws what torch's layer draws: v is its weight, g = |v| or alpha = log |v|."""
        super().reset_parameters.__func__(types.SimpleNamespace(weight=self.weight_v, bias=self.bias))
        with torch.no_grad():
            self.radius.copy_(radius_of(self.weight_v, self.dim, self.kind))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind!r}, dim={self.dim}"

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        try:
            parts = take_from_state_dict(state_dict, prefix, "weight", self.kind, self.dim, self.weight_v)
        except ValueError as error:
            args[-1].append(str(error))  # error_msgs: load_state_dict raises them together
            return
        if parts is not None:
            names = "weight" + RADIUS_SUFFIX[self.kind], "weight_v"
            state_dict.update(zip((prefix + name for name in names), parts))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _shared_weight(self) -> Tensor | None:
        """w as the forward uses it, where it has been computed with those of other layers."""
        if _compiling() or running.forward is None:
            return None
        return running.forward.weight_of(self)

    def _materialize(self) -> Tensor:
        """w in the dtype in which the forward uses it: under autocast one pass, without a cast."""
        w = self._shared_weight()
        if w is not None:
            return w
        if torch._C._is_any_autocast_enabled():  # asked first, so that torch.fx can trace the usual path
            v = self.weight_v
            device = v.device.type
            lowered = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
            if lowered and v.dtype == torch.float32:
                return self.effective_weight(torch.get_autocast_dtype(device))
        return self.effective_weight()

    @classmethod
    def from_plain(cls, module: nn.Module, kind: str = "swn", dim: int | None = 0) -> "WeightNormed":
        """A layer that computes what `module`, torch's layer, does. It shares nothing with it.

        Raises: TypeError if module is not exactly torch's layer; ValueError for a wrong kind or dim, or a zero row and
        EWN.
        """
        return cls.take_over(copy.deepcopy(module), kind, dim)

    @classmethod
    def take_over(cls, module: nn.Module, kind: str = "swn", dim: int | None = 0) -> "WeightNormed":
        """As `from_plain`, but `module` itself becomes the layer: its bias, hooks and whatever else it has stay."""
        if type(module) is not cls.plain:
            raise TypeError(f"module must be a torch.nn.{cls.plain.__name__}, got {type(module).__name__}")
        check_kind(kind)
        weight = module.weight
        radius, v = polar_parts(weight.detach(), check_dim(dim, weight), kind)
        del module._parameters["weight"]
        module.__class__ = cls
        module._configure(kind, dim)
        module._register(*(Parameter(x.to(weight.dtype), weight.requires_grad) for x in (radius, v)))
        return module

    def give_back(self) -> nn.Module:
        """Becomes torch's layer again, with w as its weight."""
        w = Parameter(self.effective_weight().detach(), self.weight_v.requires_grad)
        others = {k: p for k, p in self._parameters.items() if k not in ("weight_g", "weight_alpha", "weight_v")}
        self.__class__ = self.plain
        del self.kind, self.dim
        self._parameters.clear()
        self._parameters.update(weight=w, **others)
        return self


class Linear(WeightNormed, nn.Linear):
    """torch.nn.Linear with a normalized weight: y = x w^T + b, w = g v/|v| (SWN) or e^alpha v/|v| (EWN).

    Args:
        in_features, out_features, bias, device, dtype: as torch's.
        kind: "swn" or "ewn".
        dim: the dimension of the weight (out_features, in_features) that counts the rows; None for one norm of all.

    Parameters: weight_v (out_features, in_features); weight_g or weight_alpha, of v's shape with 1 in the reduced dims,
    () for ``dim=None``; bias (out_features,). With ``dim=0``, w is not formed where that is slower
    (`functional.weight_norm_linear`).

    Raises: ValueError for a wrong kind or dim.
    """

    plain = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        kind: str = "swn",
        dim: int | None = 0,
    ) -> None:
        self._configure(kind, dim)
        super().__init__(in_features, out_features, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        if self.dim == 0:
            w = self._shared_weight()
            if w is not None:
                return F.linear(input, w, self.bias)
            radius = self.weight_g if self.kind == "swn" else self.weight_alpha  # quicker than the property
            return functional.weight_norm_linear(input, self.weight_v, radius, self.bias, self.kind)
        return F.linear(input, self._materialize(), self.bias)


class _Conv(WeightNormed):
    """torch.nn.{name} with a normalized weight, w = g v/|v| (SWN) or e^alpha v/|v| (EWN).

    Args:
        in_channels ... dtype: as torch's.
        kind: "swn" or "ewn".
        dim: the dimension of the weight (out_channels, in_channels/groups, *kernel_size) that counts the rows; None for
            one norm of all.

    Parameters: weight_v, of the weight's shape; weight_g or weight_alpha, of v's shape with 1 in the reduced dims, ()
    for ``dim=None``; bias (out_channels,).

    Raises: ValueError for a wrong kind or dim.
    """

    def __init_subclass__(cls) -> None:
        cls.__doc__ = _Conv.__doc__.replace("{name}", cls.__name__)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        kind: str = "swn",
        dim: int | None = 0,
    ) -> None:
        self._configure(kind, dim)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self._materialize(), self.bias)


class Conv1d(_Conv, nn.Conv1d):
    plain = nn.Conv1d


class Conv2d(_Conv, nn.Conv2d):
    plain = nn.Conv2d


class Conv3d(_Conv, nn.Conv3d):
    plain = nn.Conv3d
