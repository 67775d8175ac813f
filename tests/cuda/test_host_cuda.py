"""The CUDA kernels, compiled unchanged for the host (tests/support/host_cuda), on shapes that cover every feature.

What only this leg can show: numbers right to the bit in any warp order, every sector and bank conflict counted.
"""

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

from fused_resnet.aot.launch_json import Launch
from fused_resnet.aot.planner import Kernel, planner
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import TailArguments, reference
from fused_resnet.testing import PROBLEMS, assert_bitexact, check_tail, in_dtype, make_tail
from tests.support.host_cuda.host import HostCuda, HostCudaError, Order, Statistics
from tests.support.host_cuda.shapes import ARCH, PER_KERNEL, Shape, shapes
from tests.support.launch_harness import Memory

KERNELS = tuple(k.symbol for k in planner().kernels.values() if (k.epilogue, k.family) == ("tail", "mma"))
MATHS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}


TURING = ("-O2", "-DFUSED_RESNET_HOST_TURING=1")


@lru_cache
def host(arch: str = f"sm_{ARCH}") -> HostCuda:
    return HostCuda(flags=TURING) if arch == "sm_75" else HostCuda()


def plan(problem: Problem, tail: TailArguments, arch: str = f"sm_{ARCH}", **options: object) -> Launch:
    proj_eps = tail.proj.eps if tail.proj is not None else 1e-5
    return planner().plan(problem, arch, eps=tail.conv.eps, proj_eps=proj_eps, **options)  # type: ignore[arg-type]


def run_shape(shape: Shape, tail: TailArguments, arch: str = f"sm_{ARCH}", **changes: object) -> torch.Tensor:
    shape = dataclasses.replace(shape, **changes)  # type: ignore[arg-type]
    launch = plan(shape.problem, tail, arch, tile=shape.tile, splitk=shape.splits, alignment=shape.alignment)
    assert launch.kernel == shape.kernel
    return host(arch).run(launch, tail, shape.order, shape.seed)[0]


# ---- right, on every shape


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(kernel: str) -> None:
    """Bit-exact on small integers and within 2 x eager's error on random values, on this kernel's shapes."""
    for shape in shapes(kernel):
        check_tail(lambda tail, shape=shape: run_shape(shape, tail), shape.problem, label=str(shape))


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if planner().kernels[kernel].runs_on("sm_75")])
def test_kernel_on_turing(kernel: str) -> None:
    """The same on sm_75, whose copies pass registers, as far as its shared memory goes."""
    least = planner().kernels[kernel].turing_shared_bytes
    tried = 0
    for shape in shapes(kernel):
        if shape.problem.projection is not None and least + planner().kernels[kernel].park_bytes > 64 << 10:
            continue
        check_tail(lambda tail, shape=shape: run_shape(shape, tail, "sm_75"), shape.problem, label=str(shape))
        tried += 1
    assert tried >= PER_KERNEL // 2


@pytest.mark.parametrize("math", MATHS)
def test_conformance_problems(math: str) -> None:
    """The public list of problems, through the planner's own choice of tile and splits."""
    for case in PROBLEMS:
        if case.problem.groups != 1 or case.problem.n == 0:
            continue
        problem = dataclasses.replace(in_dtype(case.problem, MATHS[math]), device_type="cuda", tf32=math == "tf32")

        def run(tail: TailArguments, problem: Problem = problem) -> torch.Tensor:
            return host().run(plan(problem, tail), tail)[0]

        check_tail(run, problem, kinds=("integers",), label=case.name)


