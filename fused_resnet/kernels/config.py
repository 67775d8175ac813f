"""The shipped tile configurations of the Triton tail, and which of them to take without measuring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..core.problem import Problem, dtype_name
from .gpu_model import memory_bound


@dataclass(frozen=True)
class TailConfig:
    """A tile of m pixels by n filters, its K-loop step, and how the programs share the work."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    split_k: int = 1
    ordered: bool = True  # split-K adds partial sums in a fixed order; False: atomically, the order is the hardware's
    persistent: bool = False  # as many programs as fit on the device, each taking tile after tile
    tma: bool = False  # operands through tensor descriptors, where `why_not_tma` has nothing against it

    def __str__(self) -> str:
        text = f"{self.m}x{self.n}x{self.k}_w{self.warps}_s{self.stages}"
        if self.split_k > 1:
            text += f"_split{self.split_k}" + ("" if self.ordered else "a")
        return text + ("_persistent" if self.persistent else "") + ("_tma" if self.tma else "")

    def shared_bytes(self, item: int) -> int:
        """Shared memory of the stages (an upper bound: on sm_80 the compiler keeps one less)."""
        return self.stages * (self.m + self.n) * self.k * item


#: fp16 and bf16. Every pair of operand tiles here is a whole number of 16-byte copies per thread.
HALF: tuple[TailConfig, ...] = (
    TailConfig(128, 128, 32, 4, 4),
    TailConfig(128, 128, 64, 4, 3),
    TailConfig(128, 128, 64, 8, 3),
    TailConfig(128, 256, 64, 8, 3),
    TailConfig(256, 128, 64, 8, 3),
    TailConfig(128, 64, 64, 4, 3),
    TailConfig(64, 128, 64, 4, 3),
    TailConfig(64, 64, 64, 4, 4),
    TailConfig(64, 64, 32, 4, 4),
    TailConfig(32, 64, 64, 4, 4),
)
#: fp32 products rounded to tf32.
TF32: tuple[TailConfig, ...] = (
    TailConfig(128, 128, 32, 8, 3),
    TailConfig(128, 64, 32, 4, 3),
    TailConfig(64, 128, 32, 4, 3),
    TailConfig(64, 64, 32, 4, 3),
    TailConfig(32, 64, 32, 4, 4),
)
#: Exact fp32, on the FMA units.
FP32: tuple[TailConfig, ...] = (
    TailConfig(128, 64, 16, 8, 3),
    TailConfig(64, 64, 16, 4, 3),
    TailConfig(64, 32, 16, 4, 3),
)
#: Bytes of shared memory that one program may use, per compute capability; a newer one counts as 99 KiB.
SHARED_LIMIT = {80: 163 << 10, 87: 163 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10, 110: 227 << 10}
#: Capabilities whose tensor cores read operands from shared memory (wgmma, tcgen05), and those with tensor memory.
MEMORY_OPERANDS = (90, 100, 103, 110)
TENSOR_MEMORY = (100, 103, 110)
TMA_CHANNELS = 64  # whole steps of the K-loop, since nothing masks the weights of the next tap
SPLITS = (2, 4, 8)


def base_configs(problem: Problem, capability: int) -> list[TailConfig]:
    """The tiles for `problem` on a device, each by pointers and, where they run, by tensor descriptors."""
    family = HALF
    if problem.dtype is torch.float32:
        family = TF32 if problem.tf32 else FP32
    found = [config for config in family if fits(config, problem, capability)]
    if why_not_tma(problem, capability) is None:
        found += [replace(config, tma=True) for config in found if config.n >= 64]  # filters are wgmma's 64 rows
    return found


def why_not_tma(problem: Problem, capability: int) -> str | None:
    """None where tensor descriptors can load a problem's operands on a device, else the sentence."""
    if capability < 90:
        return f"triton: tensor descriptors need compute capability 9.0 or newer, got {capability / 10}"
    if problem.dtype.itemsize != 2:  # tf32 must be rounded on the way, and a descriptor's own rounding is unproven here
        return f"triton: tensor descriptors load float16 and bfloat16, got {dtype_name(problem.dtype)}"
    widths = {"c": problem.c} | ({"proj c": problem.projection.c} if problem.projection else {})
    for name, c in widths.items():
        if c % TMA_CHANNELS:
            return f"triton: tensor descriptors need a multiple of {TMA_CHANNELS} channels, got {name}={c}"
    pointwise = (problem.r, problem.s) == (1, 1) and problem.padding == (0, 0)
    if problem.stride != (1, 1) and not pointwise:
        return f"triton: tensor descriptors need stride 1 for a filter of more than one tap, got {problem.stride}"
    return None


