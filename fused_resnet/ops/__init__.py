"""The operators, registered with torch.library when this package is imported."""

from __future__ import annotations

from . import autocast, conv_stats, tail, training, training_autograd
from .decomposed import decompositions
from .schemas import LIBRARY, NAMESPACE, SCHEMAS

__all__ = [
    "LIBRARY",
    "NAMESPACE",
    "SCHEMAS",
    "autocast",
    "conv_stats",
    "decompositions",
    "tail",
    "training",
    "training_autograd",
]
