"""Backend ``triton``: the implicit-GEMM tail with live BN in its epilogue, compiled at run time for sm_80 and newer.

Under ``TRITON_INTERPRET=1`` (set before the process starts) it runs in Triton's interpreter, on CPU tensors as well.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.problem import Problem, dtype_name
from ..core.reference import TailArguments
from .base import Backend

if TYPE_CHECKING:
    from ..kernels.config import TailConfig
    from ..kernels.launch import BoundTail

OLDEST_TRITON = (3, 6)


@lru_cache
def why_not_triton() -> str | None:
    """None where a Triton that these kernels need is installed, else the sentence; Triton itself is not imported."""
    if importlib.util.find_spec("triton") is None:
        return "triton: the package triton is not installed (pip install triton)"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"triton: expected version {'.'.join(map(str, OLDEST_TRITON))} or newer, got {version}"
    return None


@lru_cache
def why_not_device() -> str | None:
    """None where the current CUDA device can run the kernels, else the sentence."""
    if torch.version.hip is not None:
        return "triton: needs an NVIDIA GPU, got a ROCm build of torch"
    if not torch.cuda.is_available():
        return "triton: no NVIDIA GPU is visible"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"triton: needs compute capability 8.0 or newer, got {major}.{minor}"
    return None


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


class TritonBackend(Backend):
    name = "triton"

    def __init__(self) -> None:
        self._bound: dict[Any, BoundTail] = {}

    def can_run(self, problem: Problem) -> str | None:
        if (reason := why_not_triton()) is not None:
            return reason
        if not interpreting():
            if (reason := why_not_device()) is not None:
                return reason
            if problem.device_type != "cuda":
                return f"triton: x must be on a CUDA device, got {problem.device_type}"
        return why_not_problem(problem)

    def candidates(self, problem: Problem, device: torch.device) -> Sequence[TailConfig]:
        from ..kernels.launch import preferred

        return preferred(problem, device)

    def bind(
        self, problem: Problem, tail: TailArguments, configuration: TailConfig | None = None
    ) -> Callable[[TailArguments], Tensor]:
        from ..kernels.launch import BoundTail

        return BoundTail(problem, tail, configuration)

    def run(self, problem: Problem, tail: TailArguments, config: TailConfig | None = None) -> Tensor:
        key = (problem, config, tail.x.device,
               _signature(tail), torch.are_deterministic_algorithms_enabled())  # fmt: skip
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = self.bind(problem, tail, config)  # type: ignore[assignment]
        return bound(tail)  # type: ignore[misc]


def _signature(tail: TailArguments) -> tuple[torch.dtype | None, ...]:
    """What a Problem leaves open and a compiled kernel fixes: the dtypes of the BN vectors, and which of them there
    are.
    """
    vectors = [*tail.conv[2:6], *(tail.proj[2:6] if tail.proj is not None else ())]
    return tuple(None if v is None else v.dtype for v in vectors)


def why_not_problem(problem: Problem) -> str | None:
    """None where the kernels can compute `problem`, on whatever device, else the sentence."""
    for dtype in (problem.dtype, problem.output_dtype):
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"triton: dtype must be float16, bfloat16 or float32, got {dtype_name(dtype)}"
    if problem.groups != 1:
        return f"triton: groups must be 1, got {problem.groups}"
    if problem.n * problem.p * problem.q >= 2**31 - 1024:
        return f"triton: N*P*Q must be below 2**31, got {problem.n * problem.p * problem.q}"
    if problem.k * problem.r * problem.s * problem.c >= 2**31:
        shape = f"{problem.k}x{problem.c}x{problem.r}x{problem.s}"
        return f"triton: the weight must have fewer than 2**31 elements, got {shape}"
    return None


BACKEND = TritonBackend()
