"""Ahead-of-time artifacts of the Triton tail: launched from launch.json alone, and their machine code read."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from benchmarks.static import triton as gate
from fused_resnet import aot
from fused_resnet.aot.launch_json import Launch
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import reference
from fused_resnet.kernels.config import TailConfig
from fused_resnet.testing import assert_bitexact, assert_within_bar, eager_error, make_tail
from tests.support.launch_harness import Memory, run_ptx
from tests.support.toolchain import why_not_disassembled

pytest.importorskip("triton")

pytestmark = [pytest.mark.aot]

HALF = "dtype=float16,residual=1"
ARTIFACTS = {
    "resnet18": "n=1,h=14,w=14,c=64,k=64,padding=1," + HALF,
    "resnet50": "n=2,h=7,w=7,c=128,k=512,r=1,residual=1,dtype=bfloat16",
    "odd": "n=2,h=9,w=7,c=33,k=37,padding=1,bias=1,relu=0," + HALF,
    "mixed": "n=1,h=6,w=6,c=24,k=20,padding=1,dtype=float16,residual=float32",
    "projection": "n=2,h=7,w=7,c=32,k=40,padding=1,proj=24x14x14x2,proj_bias=1,dtype=float16",
    "dilation": "n=1,h=12,w=11,c=16,k=24,padding=2,dilation=2," + HALF,
    "stem": "n=1,h=21,w=19,c=3,k=16,r=7,stride=2,padding=3,dtype=float16",
    "splitk": "n=1,h=7,w=7,c=64,k=40,padding=1,splitk=3," + HALF,
    "tile": "n=1,h=7,w=7,c=64,k=40,padding=1,tile=128x64," + HALF,
    "descriptors": "n=2,h=9,w=7,c=64,k=70,padding=1,tile=128x128x64_w8_s3_tma," + HALF,
    "descriptors_projection": "n=1,h=7,w=7,c=64,k=64,padding=1,proj=64x14x14x2,dtype=bfloat16,tile=64x64x64_w4_s4_tma",
    "tf32": "n=1,h=8,w=7,c=24,k=40,padding=1,residual=1,dtype=tf32",
    "fp32": "n=1,h=8,w=7,c=24,k=40,padding=1,residual=1,bn=0",
}


@pytest.mark.ptx
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", ARTIFACTS)
def test_artifacts_run_from_the_json_alone(name: str, arch: str, tmp_path: Path) -> None:
    if "tma" in ARTIFACTS[name] and arch == "sm_80":
        pytest.skip("tensor descriptors need sm_90")
    aot.compile("triton", arch, ARTIFACTS[name], tmp_path)
    launch = Launch.from_json((tmp_path / "launch.json").read_text())
    ptx = (tmp_path / "kernel.ptx").read_text()
    assert (tmp_path / "kernel.cubin").read_bytes()[:4] == b"\x7fELF"
    problem = Problem.parse(launch.problem)
    # eps is a kernel argument, so part of the artifact: small integers stay exact with the eps it was compiled for only
    tail = make_tail(problem, "random")
    exact = reference(tail.to(torch.float64))
    memory = Memory(launch, tail)
    for seed in range(2 if launch.workspace_bytes else 1):  # a workspace is left as the next launch needs it
        assert_within_bar(
            run_ptx(launch, ptx, tail, seed=seed, memory=memory), eager_error(problem), exact, f"{name} {arch}"
        )


@pytest.mark.ptx
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_eps_is_in_the_artifact(arch: str, tmp_path: Path) -> None:
    text = ARTIFACTS["projection"]
    launch = aot.compile("triton", arch, text, tmp_path, eps=1.0, proj_eps=1.0)
    tail = make_tail(Problem.parse(text), "integers")
    got = run_ptx(launch, (tmp_path / "kernel.ptx").read_text(), tail)
    assert_bitexact(got, reference(tail.to(torch.float64)), arch)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n=1,h=8,w=8,c=8,k=8,groups=2,dtype=float16", "groups must be 1, got 2"),
        ("n=1,h=8,w=8,c=8,k=8,dtype=float64", "got float64"),
        ("n=1,h=8,w=8,c=8,k=8,dtype=float16,tile=96x96", "tile: expected one of"),
        ("n=0,h=8,w=8,c=8,k=8,dtype=float16", "empty batch"),
    ],
)
def test_refusals_are_sentences(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        aot.compile("triton", "sm_80", text, tmp_path)


# ---- the gate: what ptxas made of every shipped configuration ------------------------------------------

GATE = [(arch, *kernel) for arch in (80, 90) for kernel in gate.kernels(arch)]
#: The other architectures in CI by a sample, without the training convolutions; `make static` takes all.
SAMPLE = [
    (arch, problem, config, stats)
    for arch in (86, 89, 100, 120)
    for problem, config, stats in gate.kernels(arch)
    if not stats and str(config).removesuffix("_tma") in ("128x128x64_w8_s3", "64x64x64_w4_s4", "64x64x32_w4_s3")
]


def name_of(value: object) -> str:
    if isinstance(value, bool):
        return "stats" if value else "tail"
    return str(value) if not isinstance(value, Problem) else str(value.dtype)[6:] + ("_tf32" if value.tf32 else "")


@pytest.mark.parametrize(("arch", "problem", "config", "stats"), GATE + SAMPLE, ids=name_of)
def test_machine_code(arch: int, problem: Problem, config: TailConfig, stats: bool) -> None:
    if reason := why_not_disassembled(f"sm_{arch}"):
        pytest.skip(reason)
    if (triton := version("triton")).startswith("3.6.") and stats and problem.tf32:
        pytest.skip(f"Triton {triton} spills 8 bytes there; the bounds are of what 3.8 makes")
    row = gate.read(problem, config, arch, stats)
    assert gate.violations(row, problem, config, arch) == []
