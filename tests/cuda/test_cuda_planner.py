"""The planner of the CUDA extension on numbers that no tensor has, and against Python where both refuse."""

from __future__ import annotations

import dataclasses
import itertools
import struct
from typing import Any

import pytest
import torch

from tests.support.toolchain import why_not

if reason := why_not("_C"):
    pytest.skip(reason, allow_module_level=True)

from fused_resnet.aot.planner import device_for, planner
from fused_resnet.core.problem import Problem, Projection
from fused_resnet.testing import RESNET_TAILS, in_dtype

H100 = device_for("sm_90")
SMALL = Problem(1, 8, 8, 16, 16, 3, 3, padding=(1, 1), dtype=torch.float16, device_type="cuda")
#: Where ConvParams has pixels, p and q, behind two sources, two norms, five pointers and an offset.
_PIXELS = 2 * 112 + 2 * 56 + 6 * 8


def request(problem: Problem, **changes: int) -> dict[str, int | float]:
    return planner().request(problem, torch.float32, 1e-5, 1e-5, 16) | changes


def outcome(problem: Problem) -> tuple[int, int] | str:
    """Height and width of the output, or the sentence."""
    try:
        plan = planner().ask(request(problem), H100)
    except ValueError as refusal:
        return str(refusal)
    pixels, p, q = struct.unpack_from("<3i", plan.argument, _PIXELS)
    assert pixels == problem.n * p * q
    assert plan.grid[0] > 0
    return p, q


def in_python(problem: Problem) -> tuple[int, int] | str:
    try:
        problem.checked()
    except ValueError as refusal:
        return str(refusal)
    return problem.p, problem.q


def test_sizes_as_in_python() -> None:
    """C++ rounds quotients to zero, Python down: they differ where a filter is larger than its image."""
    refused = 0
    for h, r, stride, padding, dilation in itertools.product(range(1, 5), range(1, 6), (1, 2, 3), (0, 1), (1, 2)):
        for tall in (False, True):
            size, window = ((h, 9), (r, 1)) if tall else ((9, h), (1, r))
            problem = dataclasses.replace(
                SMALL, h=size[0], w=size[1], r=window[0], s=window[1], stride=(stride, stride),
                padding=(padding, padding), dilation=(dilation, dilation),
            )  # fmt: skip
            expected = in_python(problem)
            assert outcome(problem) == expected
            refused += isinstance(expected, str)
    assert refused > 100


@pytest.mark.parametrize("size", [(1, 1), (15, 8), (16, 17), (17, 15), (8, 8)])
def test_projections_as_in_python(size: tuple[int, int]) -> None:
    problem = dataclasses.replace(SMALL, projection=Projection(8, *size, (2, 2), False, True))
    assert outcome(problem) == in_python(problem)


BIG = 1 << 30
PIXELS = "cuda: batch times output pixels must be at most 2^30"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n": BIG, "h": BIG // 2, "w": BIG // 2}, f"{PIXELS}, got {1 << 60}"),
        ({"n": 1 << 16, "h": 1 << 24, "w": 1 << 24}, f"{PIXELS}, got {1 << 60}"),
        ({"n": 2, "h": 1 << 15, "w": 1 << 15}, f"{PIXELS}, got {1 << 31}"),
        (
            {"h": BIG // 2, "w": BIG // 2, "r": BIG // 2, "s": BIG // 2, "c": 16},
            f"cuda: filter size times c must be between 1 and 2^30, got {1 << 60}",
        ),
        ({"r": -(1 << 31), "s": -(1 << 31)}, "cuda: r must be between 1 and 2^30, got -2147483648"),
        ({"padding_h": BIG}, "cuda: padded height must be between 0 and 2^30, got 2147483656"),
        (
            {"h": 1 << 13, "w": 1 << 13, "k": 1 << 14, "splits": 65535, "tile_m": 32, "tile_n": 32},
            "take more than 2^48 bytes",
        ),
        ({"activation": 3}, "cuda: activation must be 0 (none), 1 (relu) or 2 (relu6), got 3"),
        ({"activation": -1}, "cuda: activation must be 0 (none), 1 (relu) or 2 (relu6), got -1"),
    ],
)  # fmt: skip
def test_numbers_that_overflow_are_refused(changes: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError) as refusal:
        planner().ask(request(SMALL, **changes), H100)
    assert sentence in str(refusal.value)


