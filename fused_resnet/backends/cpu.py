"""Backend ``cpu``: our own fused convolutions, and oneDNN's where there is none.

Three ways, decided once per signature:

``fused``
    float32, and bfloat16 where the processor has AVX512_BF16 and no matrix tiles; one group, weights whose packed
    copies the caller keeps: our kernels (:mod:`.cpu_fused`), BN live; :func:`.cpu_rule.fastest` chooses among them.
``pass``
    other float32 convolutions: eager's (oneDNN), then one pass of our own over its output. BN live.
``folded``
    other 16-bit convolutions, grouped ones without activation, and installs without the extension
    (:mod:`.cpu_onednn`).

16-bit types that neither our kernels nor oneDNN have here are computed in float32, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core import extensions
from ..core.layout import output_memory_format
from ..core.problem import Problem, Projection, dtype_name
from ..core.reference import TailArguments
from .base import Backend
from .cpu_fused import FewChannels, FusedConvolution
from .cpu_onednn import run_folded, run_pass
from .cpu_rule import DIRECT, fastest, stem, why_not_bf16, winograd_choice

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Below this, gathering the inputs of our direct kernel costs too much: oneDNN has kernels of its own for that.
_LEAST_CHANNELS = 16


def _onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in ``dtype`` here (bfloat16: AVX-512 on x86; float16: AVX-512 FP16)."""
    if dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype is not torch.float16 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _onednn_is_wrong(problem: Problem) -> bool:
    """Whether oneDNN 3.12's 16-bit convolution gives wrong values: one column of output under a stride of 2 or more.

    Seen with AMX (``brg_conv_fwd:avx10_1_512_amx``) in channels_last, torch's own ``conv2d`` included: 48 of 80 outputs
    wrong for a 9 x 1 image, 5 x 5 filter, stride (1, 2), padding (0, 2).
    """
    return problem.q == 1 and problem.p > 1 and problem.stride[1] > 1


class CpuBackend(Backend):
    name = "cpu"

    def can_run(self, problem: Problem) -> str | None:
        if problem.device_type != "cpu":
            return f"cpu: device must be cpu, got {problem.device_type}"
        for dtype in {problem.dtype, problem.output_dtype}:
            if dtype not in _DTYPES:
                return f"cpu: dtype must be float32, bfloat16 or float16, got {dtype_name(dtype)}"
        if not torch.backends.mkldnn.is_available():
            return "cpu: torch must be built with oneDNN, got a build without"
        return None

    def run(self, problem: Problem, tail: TailArguments) -> Tensor:
        return self.bind(problem, tail)(tail)

    def bind(
        self, problem: Problem, tail: TailArguments, configuration: Any = None
    ) -> Callable[[TailArguments], Tensor]:
        if problem.output_dtype is not problem.dtype:
            # float16 x with a float32 residual, say: exact in the wider type, and rare
            return partial(_run_widened, self, problem.output_dtype)
        otherwise = self._onednn(problem)
        if problem.groups != 1 or not _have_kernels(problem.dtype):
            return otherwise
        choice = winograd_choice(tail.winograd)
        if problem.c < _LEAST_CHANNELS:
            return FewChannels(otherwise, stem(problem, choice))
        projection = DIRECT
        if problem.projection is not None:
            projection = fastest(_projection(problem, problem.projection), choice)
        return FusedConvolution(otherwise, fastest(problem, choice), projection)

    def _onednn(self, problem: Problem) -> Callable[[TailArguments], Tensor]:
        """What runs where there is no kernel of ours."""
        if problem.dtype is not torch.float32 and (not _onednn_has(problem.dtype) or _onednn_is_wrong(problem)):
            return partial(_run_widened, self, torch.float32)
        if problem.dtype is not torch.float32 or extensions.cpu() is None or problem.activation == "none":
            return run_folded
        return run_pass


def _have_kernels(dtype: torch.dtype) -> bool:
    """Whether our own convolutions are the fastest of ``dtype`` here."""
    if extensions.cpu() is None:
        return False
    return dtype is torch.float32 or (dtype is torch.bfloat16 and why_not_bf16() is None)


def _projection(problem: Problem, proj: Projection) -> Problem:
    return replace(
        problem, c=proj.c, h=proj.h, w=proj.w, r=1, s=1, stride=proj.stride, padding=(0, 0), dilation=(1, 1),
        residual=None, projection=None,
    )  # fmt: skip


def arithmetic(dtype: torch.dtype) -> str | None:
    """One sentence about how this CPU computes convolutions of a 16-bit type; None where by kernels of ours."""
    if _have_kernels(dtype):
        return None
    name = dtype_name(dtype)
    if not _onednn_has(dtype):
        return f"{name}: this processor has no arithmetic for it, so each tail is computed in float32 and rounded once"
    reason = f" ({why_not_bf16()})" if dtype is torch.bfloat16 else ""
    return f"{name}: oneDNN's convolutions, with BN folded into their weights{reason}"


def _run_widened(backend: CpuBackend, dtype: torch.dtype, tail: TailArguments) -> Tensor:
    """``tail`` in a wider type, whose weights are kept where the caller keeps packed ones."""
    memory_format = output_memory_format(tail.x, tail.conv.weight)
    kept, casts, wide = tail.packed_weights, None, tail
    if kept is not None and extensions.cpu() is not None:
        conv, proj = (conv and conv._replace(weight=kept.cast(conv.weight, dtype)) for conv in (tail.conv, tail.proj))
        assert conv is not None
        casts, wide = kept.casts, tail._replace(conv=conv, proj=proj)
    wide = wide.to(dtype)._replace(packed_weights=casts)
    y = backend.run(Problem.from_tail(wide), wide)
    return y.to(Problem.from_tail(tail).output_dtype).contiguous(memory_format=memory_format)


BACKEND = CpuBackend()
