"""ResNets built of fused blocks: torchvision's names, state_dict and results, with the ImageNet or the CIFAR stem."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..nn import FusedBasicBlock, FusedBottleneck, FusedModule, parts, tail
from ..nn.onlookers import watched
from .keras import KerasBlock, from_keras

__all__ = [
    "KerasBlock",
    "ResNet",
    "from_keras",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]  # fmt: skip

Weights = str | os.PathLike[str] | Mapping[str, Tensor] | Any


class ResNet(FusedModule):
    """torchvision's ``ResNet`` of fused blocks: the same submodules, state_dict and results.

    Args:
        block: ``FusedBasicBlock`` or ``FusedBottleneck``.
        layers: the number of blocks in each of the four stages.
        num_classes: width of the last linear layer.
        stem: ``"imagenet"`` (7x7 stride 2, then max pooling) or ``"cifar"`` (3x3 stride 1, no pooling: images of
            some 32x32 pixels).
        zero_init_residual: start each residual branch at zero (the last gamma of every block).
        groups, width_per_group, replace_stride_with_dilation, norm_layer: as in torchvision.
        in_channels: channels of the image.
    """

    if TYPE_CHECKING:
        layer1: nn.Module
        layer2: nn.Module
        layer3: nn.Module
        layer4: nn.Module

    def __init__(
        self,
        block: type[FusedBasicBlock] | type[FusedBottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        stem: str = "imagenet",
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem: expected 'imagenet' or 'cifar', got {stem!r}")
        if len(layers) != 4:
            raise ValueError(f"layers: expected the number of blocks of four stages, got {list(layers)}")
        dilate = tuple(replace_stride_with_dilation or (False, False, False))
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation: expected three booleans, got {list(dilate)}")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.stem = stem
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        inplanes, dilation = 64, 1
        for i, count in enumerate(layers):
            planes, stride = 64 * 2**i, 1 if i == 0 else 2
            previous_dilation = dilation
            if i > 0 and dilate[i - 1]:
                dilation, stride = dilation * stride, 1
            blocks: list[nn.Module] = []
            for j in range(count):
                first = j == 0
                downsample = None
                if first and (stride != 1 or inplanes != planes * block.expansion):
                    downsample = nn.Sequential(
                        nn.Conv2d(inplanes, planes * block.expansion, 1, stride=stride, bias=False),
                        norm_layer(planes * block.expansion),
                    )
                blocks.append(
                    block(
                        inplanes,
                        planes,
                        stride if first else 1,
                        downsample,
                        groups,
                        width_per_group,
                        previous_dilation if first else dilation,
                        norm_layer,
                    )
                )
                inplanes = planes * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for m in self.modules():
                if isinstance(m, (FusedBasicBlock, FusedBottleneck)):
                    last: Any = getattr(m, f"bn{m._convs}")
                    if last.weight is not None:
                        nn.init.zeros_(last.weight)

    def _bypassed(self) -> Iterator[tuple[str, nn.Module | None]]:
        yield "conv1", self.conv1
        yield "bn1", self.bn1
        yield "relu", self.relu

    def _stem(self, x: Any) -> Any:
        if self.why_not_fused() is not None:
            for module in (self.conv1, self.bn1, self.relu):
                x = tail.call(module, x)
        elif parts.is_plain_max_pool(self.maxpool) and parts.why_not_bypassed(self.maxpool) is None:
            pool: Any = self.maxpool
            return tail.conv_bn_act_max_pool(self.conv1, self.bn1, pool, x, "relu", self.options)
        else:
            x = tail.conv_bn_act(self.conv1, self.bn1, x, None, "relu", self.options)
        return tail.call(self.maxpool, x)

    def _run(self, x: Any) -> Any:
        x = self._stem(x)
        for i in range(1, 5):
            x = tail.call(getattr(self, f"layer{i}"), x)
        return x

    def head(self, x: Tensor) -> Tensor:
        """The classes' logits from the last stage's output."""
        return self.fc(torch.flatten(self.avgpool(x), 1))

    @tail.runs_inside
    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # which then does not look at the rest
            return self._forward_unfused(x)
        else:
            return self._forward_unfused(x) if watched(x) else self.head(tail.leave(self._run(tail.enter(x))))

    def _forward_unfused(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.head(self.layer4(self.layer3(self.layer2(self.layer1(x)))))

    def run_inside(self, x: Any) -> Any:
        return tail.enter(self.head(tail.leave(self._run(x))))


def _state_dict(name: str, weights: Weights) -> Mapping[str, Tensor]:
    """The state_dict that ``weights`` stands for."""
    if isinstance(weights, Mapping):
        return weights
    if hasattr(weights, "get_state_dict"):  # a member of torchvision's enum
        return weights.get_state_dict(progress=True, check_hash=True)
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(
            f"weights: expected None, a checkpoint's path, a state_dict, 'DEFAULT' or one of torchvision's weights, "
            f"got a {type(weights).__name__}"
        )
    path = os.fspath(weights)
    if path == "DEFAULT" or path.startswith("IMAGENET1K"):
        from torchvision.models import get_model_weights

        return get_model_weights(name)[path].get_state_dict(progress=True, check_hash=True)
    if not os.path.exists(path):
        raise FileNotFoundError(f"weights: there is no file {path!r}")
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):  # what training scripts wrap it in
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    return loaded


def _build(
    name: str,
    block: type[FusedBasicBlock] | type[FusedBottleneck],
    layers: Sequence[int],
    weights: Weights | None,
    num_classes: int,
    stem: str,
    options: dict[str, Any],
) -> ResNet:
    model = ResNet(block, layers, num_classes, stem=stem, **options)
    if weights is None:
        return model
    state = _state_dict(name, weights)
    saved = state.get("fc.weight")
    if saved is not None and saved.shape[0] != num_classes:
        raise ValueError(
            f"num_classes: expected {saved.shape[0]}, the width of the checkpoint's fc, got {num_classes}; "
            "to fine-tune on other classes load with the checkpoint's number and replace model.fc"
        )
    saved = state.get("conv1.weight")
    if saved is not None and saved.shape != model.conv1.weight.shape:
        raise ValueError(
            f"stem: expected the one of the checkpoint, whose conv1.weight is {list(saved.shape)}, got {stem!r} with "
            f"{list(model.conv1.weight.shape)}"
        )
    model.load_state_dict(state, strict=True)
    return model


def resnet18(weights: Weights | None = None, num_classes: int = 1000, stem: str = "imagenet", **options: Any) -> ResNet:
    """ResNet-18 of fused blocks.

    Args:
        weights: None (random), a path (``.pth`` or ``.safetensors``), a state_dict, ``"DEFAULT"``,
            ``"IMAGENET1K_V1"`` or a member of torchvision's weights; loaded strictly.
        num_classes: width of the last layer.
        stem: ``"imagenet"`` or ``"cifar"``.
        options: as for :class:`ResNet`.
    """
    return _build("resnet18", FusedBasicBlock, (2, 2, 2, 2), weights, num_classes, stem, options)


def resnet34(weights: Weights | None = None, num_classes: int = 1000, stem: str = "imagenet", **options: Any) -> ResNet:
    """ResNet-34 of fused blocks; arguments as for :func:`resnet18`."""
    return _build("resnet34", FusedBasicBlock, (3, 4, 6, 3), weights, num_classes, stem, options)


def resnet50(weights: Weights | None = None, num_classes: int = 1000, stem: str = "imagenet", **options: Any) -> ResNet:
    """ResNet-50 of fused blocks; arguments as for :func:`resnet18`."""
    return _build("resnet50", FusedBottleneck, (3, 4, 6, 3), weights, num_classes, stem, options)


def resnet101(
    weights: Weights | None = None, num_classes: int = 1000, stem: str = "imagenet", **options: Any
) -> ResNet:
    """ResNet-101 of fused blocks; arguments as for :func:`resnet18`."""
    return _build("resnet101", FusedBottleneck, (3, 4, 23, 3), weights, num_classes, stem, options)


def resnet152(
    weights: Weights | None = None, num_classes: int = 1000, stem: str = "imagenet", **options: Any
) -> ResNet:
    """ResNet-152 of fused blocks; arguments as for :func:`resnet18`."""
    return _build("resnet152", FusedBottleneck, (3, 8, 36, 3), weights, num_classes, stem, options)
