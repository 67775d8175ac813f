"""The shapes on which every kernel is run: eight and more per kernel, together covering every feature.

A kernel's shapes are drawn from its name, so the list is the same in every run, and another kernel gets others.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import torch

from fused_resnet.aot.planner import Kernel, planner
from fused_resnet.backends.cuda_launch import DEVICES
from fused_resnet.core.problem import Problem, Projection
from tests.support.host_cuda.host import Order

PER_KERNEL = 8
ARCH = 90  # the most shared memory: nearly every tile has room for a projection

_FILTERS = ((3, 3), (1, 1), (5, 5), (7, 7), (3, 3), (1, 3), (3, 1), (3, 3))
_STRIDES = ((1, 1), (2, 2), (1, 1), (2, 2), (2, 1), (1, 1), (1, 2), (2, 2))
_DILATIONS = ((1, 1), (1, 1), (1, 1), (1, 1), (2, 2), (1, 2), (2, 1), (1, 1))
_SPLITS = (1, 2, 1, 3, 1, 1, 4, 2)
_ACTIVATIONS = ("none", "relu", "none", "relu6", "none", "relu", "none", "none")


@dataclass(frozen=True)
class Shape:
    kernel: str
    problem: Problem
    tile: str
    alignment: int  # bytes: what the planner may assume of every address
    splits: int
    order: Order
    seed: int

    def __str__(self) -> str:
        return f"{self.kernel} splits={self.splits} alignment={self.alignment} {self.order.name} {self.problem}"


def _problem(kernel: Kernel, i: int, rng: random.Random) -> tuple[Problem, int]:
    """Shape number i of a kernel, and the alignment with which the planner takes that kernel."""
    dtype = torch.float32 if kernel.math == "tf32" else getattr(torch, kernel.math)
    item = dtype.itemsize
    tile_m, tile_n = map(int, kernel.tile.split("x"))
    (r, s), stride, dilation = _FILTERS[i], _STRIDES[i], _DILATIONS[i]
    if kernel.load == "vector":
        step, alignment = 16 // item, 16
        channels = [step * rng.choice([1, 2, 3, 4, 5, 8, 9]) for _ in range(2)]
    else:  # odd channels, or even ones at a narrow address
        step, alignment = rng.choice([(1, 16), (1, item), (2, 2 * item), (4, 8 if item == 2 else 16)])
        channels = [step * rng.choice([1, 3, 5, 7, 11]) for _ in range(2)]
        if step > 1 and all(c * item % 16 == 0 for c in channels):
            channels[0] += step
    if r == 7:
        channels[0] = min(channels[0], max(3, 16 // item))
        if kernel.load == "vector":
            channels[0] = 16 // item
    # Between a part of a tile and somewhat more than two, in both directions.
    k = rng.choice([tile_n // 2 + 3, tile_n + 5, tile_n + 8, tile_n, 2 * tile_n + 1, tile_n // 2 + 8])
    pixels = tile_m * rng.choice([0.6, 0.9, 1.3, 1.7])
    n = rng.choice([1, 2, 3])
    q = max(3, round((pixels / n) ** 0.5) + rng.choice([-1, 0, 1]))
    p = max(3, round(pixels / n / q))
    padding = (rng.choice([0, r // 2 * dilation[0], r // 2]), rng.choice([0, s // 2 * dilation[1], s // 2]))
    h = (p - 1) * stride[0] + dilation[0] * (r - 1) + 1 - 2 * padding[0]
    w = (q - 1) * stride[1] + dilation[1] * (s - 1) + 1 - 2 * padding[1]
    while h < 1:
        h, p = h + stride[0], p + 1
    while w < 1:
        w, q = w + stride[1], q + 1
    projection = None
    residual: torch.dtype | None = (dtype, None, dtype, None, torch.float32, dtype, dtype, None)[i]
    fits = kernel.shared_bytes + kernel.park_bytes <= DEVICES[ARCH].shared_per_block
    if i in (3, 7) and fits:
        proj_stride = (2, 1) if i == 3 else (2, 2)
        extra = rng.choice([0, 1])
        projection = Projection(
            channels[1], (p - 1) * proj_stride[0] + 1 + extra, (q - 1) * proj_stride[1] + 1, proj_stride,
            bias=i == 3, bn=i == 7,
        )  # fmt: skip
    problem = Problem(
        n, h, w, channels[0], k, r, s, stride, padding, dilation, 1, dtype, "cuda", residual,
        bias=i in (2, 3, 6), bn=i not in (2, 5), activation=_ACTIVATIONS[i], projection=projection,
        tf32=kernel.math == "tf32",
    ).checked()  # fmt: skip
    return problem, alignment


@lru_cache
def shapes(symbol: str) -> tuple[Shape, ...]:
    kernel = planner().kernels[symbol]
    result = []
    for i in range(PER_KERNEL):
        seed = 0
        while True:  # until the planner takes this kernel for it
            rng = random.Random(f"{symbol} {i} {seed}")
            problem, alignment = _problem(kernel, i, rng)
            shape = Shape(symbol, problem, kernel.tile, alignment, _SPLITS[i], Order(i % 3), rng.randrange(1 << 16))
            if planner().plan(problem, f"sm_{ARCH}", tile=kernel.tile, alignment=alignment).kernel == symbol:
                break
            seed += 1
        result.append(shape)
    return tuple(result)
