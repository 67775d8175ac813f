"""Layers that ``kernels.kernelize`` puts in place of torchvision's blocks.

They are pure, as it demands: a forward and nothing else. All state is the adopting block's, read at each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .nn import blocks, tail
from .nn.onlookers import watched

_OPTIONS = tail.Options()


class BasicBlock(nn.Module):
    """The forward of ``torchvision.models.resnet.BasicBlock``, in two launches."""

    can_torch_compile: bool = True
    conv1: nn.Conv2d
    bn1: nn.Module
    conv2: nn.Conv2d
    bn2: nn.Module
    relu: nn.Module
    downsample: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, blocks.FusedBasicBlock, blocks.run_basic_block, x)


class Bottleneck(nn.Module):
    """The forward of ``torchvision.models.resnet.Bottleneck``, in three launches."""

    can_torch_compile: bool = True
    conv1: nn.Conv2d
    bn1: nn.Module
    conv2: nn.Conv2d
    bn2: nn.Module
    conv3: nn.Conv2d
    bn3: nn.Module
    relu: nn.Module
    downsample: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, blocks.FusedBottleneck, blocks.run_bottleneck, x)


def _forward(block: Any, fused: Any, run: Callable[[Any, Any, tail.Options], Any], x: Tensor) -> Tensor:
    """``fused`` is the class of which ``block`` has the submodules."""
    if watched(x) or blocks.why_not_bypassed(blocks.bypassed_of(block, fused._names)) is not None:
        unfused: Tensor = fused._forward_unfused(block, x)
        return unfused
    y: Tensor = tail.leave(run(block, tail.enter(x), _OPTIONS))
    return y
