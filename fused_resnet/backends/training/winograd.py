"""The 3 x 3 convolutions of a training step by our own Winograd kernels: forward, d_x and d_weight.

float32 on the CPU, F(4x4, 3x3) or F(2x2, 3x3): for each tile of m x m outputs (m + 2)^2 multiply-adds instead of 9 m^2.
The weights are new in every step, so their transform is paid in every step, twice: for the forward pass, and turned by
180 degrees with input and output channels exchanged for the input's gradient. :func:`algorithm` weighs that.

Accuracy. F(2x2) rounds no more than direct convolution. F(4x4) is taken where sums are long, so that its transforms add
little to what summing costs anyway: largest errors of 0.6 to 2.4 times oneDNN's were measured in y, d_x and d_weight
(27 ResNet-like problems); the tests hold them to 3, and the rms as well.
``"f2"`` is F(2x2) alone, ``"off"`` leaves everything to oneDNN; ``FUSED_RESNET_WINOGRAD`` sets the default.

NaN and Inf in the forward pass and in d_x as in inference: F(2x2) has NaN exactly where eager has it, F(4x4) spreads it
within its tile; Inf may become NaN. In d_weight a NaN reaches all nine taps of the filters that saw it, where eager
may leave out the taps that never meet a pixel at the border.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...core import extensions
from ...core.layout import output_memory_format
from ...core.training_call import ConvGeometry
from ..cpu_rule import DIRECT, TRANSFORM_CHANNELS, Algorithm, winograd_choice

_NO_BN = (None, None, None, None, 0.0)

#: Transforming one filter once and for all costs as much as so many tiles' multiply-adds with it.
_TILES_PER_FILTER = 100
#: The same of d_weight's transform, which writes 9 values a filter rather than 16 or 36.
_TILES_PER_FILTER_GRADIENT = 20
#: Multiply-adds in whose time a filter is copied for the kernels that transform it as they go ...
_FRESH_COPY = 1000
#: ... and those which that takes for each tile, by m. (They transform in float32: only where sums are longest.)
_FRESH_TILE = {2: 3, 4: 11}
_FRESH_CHANNELS = 256
#: Channels and, for d_weight, output pixels from which on F(4x4) keeps the bound on its error.
_F4_CHANNELS = 64
_F4_PIXELS = 4096


def _cheapest(outputs: int, tiles: dict[int, int], c: int, k: int, overhead: int, fresh: bool) -> Algorithm:
    """What takes fewest multiply-adds; the keys of ``tiles`` are the m to choose from, with their numbers of tiles."""
    cost = {DIRECT: 9 * outputs * c * k}
    for m, count in tiles.items():
        positions = (m + 2) ** 2
        transforms = positions * count * TRANSFORM_CHANNELS * (c + k)
        cost[Algorithm(m)] = positions * (count + overhead) * c * k + transforms
        if fresh:
            cost[Algorithm(m, "fresh")] = ((positions + _FRESH_TILE[m]) * count + _FRESH_COPY) * c * k + transforms
    return min(cost, key=lambda algorithm: cost[algorithm])


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
    return extensions.why_not_cpu()


def algorithm(x: Tensor, weight: Tensor, geometry: ConvGeometry, winograd: str = "auto") -> Algorithm:
    """What is expected to be fastest for the forward pass and for d_x; m = 0: leave it to torch."""
    k, c = weight.shape[:2]
    f4, fresh = min(c, k) >= _F4_CHANNELS, min(c, k) >= _FRESH_CHANNELS
    return _choose(*_sizes(x, geometry), c, k, f4, _TILES_PER_FILTER, fresh, _resolve(winograd))


def weight_gradient_tile(x: Tensor, weight: Tensor, geometry: ConvGeometry, winograd: str = "auto") -> int:
    """The tile m that is expected to be fastest for d_weight; 0: leave it to torch."""
    k, c = weight.shape[:2]
    n, p, q = _sizes(x, geometry)
    f4 = n * p * q >= _F4_PIXELS
    return _choose(n, p, q, c, k, f4, _TILES_PER_FILTER_GRADIENT, False, _resolve(winograd)).m


def _resolve(winograd: str) -> str:
    if winograd not in ("auto", "f2", "off"):
        raise ValueError(f"winograd: expected 'auto', 'f2' or 'off', got {winograd!r}")
    return winograd_choice(winograd)


def _sizes(x: Tensor, geometry: ConvGeometry) -> tuple[int, int, int]:
    """N, P and Q."""
    p, q = (x.shape[dim] + 2 * geometry.padding[dim - 2] - 2 for dim in (2, 3))
    return x.shape[0], p, q


@lru_cache(maxsize=1024)
def _choose(n: int, p: int, q: int, c: int, k: int, f4: bool, overhead: int, fresh: bool, winograd: str) -> Algorithm:
    if winograd == "off":
        return DIRECT
    sizes = (2, 4) if f4 and winograd != "f2" else (2,)
    return _cheapest(n * p * q, {m: n * -(-p // m) * -(-q // m) for m in sizes}, c, k, overhead, fresh)


def _convolve(
    x: Tensor, packed: Tensor, channels: int, how: Algorithm, padding: tuple[int, int], bias: Tensor | None = None
) -> Tensor:
    y: Tensor = torch.ops.fused_resnet_C.conv_fused.default(
        x.contiguous(memory_format=torch.channels_last), packed, (channels, 3, 3), how.m, "", (1, 1), padding,
        (1, 1), bias, *_NO_BN, None, 0, how.weights,
    )  # fmt: skip
    return y


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, how: Algorithm) -> Tensor:
    """``conv2d(x, weight, bias)`` in channels_last."""
    packed = torch.ops.fused_resnet_C.conv_pack.default(weight, how.m, "", how.weights)
    return _convolve(x, packed, weight.shape[0], how, geometry.padding, bias)


def input_gradient(grad_y: Tensor, weight: Tensor, geometry: ConvGeometry, how: Algorithm) -> Tensor:
    """The gradient of x in channels_last."""
    packed = torch.ops.fused_resnet_C.conv_pack_input_gradient.default(weight, how.m, "", how.weights)
    padding = (2 - geometry.padding[0], 2 - geometry.padding[1])
    return _convolve(grad_y, packed, weight.shape[1], how, padding)


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
