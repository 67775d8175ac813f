"""Backend ``cudnn``: ``aten::cudnn_convolution_add_relu`` with folded weights, the rival we keep.

cuDNN takes no per-channel scale, so BN is folded into the weights: in each call, on the device, by operators that wait
for nothing. Whether a kept copy is still true could only be asked by waiting for the device. Its traps, each guarded
here: a ``z`` that shares memory with ``x`` goes wrong (pytorch#62926), the shape of ``z`` is not checked, and a ``z``
in another layout than the output is copied without a word. Its ReLU is part of the operator, so other activations are
refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.layout import output_memory_format
from ..core.problem import Problem, dtype_name
from ..core.reference import ConvBN, TailArguments
from .base import Backend


class CudnnBackend(Backend):
    name = "cudnn"

    def can_run(self, problem: Problem) -> str | None:
        if problem.device_type != "cuda":
            return f"cudnn: device must be cuda, got {problem.device_type}"
        if not torch.backends.cudnn.is_available():
            return "cudnn: torch must be built with cuDNN, got a build without"
        if not torch.backends.cudnn.enabled:
            return "cudnn: torch.backends.cudnn.enabled must be True, got False"
        if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"cudnn: dtype must be float32, float16 or bfloat16, got {dtype_name(problem.dtype)}"
        if problem.output_dtype is not problem.dtype:
            wanted, got = dtype_name(problem.dtype), dtype_name(problem.output_dtype)
            return f"cudnn: residual must have the dtype of x, {wanted}, got {got}"
        if problem.activation != "relu":
            return f"cudnn: activation must be relu, got {problem.activation}"
        return None

    def run(self, problem: Problem, tail: TailArguments) -> Tensor:
        memory_format = output_memory_format(tail.x, tail.conv.weight)
        x = tail.x.contiguous(memory_format=memory_format)
        weight, bias = fold(tail.conv, memory_format)
        geometry = (tail.stride, tail.padding, tail.dilation, tail.groups)
        z = _added(tail, memory_format)
        if z is None:
            y = torch.ops.aten.cudnn_convolution_relu.default(x, weight, bias, *geometry)
        else:
            if tuple(z.shape) != problem.output_shape:
                raise ValueError(f"residual: expected shape {list(problem.output_shape)}, got {list(z.shape)}")
            if _share_memory(z, x):
                z = z.clone(memory_format=torch.preserve_format)
            y = torch.ops.aten.cudnn_convolution_add_relu.default(x, weight, z, 1.0, bias, *geometry)
        return y.contiguous(memory_format=memory_format)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@torch.no_grad()
def fold(conv: ConvBN, memory_format: torch.memory_format) -> tuple[Tensor, Tensor | None]:
    """Weight, dense in ``memory_format``, and bias of the one convolution that does the work of ``conv`` and its BN.

    Scaled in float64 and rounded once, into the weight's dtype. Six kernels, with a convolution's bias seven.
    """
    weight, bias, gamma, beta, mean, var, eps = conv
    if mean is None or var is None:
        return weight.contiguous(memory_format=memory_format), None if bias is None else bias.to(weight.dtype)
    std = var.double().add(eps).sqrt_()
    scale = std.reciprocal_() if gamma is None else gamma / std
    folded = torch.empty_like(weight, memory_format=memory_format)
    torch.mul(weight, scale.view(-1, 1, 1, 1), out=folded)
    if bias is not None:
        beta = bias * scale if beta is None else torch.addcmul(beta, bias, scale)
    shift = weight.new_empty(weight.shape[0])
    if beta is None:
        torch.mul(mean, scale.neg_(), out=shift)
    else:
        torch.addcmul(beta, mean, scale, value=-1, out=shift)
    return folded, shift


def _added(tail: TailArguments, memory_format: torch.memory_format) -> Tensor | None:
    """The residual or the projection's output, dense in ``memory_format``."""
    if tail.proj is not None and tail.proj_x is not None:
        weight, bias = fold(tail.proj, memory_format)
        proj_x = tail.proj_x.contiguous(memory_format=memory_format)
        y = torch.ops.aten.convolution.default(
            proj_x, weight, bias, tail.proj_stride, (0, 0), (1, 1), False, (0, 0), 1
        )  # fmt: skip
        return y.contiguous(memory_format=memory_format)
    return None if tail.residual is None else tail.residual.contiguous(memory_format=memory_format)


BACKEND = CudnnBackend()
