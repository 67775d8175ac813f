"""The CUDA convolution with statistics in its epilogue, compiled unchanged for the host (tests/support/host_cuda)."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import pytest
import torch

from tests.support.toolchain import why_not

if reason := why_not("_C", "g++"):
    pytest.skip(reason, allow_module_level=True)

from fused_resnet.aot.planner import planner
from fused_resnet.core.reference import TailArguments, reference
from fused_resnet.testing import assert_bitexact, check_tail, make_tail
from tests.support.conv_stats_cases import ConvCase, cases, check_statistics, problem_of, symbols
from tests.support.host_cuda.host import HostCuda, Order
from tests.support.launch_harness import Memory


@lru_cache
def host() -> HostCuda:
    return HostCuda()


@pytest.mark.parametrize("symbol", symbols())
def test_kernel(symbol: str) -> None:
    """y as a convolution's, to the bit on small integers; the statistics are those of y as it was rounded."""
    for case in cases(symbol):

        def run(tail: TailArguments, case: ConvCase = case) -> torch.Tensor:
            launch = host().planner.plan(case.problem, "sm_80", tile=case.tile, statistics=True)
            assert launch.kernel == symbol
            memory = Memory(launch, tail)
            host().execute(launch, memory, Order(case.seed % 3), case.seed)
            check_statistics(memory.y, memory.tensor("mean"), memory.tensor("var"), launch.problem)
            return memory.y

        # the error of 64 sums is too few for a maximum to be one
        kinds = ("integers",) if case.problem.p * case.problem.q == 1 else ("integers", "random")
        check_tail(run, case.problem, kinds=kinds, label=f"{symbol} {case.problem}")


def test_groups_of_tiles_in_any_order() -> None:
    """More tiles than one block merges: right, the same bits whoever comes last, counters zero again."""
    kernel = planner().kernels["conv_f16_stats_64x64"]
    problem = problem_of(kernel, "n=1,h=97,w=89,c=8,k=72,r=1")
    tail = make_tail(problem, "random")
    launch = host().planner.plan(problem, "sm_80", tile=kernel.tile, statistics=True)
    assert launch.grid[0] == 2 * 135, "two columns, three groups of tiles, the last of them small"
    memory, results = Memory(launch, tail), []
    for seed in range(3):  # the same workspace again and again
        for name in ("y", "mean", "var"):
            memory.tensor(name).fill_(torch.nan)
        host().execute(launch, memory, Order(seed % 3), seed)
        results.append([memory.tensor(name).clone() for name in ("y", "mean", "var")])
        check_statistics(*results[-1], launch.problem)
        assert not any(memory.content("workspace")[:256]), "an arrival counter is not zero after the launch"
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_statistics_where_the_mean_is_larger_than_the_deviation() -> None:
    """A bias of a hundred deviations."""
    problem = problem_of(planner().kernels["conv_f32_stats_64x64"], "n=1,h=19,w=23,c=8,k=64,r=1,bias=1")
    tail = make_tail(problem, "random")
    assert tail.conv.bias is not None
    tail.conv.bias.fill_(300.0)
    launch = host().planner.plan(problem, "sm_80", statistics=True)
    memory = Memory(launch, tail)
    host().execute(launch, memory)
    exact_var, exact_mean = torch.var_mean(memory.y.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(memory.tensor("mean").double(), exact_mean, rtol=4e-7, atol=0)
    torch.testing.assert_close(memory.tensor("var").double(), exact_var, rtol=1e-4, atol=0)


def test_nan_stays_in_its_channel() -> None:
    problem = problem_of(planner().kernels["conv_f16_stats_64x64"], "n=1,h=9,w=9,c=8,k=24,r=1")
    tail = make_tail(problem, "integers")
    tail.conv.weight[5] = torch.nan
    launch = host().planner.plan(problem, "sm_80", statistics=True)
    memory = Memory(launch, tail)
    host().execute(launch, memory)
    assert_bitexact(memory.y, reference(tail.to(torch.float64)), "y")
    for name in ("mean", "var"):
        assert memory.tensor(name).isnan().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("symbol", [s for s in symbols() if "gather" not in s])
def test_traffic(symbol: str) -> None:
    """y is written once, in full sectors, and never read again: nine tensors a tail where bn_stats makes it ten."""
    kernel = planner().kernels[symbol]
    problem = problem_of(kernel, "n=2,h=11,w=9,c=16,k=144,padding=1")
    launch = host().planner.plan(problem, "sm_80", tile=kernel.tile, statistics=True)
    tail = make_tail(problem, "integers")
    memory = Memory(launch, tail, alignment=256)
    statistics = host().execute(launch, memory)
    assert statistics.total("store", "y")[1] == launch.tensors["y"].span // 32
    assert statistics.total("load", "y") == (0, 0, 0)
    assert statistics.shared[0][1] == 0, "bank conflicts in the main loop"
    # Partial results are small beside y: one pair of numbers per channel for every tile of pixels.
    tile_m, tile_n = map(int, kernel.tile.split("x"))
    tiles = -(-problem.n * problem.p * problem.q // tile_m) * -(-problem.k // tile_n)
    assert statistics.total("store", "workspace")[2] == (tiles + -(-problem.k // tile_n)) * 2 * tile_n * 4


def test_refusals() -> None:
    problem = problem_of(planner().kernels["conv_f16_stats_64x64"], "n=1,h=9,w=9,c=8,k=24,r=1")
    for change in ({"bn": True}, {"activation": "relu"}, {"residual": torch.float16}):
        with pytest.raises(ValueError, match="cuda: statistics are those of a convolution alone"):
            planner().plan(dataclasses.replace(problem, **change), "sm_80", statistics=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected no BN, addition, activation or split-K"):
        planner().plan(problem, "sm_80", statistics=True, splitk=2)
    with pytest.raises(ValueError, match="cuda: tile must be one of 64x64, 128x128, got 32x32"):
        planner().plan(problem, "sm_80", statistics=True, tile="32x32")
