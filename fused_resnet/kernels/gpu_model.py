"""What a GPU kernel is expected to take: the one place of the assumptions behind the rule and the roofline.

Measured, on an H200: the rates of its row in :mod:`fused_resnet.devices` (a large bf16 product, a large copy). All else
is an assumption to about 30 %, until a GPU has been asked (benchmarks/gpu_day.sh)::

    time = max(FLOPs / (rate * fill * D / (D + prologue)), bytes / (bandwidth * share)) + fixed

D is the depth of the sum, R*S*C and the projection's C. ``fill`` is how much of the SMs the best tile keeps busy.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from ..core.problem import Problem
from ..devices import Device


@dataclass(frozen=True)
class Family:
    """How kernels of one kind come near the device's rates."""

    rates: dict[int, float]  # share of the tensor peak in a deep sum, by major capability; unknown ones as the lowest
    prologue: float  # the depth that a tile's start and epilogue cost
    share: float  # of the bandwidth
    fixed: float  # seconds

    def rate(self, device: Device) -> float:
        return self.rates.get(device.capability[0], min(self.rates.values()))


#: Of the tensor peak as measured. cuda: mma.sync, which does not reach the peak of Hopper and of datacentre Blackwell.
#: On Turing its copies pass registers. triton: wgmma on Hopper. cudnn: a convolution alone. mma.sync reads 16 bytes a
#: thread.
FAMILIES: dict[str, Family] = {
    "cuda": Family({7: 0.60, 8: 0.80, 9: 0.63, 10: 0.25, 12: 0.80}, 160, 0.82, 2.5e-6),
    "triton": Family({8: 0.75, 9: 0.76, 10: 0.60, 12: 0.75}, 220, 0.82, 2.8e-6),
    "cudnn": Family({7: 0.80, 8: 0.85, 9: 0.86, 10: 0.80, 12: 0.80}, 160, 0.85, 2.5e-6),
}

#: Where pixels are narrower than a 16-byte load, as the stem's three channels: ours gathers them (961 instructions for
#: 32 products of tiles), the others load less per instruction too. Whole kernels: filling the SMs is in the rate.
NARROW: dict[str, Family] = {
    "cuda": Family({9: 0.076}, 0, 0.70, 3e-6),
    "triton": Family({9: 0.152}, 0, 0.70, 3e-6),
    "cudnn": Family({9: 0.215}, 0, 0.80, 3e-6),
}

#: Tiles of pixels by filters, with how well each feeds the tensor cores, and the ways to split a sum.
TILES = ((256, 128, 1.0), (128, 128, 0.92), (128, 64, 0.78), (64, 64, 0.60))
SPLITS = (1, 2, 4, 8)
SPLIT_QUALITY = 0.9

#: A pass over a tensor that is there already, eager's or the second of two_pass.
PASS_SHARE, PASS_FIXED = 0.85, 2e-6

#: Seconds of host time for one call: the measured dispatch (bench_launch_cost.py) plus the driver's launches.
HOST_SECONDS = {"cuda": 10e-6, "triton": 15e-6, "cudnn": 12e-6, "two_pass": 22e-6, "eager": 25e-6}

#: cudnn folds BN into its weights in each call: small operators, each of which takes the host and the device so long.
FOLD_OPERATORS, FOLD_HOST, FOLD_DEVICE = 10, 4e-6, 2e-6


def bound(flops: float, moved: float, dtype: torch.dtype, device: Device, tf32: bool = False) -> float:
    """The least seconds: compute or memory, whichever is longer, at the device's full rates."""
    return max(flops / device.flops(dtype, tf32), moved / device.bandwidth)


def memory_bound(problem: Problem, flops: float = 790e12, bandwidth: float = 4.3e12) -> bool:
    """Whether a 16-bit tail waits for memory rather than for the tensor cores, at the H200's rates by default."""
    return problem.flops / flops < problem.compulsory_bytes / bandwidth


