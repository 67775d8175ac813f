"""The CUDA kernels of the training passes, compiled unchanged for the host (tests/support/host_cuda)."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from tests.support.toolchain import why_not

if reason := why_not("_C", "g++"):
    pytest.skip(reason, allow_module_level=True)

from fused_resnet.aot.planner import device_for
from fused_resnet.aot.training import OPS, TrainingCall, training_planner
from tests.support.host_cuda.host import HostCuda, Order, Statistics
from tests.support.launch_harness import Memory
from tests.support.training_calls import (
    BRAIN,
    FLOAT,
    HALF,
    LARGE,
    SHAPES,
    SMALL,
    Case,
    Values,
    cases,
    check,
    eager,
    values_of,
)

CHANNELS_LAST = torch.channels_last


@lru_cache
def host() -> HostCuda:
    return HostCuda()


def outputs(memory: Memory) -> Values:
    return {name: memory.tensor(name).clone() for name in memory.writable if name != "workspace"}


def run(case: Case, values: Values) -> Values:
    launch = host().training.plan(case.call, "sm_80", alignment=case.alignment, device=case.device)
    memory = Memory(launch, values)
    host().execute(launch, memory, Order(case.seed % 3), case.seed)
    return outputs(memory)


# ---- right, on every case


@pytest.mark.parametrize("op", OPS)
def test_pass(op: str) -> None:
    """Bit-exact on small integers, within 2 x eager's error (gradients 3 x) on random values."""
    for case in cases(op):
        check(run, case)


def test_the_cases_cover_every_kernel() -> None:
    planner = training_planner()
    used = {
        planner.plan(case.call, "sm_80", alignment=case.alignment, device=case.device).kernel
        for op in OPS
        for case in cases(op)
    }
    assert used == set(planner.kernels)
    for op in OPS:
        calls = [case.call for case in cases(op)]
        assert {call.shape for call in calls} == set(SHAPES)
        assert {call.activation for call in calls} == {"relu", "relu6", "none"}
        assert {call.affine for call in calls} == {"none", "both", "weight", "bias"}


def integers(call: TrainingCall, seed: int = 0) -> Values:
    return values_of(call, "integers", seed)


@pytest.mark.parametrize("op", ["bn_stats", "bn_backward_reduce"])
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_many_parts_in_any_order(op: str, dtype: torch.dtype) -> None:
    """More parts than the last block reads at once: right, the same bits whoever comes last, counters zero again."""
    call = TrainingCall(op, 2, 37, 43, 72 if dtype == FLOAT else 136, dtype)
    values = values_of(call, "random", 3)
    launch = host().training.plan(call, "sm_90", device=LARGE)
    assert launch.workspace_initial == "zeros"
    memory, results = Memory(launch, values), []
    for seed in range(4):  # the same workspace again and again
        for name in memory.writable - {"workspace"}:
            memory.tensor(name).fill_(torch.nan)
        host().execute(launch, memory, Order(seed % 3), seed)
        results.append(outputs(memory))
        assert not any(memory.content("workspace")[:256]), "an arrival counter is not zero after the launch"
    for other in results[1:]:
        for name, t in other.items():
            assert torch.equal(t, results[0][name])
    check(run, Case(call, LARGE, 16, 5))


