"""The Hopper family as nvcc compiled it, executed on the CPU by the PTX interpreter, from launch.json alone.

Beyond what it reports of any kernel (races, bounds, uninitialised data) it counts the bytes and arrivals of mbarriers,
holds copies back until a wait guarantees them, and checks tensor maps as the driver does.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.toolchain import why_not

if reason := why_not("_C", "g++", "nvcc"):
    pytest.skip(reason, allow_module_level=True)

from fused_resnet import aot
from fused_resnet.aot.cuda import compile_kernel
from fused_resnet.aot.launch_json import Launch
from fused_resnet.aot.planner import planner
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import TailArguments, reference
from fused_resnet.testing import assert_bitexact, check_tail, make_tail
from tests.support.launch_harness import Memory, interpreter, run_module
from tests.support.wgmma_shapes import PER_KERNEL, Shape, few_sms, shapes

pytestmark = [pytest.mark.ptx, pytest.mark.aot]

KERNELS = tuple(k.symbol for k in planner().kernels.values() if k.family == "wgmma")


@lru_cache(maxsize=8)
def module(symbol: str) -> Any:
    return interpreter().load(compile_kernel(planner().kernels[symbol], "sm_90")[0])


def plan(shape: Shape, tail: TailArguments) -> Launch:
    launch = planner().plan(
        shape.problem, "sm_90", tile=shape.tile, device=shape.device, eps=tail.conv.eps,
        proj_eps=tail.proj.eps if tail.proj else 1e-5,
    )  # fmt: skip
    assert launch.kernel == shape.kernel
    return Launch.from_json(launch.to_json())


@pytest.mark.parametrize("number", range(PER_KERNEL))
@pytest.mark.parametrize("symbol", KERNELS)
def test_kernel(symbol: str, number: int) -> None:
    """Bit-exact on small integers; every fourth also within 2 x eager on random values."""
    shape = shapes(symbol)[number]

    def run(tail: TailArguments) -> torch.Tensor:
        return run_module(plan(shape, tail), module(symbol), tail, seed=shape.seed, lanes=True)

    kinds = ("integers", "random") if number % 4 == 2 else ("integers",)
    check_tail(run, shape.problem, kinds=kinds, label=str(shape))


def test_the_shapes_have_every_feature() -> None:
    everything = [shape for symbol in KERNELS for shape in shapes(symbol)]
    assert len(everything) >= 100
    problems = [shape.problem for shape in everything]
    seen: Counter[str] = Counter()
    for shape, p in zip(everything, problems, strict=True):
        tile_m, tile_n = map(int, shape.tile.removeprefix("wgmma").split("x"))
        pixels = p.n * p.p * p.q
        tiles = math.ceil(pixels / tile_m) * math.ceil(p.k / tile_n)
        seen.update(
            name
            for name, holds in {
                "stride": max(p.stride) > 1, "two strides": p.stride[0] != p.stride[1], "dilation": max(p.dilation) > 1,
                "halo": max(p.padding) > 0, "two paddings": p.padding[0] != p.padding[1], "c tail": p.c % 64 != 0,
                "more than one step of c": p.c > 64, "k tail": p.k % tile_n != 0, "two tiles of k": p.k > tile_n,
                "pixel tail": pixels % tile_m != 0, "images end within a tile": p.n > 1 and p.p * p.q % tile_m != 0,
                "several tiles a block": tiles > shape.device.sm_count, "more stages than steps": p.r * p.s < 4,
                "residual": p.residual is not None, "projection": p.projection is not None, "bias": p.bias,
                "no bn": not p.bn, "no activation": p.activation == "none", "relu6": p.activation == "relu6",
            }.items()
            if holds
        )  # fmt: skip
    assert len(seen) == 19, seen
    assert min(seen.values()) >= 5, seen


def _problem(text: str) -> Problem:
    return Problem.parse(f"{text},device=cuda")


def test_blocks_without_a_tile_do_nothing() -> None:
    """A grid larger than the planner's is slower, not wrong."""
    problem = _problem("n=1,h=9,w=9,c=24,k=72,padding=1,dtype=float16,residual=1")
    tail = make_tail(problem, "integers")
    shape = Shape("conv_wgmma_f16_128x64", problem, "wgmma128x64", few_sms(8), 0)
    launch = plan(shape, tail)
    assert launch.grid == (2, 1, 1)
    y = run_module(dataclasses.replace(launch, grid=(5, 1, 1)), module(shape.kernel), tail, seed=2)
    assert_bitexact(y, reference(tail.to(torch.float64)), "five blocks for two tiles")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nan_and_infinity_pass_through(dtype: torch.dtype) -> None:
    name = {torch.float16: "float16", torch.bfloat16: "bfloat16"}[dtype]
    problem = _problem(f"n=2,h=9,w=9,c=16,k=24,r=3,s=3,padding=1,dtype={name},residual=1")
    tail = make_tail(problem, "random")
    tail.x[0, 3, 4, 4] = torch.nan
    assert tail.residual is not None
    tail.residual[1, 5, 2, 2] = torch.inf
    tail.residual[1, 6, 2, 2] = -torch.inf
    tail.residual[1, 7, 2, 2] = torch.nan
    symbol = f"conv_wgmma_{'f16' if name == 'float16' else 'bf16'}_128x64"
    y = run_module(plan(Shape(symbol, problem, "wgmma128x64", few_sms(2), 0), tail), module(symbol), tail)
    expected = reference(tail)
    assert torch.equal(y.isnan(), expected.isnan())
    assert y.isnan().sum() == 24 * 9 + 1
    assert torch.equal(y.isinf(), expected.isinf())
    assert y[1, 6, 2, 2] == 0


def test_launches_give_the_same_bits(tmp_path: Path) -> None:
    """Who finishes a stage first decides nothing; and what `fused-resnet compile` writes is what is run."""
    problem = _problem("n=3,h=12,w=11,c=72,k=136,padding=1,dtype=float16,residual=1")
    tail = make_tail(problem, "random")
    launch = aot.compile("cuda", "sm_90", problem, tmp_path, tile="wgmma128x64", eps=tail.conv.eps)
    assert launch.arch == "sm_90a"
    assert Launch.from_json((tmp_path / "launch.json").read_text()) == launch
    loaded = interpreter().load((tmp_path / "kernel.ptx").read_text())
    results = []
    for seed in range(3):
        memory = Memory(launch, tail)
        results.append(run_module(launch, loaded, tail, seed=seed, memory=memory).clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