def test_the_shapes_cover_every_feature() -> None:
    """At least 300 shapes; per type of arithmetic every filter, stride, dilation, option and warp order."""
    everything = [shape for kernel in KERNELS for shape in shapes(kernel)]
    assert len(everything) == PER_KERNEL * len(KERNELS)
    assert len({str(shape) for shape in everything}) >= 300
    for math in MATHS:
        mine = [s for s in everything if planner().kernels[s.kernel].math == math]
        problems = [s.problem for s in mine]
        assert {(p.r, p.s) for p in problems} >= {(1, 1), (3, 3), (5, 5), (7, 7), (1, 3), (3, 1)}
        assert {p.stride for p in problems} >= {(1, 1), (2, 2), (2, 1)}
        assert {p.dilation for p in problems} >= {(1, 1), (2, 2), (1, 2)}
        assert {p.c % 2 for p in problems} == {p.k % 2 for p in problems} == {0, 1}
        assert {p.bn for p in problems} == {p.bias for p in problems} == {True, False}
        assert {p.activation for p in problems} == {"relu", "relu6", "none"}
        assert {p.residual for p in problems} >= {None, torch.float32, MATHS[math]}
        assert {p.projection is None for p in problems} == {True, False}
        assert {s.splits for s in mine} >= {1, 2, 3, 4}
        assert {s.order for s in mine} == set(Order)


@pytest.mark.parametrize("math", MATHS)
def test_nan_passes_through(math: str) -> None:
    """ReLU and ReLU6 keep NaN, as eager's do, wherever it comes from."""
    text = "n=1,h=6,w=6,c=16,k=16,padding=1,residual=1"
    for activation in ("relu", "relu6", "none"):
        problem = in_dtype(
            Problem.parse(text), MATHS[math], activation=activation, device_type="cuda", tf32=math == "tf32"
        )
        tail = make_tail(problem, "integers")
        tail.x[0, 3, 2, 2] = torch.nan
        assert tail.residual is not None
        tail.residual[0, 5, 5, 5] = torch.nan
        y = host().run(plan(problem, tail), tail)[0]
        assert_bitexact(y, reference(tail.to(torch.float64)), activation)
        assert int(y.isnan().sum()) == 9 * 16 + 1


# ---- split-K


@pytest.mark.parametrize("math", MATHS)
def test_split_k_gives_the_same_bits_in_any_order(math: str) -> None:
    """Partial sums are added in the order of the splits, whoever arrives last; and the counters go back to zero."""
    text = "n=2,h=6,w=5,c=48,k=40,padding=1,residual=1,relu=0"
    problem = dataclasses.replace(in_dtype(Problem.parse(text), MATHS[math]), device_type="cuda", tf32=math == "tf32")
    tail = make_tail(problem, "random")
    launch = plan(problem, tail, tile="32x32", splitk=5)
    assert launch.workspace_initial == "zeros"
    memory = Memory(launch, tail)
    results = []
    for seed in range(4):  # the same workspace again and again
        memory.y.fill_(torch.nan)
        results.append(host().run(launch, tail, Order(seed % 3), seed, memory)[0].clone())
        counters = launch.grid[0] * 4
        assert not any(memory.content("workspace")[:counters]), "an arrival counter is not zero after the launch"
    for other in results[1:]:
        assert torch.equal(results[0], other)


# ---- traffic


def _traffic(kernel: Kernel, problem: Problem, splits: int = 1) -> tuple[Statistics, Launch]:
    tail = make_tail(problem, "integers")
    launch = plan(problem, tail, tile=kernel.tile, splitk=splits)
    assert launch.kernel == kernel.symbol
    y, statistics = host().run(launch, tail, memory=Memory(launch, tail, alignment=256))
    assert_bitexact(y, reference(tail.to(torch.float64)), str(problem))
    return statistics, launch


def _problem(kernel: Kernel, c: int, k: int, **changes: object) -> Problem:
    dtype = MATHS[kernel.math]
    problem = Problem(
        2, 11, 9, c, k, 3, 3, padding=(1, 1), dtype=dtype, device_type="cuda", residual=dtype, activation="none",
        tf32=kernel.math == "tf32",
    )  # fmt: skip
    return dataclasses.replace(problem, **changes)  # type: ignore[arg-type]


VECTOR_KERNELS = [k for k in KERNELS if planner().kernels[k].load == "vector"]


