"""The 3 x 3 convolutions of a training step by our own Winograd F(2x2, 3x3): forward, d_x and d_weight.

float32 on the CPU. Each of the three multiplies 16 times for the 36 of direct convolution. The weights are new in
every step, so their transform is paid in every step, twice: for the forward pass, and turned by 180 degrees with
input and output channels exchanged for the input's gradient. :func:`pays` weighs that.

F(2x2) and not F(4x4): its coefficients are 0, +-1 and +-1/2, so it rounds no more than direct convolution and
gradients meet the same bar. NaN: the forward pass and d_x have it wherever eager has it and nowhere else; in d_weight
it reaches all nine taps of a filter's channel, where eager may leave out the taps that never meet a pixel at the
border. Inf may become NaN. ``FUSED_RESNET_WINOGRAD=off`` leaves everything to oneDNN.
"""

from __future__ import annotations

import os
from functools import lru_cache

import torch
from torch import Tensor

from .. import _extension
from ..layout import output_memory_format
from .training_base import ConvGeometry

_TILE = 2
_NO_BN = (None, None, None, None, 0.0)

#: Transforming one pair of input and output channels costs as much as so many tiles' multiply-adds with it.
_TILES_PER_PACK = 100
#: The same of d_weight's transform, which writes 9 values, not 16, and is shared out along with the multiply-adds.
_TILES_PER_FILTER_GRADIENT = 20
#: Transforming one input (output) tile costs as much as multiplying its positions for so many output (input) channels.
_TRANSFORM_CHANNELS = 10


@lru_cache(maxsize=1024)
def pays(tiles: int, c: int, k: int, overhead: int = _TILES_PER_PACK) -> bool:
    """Whether F(2x2) is expected to beat direct convolution, both counted in multiply-adds.

    Direct convolution makes 36 per tile and pair of channels, F(2x2) 16, and its transforms on top.
    """
    transforms = tiles * _TRANSFORM_CHANNELS * (c + k)
    return 16 * ((tiles + overhead) * c * k + transforms) < 36 * tiles * c * k


def _tiles(x: Tensor, geometry: ConvGeometry) -> int:
    p, q = (x.shape[dim] + 2 * geometry.padding[dim - 2] - 2 for dim in (2, 3))
    return x.shape[0] * -(-p // _TILE) * -(-q // _TILE)


def why_not(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> str | None:
    """None where these kernels compute this convolution, else one sentence why not."""
    if x.device.type != "cpu":
        return f"cpu: x must be on the CPU, got {x.device}"
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return f"cpu: Winograd computes in float32, got {x.dtype} and {weight.dtype}"
    if tuple(weight.shape[2:]) != (3, 3):
        return f"cpu: Winograd needs a 3 x 3 filter, got {weight.shape[2]} x {weight.shape[3]}"
    if geometry.stride != (1, 1) or geometry.dilation != (1, 1) or geometry.groups != 1:
        return f"cpu: Winograd needs stride 1, dilation 1 and one group, got {geometry}"
    if max(geometry.padding) > 2:  # d_x is a convolution with padding 2 - padding
        return f"cpu: Winograd needs padding of at most 2, got {geometry.padding}"
    if x.numel() == 0:
        return f"cpu: x must not be empty, got {list(x.shape)}"
    if output_memory_format(x, weight) is not torch.channels_last:
        return "cpu: Winograd needs x or weight in channels_last, got neither"
    if os.environ.get("FUSED_RESNET_WINOGRAD", "auto") == "off":
        return "cpu: Winograd is switched off by FUSED_RESNET_WINOGRAD"
    return _extension.why_not_cpu()


def forward_pays(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> bool:
    """Whether :func:`forward` and :func:`input_gradient` are expected to be faster than oneDNN."""
    return pays(_tiles(x, geometry), weight.shape[1], weight.shape[0])


def weight_gradient_pays(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> bool:
    """Whether :func:`weight_gradient` is expected to be faster than oneDNN."""
    return pays(_tiles(x, geometry), weight.shape[1], weight.shape[0], _TILES_PER_FILTER_GRADIENT)


def _convolve(x: Tensor, packed: Tensor, channels: int, padding: tuple[int, int], bias: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.fused_resnet_C.conv_fused.default(
        x.contiguous(memory_format=torch.channels_last), packed, (channels, 3, 3), _TILE, "", (1, 1), padding, (1, 1),
        bias, *_NO_BN, None, 0,
    )  # fmt: skip
    return y


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """``conv2d(x, weight, bias)`` in channels_last."""
    packed = torch.ops.fused_resnet_C.conv_pack.default(weight, _TILE, "")
    return _convolve(x, packed, weight.shape[0], geometry.padding, bias)


def input_gradient(grad_y: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """The gradient of x in channels_last."""
    packed = torch.ops.fused_resnet_C.conv_pack_input_gradient.default(weight, _TILE, "")
    padding = (2 - geometry.padding[0], 2 - geometry.padding[1])
    return _convolve(grad_y, packed, weight.shape[1], padding)


def weight_gradient(grad_y: Tensor, x: Tensor, geometry: ConvGeometry) -> Tensor:
    """The gradient of the weight in channels_last."""
    d_weight: Tensor = torch.ops.fused_resnet_C.conv_weight_gradient.default(
        x.contiguous(memory_format=torch.channels_last),
        grad_y.contiguous(memory_format=torch.channels_last),
        geometry.padding,
        "",
    )
    return d_weight
