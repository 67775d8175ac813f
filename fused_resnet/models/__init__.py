"""ResNets of fused blocks, and weights from torchvision and Keras."""

from __future__ import annotations

from .keras import KerasBlock, from_keras
from .networks import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152

__all__ = ["KerasBlock", "ResNet", "from_keras", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
