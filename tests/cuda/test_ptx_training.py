"""The CUDA training kernels as nvcc produced them, executed by the PTX interpreter from launch.json alone."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.toolchain import why_not

if reason := why_not("_C", "g++", "nvcc"):
    pytest.skip(reason, allow_module_level=True)

import tests.support.host_cuda.host  # noqa: F401  (names the cache of compiled artefacts)
from fused_resnet import aot
from fused_resnet.aot.cuda import compile_kernel
from fused_resnet.aot.launch_json import Launch
from fused_resnet.aot.planner import planner
from fused_resnet.aot.training import OPS, TrainingCall, training_planner
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import TailArguments, reference
from fused_resnet.testing import assert_bitexact, check_tail, make_tail
from tests.support.conv_stats_cases import ConvCase, check_statistics, symbols
from tests.support.conv_stats_cases import cases as conv_cases
from tests.support.launch_harness import Memory, interpret, interpreter
from tests.support.training_calls import HALF, SMALL, Case, Values, cases, check, values_of

pytestmark = [pytest.mark.ptx, pytest.mark.aot]


@lru_cache
def module(op: str, arch: str = "sm_80") -> Any:
    """All kernels of a pass, from the PTX that the extension embeds."""
    return interpreter().load(compile_kernel(training_planner().all_of(op), arch)[0])


def outputs(memory: Memory) -> Values:
    return {name: memory.tensor(name).clone() for name in memory.writable if name != "workspace"}


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
@pytest.mark.parametrize("op", OPS)
def test_pass(op: str, arch: str) -> None:
    """Every case, with the warps and blocks of each in random order and races reported."""

    def run(case: Case, values: Values) -> Values:
        launch = training_planner().plan(case.call, arch, alignment=case.alignment, device=case.device)
        memory = Memory(launch, values)
        interpret(launch, module(case.call.op, arch), memory, case.seed)
        return outputs(memory)

    for case in cases(op):
        check(run, case)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_store_rounds_to_nearest(dtype: torch.dtype, arch: str) -> None:
    """Products of small integers with a number of few bits are exact in float32: only the store can round."""
    call = TrainingCall("bn_apply_add_relu", 1, 8, 8, 32, dtype, activation="none", affine="none")
    y = torch.arange(2048.0).remainder(255).sub(127).view(call.shape).to(dtype)
    y[0, 0, 0, 0], y[0, 1, 0, 0] = torch.nan, torch.inf
    invstd = 1 + 2.0 ** -torch.arange(1.0, 13.0)[torch.arange(32) % 12]
    values = {"y": y.contiguous(memory_format=torch.channels_last), "mean": torch.zeros(32), "invstd": invstd}
    launch = training_planner().plan(call, arch)
    memory = Memory(launch, values)
    interpret(launch, module(call.op, arch), memory, 1)
    expected = (y.double() * invstd.double().view(1, -1, 1, 1)).to(dtype)
    assert_bitexact(memory.tensor("out"), expected, f"{arch} {dtype}")


@pytest.mark.parametrize("op", ["bn_stats", "bn_backward_reduce"])
def test_reductions_leave_the_workspace_ready_for_the_next_launch(op: str) -> None:
    call = TrainingCall(op, 2, 29, 31, 72, HALF)
    launch = training_planner().plan(call, "sm_80")
    assert launch.grid[0] >= 12
    memory, results = Memory(launch, values_of(call, "random", 1)), []
    for seed in range(3):
        interpret(launch, module(op), memory, seed)
        results.append(outputs(memory))
    for other in results[1:]:
        for name, t in other.items():
            assert torch.equal(t, results[0][name])


@pytest.mark.parametrize(
    "text",
    [
        "op=bn_stats,n=2,h=9,w=8,c=64,dtype=float16",
        "op=bn_apply_add_relu,n=2,h=7,w=5,c=37,dtype=bfloat16,residual=float32",
        "op=bn_backward_reduce,n=2,h=6,w=6,c=24,proj=1",
        "op=bn_backward_apply,n=1,h=9,w=9,c=16,dtype=float16,residual=1,activation=relu6,affine=none",
    ],
)
def test_artifacts(text: str, tmp_path: Path) -> None:
    """What `fused-resnet compile` writes for a training pass is complete."""
    aot.compile("cuda", "sm_80", text, tmp_path)
    launch = Launch.from_json((tmp_path / "launch.json").read_text())
    assert (tmp_path / "kernel.cubin").read_bytes().startswith(b"\x7fELF")
    assert TrainingCall.parse(launch.problem) == TrainingCall.parse(text)
    loaded = interpreter().load((tmp_path / "kernel.ptx").read_text())

    def from_files(case: Case, values: Values) -> Values:
        memory = Memory(launch, values)
        interpret(launch, loaded, memory, case.seed)
        return outputs(memory)

    check(from_files, Case(TrainingCall.parse(text), SMALL, 16, 7))


# ---- the launch path: planner and launcher behind the C API, above a stand-in for the CUDA runtime


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("op=bn_stats,n=2,h=19,w=17,c=72,dtype=float16", {}, ""),
        ("op=bn_apply_add_relu,n=2,h=9,w=7,c=13,dtype=bfloat16,residual=1", {}, ""),
        ("op=bn_backward_reduce,n=2,h=9,w=7,c=24,proj=1", {}, ""),
        ("op=bn_backward_apply,n=2,h=9,w=7,c=24,residual=1", {"drop": ["grad_out"]}, "grad_out: expected an address"),
        ("op=bn_stats,n=2,h=9,w=7,c=24", {"shift": {"y": 4}}, "y: expected an address that is a multiple of 16"),
        ("op=bn_stats,n=2,h=9,w=7,c=24", {"extra": ["residual"]}, "residual: expected no address"),
    ],
)
def test_launch_path(text: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    from tests.cuda.test_ptx_cuda import run_job

    call = TrainingCall.parse(text)

    def launched(case: Case, values: Values) -> Values:
        memory = Memory(training_planner().plan(call, "sm_80"), values)
        buffers = {}
        for name, spec in memory.launch.tensors.items():
            (tmp_path / name).write_bytes(memory.content(name))
            writable = name in memory.writable
            buffers[name] = {"file": str(tmp_path / name), "alignment": spec.alignment, "writable": writable}
        planner = training_planner()
        request = planner.extension.training_request(**planner.request(call, 16))
        job = {"request": request.hex(), "pass": OPS.index(call.op), "buffers": buffers}
        answer = run_job({**job, **changes}, tmp_path)
        assert answer["error"].startswith(message)
        assert bool(answer["error"]) == bool(message)
        assert answer["launches"] == (0 if message else 1)
        for name in memory.writable:
            memory.replace(name, (tmp_path / name).read_bytes())
        return outputs(memory)

    case = Case(call, SMALL, 16, 3)
    if message:
        launched(case, values_of(call, "integers", 3))
    else:
        check(launched, case, kinds=("integers",))


# ---- the convolution with statistics


@pytest.mark.parametrize(
    ("symbol", "arch"),
    [(s, arch) for s in symbols() for arch in ("sm_75", "sm_80") if planner().kernels[s].runs_on(arch)],
)
def test_conv_stats(symbol: str, arch: str) -> None:
    loaded = interpreter().load(compile_kernel(planner().kernels[symbol], arch)[0])
    for case in conv_cases(symbol):

        def run_conv(tail: TailArguments, case: ConvCase = case) -> torch.Tensor:
            launch = planner().plan(case.problem, arch, tile=case.tile, statistics=True)
            memory = Memory(launch, tail)
            for seed in range(2):  # the second launch finds the workspace as the first left it
                interpret(launch, loaded, memory, case.seed + seed)
                check_statistics(memory.y, memory.tensor("mean"), memory.tensor("var"), launch.problem)
            return memory.y

        check_tail(run_conv, case.problem, kinds=("integers",), label=f"{symbol} {case.problem}")


def test_artifacts_of_a_convolution_with_statistics(tmp_path: Path) -> None:
    text = "op=conv_bn_stats,n=2,h=9,w=9,c=16,k=72,padding=1,dtype=float16,bias=1"
    aot.compile("cuda", "sm_80", text, tmp_path)
    launch = Launch.from_json((tmp_path / "launch.json").read_text())
    assert aot.compile("cuda", "sm_80", launch.problem, tmp_path) == launch, "the text says all"
    problem = Problem.parse(launch.problem.partition(",")[2])
    tail = make_tail(problem, "integers")
    memory = Memory(launch, tail)
    interpret(launch, interpreter().load((tmp_path / "kernel.ptx").read_text()), memory, 5)
    assert_bitexact(memory.y, reference(tail.to(torch.float64)), text)
    check_statistics(memory.y, memory.tensor("mean"), memory.tensor("var"), text)


@pytest.mark.parametrize(
    ("problem", "options", "message"),
    [
        ("op=bn_stats,n=0,h=4,w=4,c=8", {}, "n is 0"),
        ("op=bn_stats,h=4,w=4", {}, "the field 'c' is missing"),
        ("op=bn_stats,h=4,w=4,c=8,k=8", {}, "unknown field 'k' of a training pass"),
        ("op=bn_norm,h=4,w=4,c=8", {}, "op: expected one of bn_stats"),
        ("op=bn_stats,h=4,w=4,c=8", {"tile": "64x64"}, "tile: a training pass has none"),
    ],
)
def test_artifacts_refuse(problem: str, options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        aot.compile("cuda", "sm_80", problem, tmp_path, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="triton: no artifacts of training passes"):
        aot.compile("triton", "sm_80", "op=bn_stats,h=4,w=4,c=8", tmp_path)