@pytest.mark.parametrize("symbol", VECTOR_KERNELS)
def test_traffic(symbol: str) -> None:
    """Residual read and output written once, in full sectors; x and weights fetched in full sectors (C % 16 == 0)."""
    kernel = planner().kernels[symbol]
    for c, k in ((16, 48), (80, 144)):
        problem = _problem(kernel, c, k)
        statistics, launch = _traffic(kernel, problem)
        compulsory = launch.tensors["y"].span // 32
        assert statistics.total("load", "residual")[1] == compulsory
        assert statistics.total("store", "y")[1] == compulsory
        assert statistics.total("load", "y") == (0, 0, 0)
        for name in ("x", "weight"):
            _, sectors, size = statistics.total("load", name)
            assert sectors * 32 == size, f"{name}: {size} bytes in {sectors} sectors"
        # a tile's share of x and of the weights passes once per tile: the weights exactly so
        tile_m = int(kernel.tile.split("x")[0])
        rows = launch.grid[0] // (-(-k // int(kernel.tile.split("x")[1])))
        assert rows == -(-problem.n * problem.p * problem.q // tile_m)


@pytest.mark.parametrize("symbol", KERNELS)
def test_no_bank_conflict_in_the_main_loop(symbol: str) -> None:
    kernel = planner().kernels[symbol]
    item = MATHS[kernel.math].itemsize
    c = 16 // item * 5 if kernel.load == "vector" else 16 // item * 5 + 4 // item
    statistics, _ = _traffic(kernel, _problem(kernel, c, 72))
    wavefronts, conflicts = statistics.shared[0]
    assert wavefronts > 0
    assert conflicts == 0, f"{conflicts} conflicts beside {wavefronts} wavefronts"


# ---- AddressSanitizer: what the checks of the primitives cannot see, such as arrays in registers


def _sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    if not Path(library.stdout.strip()).is_absolute():
        pytest.skip("g++ has no libasan.so")
    options = "detect_leaks=0:detect_stack_use_after_return=0"  # Python leaks; fibers have stacks of their own
    environment = os.environ | {"LD_PRELOAD": library.stdout.strip(), "ASAN_OPTIONS": options}
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    script = root / "tests/support/host_cuda/asan_main.py"
    return subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_address_sanitizer() -> None:
    kernels = ("conv_f16_64x64", "conv_bf16_128x64", "conv_tf32_32x32", "conv_f32_32x32", "conv_gather_f16_32x32")
    done = _sanitized(*kernels)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "40 shapes, no report" in done.stdout


def test_address_sanitizer_reports() -> None:
    done = _sanitized("probe")
    assert done.returncode != 0
    assert "stack-buffer-overflow" in done.stderr


# ---- the twin itself: each of its reports can be provoked (host_cuda/probes.cpp)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (0, "outside of every tensor"),
        (1, "misaligned"),
        (2, "write to the input x"),
        (3, "shared memory: offset 256"),
        (4, "not a multiple"),
        (5, "different __syncthreads"),
        (6, "not every lane"),
        (7, "copies in flight"),
    ],
)
def test_the_twin_reports(which: int, message: str) -> None:
    with pytest.raises(HostCudaError, match=message):
        host().probe(which)


def test_the_twin_delivers_copies_only_in_the_wait() -> None:
    """Shared memory is NaN from the start, and again while a copy is under way."""
    assert host().probe(8)[0].isnan().all()
    assert host().probe(9)[0].isnan().all()
    assert torch.equal(host().probe(10)[0], torch.arange(64.0))
    assert not host().probe(11)[0].any()


def test_the_twin_shows_a_missing_barrier() -> None:
    up, down = host().probe(12, Order.ASCENDING)[0], host().probe(12, Order.DESCENDING)[0]
    assert up[:32].isnan().all()
    assert not up[32:].isnan().any()
    assert down[32:].isnan().all()


def test_the_twin_counts() -> None:
    # Rows 32 bytes apart: 8 rows lie in 4 groups of banks, so each of the four matrices takes two wavefronts.
    assert host().probe(13)[1].shared[0] == (4, 4)
    statistics = host().probe(14)[1]
    assert statistics.total("load", "x") == (1, 8, 128)
    assert statistics.total("store", "y") == (1, 4, 128)