@pytest.mark.parametrize("outlier", [False, True])
def test_statistics_where_the_mean_is_far_larger_than_the_deviation(outlier: bool) -> None:
    """Also where the first pixel, around which all is computed, is itself far from the mean."""
    call = TrainingCall("bn_stats", 3, 23, 19, 20)
    g = torch.Generator().manual_seed(0)
    y = (torch.randn(call.shape, generator=g) * 2 + 3000).contiguous(memory_format=CHANNELS_LAST)
    if outlier:
        y[0, :, 0, 0] = -3000.0
    got = run(Case(call, SMALL, 16, 1), {"y": y})
    exact = eager(call, {"y": y}, exact=True)
    torch.testing.assert_close(got["mean"].double(), exact["mean"], rtol=2e-7, atol=0)
    torch.testing.assert_close(got["var"].double(), exact["var"], rtol=4e-6, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_nan_as_in_eager(op: str) -> None:
    for dtype, activation in ((HALF, "relu"), (FLOAT, "relu6"), (BRAIN, "none")):
        call = TrainingCall(op, 1, 6, 7, 24, dtype, residual=None if op == "bn_stats" else dtype, activation=activation)
        values = integers(call)
        values["y"][0, 3, 2, 2] = torch.nan
        if "grad_out" in values:
            values["grad_out"][0, 5, 1, 1] = torch.nan
        if "residual" in values:
            values["residual"][0, 7, 3, 3] = torch.nan
        got, expected = run(Case(call, SMALL, 16, 2), values), eager(call, values, exact=True)
        for name, t in got.items():
            if t.is_floating_point():
                assert torch.equal(t.isnan(), expected[name].isnan()), f"{op} {dtype} {name}"
                assert t.isnan().any()
            else:
                assert torch.equal(t, expected[name])


def test_an_empty_batch_launches_nothing() -> None:
    for op in OPS:
        assert host().training.plan(TrainingCall(op, 0, 4, 4, 8), "sm_80").grid[0] == 0


# ---- traffic, by counted sectors


def traffic(call: TrainingCall) -> tuple[Statistics, Memory]:
    launch = host().training.plan(call, "sm_80", device=SMALL)
    memory = Memory(launch, integers(call), alignment=256)
    return host().execute(launch, memory), memory


def passes(statistics: Statistics, memory: Memory, kind: str, name: str) -> float:
    """Sectors moved of a tensor, in units of its size."""
    return statistics.total(kind, name)[1] * 32 / memory.buffers[name].size


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FLOAT])
def test_activation_traffic_is_ten_tensors_and_three_masks(dtype: torch.dtype) -> None:
    """Forward and backward of the tail: every activation once per pass, in full sectors; eager PyTorch moves 16."""
    tail = TrainingCall("bn_stats", 2, 12, 10, 64, dtype)
    statistics, memory = traffic(tail)
    pivots = statistics.total("load", "y")[1] * 32 - memory.buffers["y"].size
    blocks = memory.launch.grid[0] + 1
    assert 0 <= pivots <= blocks * 4 * 64 * 8, "each block reads its first pixel once more"
    total = 1.0
    moved = {
        "bn_apply_add_relu": {"y": "load", "residual": "load", "out": "store"},
        "bn_backward_reduce": {"grad_out": "load", "y": "load"},
        "bn_backward_apply": {"grad_out": "load", "y": "load", "d_y": "store", "d_second": "store"},
    }
    masks = 0.0
    for op, tensors in moved.items():
        residual = None if op == "bn_backward_reduce" else dtype
        statistics, memory = traffic(dataclasses.replace(tail, op=op, residual=residual))
        for name, kind in tensors.items():
            assert passes(statistics, memory, kind, name) == 1, f"{op}: {name}"
            other = "store" if kind == "load" else "load"
            assert statistics.total(other, name) == (0, 0, 0)
        total += len(tensors)
        kind = "store" if op == "bn_apply_add_relu" else "load"
        masks += statistics.total(kind, "mask")[2] / memory.buffers["mask"].size
    assert total == 10
    assert masks == 3


def test_odd_channels_move_whole_packets() -> None:
    """37 channels: the elementwise passes still read and write every sector once."""
    for op, names in (("bn_apply_add_relu", ("y", "residual", "out")), ("bn_backward_apply", ("y", "grad_out", "d_y"))):
        statistics, memory = traffic(TrainingCall(op, 2, 8, 8, 37, HALF, residual=HALF))
        for name in names:
            kind = "load" if name in ("y", "residual", "grad_out") else "store"
            requests, sectors, size = statistics.total(kind, name)
            assert sectors * 32 == size == memory.buffers[name].size, f"{op}: {name}"
            assert requests <= size / 16 / 32 + 2, "16 bytes a lane"


# ---- AddressSanitizer


def test_address_sanitizer() -> None:
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    if not Path(library.stdout.strip()).is_absolute():
        pytest.skip("g++ has no libasan.so")
    environment = os.environ | {
        "LD_PRELOAD": library.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    script = Path(__file__).parents[1] / "support/host_cuda" / "asan_main.py"
    done = subprocess.run(
        [sys.executable, str(script), *OPS], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{sum(len(cases(op)) for op in OPS)} shapes, no report" in done.stdout


def test_names_are_unique_in_a_pass() -> None:
    """A plan lists tensors by offset, and alignments by name: two tensors of one name would be one alignment."""
    planner = training_planner()
    for op in OPS:
        for case in cases(op):
            request = planner.request(case.call, case.alignment)
            plan = planner.extension.plan_training(device_for("sm_80").properties, **request)
            assert len(plan.alignment) == len(plan.pointers), str(case.call)


def test_refusals() -> None:
    planner = training_planner()
    with pytest.raises(ValueError, match="activations must be float16, bfloat16 or float32, got float64"):
        planner.plan(TrainingCall("bn_stats", 1, 2, 2, 8, torch.float64), "sm_80")
    with pytest.raises(ValueError, match="cuda: expected a residual or a projection, got both"):
        planner.plan(TrainingCall("bn_apply_add_relu", 1, 2, 2, 8, residual=FLOAT, proj=FLOAT), "sm_80")
    with pytest.raises(ValueError, match="cuda: y must have at least one channel, got 0"):
        planner.plan(TrainingCall("bn_stats", 1, 2, 2, 0), "sm_80")
