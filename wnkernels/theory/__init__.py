"""Predictions in closed form, in numpy and scipy only: no kernel of ours, so that they can referee the kernels."""

from . import implicit_bias, margin, rates, spherical, two_homogeneous

__all__ = ["implicit_bias", "margin", "rates", "spherical", "two_homogeneous"]
