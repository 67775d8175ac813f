"""The training passes by the extension's own CPU kernels: float32, bfloat16 and float16, vectorised, multi-threaded.

The 3 x 3 convolutions are ours where :mod:`training_winograd` has them and expects to be faster, else torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import extensions
from ...core.training_call import BackwardPass, ConvGeometry, ForwardPass, Gradients, first_fields
from . import winograd
from .base import TrainingBackend

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# NaN is "no bound": every comparison with it is false.
_BOUNDS = {"relu": (0.0, float("nan")), "relu6": (0.0, 6.0), "none": (float("nan"), float("nan"))}


class CpuTraining(TrainingBackend):
    name = "cpu"

    def can_run(self, y: Tensor, *others: Tensor | None) -> str | None:
        if y.device.type != "cpu":
            return f"cpu: y must be on the CPU, got {y.device}"
        for t in (y, *others):
            if t is not None and t.dtype not in _DTYPES:
                return f"cpu: activations must be float32, bfloat16 or float16, got {t.dtype}"
            if t is not None and torch.float32 not in (y.dtype, t.dtype) and t.dtype != y.dtype:
                return f"cpu: activations must not mix bfloat16 and float16, got {y.dtype} and {t.dtype}"
        why_not = extensions.why_not_cpu()
        return None if why_not is None else f"cpu: {why_not}"

    @property
    def _ops(self) -> Any:
        return torch.ops.fused_resnet_C

    def __init__(self, winograd: str = "auto") -> None:
        self._winograd = winograd

    def with_winograd(self, winograd: str) -> CpuTraining:
        return self if winograd == self._winograd else CpuTraining(winograd)

    def why_not_conv_stats(self, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> str | None:
        reason = winograd.why_not(x, weight, geometry)
        if reason is None and not winograd.algorithm(x, weight, geometry, self._winograd).m:
            reason = f"cpu: Winograd is off or does not pay for x {list(x.shape)} and weight {list(weight.shape)}"
        return reason

    def conv_stats(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = winograd.forward(x, weight, bias, geometry, winograd.algorithm(x, weight, geometry, self._winograd))
        return y, *self.stats(y)

    def conv_backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        weight: Tensor,
        has_bias: bool,
        geometry: ConvGeometry,
        output_mask: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        need_x, need_weight, need_bias = output_mask
        own_x = own_weight = False
        if winograd.why_not(x, weight, geometry) is None:
            algorithm = winograd.algorithm(x, weight, geometry, self._winograd)
            weight_tile = winograd.weight_gradient_tile(x, weight, geometry, self._winograd)
            own_x, own_weight = need_x and algorithm.m != 0, need_weight and weight_tile != 0
        own_bias = need_bias and own_weight  # torch computes the bias's along with the weight's
        left = (need_x and not own_x, need_weight and not own_weight, need_bias and not own_bias)
        d_x = d_weight = d_bias = None
        if any(left):
            d_x, d_weight, d_bias = super().conv_backward(grad_y, x, weight, has_bias, geometry, left)
        if own_x:
            d_x = winograd.input_gradient(grad_y, weight, geometry, algorithm)
        if own_weight:
            d_weight = winograd.weight_gradient(grad_y, x, geometry, weight_tile)
        if own_bias:
            d_bias = grad_y.sum(dim=(0, 2, 3))
        return d_x, d_weight, d_bias

    def stats(self, y: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = (torch.empty(y.shape[1], dtype=torch.float32) for _ in range(2))
        self._ops.cpu_bn_stats(y, mean, var)
        return mean, var

    def apply(self, forward: ForwardPass) -> None:
        bn, residual, proj, activation, out, mask = forward
        self._ops.cpu_bn_apply(*bn, residual, *first_fields(proj, 5), *_BOUNDS[activation], out, mask)

    def backward_reduce(self, backward: BackwardPass) -> tuple[Tensor, Tensor, Tensor]:
        grad_out, mask, bn, proj = backward
        sums = [torch.empty_like(bn.mean) for _ in range(2)]
        proj_sum = torch.empty(0 if proj is None else bn.mean.shape[0], dtype=torch.float32)
        self._ops.cpu_bn_backward_reduce(
            grad_out, mask, *bn[:3], *first_fields(proj, 3), *sums, None if proj is None else proj_sum
        )
        return sums[0], sums[1], proj_sum

    def backward_apply(self, backward: BackwardPass, gradients: Gradients) -> None:
        grad_out, mask, bn, proj = backward
        means, proj_means, d_y, d_second = gradients
        if d_second is None and grad_out.dtype != d_y.dtype:
            # The kernels know grad_out's dtype by that of the residual; a residual no one asked about is dropped.
            d_second = torch.empty_like(grad_out)
        self._ops.cpu_bn_backward_apply(
            grad_out, mask, *bn[:4], *means, *first_fields(proj, 4), *(proj_means or (None, None)), d_y, d_second
        )


BACKEND = CpuTraining()
