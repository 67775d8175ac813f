"""What nvcc really produced, executed on the CPU by the PTX interpreter, from launch.json alone.

The interpreter runs warps and blocks in random order, several blocks interleaved, and reports races in shared and
global memory, accesses out of bounds or misaligned, uninitialised data, and copies read before their wait.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.toolchain import why_not

if reason := why_not("_C", "g++", "nvcc"):
    pytest.skip(reason, allow_module_level=True)

from fused_resnet import aot
from fused_resnet.aot.cuda import build_module, compile_kernel
from fused_resnet.aot.launch_json import Launch, default_bn_dtype, write
from fused_resnet.aot.planner import cache_directory, planner, source_directory, sources_key
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import TailArguments, reference
from fused_resnet.testing import RESNET_TAILS, assert_bitexact, check_tail, in_dtype, make_tail
from tests.support.host_cuda.host import locked
from tests.support.host_cuda.shapes import Shape, shapes
from tests.support.launch_harness import WRITABLE, Memory, interpreter, run_module

pytestmark = [pytest.mark.ptx, pytest.mark.aot]

KERNELS = tuple(k.symbol for k in planner().kernels.values() if (k.epilogue, k.family) == ("tail", "mma"))
ARCHS = ("sm_75", "sm_80", "sm_90")
RUNNING = [(symbol, arch) for symbol in KERNELS for arch in ARCHS if planner().kernels[symbol].runs_on(arch)]


@lru_cache(maxsize=4)
def module(ptx: str) -> Any:
    return interpreter().load(ptx)


def launch_of(directory: Path) -> tuple[Launch, str]:
    return Launch.from_json((directory / "launch.json").read_text()), (directory / "kernel.ptx").read_text()


# ---- every kernel, on its odd shapes


def _fits(shape: Shape, arch: str) -> bool:
    try:
        planner().plan(shape.problem, arch, tile=shape.tile, alignment=shape.alignment)
    except ValueError:  # the projection of the largest tile, where a block has less shared memory
        return False
    return True


@pytest.mark.parametrize(("symbol", "arch"), RUNNING)
def test_kernel(symbol: str, arch: str, tmp_path: Path) -> None:
    """Three shapes each: bit-exact on small integers, and the first within 2 x eager on random values."""
    kernel = planner().kernels[symbol]
    ptx, cubin = compile_kernel(kernel, arch)
    fitting = [shape for shape in shapes(symbol) if _fits(shape, arch)]
    start = KERNELS.index(symbol) + {"sm_75": 6, "sm_80": 0, "sm_90": 3}[arch]
    chosen = [fitting[(start + step) % len(fitting)] for step in (0, 2, 5)]
    for number, shape in enumerate(chosen):

        def run(tail: TailArguments, shape: Shape = shape) -> torch.Tensor:
            launch = planner().plan(
                shape.problem, arch, tile=shape.tile, splitk=shape.splits, alignment=shape.alignment,
                eps=tail.conv.eps, proj_eps=tail.proj.eps if tail.proj else 1e-5,
            )  # fmt: skip
            write(tmp_path, launch, ptx, cubin)
            launch, text = launch_of(tmp_path)
            assert launch.kernel == symbol
            return run_module(launch, module(text), tail, seed=shape.seed)

        check_tail(run, shape.problem, kinds=("integers",) if number else ("integers", "random"), label=str(shape))


# ---- what `fused-resnet compile` writes, on the problems it is made for

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}


def _compile_and_run(problem: Problem, arch: str, directory: Path, **options: Any) -> Launch:
    tail = make_tail(problem, "integers")
    proj_eps = tail.proj.eps if tail.proj else 1e-5
    aot.compile("cuda", arch, problem, directory, eps=tail.conv.eps, proj_eps=proj_eps, **options)
    launch, ptx = launch_of(directory)
    assert (directory / "kernel.cubin").read_bytes().startswith(b"\x7fELF")
    y = run_module(launch, module(ptx), tail, seed=7)
    assert_bitexact(y, reference(tail.to(torch.float64)), f"{arch} {problem}")
    return launch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("real", RESNET_TAILS, ids=lambda tail: f"{tail.network}-{tail.stage}")
def test_resnet_tails(real: Any, dtype: str, tmp_path: Path) -> None:
    """The tails of ResNet-18 and -50 at a quarter of their height and width, so that seconds suffice."""
    problem = dataclasses.replace(in_dtype(real.problem, DTYPES[dtype]), device_type="cuda", tf32=dtype == "tf32")
    small = max(problem.h // 4, 4), max(problem.w // 4, 4)
    problem = dataclasses.replace(problem, h=small[0], w=small[1])
    if (proj := problem.projection) is not None:
        size = (small[0] * proj.stride[0], small[1] * proj.stride[1])
        problem = dataclasses.replace(problem, projection=dataclasses.replace(proj, h=size[0], w=size[1]))
    _compile_and_run(problem, "sm_80" if dtype in ("float16", "float32") else "sm_90", tmp_path)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("n=1,h=14,w=14,c=64,k=64,r=3,s=3,stride=1,padding=1,dilation=1,dtype=float16,residual=1,relu=1,bn=1", {}),
        ("n=2,h=9,w=11,c=33,k=37,padding=1,dtype=float16,residual=1", {}),
        ("n=1,h=7,w=7,c=13,k=5,padding=1,dtype=bfloat16,residual=1,relu=0", {}),
        ("n=1,h=8,w=8,c=30,k=64,padding=1,stride=2,dtype=float16,proj=31x7x7x2", {}),
        ("n=1,h=10,w=10,c=32,k=64,padding=1,stride=1,dtype=float16", {"proj": "16x19x19x2"}),
        ("n=1,h=12,w=12,c=32,k=48,padding=2,dilation=2,dtype=tf32,residual=1", {}),
        ("n=1,h=7,w=7,c=64,k=64,padding=1,dtype=float16,residual=1,splitk=4", {}),
        ("n=1,h=7,w=7,c=64,k=40,padding=1,dtype=float32,residual=1", {"splitk": 3}),
        ("n=1,h=14,w=14,c=64,k=64,padding=1,dtype=bfloat16,residual=float32,tile=128x64", {}),
        ("n=3,h=20,w=21,c=3,k=64,r=7,stride=2,padding=3,dtype=float16", {"tile": "64x64"}),
        ("n=1,h=5,w=5,c=16,k=24,dtype=float16,bn=0,bias=1,relu=0", {}),
    ],
)
def test_command_line_problems(text: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The problem as text, with the options in the text or beside it."""
    problem, in_text = aot._split_options(f"{text},proj={options['proj']}" if "proj" in options else text)
    tail = make_tail(problem, "integers")
    proj_eps = tail.proj.eps if tail.proj else 1e-5
    launch = aot.compile("cuda", "sm_80", text, tmp_path, eps=tail.conv.eps, proj_eps=proj_eps, **options)
    splits = int(options.get("splitk", in_text.get("splitk", 0)))
    if splits:
        assert launch.grid[1] == splits
    stored, ptx = launch_of(tmp_path)
    assert stored == launch
    y = run_module(stored, module(ptx), tail)
    assert_bitexact(y, reference(tail.to(torch.float64)), text)


