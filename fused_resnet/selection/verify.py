"""Is a candidate right on this device? Compared with the reference on random tensors like those of the call.

A compiled kernel is only as right as its compiler: Triton's and nvcc's code generation differ by GPU, driver and
version. So before a candidate first runs somewhere it is held to the bar of :mod:`fused_resnet.testing` there, and
the verdict is kept. A miscompiled kernel then costs speed, never a wrong answer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.problem import Problem
from ..core.reference import TailArguments, reference
from ..testing import Kind, eager_error, eager_output
from ..testing.tolerances import FORWARD_FACTOR, OUTPUTS_SEEN, ROUNDING, WINOGRAD_F4_RMS_FACTOR
from .calls import Call
from .candidates import UNCOMPILED, Candidate, first_line, is_compiler_error
from .store import Store

#: Backends that round between their steps or fold the weights: not bit-exact on integers, and need not be.
ROUNDS_BETWEEN = frozenset({"eager", "cudnn", "two_pass", "cpu"})

#: Largest float64 chunk of the reference, in bytes: the reference runs image by image where memory is short.
_CHUNK_BYTES = 256 << 20


class DeviceLost(RuntimeError):
    """A kernel has broken the GPU's context; this process can run nothing more on it."""


def enabled() -> bool:
    """Verification on first use, unless the environment variable ``FUSED_RESNET_VERIFY`` is 0."""
    return os.environ.get("FUSED_RESNET_VERIFY", "1") not in ("0", "off", "no")


def needed(candidate: Candidate, device: torch.device) -> bool:
    """Whether ``candidate`` has to be verified before it runs: all but the reference itself, where code is
    generated for the device. The CPU's kernels are compiled with the package and tested with it."""
    return device.type == "cuda" and candidate.backend != "eager"


def judge(candidate: Candidate, call: Call, device: torch.device, store: Store) -> str:
    """Try ``candidate`` and keep the verdict: ``"ok"``, ``"wrong: …"`` or ``"failed: …"``.

    Being out of memory says nothing about the candidate, so it is returned but not kept. An interrupt leaves no
    trace; the end of the process leaves a note that the next one finds.
    """
    store.set_trying(call.key, candidate.name)
    try:
        wrong = mismatch(candidate, call, device)
        verdict = "ok" if wrong is None else f"wrong: {wrong}"
    except torch.OutOfMemoryError as error:
        store.forget(call.key, candidate.name)
        return f"failed: {first_line(error)}"
    except Exception as error:
        verdict = f"{UNCOMPILED if is_compiler_error(error) else 'failed'}: {first_line(error)}"
        if lost(device):
            store.set_verdict(call.key, candidate.name, verdict.replace("failed", "crashed", 1))
            raise DeviceLost(
                f"{candidate.name} broke the CUDA context while it was verified on {call.problem} "
                f"({first_line(error)}); it will not run here again, start the process anew"
            ) from error
    except BaseException:
        store.forget(call.key, candidate.name)
        raise
    store.set_verdict(call.key, candidate.name, verdict)
    return verdict


def lost(device: torch.device) -> bool:
    """Whether the device no longer answers, as after an illegal access."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def mismatch(candidate: Candidate, call: Call, device: torch.device) -> str | None:
    """None where ``candidate`` meets the bar, else one clause that says how it does not.

    Two runs: small integers, where nothing may round (every indexing mistake shows), and random values, whose
    error may be twice eager's own plus one rounding of the output.
    """
    kinds: tuple[Kind, ...] = ("random",) if candidate.backend in ROUNDS_BETWEEN else ("integers", "random")
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for kind in kinds:
            tail = call.tail(kind, 0, device)
            y = candidate.bind(call.problem, tail)(tail)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found = _compare(y, tail, call.problem, kind, candidate.backend == "cpu")
            if found is not None:
                return found
    return None


def _compare(y: Tensor, tail: TailArguments, problem: Problem, kind: Kind, winograd: bool) -> str | None:
    if tuple(y.shape) != problem.output_shape or y.dtype != problem.output_dtype:
        return f"{y.dtype} {list(y.shape)} where {problem.output_dtype} {list(problem.output_shape)} was expected"
    if kind == "integers":
        wrong = sum(int((part != _exact(chunk).to(y.dtype)).sum()) for chunk, part in _chunks(tail, y))
        return f"{wrong} of {y.numel()} outputs differ on small integers, where nothing rounds" if wrong else None
    errors = _Errors()
    for chunk, part in _chunks(tail, y):
        errors.add(part, _exact(chunk), eager_output(chunk, problem.tf32 and not y.is_cuda))
    if winograd:  # the CPU's F(4x4, 3x3), whose bar is one of rms
        limit, worst, baseline = WINOGRAD_F4_RMS_FACTOR, errors.rms, errors.eager_rms
    else:
        limit, worst, baseline = FORWARD_FACTOR, errors.worst, errors.eager_worst
        if y.numel() < OUTPUTS_SEEN:  # too few outputs for a reliable estimate of eager's error
            baseline = max(baseline, eager_error(problem, 1, y.device))
    if worst > limit * baseline:
        return f"error {worst:.1e}, where eager's own is {baseline:.1e} and {limit:g} times that is allowed"
    return None


class _Errors:
    """Errors against float64, gathered part by part: the largest, beyond one rounding of the output, and the rms."""

    def __init__(self) -> None:
        self.worst = self.eager_worst = 0.0
        self._squares = self._eager_squares = 0.0

    def add(self, y: Tensor, exact: Tensor, eager: Tensor) -> None:
        error = (y.to(torch.float64) - exact).abs()
        error = torch.where(error.isnan(), math.inf, error)
        eager_error = (eager.to(torch.float64) - exact).abs()
        self.worst = max(self.worst, float((error - ROUNDING[y.dtype] * exact.abs()).max()))
        self.eager_worst = max(self.eager_worst, float(eager_error.max()))
        self._squares += float(error.square().sum())
        self._eager_squares += float(eager_error.square().sum())

    @property
    def rms(self) -> float:
        """Up to the number of outputs, which cancels in the comparison."""
        return math.sqrt(self._squares)

    @property
    def eager_rms(self) -> float:
        return math.sqrt(self._eager_squares)


def _exact(tail: TailArguments) -> Tensor:
    return reference(tail.to(torch.float64))


def _chunks(tail: TailArguments, y: Tensor) -> Iterator[tuple[TailArguments, Tensor]]:
    """The call in parts of a few images each, with their outputs: images do not depend on each other."""
    images = y.shape[0]
    if images == 0 or y.numel() == 0:
        return
    elements = y.numel() + tail.x.numel() + (0 if tail.proj_x is None else tail.proj_x.numel())
    step = max(1, min(images, int(_CHUNK_BYTES / 8 * images / elements)))

    def part(t: Tensor | None, start: int) -> Tensor | None:
        return None if t is None else t[start : start + step]

    for start in range(0, images, step):
        x = tail.x[start : start + step]
        chunk = tail._replace(x=x, residual=part(tail.residual, start), proj_x=part(tail.proj_x, start))
        yield chunk, y[start : start + step]
