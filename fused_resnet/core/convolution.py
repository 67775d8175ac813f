"""torch's own convolution on the CPU, kept away from two faults of oneDNN 3.12 that corrupt memory or crash.

``brg_conv_fwd`` (channels_last, AVX2 and AVX-512, every dtype)
    calls a kernel that it has not made when a block of output columns lies in the padding alone.
``jit_1x1:avx2`` and relatives, gradient of the weight (channels_last)
    write past their workspace for a 1 x 1 convolution with a stride and fewer channels than a vector holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import output_memory_format

#: The widest vector of float32 that oneDNN blocks channels by.
_VECTOR = 16


def pad_width(
    x: Tensor, window: int, padding: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, tuple[int, int]]:
    """``x`` and the padding left to do: the columns are padded here where an output column may see none of ``x``.

    The taps of every column reach into ``x`` if the padding is no wider than the filter less one tap, and no two
    taps are further apart than ``x`` is wide.
    """
    high, wide = padding
    if wide == 0 or not _by_onednn(x) or (wide <= dilation[1] * (window - 1) and dilation[1] <= x.shape[-1]):
        return x, (high, wide)
    return F.pad(x, (wide, wide)), (high, 0)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """``F.conv2d``, for values alone: see :func:`trainable_conv2d`."""
    padded, padding = pad_width(x, weight.shape[3], padding, dilation)
    y = F.conv2d(padded, weight, bias, stride, padding, dilation, groups)
    return y if padded is x else y.contiguous(memory_format=output_memory_format(x, weight))


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """``aten::convolution``: :func:`conv2d` inside an operator, where autocast and forward mode are dealt with."""
    padded, padding = pad_width(x, weight.shape[3], padding, dilation)
    y = torch.ops.aten.convolution(padded, weight, bias, stride, padding, dilation, False, [0, 0], groups)
    return y if padded is x else y.contiguous(memory_format=output_memory_format(x, weight))


def trainable_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """``F.conv2d`` whose gradients are safe, too."""
    if not _skips_pixels(x, weight, stride, padding):
        return conv2d(x, weight, bias, stride, padding, dilation, groups)
    memory_format = output_memory_format(x, weight)
    seen = x[:, :, :: stride[0], :: stride[1]].contiguous(memory_format=memory_format)
    return F.conv2d(seen, weight, bias, groups=groups).contiguous(memory_format=memory_format)


def convolution_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, has_bias: bool, stride: Any, padding: Any, dilation: Any, groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, weight and bias; None where ``output_mask`` does not ask for one. Differentiable."""
    seen = x
    skips = _skips_pixels(x, weight, stride, padding)
    if skips:
        rows, columns = slice(None, None, stride[0]), slice(None, None, stride[1])
        seen, stride = x[:, :, rows, columns], (1, 1)
    wide = padding[1]
    seen, padding = pad_width(seen, weight.shape[3], padding, dilation)
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_y, seen, weight, [weight.shape[0]] if has_bias else None, stride, padding, dilation, False, [0, 0],
        groups, list(output_mask),
    )  # fmt: skip
    if output_mask[0] and padding[1] != wide:
        grad_x = grad_x[:, :, :, wide:-wide]
    if output_mask[0] and skips:
        in_rows = torch.zeros_like(x[:, :, rows]).slice_scatter(grad_x, 3, step=columns.step)
        grad_x = torch.zeros_like(x).slice_scatter(in_rows, 2, step=rows.step)
    return grad_x, grad_weight, grad_bias


def _by_onednn(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype is not torch.float64


def _skips_pixels(x: Tensor, weight: Tensor, stride: Any, padding: Any) -> bool:
    """Whether oneDNN might gather every second pixel, say, in a workspace that it overruns."""
    return (
        _by_onednn(x)
        and weight.shape[1] < _VECTOR
        and tuple(weight.shape[2:]) == (1, 1)
        and tuple(padding) == (0, 0)
        and tuple(stride) != (1, 1)
    )
