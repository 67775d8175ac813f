"""What a training backend is, and which one runs.

The four passes of a training tail see canonical tensors only: activations that are dense in channels_last,
statistics and BN parameters contiguous in the accumulation dtype (float32, or float64 for float64 input).
``fused_resnet.ops.training`` brings them into this form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Elements per word of the activation's 1-bit mask: element ``i`` of the NHWC order is bit ``i % 32``.
MASK_BITS = 32


class BatchNorm(NamedTuple):
    """One BN whose statistics are known: ``weight * (y - mean) * invstd + bias``."""

    y: Tensor  # [N, C, H, W], channels_last
    mean: Tensor  # [C]
    invstd: Tensor  # [C], 1 / sqrt(var + eps)
    weight: Tensor | None = None  # [C]; 1 when None
    bias: Tensor | None = None  # [C]; 0 when None


class GradMeans(NamedTuple):
    """What flows through the statistics: means over N, H, W of ``dz`` and ``dz * xhat``; 0 if frozen."""

    dz: Tensor  # [C]
    dz_xhat: Tensor  # [C]


class TrainingBackend:
    """The four passes on one kind of hardware. ``dz = grad_out`` where the activation passes it, else 0."""

    name: str

    def can_run(self, y: Tensor, *others: Tensor | None) -> str | None:
        """None, or one sentence why ``y`` and the other activations of the call cannot be handled."""
        raise NotImplementedError

    def stats(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of every channel."""
        raise NotImplementedError

    def apply(
        self,
        bn: BatchNorm,
        residual: Tensor | None,
        proj: BatchNorm | None,
        activation: str,
        with_mask: bool,
        out: Tensor,
        mask: Tensor,
    ) -> None:
        """``out = act(bn + (residual or proj))``, and the mask when ``with_mask``."""
        raise NotImplementedError

    def backward_reduce(
        self, grad_out: Tensor, mask: Tensor, bn: BatchNorm, proj: BatchNorm | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``sum(dz)``, ``sum(dz * xhat)`` and the projection's ``sum(dz * xhat)`` (empty without one)."""
        raise NotImplementedError

    def backward_apply(
        self,
        grad_out: Tensor,
        mask: Tensor,
        bn: BatchNorm,
        means: GradMeans,
        proj: BatchNorm | None,
        proj_means: GradMeans | None,
        d_y: Tensor,
        d_second: Tensor | None,
    ) -> None:
        """``d_y = weight * invstd * (dz - mean(dz) - xhat * mean(dz * xhat))``.

        ``d_second``, where wanted, is the gradient of the residual (``dz``) or of the projection's
        convolution output (the same formula with the projection's BN).
        """
        raise NotImplementedError


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and arithmetic for activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mask_words(numel: int) -> int:
    """Number of int32 words of the mask of ``numel`` elements."""
    return (numel + MASK_BITS - 1) // MASK_BITS


def is_dense_channels_last(t: Tensor) -> bool:
    """Whether element (n, c, h, w) lies at ``((n * H + h) * W + w) * C + c``."""
    return t.is_contiguous(memory_format=torch.channels_last)
