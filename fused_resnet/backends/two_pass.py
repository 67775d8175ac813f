"""Backend ``two_pass``: cuDNN's convolution, then everything else in one launch of ours.

The safe candidate of ``auto`` on CUDA: its convolution is eager's own, so it can only lose what the fused pass costs
over eager's three or four passes, which is less than nothing. BN is read live, nothing is folded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.layout import output_memory_format
from ..core.problem import Problem, dtype_name
from ..core.reference import ConvBN, TailArguments
from .base import Backend
from .triton import interpreting, why_not_device, why_not_triton

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class TwoPassBackend(Backend):
    name = "two_pass"

    def can_run(self, problem: Problem) -> str | None:
        reason = why_not_triton()
        if reason is None and not interpreting():
            reason = why_not_device()
            if reason is None and problem.device_type != "cuda":
                reason = f"triton: x must be on a CUDA device, got {problem.device_type}"
        if reason is not None:
            return f"two_pass: its second pass needs Triton ({reason.removeprefix('triton: ')})"
        for dtype in (problem.dtype, problem.output_dtype):
            if dtype not in _DTYPES:
                return f"two_pass: dtype must be float16, bfloat16 or float32, got {dtype_name(dtype)}"
        return None

    def run(self, problem: Problem, tail: TailArguments) -> Tensor:
        from ..kernels.bn_pass import bn_add_act

        y = _conv(tail.x, tail.conv, tail.stride, tail.padding, tail.dilation, tail.groups)
        second = None if tail.residual is None else _channels_last(tail.residual)
        if tail.proj is not None and tail.proj_x is not None:
            second = _conv(tail.proj_x, tail.proj, tail.proj_stride, (0, 0), (1, 1), 1)
        in_place = problem.output_dtype is y.dtype
        out = y if in_place else torch.empty_like(y, dtype=problem.output_dtype)
        if out.numel():
            with torch.cuda.device_of(y):
                bn_add_act(y, tail.conv, second, tail.proj, tail.activation, out)
        if output_memory_format(tail.x, tail.conv.weight) is torch.contiguous_format:
            return out.contiguous()
        return out


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _conv(
    x: Tensor, conv: ConvBN, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int
) -> Tensor:
    """The convolution alone, without its bias (which the pass adds in float32), in channels_last."""
    weight = _channels_last(conv.weight)
    return _channels_last(torch.conv2d(_channels_last(x), weight, None, stride, padding, dilation, groups))


BACKEND = TwoPassBackend()