def test_split_k_leaves_the_workspace_ready_for_the_next_launch(tmp_path: Path) -> None:
    problem = Problem.parse("n=1,h=7,w=7,c=40,k=48,padding=1,dtype=float16,residual=1,device=cuda")
    tail = make_tail(problem, "random")
    launch = aot.compile("cuda", "sm_80", problem, tmp_path, splitk=5, eps=tail.conv.eps)
    memory, results = Memory(launch, tail), []
    for seed in range(3):
        memory.y.fill_(torch.nan)
        results.append(
            run_module(launch, module((tmp_path / "kernel.ptx").read_text()), tail, seed=seed, memory=memory).clone()
        )
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---- the launch path: planner and launcher as they are, above a stand-in for the CUDA runtime


#: Kernels in the library of each family, as they stand in tiles.h; what it is built for, and the device it runs on.
SHORT = {"mma": ("(?!32x32)", "(?!f16)", "8.0", "80"), "wgmma": ("(?!128x64, Wgmma)", "", "9.0", "90")}


@lru_cache
def launcher_library(family: str) -> Path:
    """Planner, launcher and the kernels of a tile (as PTX) in one shared object against libcudart.so."""
    csrc = source_directory()
    build = hashlib.sha256((csrc / "cuda_build.py").read_bytes()).hexdigest()[:8]
    key = f"{family}-{build}-{sources_key(csrc, '.cuh')}-{sources_key(csrc, '.cpp')}"
    out = cache_directory() / f"launcher-{key}.so"
    other_tiles, other_statistics, archs, _ = SHORT[family]
    with locked(out), tempfile.TemporaryDirectory() as folder:
        if not out.exists():
            copy = Path(folder) / "csrc"
            shutil.copytree(csrc, copy, ignore=shutil.ignore_patterns("cpu", "__pycache__"))
            # A short catalogue, for the compiler's sake: the launcher neither knows nor cares which kernels are in it.
            tiles = copy / "cuda" / "tiles.h"
            text = re.sub(rf"X\(prefix##_{other_tiles}\w+, [^)]*\)", "", tiles.read_text())
            tiles.write_text(re.sub(rf"FUSED_RESNET_STATISTICS\(X, conv_{other_statistics}\w+, [^)]*\)", "", text))
            if family != "mma":
                _leave_out_all_kernels_but(family, copy)
            built = build_module(copy).build_launcher(Path(folder) / "build", archs, "shared")
            shutil.copy(built, f"{out}.tmp")
            Path(f"{out}.tmp").rename(out)
    return out


