"""The cuda backend on a GPU: `pytest -m gpu`. What the CPU legs prove about the code, here on the machine itself.

tests/support/compute_sanitizer.sh runs the ones marked here under NVIDIA's memory and race checkers.
"""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_resnet import aot, backends
from fused_resnet.aot.launch_json import Launch
from fused_resnet.core import extensions
from fused_resnet.core.problem import DTYPES as TORCH_DTYPES
from fused_resnet.core.problem import Problem, dtype_name
from fused_resnet.core.reference import TailArguments, reference
from fused_resnet.testing import PROBLEMS, RESNET_TAILS, assert_bitexact, check_tail, in_dtype, make_tail
from tests.support.launch_harness import named_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(extensions.cuda() is None, reason=str(extensions.why_not_cuda())),
]

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}


@pytest.fixture(params=DTYPES)
def math(request: pytest.FixtureRequest) -> Any:
    """A type of arithmetic, with torch's tf32 switch as it asks."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = request.param == "tf32"
    yield request.param
    torch.backends.cudnn.allow_tf32 = before


def on_gpu(problem: Problem, math: str, **changes: Any) -> Problem:
    return in_dtype(problem, DTYPES[math], device_type="cuda", tf32=math == "tf32", **changes)


def backend() -> Any:
    return backends.get("cuda")


def run(tail: TailArguments) -> torch.Tensor:
    return backend().run(Problem.from_tail(tail), tail)


@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
def test_conformance(case: Any, math: str) -> None:
    problem = on_gpu(case.problem, math)
    if reason := backend().can_run(problem):
        assert "groups" in reason
        pytest.skip(reason)
    check_tail(run, problem, device="cuda")


@pytest.mark.parametrize("real", RESNET_TAILS, ids=lambda tail: f"{tail.network}-{tail.stage}")
def test_every_candidate(real: Any, math: str) -> None:
    """Every tile and split that the tuner may try, bit-exact: not only the one that wins."""
    problem = on_gpu(real.problem, math, n=2)
    tail = make_tail(problem, "integers", device="cuda")
    exact = reference(make_tail(problem, "integers").to(torch.float64))
    candidates = backend().candidates(problem, torch.device("cuda", torch.cuda.current_device()))
    assert len(candidates) > 3
    for candidate in candidates:
        assert_bitexact(backend().bind(problem, tail, candidate)(tail), exact, f"{candidate} {problem}")


def test_split_k_gives_the_same_bits_every_time() -> None:
    problem = on_gpu(Problem.parse("n=1,h=7,w=7,c=512,k=512,padding=1,residual=1"), "float16")
    tail = make_tail(problem, "random", device="cuda")
    candidates = backend().candidates(problem, torch.device("cuda", torch.cuda.current_device()))
    split = [candidate for candidate in candidates if candidate.splits > 1]
    assert split
    for candidate in split:
        call = backend().bind(problem, tail, candidate)
        first = call(tail)
        for _ in range(20):
            assert torch.equal(call(tail), first), str(candidate)


def test_streams_and_graphs() -> None:
    """On a stream of its own, beside a busy one, and captured into a CUDA graph with split-K in it."""
    problem = on_gpu(Problem.parse("n=1,h=7,w=7,c=256,k=256,padding=1,residual=1"), "float16")
    tail = make_tail(problem, "integers", device="cuda")
    exact = reference(make_tail(problem, "integers").to(torch.float64))
    stream = torch.cuda.Stream()
    busy = torch.randn(4096, 4096, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    busy @ busy
    with torch.cuda.stream(stream):
        y = run(tail)
    stream.synchronize()
    assert_bitexact(y, exact, "on a stream")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(tail)
    for _ in range(3):
        captured.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_bitexact(captured, exact, "in a graph")


def test_other_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    problem = on_gpu(Problem.parse("n=1,h=8,w=8,c=64,k=64,padding=1,residual=1"), "float16")
    tail = make_tail(problem, "integers", device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert_bitexact(run(tail), reference(make_tail(problem, "integers").to(torch.float64)), "on cuda:1")


def test_offsets_beyond_31_bits() -> None:
    """x of more than 2^31 elements: the last image is as right as the first."""
    problem = on_gpu(Problem.parse("n=131,h=512,w=512,c=64,k=8,r=1,residual=0"), "float16")
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    tail = make_tail(dataclasses.replace(problem, n=1), "integers", device="cuda")
    x = tail.x.expand(problem.n, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    y = run(tail._replace(x=x))
    exact = reference(make_tail(dataclasses.replace(problem, n=1), "integers").to(torch.float64))
    assert_bitexact(y[:1], exact, "first image")
    assert_bitexact(y[-1:], exact, "last image")


# ---- the artifacts of `fused-resnet compile`, launched with the driver API alone


def launch_cubin(directory: Path, tail: TailArguments) -> torch.Tensor:
    launch = Launch.from_json((directory / "launch.json").read_text())
    driver = ctypes.CDLL("libcuda.so.1")

    def check(status: int, what: str) -> None:
        assert status == 0, f"{what}: CUDA driver error {status}"

    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    image = (directory / "kernel.cubin").read_bytes()
    check(driver.cuModuleLoadData(ctypes.byref(module), image), "cuModuleLoadData")
    check(driver.cuModuleGetFunction(ctypes.byref(function), module, launch.kernel.encode()), "cuModuleGetFunction")
    check(driver.cuFuncSetAttribute(function, 8, launch.dynamic_shared_bytes), "cuFuncSetAttribute")  # dynamic shared
    values, buffers = named_tensors(tail), {}
    for name, spec in launch.tensors.items():
        if name == "workspace":
            buffers[name] = torch.zeros(spec.shape, dtype=torch.uint8, device="cuda")
        else:
            dtype = TORCH_DTYPES[spec.dtype]
            buffers[name] = torch.empty_strided(spec.shape, spec.strides, dtype=dtype, device="cuda").fill_(torch.nan)
        if name in values:
            buffers[name].copy_(values[name])
    (argument,) = launch.arguments
    data = bytearray.fromhex(argument["hex"])
    for entry in argument["pointers"]:
        address = buffers[entry["tensor"]].data_ptr()
        data[entry["offset"] : entry["offset"] + 8] = address.to_bytes(8, "little")
    block = ctypes.create_string_buffer(bytes(data), len(data))
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(block))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    status = driver.cuLaunchKernel(
        function, *launch.grid, *launch.block, launch.dynamic_shared_bytes, stream, parameters, None
    )
    check(status, "cuLaunchKernel")
    torch.cuda.synchronize()
    driver.cuModuleUnload(module)
    return buffers["y"]


@pytest.mark.parametrize(
    "text",
    [
        "n=1,h=14,w=14,c=64,k=64,padding=1,residual=1",
        "n=1,h=7,w=7,c=64,k=64,padding=1,residual=1,splitk=4",
        "n=2,h=9,w=7,c=33,k=37,padding=1,residual=1,relu=0",
        "n=1,h=10,w=10,c=32,k=64,padding=1,proj=16x19x19x2",
    ],
)
def test_artifacts(text: str, math: str, tmp_path: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    text += f",dtype={math if math == 'tf32' else dtype_name(DTYPES[math])}"
    problem, _ = aot._split_options(text)
    tail = make_tail(dataclasses.replace(problem, device_type="cuda"), "integers", device="cuda")
    proj_eps = tail.proj.eps if tail.proj else 1e-5
    aot.compile("cuda", f"sm_{major}{minor}", text, tmp_path, eps=tail.conv.eps, proj_eps=proj_eps)
    y = launch_cubin(tmp_path, tail)
    assert_bitexact(y, reference(make_tail(problem, "integers").to(torch.float64)), text)
