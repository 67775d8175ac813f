"""Memory formats: which one an output has, and how a dense copy in that format is strided."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def looks_channels_last(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether eager PyTorch would take a 4-d tensor of this shape and these strides for channels_last.

    The rule is that of ``c10::is_channels_last_strides_2d``: strides grow in the order C, W, H, N, and the
    ambiguous cases (C == 1, or 1x1 pixels with contiguous strides) count as contiguous.
    """
    if len(shape) != 4 or stride[1] == 0:
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        if shape[dim] == 0 or stride[dim] < least:
            return False
        if dim == 0 and least == stride[1]:
            return False
        least = stride[dim] * (shape[dim] if shape[dim] > 1 else 1)
    return True


def looks_contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the dimensions lie in memory in the order N, C, H, W, as far as they have more than one entry."""
    steps = [step for size, step in zip(shape, stride, strict=True) if size > 1]
    return 0 not in steps and steps == sorted(steps, reverse=True)


def sum_order(first: Tensor, second: torch.memory_format, shape: Sequence[int]) -> list[int]:
    """The dimensions of eager's ``first + y``, outermost first, where ``y`` has that shape and memory format.

    An elementwise operation lays its result out as its first operand, and where that has no order (it is expanded)
    as the next one; ``meta`` tensors tell.
    """
    one = torch.empty_strided(first.shape, first.stride(), device="meta")
    strides = (one + torch.empty(tuple(shape), device="meta", memory_format=second)).stride()
    return sorted(range(len(strides)), key=lambda d: -strides[d])


def output_memory_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format of ``conv2d(x, weight)`` in eager PyTorch: channels_last if either argument is.

    Every backend returns its output in this format, so that the fake kernel can promise it.
    """
    if looks_channels_last(x.shape, x.stride()) or looks_channels_last(weight.shape, weight.stride()):
        return torch.channels_last
    return torch.contiguous_format


def empty_output(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, memory_format: torch.memory_format
) -> Tensor:
    """An uninitialised output tensor in ``memory_format``."""
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=memory_format)
