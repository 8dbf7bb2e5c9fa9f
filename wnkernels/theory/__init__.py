"""Predictions in closed form, in numpy and scipy only: no kernel of ours, so that they can referee what the kernels do."""

from . import implicit_bias, margin

__all__ = ["implicit_bias", "margin"]
