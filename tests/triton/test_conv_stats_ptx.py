"""The Triton convolution with statistics as compiled for sm_80 and sm_90, executed by the PTX interpreter.

Blocks are interleaved at random and races between them are reported: who comes last, and what it may read, is
decided by the compiled code alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fused_resnet.core.problem import Problem
from fused_resnet.kernels.arguments import STATS_GROUP
from fused_resnet.kernels.config import FP32, HALF, TF32, TailConfig, fits
from fused_resnet.testing import in_dtype, make_tail
from tests.support.conv_stats_checks import (
    Scratch,
    assert_statistics_of,
    check_conv_stats,
    convolution,
    far_from_zero,
    launch,
)
from tests.support.launch_harness import triton_device

pytestmark = [pytest.mark.ptx]

#: C is a whole number of 16-byte copies but not of BLOCK_K, so copies are asynchronous and have tails.
ODD = Problem.parse("n=3,h=7,w=5,c=40,k=37,r=3,s=3,stride=2:1,padding=1,bias=1,dtype=float16")
#: More rows of tiles than are merged at once, a partial last tile, a partial last group, a tail of filters.
MANY = Problem.parse("n=3,h=27,w=27,c=8,k=37,r=1,dtype=float16")
SMALL = TailConfig(32, 32, 32, 4, 3)


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def device(request: pytest.FixtureRequest) -> Any:
    return triton_device(request.param)


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Scratch:
    from fused_resnet.kernels import conv_stats_launch, launch

    monkeypatch.setattr(launch, "sm_count", lambda device: 2)  # persistent programs take several tiles
    conv_stats_launch.planned.cache_clear()
    return Scratch(monkeypatch)


@pytest.mark.parametrize("config", [*HALF, *TF32, *FP32], ids=str)
def test_every_configuration(device: Any, config: TailConfig, scratch: Scratch) -> None:
    problem = ODD if config in HALF else in_dtype(ODD, torch.float32, tf32=config in TF32)
    if not fits(config, problem, device.capability):
        pytest.skip(f"{config} is not for sm_{device.capability}")
    check_conv_stats(problem, config, scratch)


@pytest.mark.parametrize(
    "config",
    [replace(c, tma=True) for c in HALF if c.k == 64] + [TailConfig(32, 64, 64, 4, 3, tma=True, persistent=True)],
    ids=str,
)
@pytest.mark.parametrize("device", [90], indirect=True, ids=["sm_90"])
def test_every_configuration_with_tensor_descriptors(device: Any, config: TailConfig, scratch: Scratch) -> None:
    check_conv_stats(Problem.parse("n=3,h=9,w=7,c=64,k=37,padding=1,dtype=float16"), config, scratch)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, persistent=True)], ids=str)
def test_many_tiles_are_merged_in_groups(device: Any, config: TailConfig, scratch: Scratch) -> None:
    assert MANY.n * MANY.p * MANY.q > (STATS_GROUP + 1) * config.m
    check_conv_stats(MANY, config, scratch)


def test_bfloat16(device: Any, scratch: Scratch) -> None:
    check_conv_stats(in_dtype(ODD, torch.bfloat16), TailConfig(64, 64, 32, 4, 3), scratch)


def test_a_mean_far_above_the_deviation(device: Any, scratch: Scratch) -> None:
    problem, tail = far_from_zero(300, 16)
    y, mean, var = launch(tail, problem, TailConfig(64, 32, 16, 4, 3))
    assert torch.equal(y, tail.x)
    assert_statistics_of(y, mean, var)


def test_the_result_does_not_depend_on_timing(device: Any, scratch: Scratch) -> None:
    """Bit for bit, whoever comes last: orders of blocks, how many run at once, orders of warps."""
    problem = convolution(MANY)
    tail = make_tail(problem)
    results = []
    for seed, (order, resident) in enumerate([(0, 1), (1, 1), (2, 4), (2, 9)]):
        device.options.update(seed=seed, block_order=order, resident=resident)
        results.append(launch(tail, problem, SMALL))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
