"""The training passes by Triton kernels: CUDA, or anything under TRITON_INTERPRET=1."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.training_call import BatchNorm, ConvGeometry, GradMeans, conv_problem
from ..triton import interpreting, why_not_device, why_not_problem, why_not_triton
from .base import TrainingBackend

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class TritonTraining(TrainingBackend):
    name = "triton"

    def can_run(self, y: Tensor, *others: Tensor | None) -> str | None:
        if (reason := why_not_triton()) is not None:
            return reason
        if not interpreting():
            if (reason := why_not_device()) is not None:
                return reason
            if y.device.type != "cuda":
                return f"triton: y must be on a CUDA device, got {y.device}"
        for t in (y, *others):
            if t is not None and t.dtype not in _DTYPES:
                return f"triton: activations must be float16, bfloat16 or float32, got {t.dtype}"
        return None

    def why_not_conv_stats(self, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> str | None:
        return why_not_problem(conv_problem(x, weight, None, geometry))

    def conv_stats(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry
    ) -> tuple[Tensor, Tensor, Tensor]:
        from ...kernels import conv_stats_launch

        with torch.cuda.device_of(x):
            return conv_stats_launch.conv_bn_stats(conv_problem(x, weight, bias, geometry), x, weight, bias)

    def stats(self, y: Tensor) -> tuple[Tensor, Tensor]:
        from ...kernels import bn_launch

        with torch.cuda.device_of(y):
            return bn_launch.bn_stats(y)

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
        from ...kernels import bn_launch

        with torch.cuda.device_of(bn.y):
            bn_launch.bn_apply_add_relu(bn, residual, proj, activation, out, mask if with_mask else None)

    def backward_reduce(
        self, grad_out: Tensor, mask: Tensor, bn: BatchNorm, proj: BatchNorm | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        from ...kernels import bn_launch

        with torch.cuda.device_of(bn.y):
            return bn_launch.bn_backward_reduce(grad_out, mask if mask.numel() else None, bn, proj)

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
        from ...kernels import bn_launch

        words = mask if mask.numel() else None
        with torch.cuda.device_of(bn.y):
            bn_launch.bn_backward_apply(grad_out, words, bn, means, proj, proj_means, d_y, d_second)


BACKEND = TritonTraining()
