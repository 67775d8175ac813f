"""Convolutions with statistics for the CUDA legs: a few problems for each kernel, and the bar of the statistics."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fused_resnet.aot.planner import Kernel, planner
from fused_resnet.backends.training.eager import BACKEND as EAGER
from fused_resnet.core.problem import Problem
from fused_resnet.testing.tolerances import FORWARD_FACTOR, ROUNDING

#: Parts of a tile and several; K that no packet divides; windows, strides, dilations beyond the image; one pixel.
TEXTS = (
    "n=2,h=9,w=11,c={c},k={whole},padding=1,bias=1",
    "n=1,h=23,w=17,c={c},k={odd},r=1,stride=2",
    "n=3,h=12,w=7,c={c},k={more},r=3,s=1,padding=1:0,dilation=2:1",
    "n=1,h=3,w=3,c={c},k={whole}",
)


@dataclass(frozen=True)
class ConvCase:
    problem: Problem
    tile: str
    seed: int


@lru_cache
def cases(symbol: str) -> tuple[ConvCase, ...]:
    kernel = planner().kernels[symbol]
    tile_n = int(kernel.tile.split("x")[1])
    item = 2 if kernel.math in ("float16", "bfloat16") else 4
    c = 13 if kernel.load == "gather" else 3 * 16 // item
    sizes = {"c": c, "whole": tile_n, "odd": tile_n // 2 + 5, "more": tile_n + 24}
    return tuple(
        ConvCase(problem_of(kernel, text.format(**sizes)), kernel.tile, number) for number, text in enumerate(TEXTS)
    )


def problem_of(kernel: Kernel, text: str) -> Problem:
    """The convolution alone, in the kernel's type of arithmetic."""
    problem = Problem.parse(f"{text},dtype={kernel.math},bn=0,relu=0")
    return dataclasses.replace(problem, device_type="cuda")


def symbols() -> tuple[str, ...]:
    return tuple(k.symbol for k in planner().kernels.values() if k.epilogue == "statistics")


def check_statistics(y: Tensor, mean: Tensor, var: Tensor, label: str) -> None:
    """Of y as it was rounded: within 2 x the eager backend's error, and a few roundings of the numbers they are of."""
    exact_var, exact_mean = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
    own = EAGER.stats(y)
    few = 4 * ROUNDING[torch.float32]
    for name, got, eager, exact, size in (
        ("mean", mean, own[0], exact_mean, y.double().abs().max()),
        ("var", var, own[1], exact_var, exact_var.max()),
    ):
        assert not got.isnan().any(), f"{label}: {name} has NaN"
        allowed = float((eager.double() - exact).abs().max()) * FORWARD_FACTOR + few * float(size)
        error = float((got.double() - exact).abs().max())
        assert error <= allowed, f"{label}: {name}: error {error:.3g}, allowed {allowed:.3g}"
