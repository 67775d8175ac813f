"""Networks to freeze, and their answers compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fused_resnet
from fused_resnet.core import extensions
from tests.support.surgery_helpers import randomise

needs_extension = pytest.mark.skipif(extensions.cpu() is None, reason=str(extensions.why_not_cpu()))


class Stages(nn.Module):
    """Hands out the value of each stage, as detectors want it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(32, 32), BasicBlock(32, 32))
        down = nn.Sequential(nn.Conv2d(32, 48, 1, 2, bias=False), nn.BatchNorm2d(48))
        self.layer2 = nn.Sequential(BasicBlock(32, 48, 2, down), nn.Identity())

    def forward(self, x: Tensor) -> Any:
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return {"1": x, "2": [self.layer2(x)]}


class Branching(nn.Module):
    """A decision by values, between what can be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(BasicBlock(32, 32)), nn.Sequential(BasicBlock(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) if float(y.mean()) > 0.1 else y


class Squeeze(BasicBlock):
    """Something that is no tail between two tails."""

    def __init__(self) -> None:
        super().__init__(32, 32)
        self.gate = nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return self.relu(y + x)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7), 3),
    "bottlenecks": (lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=7), 3),
    "resnext": (lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=7, groups=4, width_per_group=8), 3),
    "own": (lambda: fused_resnet.models.ResNet(fused_resnet.FusedBasicBlock, [1, 1, 1, 1], num_classes=7), 3),
    "own, cifar": (
        lambda: fused_resnet.models.ResNet(fused_resnet.FusedBottleneck, [1, 1, 1, 1], num_classes=7, stem="cifar"),
        3,
    ),
    "block": (lambda: fused_resnet.FusedBasicBlock(32, 32), 32),
    "sequential": (lambda: nn.Sequential(BasicBlock(32, 32), nn.Identity(), nn.Tanh(), BasicBlock(32, 32)), 32),
    "stages": (Stages, 3),
    "branching": (Branching, 32),
    "squeeze": (lambda: nn.Sequential(Squeeze(), BasicBlock(32, 32)), 32),
    "no tail": (lambda: nn.Sequential(nn.Conv2d(32, 8, 3), nn.Tanh()), 32),
    "no statistics": (
        lambda: nn.Sequential(
            BasicBlock(32, 32, norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False)), BasicBlock(32, 32)
        ),
        32,
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return randomise(MODELS[name][0](), dtype).eval()


def image(name: str, size: int = 33, batch: int = 2, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, MODELS[name][1], size, size + 2, generator=generator)


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [t for item in items for t in flat(item)]


def assert_close(got: Any, expected: Any, rtol: float = 1e-4) -> None:
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))
