"""Dynamics of weight-normalized training: flows, descents, losses in the log domain, diagnostics, pruning."""

from . import descent, diagnostics, flow, losses, pruning, record
from .descent import multi_stage, normalized_descent, objective, polar_weights
from .diagnostics import Monitor
from .flow import polar_flow, weight_flow
from .record import Recorder

__all__ = [
    "Monitor",
    "Recorder",
    "descent",
    "diagnostics",
    "flow",
    "losses",
    "multi_stage",
    "normalized_descent",
    "objective",
    "polar_flow",
    "polar_weights",
    "pruning",
    "record",
    "weight_flow",
]
