"""The 3 x 3 convolutions of a training step by our own Winograd kernels: forward, d_x and d_weight.

float32 on the CPU, F(4x4, 3x3) or F(2x2, 3x3): for each tile of m x m outputs (m + 2)^2 multiply-adds instead of 9 m^2.
The weights are new in every step, so their transform is paid in every step, twice: for the forward pass, and turned by
180 degrees with input and output channels exchanged for the input's gradient. :func:`tile` weighs that.

Accuracy. F(2x2) rounds no more than direct convolution. F(4x4) is taken where sums are long, so that its transforms add
little to what summing costs anyway: at most 2.4 times oneDNN's largest error in all three results, 3 times its rms.
``"f2"`` is F(2x2) alone, ``"off"`` leaves everything to oneDNN; ``FUSED_RESNET_WINOGRAD`` sets the default.

NaN and Inf in the forward pass and in d_x as in inference: F(2x2) has NaN exactly where eager has it, F(4x4) spreads it
within its tile; Inf may become NaN. In d_weight a NaN reaches all nine taps of the filters that saw it, where eager
may leave out the taps that never meet a pixel at the border.
"""

from __future__ import annotations

import os
from functools import lru_cache

import torch
from torch import Tensor

from .. import _extension
from ..layout import output_memory_format
from .training_base import ConvGeometry

_NO_BN = (None, None, None, None, 0.0)

#: Transforming one filter costs as much as so many tiles' multiply-adds with it.
_TILES_PER_FILTER = 100
#: The same of d_weight's transform, which writes 9 values a filter rather than 16 or 36.
_TILES_PER_FILTER_GRADIENT = 20
#: Transforming one input (output) tile costs as much as multiplying its positions for so many output (input) channels.
_TRANSFORM_CHANNELS = 10
#: Channels and, for d_weight, output pixels from which on F(4x4) keeps the bound on its error.
_F4_CHANNELS = 64
_F4_PIXELS = 4096


def _cheapest(outputs: int, tiles: dict[int, int], c: int, k: int, overhead: int) -> int:
    """The tile m of fewest multiply-adds among the keys of ``tiles``, their numbers; 0 for direct convolution."""
    cost = {0: 9 * outputs * c * k}
    for m, count in tiles.items():
        cost[m] = (m + 2) ** 2 * ((count + overhead) * c * k + count * _TRANSFORM_CHANNELS * (c + k))
    return min(cost, key=lambda m: cost[m])


def why_not(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> str | None:
    """None where these kernels can compute this convolution, else one sentence why not."""
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
    return _extension.why_not_cpu()


def tile(x: Tensor, weight: Tensor, geometry: ConvGeometry, winograd: str = "auto") -> int:
    """The tile m of F(m x m, 3 x 3) expected to be fastest for the forward pass and for d_x; 0: leave it to torch."""
    k, c = weight.shape[:2]
    return _tile(*_sizes(x, geometry), c, k, min(c, k) >= _F4_CHANNELS, _TILES_PER_FILTER, _resolve(winograd))


def weight_gradient_tile(x: Tensor, weight: Tensor, geometry: ConvGeometry, winograd: str = "auto") -> int:
    """The same for d_weight."""
    k, c = weight.shape[:2]
    n, p, q = _sizes(x, geometry)
    return _tile(n, p, q, c, k, n * p * q >= _F4_PIXELS, _TILES_PER_FILTER_GRADIENT, _resolve(winograd))


def _resolve(winograd: str) -> str:
    if winograd not in ("auto", "f2", "off"):
        raise ValueError(f"winograd: expected 'auto', 'f2' or 'off', got {winograd!r}")
    return winograd if winograd != "auto" else os.environ.get("FUSED_RESNET_WINOGRAD", "auto")


def _sizes(x: Tensor, geometry: ConvGeometry) -> tuple[int, int, int]:
    """N, P and Q."""
    p, q = (x.shape[dim] + 2 * geometry.padding[dim - 2] - 2 for dim in (2, 3))
    return x.shape[0], p, q


@lru_cache(maxsize=1024)
def _tile(n: int, p: int, q: int, c: int, k: int, f4: bool, overhead: int, winograd: str) -> int:
    if winograd == "off":
        return 0
    sizes = (2, 4) if f4 and winograd != "f2" else (2,)
    return _cheapest(n * p * q, {m: n * -(-p // m) * -(-q // m) for m in sizes}, c, k, overhead)


def _convolve(
    x: Tensor, packed: Tensor, channels: int, m: int, padding: tuple[int, int], bias: Tensor | None = None
) -> Tensor:
    y: Tensor = torch.ops.fused_resnet_C.conv_fused.default(
        x.contiguous(memory_format=torch.channels_last), packed, (channels, 3, 3), m, "", (1, 1), padding, (1, 1),
        bias, *_NO_BN, None, 0,
    )  # fmt: skip
    return y


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, m: int) -> Tensor:
    """``conv2d(x, weight, bias)`` in channels_last."""
    packed = torch.ops.fused_resnet_C.conv_pack.default(weight, m, "")
    return _convolve(x, packed, weight.shape[0], m, geometry.padding, bias)


def input_gradient(grad_y: Tensor, weight: Tensor, geometry: ConvGeometry, m: int) -> Tensor:
    """The gradient of x in channels_last."""
    packed = torch.ops.fused_resnet_C.conv_pack_input_gradient.default(weight, m, "")
    padding = (2 - geometry.padding[0], 2 - geometry.padding[1])
    return _convolve(grad_y, packed, weight.shape[1], m, padding)


def weight_gradient(grad_y: Tensor, x: Tensor, geometry: ConvGeometry, m: int) -> Tensor:
    """The gradient of the weight in channels_last."""
    d_weight: Tensor = torch.ops.fused_resnet_C.conv_weight_gradient.default(
        x.contiguous(memory_format=torch.channels_last),
        grad_y.contiguous(memory_format=torch.channels_last),
        geometry.padding,
        m,
        "",
    )
    return d_weight
