"""Which of our CPU convolution kernels is expected to be fastest: a rule that needs no tuning, and its reasons."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from ..core import extensions
from ..core.layout import output_memory_format
from ..core.problem import Problem

#: A weight arrives from memory in the time of so many multiply-adds with it (13 GB/s against 230 GFLOP/s; the ratio is
#: alike on other CPUs): a GEMM with fewer rows waits for its weights. In a network they never come from a cache.
_ROWS_TO_HIDE_A_WEIGHT = 36
#: A GEMM with fewer rows than this takes as long as one with so many: its multiply-adds wait for one another.
_LEAST_ROWS = 7
#: Transforming one input (output) tile costs as much as multiplying its positions for so many output (input) channels.
TRANSFORM_CHANNELS = 10
#: Transforming one 3 x 3 filter in the call costs as much as so many multiply-adds.
_FRESH_TRANSFORM = {2: 65, 4: 110}
#: A multiply-add of float32 on matrix tiles costs so much of one in the vector unit: 460 to 480 GFLOP/s against 145.
_BF16X3_MULTIPLY_ADD = 0.3
#: Taking a weight apart in the call costs as much as so many multiply-adds.
_BF16X3_WEIGHT = 5
#: Taking its result apart makes an input tile's transform so many times as dear, the output's included.
_BF16X3_TRANSFORM = 2.3
#: A weight in three bfloat16 parts takes so many times the bytes of one in float32.
_BF16X3_BYTES = 1.5
#: A multiply-add of two bfloat16 costs so much of one of float32 where the vector unit has instructions for pairs of
#: them (AVX512_BF16; on a Zen 4 215 against 105 GFLOP/s); so does a weight's way from memory.
_BF16_MULTIPLY_ADD = 0.5
#: bf16x3 Winograd weights of more bytes do not stay in a core's second-level cache, where the tiles need them.
_BF16X3_WEIGHTS_STAY = 1 << 20


#: What a filter of ours saves, for each pair of an input and an output channel, must pay for what each channel costs:
#: the transforms, and from NCHW the copies. So many pairs to a channel do at 28 x 28 pixels and more (one thread,
#: AVX2; 1.2 to 2 times eager's speed, 1x1 convolutions and strided ones 0.6 to 1.0 times).
_LEAST_PAIRS = {torch.channels_last: 16, torch.contiguous_format: 20}


class Algorithm(NamedTuple):
    """One of our convolution kernels: Winograd F(m x m, 3 x 3), or direct convolution where m is 0.

    ``weights`` is what is kept of them: ``whole``, the values that are multiplied; ``fresh``, the weights as they are,
    transformed in each call, 9 values to read for 36 (F4) or 16 (F2); ``bf16x3``, the values in three bfloat16 parts
    for the processor's matrix tiles (AMX), which multiply as accurately as float32 does (csrc/cpu/bf16x3.h);
    ``fresh bf16x3``, the weights as they are, taken apart in each call; ``bf16x3 stem``, as ``bf16x3`` in the order in
    which the kernel with a max pool reads them; ``bf16``, the weights in bfloat16, for direct convolution of bfloat16.
    Winograd of bfloat16 multiplies in float32.
    """

    m: int
    weights: str = "whole"


DIRECT = Algorithm(0)
BF16X3_DIRECT = Algorithm(0, "bf16x3")
FRESH_BF16X3_DIRECT = Algorithm(0, "fresh bf16x3")
BF16_DIRECT = Algorithm(0, "bf16")
BF16X3_STEM = Algorithm(0, "bf16x3 stem")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def fastest(problem: Problem, winograd: str = "auto", tiles: bool | None = None) -> Algorithm:
    """The kernel that is expected to be fastest for a convolution of one group.

    The rule counts multiply-adds per pair of input and output channel. Direct convolution makes R S for each of the
    N P Q outputs, a third as dear on matrix tiles; F(m), for 3 x 3 filters with stride and dilation 1, makes (m + 2)^2
    for each tile plus its transforms; each costs at least what it takes to fetch its weights: 9, 36 (F4) or 16 (F2) for
    each pair, or 9 and their transform. So F(4x4) wins on large images, with fresh weights where there are few tiles to
    share them, F(2x2) on 7x7 at batch 1, direct convolution where there is next to nothing (1x1 to 4x4 pixels) or few
    channels; with matrix tiles direct convolution wins from 256 channels at 14x14 on. In bfloat16 direct convolution
    costs half, Winograd what it costs in float32. ``tiles``: whether there are matrix tiles (None: whether this CPU has
    them).
    """
    bf16 = problem.dtype is torch.bfloat16
    direct = BF16_DIRECT if bf16 else DIRECT
    if winograd == "off":
        return direct
    if tiles is None:
        tiles = has_tiles()
    c, k = _round_up(problem.c, 16), _round_up(problem.k, 32)  # the kernel's granularity
    taps, outputs = problem.r * problem.s, problem.n * problem.p * problem.q
    each = _BF16_MULTIPLY_ADD if bf16 else 1.0
    cost = {direct: each * taps * problem.c * problem.k * max(outputs, _ROWS_TO_HIDE_A_WEIGHT)}
    if tiles and not bf16:
        pairs, rows = taps * _round_up(problem.c, 32) * k, _round_up(outputs, 32)
        for algorithm, work, fetched in (
            (BF16X3_DIRECT, _BF16X3_MULTIPLY_ADD * rows, _BF16X3_BYTES),
            (FRESH_BF16X3_DIRECT, _BF16X3_MULTIPLY_ADD * rows + _BF16X3_WEIGHT, 1),
        ):
            cost[algorithm] = pairs * max(work, fetched * _ROWS_TO_HIDE_A_WEIGHT)
    sizes: tuple[int, ...] = (2,) if winograd == "f2" else (2, 4)
    if (problem.r, problem.s, problem.stride, problem.dilation) != (3, 3, (1, 1), (1, 1)):
        sizes = ()
    for m in sizes:
        positions, winograd_tiles = (m + 2) ** 2, problem.n * -(-problem.p // m) * -(-problem.q // m)
        transforms = positions * winograd_tiles * TRANSFORM_CHANNELS * (c + k)
        cost[Algorithm(m)] = c * k * positions * max(winograd_tiles, _ROWS_TO_HIDE_A_WEIGHT) + transforms
        fresh = max(positions * max(winograd_tiles, _LEAST_ROWS) + _FRESH_TRANSFORM[m], 9 * _ROWS_TO_HIDE_A_WEIGHT)
        cost[Algorithm(m, "fresh")] = c * k * fresh + transforms
        c32 = _round_up(problem.c, 32)
        if tiles and not bf16 and 6 * positions * c32 * k <= _BF16X3_WEIGHTS_STAY:
            multiply_adds = _BF16X3_MULTIPLY_ADD * _round_up(winograd_tiles, 16)
            cost[Algorithm(m, "bf16x3")] = c32 * k * positions * multiply_adds + _BF16X3_TRANSFORM * transforms
    return min(cost, key=lambda algorithm: cost[algorithm])


def gains_alone(conv: nn.Conv2d) -> bool:
    """Whether a launch of ``conv`` with its BN and activation beats eager's operators even where it stands alone.

    Only where there is a faster algorithm than eager's, Winograd, and enough channels. Anything else saves no more than
    passes over an output that lies in a cache, about what the launch itself costs at batch 1.
    """
    k, c, r, s = conv.weight.shape
    if conv.groups != 1 or (r, s) != (3, 3) or not (_is_one(conv.stride) and _is_one(conv.dilation)):
        return False
    layout = output_memory_format(conv.weight, conv.weight)
    return c >= 16 and c * k >= _LEAST_PAIRS[layout] * (c + k)


def _is_one(numbers: Any) -> bool:
    return numbers in (1, (1, 1))


@lru_cache(maxsize=1)
def has_tiles() -> bool:
    """Whether the extension multiplies on this processor's matrix tiles (AMX)."""
    extension = extensions.cpu()
    return extension is not None and extension.build_info()["cpu_isa"] == "amx"


