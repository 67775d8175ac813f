"""Layers that ``kernels.kernelize`` puts in place of torchvision's blocks.

They are pure, as it demands: a forward and nothing else. All state is the adopting block's, read at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
        return _forward(self, blocks.FusedBasicBlock, _basic_block, x)


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
        return _forward(self, blocks.FusedBottleneck, _bottleneck, x)


def _forward(block: Any, fused: Any, run: Callable[[Any, Any], Any], x: Tensor) -> Tensor:
    """``fused`` is the class of which ``block`` has the submodules."""
    if watched(x) or blocks.why_not_bypassed(_bypassed(block, fused)) is not None:
        unfused: Tensor = fused._forward_unfused(block, x)
        return unfused
    y: Tensor = tail.leave(run(block, tail.enter(x)))
    return y


def _bypassed(block: Any, fused: Any) -> Iterator[tuple[str, nn.Module | None]]:
    for name in fused._names:
        yield name, block._modules.get(name)
    projection = fused._projection(block)
    if projection is not None:
        yield "downsample", block.downsample
        yield "downsample.0", projection[0]
        yield "downsample.1", projection[1]


def _basic_block(block: Any, x: Any) -> Any:
    h = tail.conv_bn_act(block.conv1, block.bn1, x, None, "relu", _OPTIONS)
    return _last(block, block.conv2, block.bn2, h, x)


def _bottleneck(block: Any, x: Any) -> Any:
    h = tail.conv_bn_act(block.conv1, block.bn1, x, None, "relu", _OPTIONS)
    h = tail.conv_bn_act(block.conv2, block.bn2, h, None, "relu", _OPTIONS)
    return _last(block, block.conv3, block.bn3, h, x)


def _last(block: Any, conv: nn.Conv2d, bn: nn.Module, h: Any, x: Any) -> Any:
    projection = blocks.FusedBasicBlock._projection(block)
    if projection is not None:
        return tail.conv_bn_proj_act(conv, bn, h, *projection, x, "relu", _OPTIONS)
    identity = x if block.downsample is None else tail.call(block.downsample, x)
    return tail.conv_bn_act(conv, bn, h, identity, "relu", _OPTIONS)
