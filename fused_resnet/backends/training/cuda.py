"""The training passes by the CUDA extension: float16, bfloat16 and float32 in any mix, no JIT, one launch a pass.

The convolution is the extension's as well, with the statistics in its epilogue, where it may be expected to cost less
than torch's and a pass for the statistics.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...core import extensions
from ...core.layout import output_memory_format
from ...core.training_call import BackwardPass, ConvGeometry, ForwardPass, Gradients, conv_problem, first_fields
from ..cuda import BACKEND as CONVOLUTION
from ..cuda import why_not_device
from .base import TrainingBackend

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: Products per output, by compute capability, above which cuDNN's convolution is expected to win more than the pass
#: over y that ours saves. A model, not a measurement: mma.sync reaches 62 % of an H100's peak and about 30 % of a
#: B200's, cuDNN is taken at 80 %, and the pass reads y once at the memory's rate. Elsewhere mma.sync is the peak.
MOST_PRODUCTS = {90: 800, 100: 140, 103: 140}


@lru_cache
def _activation(name: str) -> int:
    extension = extensions.cuda()
    assert extension is not None, "can_run has been asked"
    code: int = extension.ACTIVATIONS[name]
    return code


@lru_cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


class CudaTraining(TrainingBackend):
    name = "cuda"

    def can_run(self, y: Tensor, *others: Tensor | None) -> str | None:
        if y.device.type != "cuda":
            return f"cuda: y must be on a CUDA device, got {y.device}"
        for t in (y, *others):
            if t is not None and t.dtype not in _DTYPES:
                return f"cuda: activations must be float16, bfloat16 or float32, got {t.dtype}"
        return why_not_device(y.device)

    @property
    def _ops(self) -> Any:
        return torch.ops.fused_resnet_C

    def why_not_conv_stats(self, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> str | None:
        if output_memory_format(x, weight) is not torch.channels_last:
            return "cuda: the convolution with statistics takes x in channels_last"
        problem = conv_problem(x, weight, None, geometry)
        if (reason := CONVOLUTION.can_run(problem)) is not None:
            return reason
        products = problem.c * problem.r * problem.s
        capability = _capability(x.device.index or 0)
        most = MOST_PRODUCTS.get(capability)
        exact = problem.dtype == torch.float32 and not problem.tf32  # no tensor core in either
        if most is not None and products > most and not exact:
            return f"cuda: at most {most} products per output on sm_{capability}, got {products}"
        return None

    def conv_stats(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry
    ) -> tuple[Tensor, Tensor, Tensor]:
        tf32 = conv_problem(x, weight, bias, geometry).tf32
        if bias is not None and bias.dtype not in _DTYPES:
            bias = bias.to(x.dtype)
        y, mean, var = self._ops.cuda_conv_stats(x, weight, bias, *geometry, tf32)
        return y.contiguous(memory_format=output_memory_format(x, weight)), mean, var

    def stats(self, y: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = (torch.empty(y.shape[1], dtype=torch.float32, device=y.device) for _ in range(2))
        self._ops.cuda_bn_stats(y, mean, var)
        return mean, var

    def apply(self, forward: ForwardPass) -> None:
        bn, residual, proj, activation, out, mask = forward
        self._ops.cuda_bn_apply(*bn, residual, *first_fields(proj, 5), _activation(activation), out, mask)

    def backward_reduce(self, backward: BackwardPass) -> tuple[Tensor, Tensor, Tensor]:
        grad_out, mask, bn, proj = backward
        sum_dz, sum_dz_xhat = torch.empty_like(bn.mean), torch.empty_like(bn.mean)
        proj_sum = sum_dz.new_empty(0 if proj is None else sum_dz.shape[0])
        self._ops.cuda_bn_backward_reduce(
            grad_out, mask, *bn[:3], *first_fields(proj, 3), sum_dz, sum_dz_xhat, None if proj is None else proj_sum
        )
        return sum_dz, sum_dz_xhat, proj_sum

    def backward_apply(self, backward: BackwardPass, gradients: Gradients) -> None:
        grad_out, mask, bn, proj = backward
        means, proj_means, d_y, d_second = gradients
        self._ops.cuda_bn_backward_apply(
            grad_out, mask, *bn[:4], *means, *first_fields(proj, 4), *(proj_means or (None, None)), d_y, d_second
        )


BACKEND = CudaTraining()
