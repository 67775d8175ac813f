"""The problems on which every kernel of the Hopper family is run: drawn from its name, so the same in every run.

Each has something that a tile does not divide: pixels, channels, filters, or images that end within a tile. The device
they are planned for has so few SMs that a block takes several tiles.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from functools import lru_cache

import torch

from fused_resnet.aot.planner import Kernel, device_for, planner
from fused_resnet.backends.cuda_launch import Device
from fused_resnet.core.problem import Problem, Projection

PER_KERNEL = 20

_FILTERS = ((3, 3), (1, 1), (3, 3), (5, 5), (1, 3), (3, 1), (7, 7), (2, 2))
_STRIDES = ((1, 1), (2, 2), (1, 1), (2, 1), (1, 2), (1, 1), (3, 2), (2, 2))
_DILATIONS = ((1, 1), (1, 1), (2, 2), (1, 1), (1, 3), (2, 1))
_ACTIVATIONS = ("none", "relu", "relu6")


@dataclass(frozen=True)
class Shape:
    kernel: str
    problem: Problem
    tile: str
    device: Device
    seed: int

    def __str__(self) -> str:
        return f"{self.kernel} on {self.device.sm_count} SMs, {self.problem}"


def few_sms(count: int) -> Device:
    """An H100 of which only so many SMs are left."""
    return dataclasses.replace(device_for("sm_90"), sm_count=count)


def _problem(kernel: Kernel, i: int, rng: random.Random) -> Problem:
    tile_m, tile_n = map(int, kernel.tile.split("x"))
    dtype: torch.dtype = getattr(torch, kernel.math)
    (r, s), stride, dilation = _FILTERS[i % 8], _STRIDES[rng.randrange(8)], _DILATIONS[i % 6]
    most = 64 if r * s > 9 else 136  # of the channels: what the interpreter does in a second
    c, k = 8 * rng.randrange(1, most // 8 + 1), 8 * rng.randrange(1, tile_n // 4 + 2)
    padding = (rng.randrange(r * dilation[0]), rng.randrange(s * dilation[1]))
    pixels = rng.choice([tile_m // 3, tile_m + 9, 2 * tile_m + 21])
    n = rng.choice([1, 2, 3, 5])
    q = rng.randrange(3, 19)
    p = max(1, pixels // (n * q))
    h = (p - 1) * stride[0] + (r - 1) * dilation[0] + 1 - 2 * padding[0] + rng.randrange(stride[0])
    w = (q - 1) * stride[1] + (s - 1) * dilation[1] + 1 - 2 * padding[1] + rng.randrange(stride[1])
    h, w = max(h, 1), max(w, 1)
    problem = Problem(
        n, h, w, c, k, r, s, stride, padding, dilation, 1, dtype, "cuda", dtype if i % 2 else None,
        bias=i % 5 == 1, bn=i % 7 != 4, activation=_ACTIVATIONS[i % 3],
    )  # fmt: skip
    if kernel.projection and i % 4 == 2:
        proj_stride = rng.choice([(1, 1), (2, 2), (2, 1), (3, 2)])
        size = [
            (out - 1) * step + 1 + rng.randrange(step)
            for out, step in zip((problem.p, problem.q), proj_stride, strict=True)
        ]
        projection = Projection(8 * rng.randrange(1, 18), *size, proj_stride, bias=i == 2, bn=i != 6)
        problem = dataclasses.replace(problem, residual=None, projection=projection)
    return problem


@lru_cache
def shapes(symbol: str) -> tuple[Shape, ...]:
    kernel = planner().kernels[symbol]
    result: list[Shape] = []
    draw = 0
    while len(result) < PER_KERNEL:  # what is drawn may have no output at all
        rng = random.Random(f"{symbol} {draw}")
        draw += 1
        try:
            problem = _problem(kernel, len(result), rng).checked()
        except ValueError:
            continue
        result.append(
            Shape(symbol, problem, f"wgmma{kernel.tile}", few_sms(rng.randrange(1, 4)), rng.randrange(1 << 16))
        )
    return tuple(result)
