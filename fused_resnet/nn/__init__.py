"""Blocks that are built fused, with torchvision's names and ``state_dict`` keys."""

from __future__ import annotations

from .blocks import FusedBasicBlock, FusedBottleneck, FusedConvBNReLU, FusedModule

__all__ = ["FusedBasicBlock", "FusedBottleneck", "FusedConvBNReLU", "FusedModule"]
