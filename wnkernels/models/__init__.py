"""The models that the papers study."""

from . import diagonal, homogeneous, tensor, two_layer

__all__ = ["diagonal", "homogeneous", "tensor", "two_layer"]
