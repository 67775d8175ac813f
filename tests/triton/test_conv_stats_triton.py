"""The Triton convolution with statistics in Triton's interpreter: shapes, configurations, accuracy, planted bugs."""

from __future__ import annotations

import importlib.util
import inspect
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start"),
]
pytest.importorskip("triton")

from fused_resnet import functional  # noqa: E402
from fused_resnet.backends.training.base import TrainingBackend  # noqa: E402
from fused_resnet.backends.training.triton import BACKEND  # noqa: E402
from fused_resnet.core.problem import Problem  # noqa: E402
from fused_resnet.core.training_call import ConvGeometry  # noqa: E402
from fused_resnet.kernels import bn_launch, conv_stats_launch, epilogue_stats  # noqa: E402
from fused_resnet.kernels import conv_bn_stats as kernels  # noqa: E402
from fused_resnet.kernels.arguments import STATS_GROUP  # noqa: E402
from fused_resnet.kernels.config import FP32, HALF, TF32, TailConfig, stats_candidates  # noqa: E402
from fused_resnet.testing import PROBLEMS, in_dtype, make_tail  # noqa: E402
from tests.support.conv_stats_checks import (  # noqa: E402
    Scratch,
    assert_statistics_of,
    check_conv_stats,
    convolution,
    far_from_zero,
    launch,
)

OPS = torch.ops.fused_resnet
#: Odd in every size, with a halo, several images to a tile, and neither C nor K a multiple of a vector.
ODD = Problem.parse("n=3,h=7,w=5,c=19,k=37,r=3,s=3,stride=2:1,padding=1,bias=1")
#: More rows of tiles than are merged at once, a partial last tile, a partial last group, a tail of filters.
MANY = Problem.parse("n=1,h=45,w=47,c=3,k=20,r=1,bias=1")
SMALL = TailConfig(32, 32, 16, 4, 3)


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Scratch:
    return Scratch(monkeypatch)


@pytest.mark.parametrize(
    "case", [c for c in PROBLEMS if c.problem.groups == 1 and c.problem.n > 0], ids=lambda c: c.name
)
def test_conformance_list(case, scratch: Scratch) -> None:
    check_conv_stats(in_dtype(case.problem, torch.float16), None, scratch)


@pytest.mark.parametrize("config", [*HALF, *TF32, *FP32], ids=str)
def test_every_configuration(config: TailConfig, scratch: Scratch) -> None:
    check_conv_stats(in_dtype(ODD, torch.float16 if config in HALF else torch.float32), config, scratch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, scratch: Scratch) -> None:
    check_conv_stats(in_dtype(ODD, dtype), None, scratch)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, persistent=True)], ids=str)
def test_many_tiles_are_merged_in_groups(config: TailConfig, scratch: Scratch) -> None:
    assert MANY.n * MANY.p * MANY.q > (STATS_GROUP + 1) * config.m
    check_conv_stats(MANY, config, scratch)


def test_tensor_descriptors(scratch: Scratch) -> None:
    problem = Problem.parse("n=3,h=9,w=7,c=64,k=70,padding=1,bias=1,dtype=bfloat16")
    check_conv_stats(problem, TailConfig(32, 64, 64, 4, 3, tma=True), scratch)


@pytest.mark.parametrize("pixels", [50, 2115])
def test_a_mean_far_above_the_deviation(pixels: int, scratch: Scratch) -> None:
    """Within a tile and across groups of tiles."""
    problem, tail = far_from_zero(pixels, 8)
    y, mean, var = launch(tail, problem, SMALL)
    assert torch.equal(y, tail.x)
    assert_statistics_of(y, mean, var)


def test_special_values() -> None:
    """A constant channel has no variance and no negative one; NaN stays in its channel."""
    problem = convolution(Problem.parse("n=1,h=9,w=40,c=8,k=8,r=1,bias=1"))
    tail = make_tail(problem)
    tail.conv.weight.copy_(torch.eye(8).view_as(tail.conv.weight))
    tail.conv.weight[1] = 0
    tail.conv.bias[1], tail.conv.bias[2] = 1 / 3, float("nan")
    y, mean, var = launch(tail, problem, SMALL)
    assert 0 <= float(var[1]) < 1e-12
    assert bool(mean[2].isnan())
    assert bool(var[2].isnan())
    keep = [0, 3, 4, 5, 6, 7]
    assert_statistics_of(y[:, keep].contiguous(), mean[keep], var[keep])


def test_no_configuration_splits_the_k_loop() -> None:
    deep = convolution(Problem.parse("n=1,h=5,w=6,c=512,k=40,padding=1,dtype=float16"))
    found = stats_candidates(deep, 90, 132)
    assert found
    assert all(config.split_k == 1 for config in found)


