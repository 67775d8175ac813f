"""What the passes of a training tail are called with: batch norms, geometry and the mask of one bit an element."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .problem import Problem
from .reference import ConvBN, TailArguments

#: Elements per word of the activation's 1-bit mask: element ``i`` of the NHWC order is bit ``i % 32``.
MASK_BITS = 32


class BatchNorm(NamedTuple):
    """One BN whose statistics are known: ``weight * (y - mean) * invstd + bias``."""

    y: Tensor  # [N, C, H, W], channels_last
    mean: Tensor  # [C]
    invstd: Tensor  # [C], 1 / sqrt(var + eps)
    weight: Tensor | None = None  # [C]; 1 when None
    bias: Tensor | None = None  # [C]; 0 when None


class ConvGeometry(NamedTuple):
    """A convolution's numbers, as ``aten::convolution`` takes them."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class GradMeans(NamedTuple):
    """What flows through the statistics: means over N, H, W of ``dz`` and ``dz * xhat``; 0 if frozen."""

    dz: Tensor  # [C]
    dz_xhat: Tensor  # [C]


class ForwardPass(NamedTuple):
    """``out = act(bn + (residual or proj))``, and where that passes the gradient."""

    bn: BatchNorm
    residual: Tensor | None
    proj: BatchNorm | None
    activation: str
    out: Tensor  # written
    mask: Tensor | None  # written where it is given


class BackwardPass(NamedTuple):
    """What both backward passes read: ``dz = grad_out`` where the mask is set, else 0; without a mask everywhere."""

    grad_out: Tensor
    mask: Tensor | None
    bn: BatchNorm
    proj: BatchNorm | None


class Gradients(NamedTuple):
    """What the second backward pass reads besides, and where it writes.

    ``d_y = weight * invstd * (dz - mean(dz) - xhat * mean(dz * xhat))``; ``d_second``, where it is wanted, is the
    gradient of the residual (``dz``) or of the projection's convolution output (as ``d_y``, with the projection's BN).
    """

    means: GradMeans
    proj_means: GradMeans | None
    d_y: Tensor
    d_second: Tensor | None


def first_fields(bn: BatchNorm | None, count: int) -> tuple[Tensor | None, ...]:
    """The first ``count`` fields of ``bn``, or as many None."""
    return (None,) * count if bn is None else bn[:count]


def conv_problem(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Problem:
    """The convolution alone as a Problem; ValueError or TypeError names the argument that does not fit."""
    conv = ConvBN(weight, bias, None, None, None, None, 0.0)
    return Problem.from_tail(TailArguments(x, conv, None, *geometry, "none", None, None, (1, 1), None, "auto"))


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and arithmetic for activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mask_words(numel: int) -> int:
    """Number of int32 words of the mask of ``numel`` elements."""
    return (numel + MASK_BITS - 1) // MASK_BITS


def is_dense_channels_last(t: Tensor) -> bool:
    """Whether element (n, c, h, w) lies at ``((n * H + h) * W + w) * C + c``."""
    return t.is_contiguous(memory_format=torch.channels_last)