def _leave_out_all_kernels_but(family: str, csrc: Path) -> None:
    """The compiler's time again: lists that are empty now, and training passes, whose names alone must be there."""
    for path in (csrc / "cuda").glob("*.cu"):
        if path.stem.startswith("bn_"):
            name = "FUSED_RESNET_DEFINE_BN_KERNEL"
            empty = f'#include "bn_kernels.h"\n#define {name}(symbol, ...) extern "C" void symbol() {{}}\n'
            path.write_text(empty + path.read_text().partition("\n")[2])
        elif family not in path.stem:
            path.unlink()


def run_job(job: dict[str, Any], directory: Path, family: str = "mma") -> dict[str, Any]:
    """One launch by the library, in a process of its own above the stand-in for the CUDA runtime."""
    (directory / "jobs.json").write_text(json.dumps([{"shift": {}, "drop": [], "extra": [], **job}]))
    script = Path(__file__).parents[1] / "support/host_cuda/launch_path.py"
    command = [sys.executable, str(script), str(launcher_library(family)), str(directory / "jobs.json")]
    env = os.environ | {"PTXI_ARCH": SHORT[family][-1]}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def launch_through_the_runtime(
    problem: Problem, directory: Path, splits: int = 0, family: str = "mma", **changes: Any
) -> dict[str, Any]:
    """Plan and launch (host_cuda/launch_path.py); adds y to the answer."""
    tail = make_tail(problem, "integers")
    proj_eps = tail.proj.eps if tail.proj else 1e-5
    # The short catalogue has one tile, so name it where the buffers (the workspace's size) are made.
    arch, tile = ("sm_80", "32x32") if family == "mma" else ("sm_90", "wgmma128x64")
    launch = planner().plan(problem, arch, tile=tile, splitk=splits or 1, eps=tail.conv.eps, proj_eps=proj_eps)
    fields = planner().request(problem, default_bn_dtype(problem), tail.conv.eps, proj_eps, 16)
    wanted = {"splits": splits or 1, "family": planner().extension.FAMILIES[family]}
    request = planner().extension.plan_request(**fields, **wanted)
    memory = Memory(launch, tail)
    buffers = {}
    for name, spec in launch.tensors.items():
        (directory / name).write_bytes(memory.content(name))
        buffers[name] = {"file": str(directory / name), "alignment": spec.alignment, "writable": name in WRITABLE}
    answer = run_job({"request": request.hex(), "buffers": buffers, **changes}, directory, family)
    memory.replace("y", (directory / "y").read_bytes())
    answer |= {"y": memory.y, "exact": reference(tail.to(torch.float64)), "symbol": launch.kernel}
    return answer