def test_a_device_without_multiprocessors_is_refused() -> None:
    with pytest.raises(ValueError, match="a device has at least one multiprocessor, got 0"):
        planner().ask(request(SMALL), dataclasses.replace(H100, sm_count=0))


def test_requests_of_other_fields_or_of_no_32_bits_are_refused() -> None:
    with pytest.raises(TypeError, match="plan: unknown argument colour"):
        planner().ask(request(SMALL, colour=1), H100)
    with pytest.raises(ValueError, match=f"n: expected a number of 32 bits, got {1 << 31}"):
        planner().ask(request(SMALL, n=1 << 31), H100)


def test_counters_are_no_more_than_a_launch_counts() -> None:
    for k, splits in itertools.product((16, 200, 5000), (2, 7)):
        plan = planner().ask(request(dataclasses.replace(SMALL, k=k), splits=splits, tile_m=32, tile_n=32), H100)
        assert plan.grid[1] == splits
        assert plan.grid[0] * 4 <= plan.counter_bytes < plan.grid[0] * 4 + 256
        assert plan.workspace_bytes == plan.counter_bytes + plan.grid[0] * splits * 32 * 32 * 4


def _blocks_per_sm(symbol: str, shared: int) -> int:
    return min(planner().kernels[symbol].blocks_per_sm, H100.shared_per_sm // (shared + 1024))


def test_what_memory_bounds_does_not_run_alone_on_an_sm() -> None:
    """A block alone on its SM loads nothing while it stores: no largest tile, no parked one, where that takes long."""
    alone = {}
    for tail in RESNET_TAILS:
        problem = dataclasses.replace(in_dtype(tail.problem, torch.float16), n=256, device_type="cuda")
        launch = planner().plan(problem, "sm_90", device=dataclasses.replace(H100, wgmma=False))
        outputs = problem.n * problem.p * problem.q * problem.k
        products = problem.r * problem.s * problem.c + (problem.projection.c if problem.projection else 0)
        moved = 2 * outputs * (2 if problem.residual else 1) + 2 * problem.n * problem.h * problem.w * problem.c
        if problem.projection:  # of what a stride leaves out, nothing is read
            moved += 2 * problem.n * problem.p * problem.q * problem.projection.c
        bound = moved / 4.3e12 > outputs * products * 2 / 500e12
        alone[problem] = _blocks_per_sm(launch.kernel, launch.dynamic_shared_bytes) == 1
        assert not (bound and alone[problem]), f"{tail.network} {tail.stage}: {launch.kernel}"
    assert True in alone.values(), "where products bound, the largest tile is the best"


def _chosen(problem: Problem, **options: Any) -> str:
    kernel = planner().kernels[planner().plan(problem, "sm_90", **options).kernel]
    return f"{kernel.family} {kernel.tile}"


def test_hopper_runs_large_batches_on_wgmma() -> None:
    """One block per SM that takes tile after tile; where tiles are few, more and smaller blocks, or split-K."""
    for tail in RESNET_TAILS:
        for dtype in (torch.float16, torch.bfloat16):
            problem = dataclasses.replace(in_dtype(tail.problem, dtype), n=256, device_type="cuda")
            launch = planner().plan(problem, "sm_90")
            kernel = planner().kernels[launch.kernel]
            assert (kernel.family, kernel.math) == ("wgmma", str(dtype).removeprefix("torch."))
            assert (launch.arch, launch.grid) == ("sm_90a", (H100.sm_count, 1, 1))
            assert launch.dynamic_shared_bytes <= H100.shared_per_block
            assert "mma" in _chosen(problem, device=dataclasses.replace(H100, wgmma=False)).split(), "without its code"
        small = dataclasses.replace(in_dtype(tail.problem, torch.float16), device_type="cuda")
        if tail.stage.startswith("layer4"):
            assert _chosen(small).startswith("mma")


@pytest.mark.parametrize(
    ("changes", "takes"),
    [
        ({}, True),
        ({"c": 8, "k": 8}, True),
        ({"c": 20}, False),  # channels in packets of 8
        ({"k": 20}, False),
        ({"dtype": torch.float32, "residual": torch.float32}, False),
        ({"residual": torch.float32}, False),  # y is float32 then
        ({"residual": torch.bfloat16}, False),
        ({"stride": (8, 8)}, True),
        ({"stride": (1, 9)}, False),
        ({"padding": (128, 1)}, True),
        ({"padding": (1, 129), "h": 140, "w": 140}, False),
        ({"dilation": (64, 1), "h": 140, "w": 140, "padding": (0, 0)}, True),
        ({"dilation": (65, 1), "h": 140, "w": 140, "padding": (0, 0)}, False),  # the upper corner: -130
        ({"dilation": (127, 1), "h": 300, "w": 140, "padding": (127, 0)}, True),  # -127, 254 pixels on
        ({"dilation": (128, 1), "h": 300, "w": 140, "padding": (128, 0)}, False),  # 256
    ],
)  # fmt: skip
def test_what_tensor_maps_can_say(changes: dict[str, Any], takes: bool) -> None:
    """What they cannot is left to the other family; asked for by name, it is refused in one sentence."""
    problem = dataclasses.replace(SMALL, **{"n": 64, "c": 64, "k": 64, "residual": torch.float16, **changes})
    if takes:
        assert _chosen(problem, tile="wgmma128x64") == "wgmma 128x64"
        return
    assert _chosen(problem).startswith("mma")
    with pytest.raises(ValueError, match="cuda: wgmma takes 16-bit tensors, c and k that are multiples of 8"):
        planner().plan(problem, "sm_90", tile="wgmma128x64")


def test_forced_tiles_and_splits_are_of_the_family_that_they_always_were() -> None:
    large = dataclasses.replace(SMALL, n=256, c=64, k=256)
    assert _chosen(large).startswith("wgmma")
    assert _chosen(large, tile="128x128") == "mma 128x128"
    assert _chosen(large, splitk=1).startswith("mma")
    assert _chosen(large, tile="wgmma128x128", splitk=1) == "wgmma 128x128"
    for options in ({"tile": "wgmma128x128", "splitk": 2}, {"tile": "wgmma128x64", "alignment": 8}):
        with pytest.raises(ValueError, match=r"cuda: wgmma takes 16-bit tensors, .*and no split-K, got c 64 and k 256"):
            planner().plan(large, "sm_90", **options)
    with pytest.raises(
        ValueError, match="cuda: wgmma needs sm_90, a build for it and a driver that encodes tensor maps, got sm_80"
    ):
        planner().plan(large, "sm_80", tile="wgmma128x128")
    with pytest.raises(ValueError, match="tile must be one of 128x64, 128x128, 256x128, got 64x64"):
        planner().plan(large, "sm_90", tile="wgmma64x64")
    projected = dataclasses.replace(large, projection=Projection(8, 15, 15, (2, 2), False, True))
    with pytest.raises(ValueError, match="tile must be one of 128x64, 128x128, got 256x128"):
        planner().plan(projected, "sm_90", tile="wgmma256x128")


def test_turing() -> None:
    """Kernels that sm_75 has the arithmetic and the registers for, in the shared memory of its SMs."""
    for real in RESNET_TAILS:
        for dtype, math in ((torch.float16, "float16"), (torch.float32, "float32")):
            problem = dataclasses.replace(in_dtype(real.problem, dtype), device_type="cuda", tf32=True)
            launch = planner().plan(problem, "sm_75")
            kernel = planner().kernels[launch.kernel]
            assert kernel.math == math
            assert kernel.runs_on("sm_75")
            park = 0 if problem.projection is None else kernel.park_bytes
            assert launch.dynamic_shared_bytes == kernel.turing_shared_bytes + park <= 64 << 10
        with pytest.raises(ValueError, match="bfloat16 needs sm_80 or newer, got sm_75"):
            planner().plan(dataclasses.replace(problem, dtype=torch.bfloat16, residual=None), "sm_75")
    with pytest.raises(ValueError, match="tile must be one of 32x32, 64x64, 128x64, 64x128, got 128x128"):
        planner().plan(SMALL, "sm_75", tile="128x128")
