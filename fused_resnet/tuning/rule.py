"""Which candidate runs where nothing has been timed: the rule of ``auto`` on CUDA.

Status: expected not slower than eager, **unmeasured**. No time in this file comes from a GPU; the rule stands until
a GPU's tuning file is committed, and ``fused-resnet tune`` replaces it on any machine. It compares lower bounds: the
roofline of each way to run the call, with the tensor rate cut to what its instruction stream can issue.

* Compute: peak x issue ceiling x how evenly tiles fill the SMs. Ours pays 15 % more for being unmeasured.
* Memory: compulsory bytes, plus what each further pass reads and writes.
* Host: a launch that the host takes longer to prepare than the device to run costs the host's time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..devices import Device, of
from ..problem import Problem
from .candidates import Candidate

#: Share of the dense tensor peak that the instruction stream of each backend can reach, by major capability.
#: cuda: mma.sync. On Hopper published microbenchmarks give it about 63 % of the wgmma peak; for datacentre Blackwell,
#: where it is an older path still, a quarter is assumed. triton: wgmma on Hopper; of a step's 512 tensor cycles a plain
#: pointer loop spends 284 on issue, so they overlap only in part. cudnn: what its kernels reach on large convolutions.
CEILINGS: dict[str, dict[int, float]] = {
    "cuda": {8: 0.80, 9: 0.60, 10: 0.25, 12: 0.80},
    "triton": {8: 0.75, 9: 0.70, 10: 0.60, 12: 0.75},
    "cudnn": {8: 0.80, 9: 0.80, 10: 0.75, 12: 0.75},
}

#: Rate asked of our own kernels less than their ceiling, until a GPU has measured them.
UNMEASURED = 0.85

#: Seconds of host time for one call: the measured dispatch (bench_launch_cost.py) plus the driver's launches.
HOST_SECONDS = {"cuda": 10e-6, "triton": 15e-6, "cudnn": 12e-6, "two_pass": 22e-6, "eager": 25e-6}

#: Times closer than this are taken as equal; the order below then decides.
TIE = 0.02

#: Between equals: live BN and the lowest launch cost first, then no folded copies, then no fusion.
PREFERENCE = ("cuda", "triton", "cudnn", "two_pass", "eager")


def order(candidates: Sequence[Candidate], problem: Problem, device: Device, cached: bool = False) -> list[Candidate]:
    """``candidates`` with the one to be tried first in front. Within a backend its own preference stands."""
    expected = {c.backend: seconds(c.backend, problem, device, cached) for c in candidates}
    best = min(expected.values(), default=0.0)

    def rank(backend: str) -> tuple[float, int]:
        place = PREFERENCE.index(backend) if backend in PREFERENCE else len(PREFERENCE)
        return (0.0 if expected[backend] <= best * (1 + TIE) else expected[backend], place)

    return sorted(candidates, key=lambda c: rank(c.backend))  # stable: keeps the order within a backend


def ladder(problem: Problem, device: torch.device) -> tuple[str, ...]:
    """The backends in the order of the rule on ``device``, weights taken as cached."""
    return tuple(c.backend for c in order([Candidate(name) for name in PREFERENCE], problem, of(device), True))


def seconds(backend: str, problem: Problem, device: Device, cached: bool = False) -> float:
    """The least time in which ``backend`` can run ``problem``, by the roofline and its ceilings."""
    host = HOST_SECONDS.get(backend, 25e-6)
    if backend in ("cuda", "triton"):
        rate = _rate(backend, problem, device) * UNMEASURED
        return max(problem.flops / rate, problem.compulsory_bytes / device.bandwidth, host)
    rate = _rate("cudnn", problem, device)
    pixels = problem.n * problem.p * problem.q * problem.k
    y = pixels * problem.dtype.itemsize
    if backend == "cudnn":
        # a fold on every call reads and writes the weights and takes some ten small kernels
        fold = 0.0 if cached else 10 * 3e-6
        projection = 2 * y / device.bandwidth if problem.projection else 0.0  # a launch of its own
        return max(problem.flops / rate, problem.compulsory_bytes / device.bandwidth, host) + projection + fold
    residual = 0 if problem.residual is None else pixels * problem.residual.itemsize
    out = pixels * problem.output_dtype.itemsize
    convolutions = max(problem.flops / rate, (problem.compulsory_bytes - residual) / device.bandwidth)
    outputs = 2 if problem.projection else 1
    if backend == "two_pass":
        return max(convolutions + (outputs * y + residual + out) / device.bandwidth, host)
    # eager: BN of each convolution, the addition and the activation, each a pass of its own
    passes = outputs * 2 * y * int(problem.bn) + 2 * y * int(problem.activation != "none")
    if problem.residual is not None or problem.projection is not None:
        passes += y + out + (residual or y)
    return max(convolutions + passes / device.bandwidth, host)


def _rate(backend: str, problem: Problem, device: Device) -> float:
    """Products per second: the peak, cut to the backend's issue ceiling (tensor cores only) and to filled SMs."""
    peak = device.flops(problem.dtype, problem.tf32)
    if problem.dtype.itemsize == 2 or problem.tf32:
        ceilings = CEILINGS[backend]
        peak *= ceilings.get(device.capability[0], min(ceilings.values()))
    return peak * filled(problem, device.sms)


def filled(problem: Problem, sms: int) -> float:
    """The share of SM time that the best of three tile sizes keeps busy, split-K up to 8 included."""
    pixels = max(1, problem.n * problem.p * problem.q)
    best = 0.0
    # a smaller tile feeds the tensor cores less well: each operand is used fewer times
    for m, n, quality in ((128, 128, 1.0), (128, 64, 0.9), (64, 64, 0.75)):
        tiles = math.ceil(pixels / m) * math.ceil(problem.k / n)
        useful = pixels * problem.k / (tiles * m * n)
        for split in (1, 2, 4, 8):
            waves = tiles * split / sms
            cost = 1.0 if split == 1 else 0.95  # the partial sums travel
            best = max(best, quality * useful * cost * waves / math.ceil(waves))
    return best