@pytest.mark.parametrize(
    ("text", "splits"),
    [
        ("n=1,h=14,w=14,c=64,k=64,padding=1,dtype=float16,residual=1", 0),
        ("n=1,h=7,w=7,c=64,k=64,padding=1,dtype=bfloat16,residual=1,relu=0", 3),
        ("n=2,h=9,w=9,c=13,k=21,padding=1,dtype=float16,residual=1", 0),
        ("n=1,h=9,w=9,c=32,k=40,padding=1,dtype=float32,proj=16x17x17x2", 0),
        ("n=2,h=20,w=20,c=40,k=136,padding=1,dtype=tf32,residual=1", 0),
    ],
)
def test_launch_path(text: str, splits: int, tmp_path: Path) -> None:
    """cudaFuncSetAttribute, grid, block and argument bytes as the extension passes them to the runtime."""
    answer = launch_through_the_runtime(dataclasses.replace(Problem.parse(text), device_type="cuda"), tmp_path, splits)
    assert answer["error"] == ""
    assert answer["launches"] == 1, "one launch, whatever the problem"
    assert answer["device"] == [108, 80, 166912, 167936, 0]
    assert_bitexact(answer["y"], answer["exact"], text)


@pytest.mark.parametrize(
    "text",
    [
        "n=1,h=14,w=14,c=64,k=64,padding=1,dtype=float16,residual=1",
        "n=3,h=13,w=11,c=40,k=136,padding=1,stride=2,dtype=bfloat16,residual=1,relu=0",
        "n=1,h=9,w=9,c=32,k=40,padding=1,dtype=float16,proj=16x17x17x2",
    ],
)
def test_launch_path_of_hopper(text: str, tmp_path: Path) -> None:
    """Tensor maps by the driver's functions, found at run time, and all five arguments of the kernel."""
    problem = dataclasses.replace(Problem.parse(text), device_type="cuda")
    answer = launch_through_the_runtime(problem, tmp_path, family="wgmma")
    assert answer["error"] == ""
    assert answer["launches"] == 1
    assert answer["device"] == [132, 90, 232448, 233472, 1]
    assert_bitexact(answer["y"], answer["exact"], text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": ["weight"]}, "weight: expected an address"),
        ({"shift": {"x": 2}}, "x: expected an address that is a multiple of 16"),
        ({"extra": ["bias"]}, "bias: expected no address"),
    ],
)
def test_launch_path_refuses(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A missing, misaligned or superfluous address is one sentence, and nothing is launched."""
    problem = Problem.parse("n=1,h=6,w=6,c=16,k=16,padding=1,dtype=float16,residual=1,device=cuda")
    answer = launch_through_the_runtime(problem, tmp_path, **changes)
    assert answer["error"].startswith(message)
    assert answer["launches"] == 0


def test_an_empty_batch_launches_nothing(tmp_path: Path) -> None:
    problem = Problem.parse("n=0,h=6,w=6,c=16,k=16,padding=1,dtype=float16,residual=1,device=cuda")
    answer = launch_through_the_runtime(problem, tmp_path)
    assert (answer["error"], answer["launches"]) == ("", 0)
    with pytest.raises(ValueError, match="n is 0"):
        aot.compile("cuda", "sm_80", problem, tmp_path)
