"""Which candidate runs where nothing has been timed: the rule of ``auto`` on CUDA.

Status: expected not slower than eager, **unmeasured**. The rule stands until a GPU's tuning file is committed, and
``fused-resnet tune`` replaces it on any machine. It compares what :mod:`fused_resnet.kernels.gpu_model`
expects of each way to run the call: the device's time, or the host's where that is longer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.problem import Problem
from ..devices import Device, of
from ..kernels import gpu_model
from ..selection.candidates import Candidate

#: What our own kernels are taken to need more than the model says, until a GPU has measured them.
UNMEASURED = 1.05

#: Times closer than this are taken as equal; the order below then decides.
TIE = 0.02

#: Between equals: live BN and the lowest launch cost first, then no folded copies, then no fusion.
PREFERENCE = ("cuda", "triton", "cudnn", "two_pass", "eager")


def order(candidates: Sequence[Candidate], problem: Problem, device: Device) -> list[Candidate]:
    """``candidates`` with the one to be tried first in front. Within a backend its own preference stands."""
    expected = {c.backend: seconds(c.backend, problem, device) for c in candidates}
    best = min(expected.values(), default=0.0)

    def rank(backend: str) -> tuple[float, int]:
        place = PREFERENCE.index(backend) if backend in PREFERENCE else len(PREFERENCE)
        return (0.0 if expected[backend] <= best * (1 + TIE) else expected[backend], place)

    return sorted(candidates, key=lambda c: rank(c.backend))  # stable: keeps the order within a backend


def ladder(problem: Problem, device: torch.device) -> tuple[str, ...]:
    """The backends in the order of the rule on ``device``."""
    return tuple(c.backend for c in order([Candidate(name) for name in PREFERENCE], problem, of(device)))


def seconds(backend: str, problem: Problem, device: Device) -> float:
    """The time in which ``backend`` is expected to run ``problem``, calls following each other."""
    if backend not in PREFERENCE:
        backend = "eager"
    ours = UNMEASURED if backend in ("cuda", "triton") else 1.0
    on_device = gpu_model.device_seconds(backend, problem, device) * ours
    return max(on_device, gpu_model.host_seconds(backend, problem))
