"""oneDNN's own fused convolutions, reached through torch's private mkldnn operators: the strongest CPU rival in torch.

Weights are folded and reordered once, activations stay in channels_last, residual and ReLU are oneDNN post-ops.
It is what torch.compile with freezing emits, without its Python and its other choices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.core.reference import ConvBN, TailArguments, scale_shift


class PackedConv:
    """A folded convolution with its weights in oneDNN's own order."""

    def __init__(
        self,
        conv: ConvBN,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...] = (1, 1),
        groups: int = 1,
        input_size: list[int] | None = None,
    ) -> None:
        scale, shift = scale_shift(conv)
        weight = conv.weight if scale is None else conv.weight * scale.view(-1, 1, 1, 1)
        self.bias = shift
        self.arguments = (list(padding), list(stride), list(dilation), groups)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight.contiguous(), *self.arguments, input_size)

    def __call__(self, x: Tensor, relu: bool) -> Tensor:
        attribute = "relu" if relu else "none"
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.arguments, attribute, [], "")

    def add(self, x: Tensor, residual: Tensor, relu: bool, keep: bool = False) -> Tensor:
        """Convolution, plus ``residual``, ReLU: the sum is a post-op that writes over a copy the caller gives up.

        With ``keep`` the residual stays as it is, as a caller of ours may expect, and the output has memory of its own.
        """
        attribute = "relu" if relu else None
        if keep:
            return torch.ops.mkldnn._convolution_pointwise.binary(
                x, residual, self.weight, self.bias, *self.arguments, "add", 1.0, attribute, [], None
            )
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, x, self.weight, self.bias, *self.arguments, "add", 1.0, attribute, [], None
        )


def tail(t: TailArguments, keep: bool = False) -> Callable[..., Tensor]:
    """The tail of ``t``; the residual is overwritten, as a compiler does with a value that nobody reads again.

    With ``keep`` it is not.
    """
    relu = t.activation == "relu"
    conv = PackedConv(t.conv, t.stride, t.padding, t.dilation, t.groups, list(t.x.shape))
    if t.proj is not None and t.proj_x is not None:
        proj = PackedConv(t.proj, t.proj_stride, (0, 0), input_size=list(t.proj_x.shape))
        return lambda x, proj_x: conv.add(x, proj(proj_x, relu=False), relu)
    if t.residual is None:
        return lambda x: conv(x, relu)
    return lambda x, residual: conv.add(x, residual, relu, keep)


def _packed(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> PackedConv:
    gamma, beta = bn.weight.detach(), bn.bias.detach()
    part = ConvBN(conv.weight.detach(), None, gamma, beta, bn.running_mean, bn.running_var, bn.eps)
    padding: Any = conv.padding
    return PackedConv(part, conv.stride, padding, conv.dilation, conv.groups)


def network(model: Any) -> Callable[[Tensor], Tensor]:
    """A torchvision ResNet of BasicBlocks or Bottlenecks, every convolution one oneDNN call."""
    blocks = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            depth = 3 if hasattr(block, "conv3") else 2
            pairs = [(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in range(1, depth + 1)]
            down = None if block.downsample is None else _packed(*block.downsample)
            blocks.append(([_packed(*pair) for pair in pairs], down))
    stem, fc = _packed(model.conv1, model.bn1), model.fc

    def run(x: Tensor) -> Tensor:
        x = model.maxpool(stem(x, relu=True))
        for convs, down in blocks:
            identity = x if down is None else down(x, relu=False)
            h = x
            for conv in convs[:-1]:
                h = conv(h, relu=True)
            x = convs[-1].add(h, identity, relu=True)
        return fc(x.mean((2, 3)))

    return run
