"""The training passes by Triton kernels: CUDA, or anything under TRITON_INTERPRET=1."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.training_call import BackwardPass, ConvGeometry, ForwardPass, Gradients, conv_problem
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

    def apply(self, forward: ForwardPass) -> None:
        from ...kernels import bn_launch

        with torch.cuda.device_of(forward.out):
            bn_launch.bn_apply_add_relu(forward)

    def backward_reduce(self, backward: BackwardPass) -> tuple[Tensor, Tensor, Tensor]:
        from ...kernels import bn_launch

        with torch.cuda.device_of(backward.grad_out):
            return bn_launch.bn_backward_reduce(backward)

    def backward_apply(self, backward: BackwardPass, gradients: Gradients) -> None:
        from ...kernels import bn_launch

        with torch.cuda.device_of(backward.grad_out):
            bn_launch.bn_backward_apply(backward, gradients)


BACKEND = TritonTraining()