def filled(problem: Problem, sms: int) -> float:
    """The share of SM time that the best tile and split keep busy, times how well that tile feeds the tensor cores."""
    pixels = max(1, problem.n * problem.p * problem.q)
    best = 0.0
    for m, n, quality in TILES:
        tiles = math.ceil(pixels / m) * math.ceil(problem.k / n)
        useful = pixels * problem.k / (tiles * m * n)
        for split in SPLITS:
            waves = tiles * split / sms
            cost = 1.0 if split == 1 else SPLIT_QUALITY  # the partial sums travel
            best = max(best, quality * useful * cost * waves / math.ceil(waves))
    return best


def kernel(name: str, problem: Problem, device: Device, moved: float | None = None) -> float:
    """Seconds of one kernel of the family ``name`` that computes ``problem`` and moves ``moved`` bytes."""
    narrow = problem.c // problem.groups * problem.dtype.itemsize % 16 != 0
    family = (NARROW if narrow else FAMILIES)[name]
    peak = device.flops(problem.dtype, problem.tf32)
    if problem.dtype.itemsize == 2 or problem.tf32:
        depth = problem.r * problem.s * (problem.c // problem.groups)
        depth += problem.projection.c if problem.projection else 0
        peak *= family.rate(device) * depth / (depth + family.prologue)
    rate = peak * (1.0 if narrow else filled(problem, device.sms))
    traffic = problem.compulsory_bytes if moved is None else moved
    return max(problem.flops / rate, traffic / (device.bandwidth * family.share)) + family.fixed


def passes(moved: float, launches: int, device: Device) -> float:
    """Seconds of ``launches`` elementwise kernels that move so many bytes together."""
    return moved / (device.bandwidth * PASS_SHARE) + launches * PASS_FIXED


def device_seconds(backend: str, problem: Problem, device: Device) -> float:
    """What the GPU takes for a call by ``backend``."""
    if backend in ("cuda", "triton"):
        return kernel(backend, problem, device)
    y = problem.n * problem.p * problem.q * problem.k * problem.dtype.itemsize
    out = y // problem.dtype.itemsize * problem.output_dtype.itemsize
    added = 0 if problem.residual is None else y // problem.dtype.itemsize * problem.residual.itemsize
    alone = dataclasses.replace(problem, projection=None, residual=None)
    convolutions = kernel("cudnn", alone, device)
    if (proj := problem.projection) is not None:
        read = proj.c * problem.dtype.itemsize * (problem.n * problem.p * problem.q + problem.k)
        shortcut = dataclasses.replace(alone, c=proj.c, r=1, s=1, stride=(1, 1), padding=(0, 0), dilation=(1, 1))
        shortcut = dataclasses.replace(shortcut, h=problem.p, w=problem.q, groups=1)
        projection = kernel("cudnn", shortcut, device, read + y)
    else:
        projection = 0.0
    if backend == "cudnn":
        fold = FOLD_OPERATORS * FOLD_DEVICE * (2 if proj else 1)
        # what is added is read in the epilogue, where nothing else happens
        z = passes(y if proj else added, 0, device)
        return convolutions + projection + z + fold
    second = added or (y if proj else 0)
    if backend == "two_pass":
        return convolutions + projection + passes(y + second + out, 1, device)
    # eager: BN of each convolution, the addition and the activation, each a pass of its own
    moved, launches = 0, 0
    for there, traffic in (
        (problem.bn, 2 * y), (proj is not None and proj.bn, 2 * y), (second, y + second + out),
        (problem.activation != "none", 2 * out),
    ):  # fmt: skip
        if there:
            moved, launches = moved + traffic, launches + 1
    return convolutions + projection + passes(moved, launches, device)


def host_seconds(backend: str, problem: Problem) -> float:
    """What the host takes to queue a call by ``backend``, outside a CUDA graph."""
    fold = FOLD_OPERATORS * FOLD_HOST * (2 if problem.projection else 1) if backend == "cudnn" else 0.0
    return HOST_SECONDS.get(backend, 25e-6) + fold
