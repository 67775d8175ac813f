"""What the training ops ask of their arguments; the message names the argument, what was expected and what was got."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.forward_mode import has_tangent

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_y(op: str, name: str, y: Tensor, like: Tensor | None = None) -> None:
    """``y`` is an activation, of the shape of ``like`` where that is given."""
    if y.dim() != 4 or y.dtype not in _FLOATING:
        raise ValueError(f"{op}: {name}: expected a floating-point [N, C, H, W] tensor, got {y.dtype} {list(y.shape)}")
    if like is not None and y.shape != like.shape:
        raise ValueError(f"{op}: {name}: expected the shape of y, {list(like.shape)}, got {list(y.shape)}")


def check_not_empty(op: str, name: str, y: Tensor) -> None:
    """There is something to take statistics of."""
    if y.numel() == 0:
        raise ValueError(f"{op}: {name}: expected at least one element, got shape {list(y.shape)}")


def check_vector(op: str, name: str, t: Tensor | None, channels: int) -> None:
    """``t`` has one entry per channel."""
    if t is not None and (t.dim() != 1 or t.shape[0] != channels):
        raise ValueError(f"{op}: {name}: expected shape [{channels}], the channels of y, got {list(t.shape)}")


def refuse_forward_mode(x: Tensor) -> None:
    """Raise under forward-mode differentiation: register_autograd knows nothing of it and would drop the tangents."""
    if has_tangent(x):
        raise NotImplementedError(
            "fused_resnet: forward-mode differentiation is not implemented; unfuse(model) first, or use reverse mode"
        )