@lru_cache(maxsize=1)
def why_not_bf16() -> str | None:
    """None where our own kernels are the fastest in bfloat16 on this processor, else why not, in one sentence."""
    extension = extensions.cpu()
    if extension is None:
        return extensions.why_not_cpu()
    isa = extension.build_info()["cpu_isa"]
    if isa == "avx512_bf16":
        return None
    if isa == "amx":
        return "oneDNN multiplies bfloat16 on this processor's matrix tiles, faster than its vector unit does"
    return f"our bfloat16 kernels need AVX512_BF16, and the instruction set in use is {isa}"


def stem(problem: Problem, winograd: str) -> Algorithm:
    """The kernel for a convolution of few channels with its max pool (``can_run`` in csrc/cpu/bf16x3_stem.h)."""
    if problem.dtype is torch.bfloat16:
        return BF16_DIRECT
    on_tiles = problem.dilation == (1, 1) and problem.stride[0] <= problem.r and problem.r * problem.s * problem.c >= 32
    return BF16X3_STEM if on_tiles and winograd != "off" and has_tiles() else DIRECT


def winograd_choice(winograd: str) -> str:
    """``winograd``, or what ``FUSED_RESNET_WINOGRAD`` says where it is ``"auto"``."""
    return winograd if winograd != "auto" else os.environ.get("FUSED_RESNET_WINOGRAD", "auto")