# ---- the backend ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_operator_on_this_backend(memory_format: torch.memory_format) -> None:
    tail = make_tail(convolution(ODD))
    x = tail.x.contiguous(memory_format=memory_format)
    weight, geometry = tail.conv.weight.contiguous(), ConvGeometry((2, 1), (1, 1), (1, 1), 1)
    got = OPS.conv_bn_stats(x, weight, tail.conv.bias, *geometry, "triton")
    expected = TrainingBackend.conv_stats(BACKEND, x, weight, tail.conv.bias, geometry)
    for a, b in zip(got, expected, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    grouped = ConvGeometry((1, 1), (0, 0), (1, 1), 2)
    x, weight = torch.zeros(1, 8, 5, 5), torch.zeros(8, 4, 3, 3)
    assert BACKEND.why_not_conv_stats(x, weight, grouped) == "triton: groups must be 1, got 2"
    torch.library.opcheck(OPS.conv_bn_stats.default, (tail.x, tail.conv.weight, None, *geometry, "triton"))


def test_training_tail_is_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward: the convolution with its statistics, then apply; no pass that takes statistics."""
    launches: list[str] = []

    class Recorded:
        def __init__(self, module: ModuleType, name: str) -> None:
            self.kernel, self.name = getattr(module, name), name
            monkeypatch.setattr(module, name, self)

        def __getitem__(self, grid: object) -> object:
            launches.append(self.name)
            return self.kernel[grid]

    Recorded(conv_stats_launch, "conv_bn_stats_kernel")
    Recorded(bn_launch, "bn_stats_kernel")
    Recorded(bn_launch, "bn_apply_add_relu_kernel")
    tail = make_tail(convolution(ODD))
    residual = torch.ones(3, 37, 4, 5).contiguous(memory_format=torch.channels_last)
    functional.conv_bn_add_relu_train(
        tail.x, tail.conv.weight, tail.conv.bias, stride=(2, 1), padding=1, residual=residual, backend="triton"
    )
    assert launches == ["conv_bn_stats_kernel", "bn_apply_add_relu_kernel"]


# ---- planted bugs: each of them must fail the checks above --------------------------------------------------

_ARRIVAL = "is_last(counters_ptr + 1 + group, members"
_GROUPS = "merge_records(grouped_ptr, groups"
MUTANTS = {
    "the last record of a merge is dropped": ("valid = i < records", "valid = i < records - 1"),
    "the last group is dropped": (_GROUPS, _GROUPS + " - 1"),
    "one tile too few is waited for": (_ARRIVAL, _ARRIVAL + " - 1"),
    "pixels past the end are in the pivot": ("tl.where(in_m[:, None], y, 0.0)", "y"),
    "pixels past the end are in the spread": ("tl.where(in_m[:, None], y - pivot[None, :], 0.0)", "y - pivot[None, :]"),
    "the last tile counts as full": ("pixels = count.to(tl.float32)", "pixels = count.to(tl.float32) * 0 + tile.m"),
    "the accumulator's statistics": ("column_statistics(stored", "column_statistics(z"),
    "means without their pivots": ('cache_modifier=".cg") - pivot[None, :]', 'cache_modifier=".cg") * 0'),
    "pivots without their means": ("    return pivot, mean, tl.sum", "    return pivot, mean * 0, tl.sum"),
    "tiles without their own spread": ("mean, m2, count, part, part_m2, n)", "mean, m2, count, part, part_m2 * 0, n)"),
}


def far_and_rounded(scratch: Scratch) -> None:
    """float32 whose mean is far above the deviation; float16 whose rounding is a good part of the deviation."""
    problem, tail = far_from_zero(2115, 8)
    y, mean, var = launch(tail, problem, SMALL)
    assert_statistics_of(y, mean, var)
    tail = make_tail(convolution(in_dtype(MANY, torch.float16)))
    tail.conv.bias.fill_(1000.0)
    y, mean, var = launch(tail, convolution(in_dtype(MANY, torch.float16)), SMALL)
    assert_statistics_of(y, mean, var)
    assert not scratch.counters.any()


def mutated(change: tuple[str, str], folder: Path) -> ModuleType:
    source = inspect.getsource(epilogue_stats)
    assert source.count(change[0]) == 1, f"the mutant no longer applies: {change[0]}"
    path = folder / "epilogue_stats_mutant.py"
    path.write_text(source.replace(*change))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(name: str, scratch: Scratch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "finish_tile_stats", mutated(MUTANTS[name], tmp_path).finish_tile_stats)
    with pytest.raises(AssertionError):
        far_and_rounded(scratch)


def test_without_a_planted_bug(scratch: Scratch) -> None:
    far_and_rounded(scratch)
