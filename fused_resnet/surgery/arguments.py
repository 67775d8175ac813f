"""What the functions of surgery accept."""

from __future__ import annotations

import torch
from torch import nn

from .. import backends


class Frozen(nn.Module):
    """The base of frozen models, by which the functions for live ones tell them without importing what freezes."""

    model: nn.Module
    """The live model."""


def check_options(backend: str, winograd: str) -> None:
    """ValueError for an unknown backend or Winograd choice."""
    if backend != "auto":
        backends.get(backend)
    if winograd not in ("auto", "f2", "off"):
        raise ValueError(f"winograd: expected 'auto', 'f2' or 'off', got {winograd!r}")


def check_dtype(dtype: object) -> None:
    """ValueError for anything that a frozen model does not compute in."""
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected None, torch.bfloat16 or torch.float16, got {dtype!r}")


def require_module(model: object, function: str) -> None:
    """TypeError for anything that ``function`` does not take."""
    if isinstance(model, Frozen) and function not in ("freeze", "explain"):
        raise TypeError(f"{function}: model: expected a live model, got a frozen one; use its attribute .model")
    if isinstance(model, nn.Module):
        return
    got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
    raise TypeError(f"{function}: model: expected a torch.nn.Module, got {got}")