def fits(config: TailConfig, problem: Problem, capability: int) -> bool:
    """Whether the device has the shared memory, and the program the registers (a projection needs two accumulators)."""
    accumulators = config.m * config.n // (32 * config.warps)
    if accumulators > 64 and problem.projection is not None:
        return False
    on_tensor_cores = problem.tf32 or problem.dtype is not torch.float32
    if on_tensor_cores and capability in MEMORY_OPERANDS and config.k * problem.dtype.itemsize < 128:
        return False  # steps too short for tensor cores that read shared memory
    if on_tensor_cores and capability in TENSOR_MEMORY and accumulators > 64:
        return False  # they come back from tensor memory all at once, and would spill
    return config.shared_bytes(problem.dtype.itemsize) <= SHARED_LIMIT.get(capability, 99 << 10)


def tile_count(config: TailConfig, problem: Problem) -> int:
    return -(-problem.n * problem.p * problem.q // config.m) * -(-problem.k // config.n)


def variants(config: TailConfig, problem: Problem, sms: int, deterministic: bool) -> Iterator[TailConfig]:
    """`config`, split where its tiles leave SMs idle, persistent where there are several tiles per SM."""
    yield config
    tiles = tile_count(config, problem)
    depth = problem.r * problem.s * -(-problem.c // config.k)
    for split in SPLITS:
        if tiles * split <= 2 * sms and 2 * split <= depth:
            yield replace(config, split_k=split)
            if not deterministic:
                yield replace(config, split_k=split, ordered=False)
    if tiles > 2 * sms:
        yield replace(config, persistent=True)


def candidates(problem: Problem, capability: int, sms: int, deterministic: bool) -> list[TailConfig]:
    """Every configuration that can compute `problem`, the expected best first (an expectation, not a measurement).

    The expectation: a tile costs its multiplications, slower the fewer of them a loaded byte feeds, plus a fixed
    start and epilogue; the device runs one tile per SM at a time; a split adds the partial tiles' traffic. Where
    memory is the limit, an SM that holds one program idles through its loads and its epilogue.
    """
    found = [
        variant
        for config in base_configs(problem, capability)
        for variant in variants(config, problem, sms, deterministic)
    ]
    depth = problem.r * problem.s * problem.c + (problem.projection.c if problem.projection else 0)

    waits_for_memory = memory_bound(problem)
    shared = SHARED_LIMIT.get(capability, 99 << 10)

    def cost(config: TailConfig) -> float:
        intensity = config.m * config.n / (config.m + config.n)
        rate = intensity / (intensity + 32)
        loop = config.m * config.n * max(depth / config.split_k, config.k) / rate
        fixed = config.m * config.n * 32 * (1 + 3 * (config.split_k > 1) + config.split_k / 2 * (config.split_k > 1))
        rounds = -(-tile_count(config, problem) * config.split_k // sms)
        alone = 2 * config.shared_bytes(problem.dtype.itemsize) > shared
        if waits_for_memory and alone:
            loop, fixed = 1.5 * loop, 1.5 * fixed
        # variants that only a measurement can justify come right after their plain form
        return rounds * (loop + fixed) * (1.001 if config.persistent or config.tma or not config.ordered else 1.0)

    return sorted(found, key=cost)


def stats_candidates(problem: Problem, capability: int, sms: int) -> list[TailConfig]:
    """The configurations of the training convolution, the expected best first.

    None splits the K-loop: the statistics are of the rounded sum over all of it, so they could only follow a second
    hand-over between programs, and a training batch has tiles enough to fill a device.
    """
    return [c for c in candidates(problem, capability, sms, deterministic=True) if c.split_k == 1]
