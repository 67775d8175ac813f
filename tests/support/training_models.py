"""A small ResNet of the tails that the fused blocks run, for tests of the loop around them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_resnet.nn import tail


class Block(nn.Module):
    """Basic block with a projection; stride 2 halves the image."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv_proj = nn.Conv2d(inputs, outputs, 1, 2, bias=False)
        self.bn_proj = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = tail.conv_bn_act(self.conv1, self.bn1, x)
        return tail.leave(tail.conv_bn_proj_act(self.conv2, self.bn2, h, self.conv_proj, self.bn_proj, x))


class SmallResNet(nn.Module):
    def __init__(self, classes: int = 10, channels: int = 1, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = Block(width, 2 * width)
        self.layer2 = Block(2 * width, 4 * width)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = tail.leave(tail.conv_bn_act(self.conv1, self.bn1, x))
        return self.fc(torch.flatten(self.layer2(self.layer1(x)).mean((2, 3)), 1))


def small_resnet(classes: int, channels: int) -> SmallResNet:
    return SmallResNet(classes, channels)
