"""What a GPU kernel is expected to take: the one place of the assumptions behind the rule and the roofline.

Measured, on an H200: the rates of its row in :mod:`fused_resnet.devices` (a large bf16 product, a large copy). All else
is an assumption to about 30 %, until a GPU has been asked (benchmarks/gpu_day.sh)::

    time = max(FLOPs / (rate * fill * D / (D + prologue)), bytes / (bandwidth * share)) + fixed

D is the depth of the sum, R*S*C and the projection's C. ``fill`` is how much of the SMs the best tile keeps busy, or
the tile that a planner has chosen. Which family runs a call of the backend ``cuda`` is its planner's to say.
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


@dataclass(frozen=True)
class Launch:
    """A kernel of ours as its planner would launch it: the tile, the blocks that share its sum, the depth it walks."""

    family: str  # "wgmma", "mma.sync" or, for exact float32, "FMA"
    m: int
    n: int
    splits: int
    depth: int  # in whole steps, so at least R*S*C and the projection's C

    def __str__(self) -> str:
        return f"{self.family} {self.m}x{self.n}" + (f" splitk={self.splits}" if self.splits > 1 else "")


#: Of the tensor peak as measured. mma.sync: the C++ kernels, whose instruction does not reach the peak of Hopper and of
#: datacentre Blackwell; on Turing their copies pass registers. wgmma: the C++ kernels for Hopper, persistent and with
#: copies that run ahead into the next tile, so that of a tile's start and end only the store is left. triton: wgmma on
#: Hopper. cudnn: a convolution alone. mma.sync reads 16 bytes a thread.
FAMILIES: dict[str, Family] = {
    "wgmma": Family({9: 0.91}, 64, 0.88, 2e-6),
    "mma.sync": Family({7: 0.60, 8: 0.80, 9: 0.63, 10: 0.25, 12: 0.80}, 160, 0.82, 2.5e-6),
    "triton": Family({8: 0.75, 9: 0.76, 10: 0.60, 12: 0.75}, 220, 0.82, 2.8e-6),
    "cudnn": Family({7: 0.80, 8: 0.85, 9: 0.86, 10: 0.80, 12: 0.80}, 160, 0.85, 2.5e-6),
}

#: Where pixels are narrower than a 16-byte load, as the stem's three channels: ours gathers them (961 instructions for
#: 32 products of tiles), the others load less per instruction too. Whole kernels: filling the SMs is in the rate.
NARROW: dict[str, Family] = {
    "mma.sync": Family({9: 0.076}, 0, 0.70, 3e-6),
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


def _filled(problem: Problem, sms: int, tile: tuple[int, int, float], split: int) -> float:
    m, n, quality = tile
    pixels = max(1, problem.n * problem.p * problem.q)
    tiles = math.ceil(pixels / m) * math.ceil(problem.k / n)
    useful = pixels * problem.k / (tiles * m * n)
    waves = tiles * split / sms
    cost = 1.0 if split == 1 else SPLIT_QUALITY  # the partial sums travel
    return quality * useful * cost * waves / math.ceil(waves)


def filled(problem: Problem, sms: int, launch: Launch | None = None) -> float:
    """The share of SM time that a tile keeps busy, times how well it feeds the tensor cores: that of ``launch``, or of
    the best tile and split."""
    if launch is not None:
        (tile,) = (tile for tile in TILES if tile[:2] == (launch.m, launch.n))
        return _filled(problem, sms, tile, launch.splits)
    return max(_filled(problem, sms, tile, split) for tile in TILES for split in SPLITS)


def kernel(
    name: str, problem: Problem, device: Device, moved: float | None = None, launch: Launch | None = None
) -> float:
    """Seconds of one kernel of the family ``name`` that computes ``problem`` and moves ``moved`` bytes, with the
    tile of ``launch`` if one is known."""
    narrow = problem.c // problem.groups * problem.dtype.itemsize % 16 != 0
    family = (NARROW if narrow else FAMILIES)[name]
    peak = device.flops(problem.dtype, problem.tf32)
    if problem.dtype.itemsize == 2 or problem.tf32:
        depth = problem.r * problem.s * (problem.c // problem.groups)
        depth += problem.projection.c if problem.projection else 0
        walked = launch.depth if launch else depth
        peak *= family.rate(device) * depth / (walked + family.prologue)
    rate = peak * (1.0 if narrow else filled(problem, device.sms, launch))
    traffic = problem.compulsory_bytes if moved is None else moved
    return max(problem.flops / rate, traffic / (device.bandwidth * family.share)) + family.fixed


def passes(moved: float, launches: int, device: Device) -> float:
    """Seconds of ``launches`` elementwise kernels that move so many bytes together."""
    return moved / (device.bandwidth * PASS_SHARE) + launches * PASS_FIXED


def device_seconds(backend: str, problem: Problem, device: Device, launch: Launch | None = None) -> float:
    """What the GPU takes for a call by ``backend``. ``launch``: what ``cuda`` launches, else mma.sync at its best."""
    if backend == "cuda":
        if launch is not None and launch.family == "wgmma":
            return kernel("wgmma", problem, device, launch=launch)
        return kernel("mma.sync", problem, device)
    if backend == "triton":
        return kernel("triton", problem, device)
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
