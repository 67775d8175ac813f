"""Every backend on a GPU, over the one list of problems: `pytest -m gpu`. Triton by pointers and by descriptors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet import backends
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import TailArguments, reference
from fused_resnet.selection.verify import ROUNDS_BETWEEN
from fused_resnet.testing import (
    DESCRIBED,
    PROBLEMS,
    RESNET_TAILS,
    Case,
    RealTail,
    assert_bitexact,
    check_tail,
    in_dtype,
    make_tail,
)

pytestmark = pytest.mark.gpu

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
#: Ways to run a tail: a backend, and for Triton how operands are loaded.
WAYS = ("cuda", "triton", "triton_tma", "cudnn", "two_pass")
NAMES = [case.name for case in PROBLEMS]


@pytest.fixture(params=DTYPES)
def math(request: pytest.FixtureRequest) -> Iterator[str]:
    """A type of arithmetic, with torch's tf32 switch as it asks."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = request.param == "tf32"
    yield request.param
    torch.backends.cudnn.allow_tf32 = before


def on_gpu(problem: Problem, math: str = "float16", **changes: Any) -> Problem:
    return in_dtype(problem, DTYPES[math], device_type="cuda", tf32=math == "tf32", **changes)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def ran(way: str, problem: Problem) -> Callable[[TailArguments], Tensor]:
    """The backend's function for `problem`; skips with its own sentence where it refuses."""
    backend = backends.get(way.removesuffix("_tma"))
    if (reason := backend.can_run(problem)) is not None:
        pytest.skip(reason)
    if way != "triton_tma":
        return lambda tail: backend.run(Problem.from_tail(tail), tail)
    config = described(problem)
    return lambda tail: backend.bind(Problem.from_tail(tail), tail, config)(tail)


def described(problem: Problem) -> Any:
    """The preferred configuration with tensor descriptors."""
    from fused_resnet.kernels import config, launch

    if (reason := config.why_not_tma(problem, launch.capability(device()))) is not None:
        pytest.skip(reason)
    return next(c for c in launch.preferred(problem, device()) if c.tma)


def kinds_of(way: str) -> Any:
    return ("random",) if way.removesuffix("_tma") in ROUNDS_BETWEEN else ("integers", "random")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", [*PROBLEMS, *DESCRIBED], ids=lambda case: case.name)
def test_conformance(case: Case, way: str, math: str) -> None:
    problem = on_gpu(case.problem, math)
    check_tail(ran(way, problem), problem, kinds=kinds_of(way), device="cuda", label=way)


@pytest.mark.parametrize("way", ["cuda", "triton"])
@pytest.mark.parametrize("name", ["odd", "7x7_pixels", "1x1"])
def test_a_float32_residual_beside_float16(name: str, way: str) -> None:
    case = next(case for case in PROBLEMS if case.name == name)
    problem = in_dtype(case.problem, torch.float16, torch.float32, device_type="cuda")
    check_tail(ran(way, problem), problem, device="cuda", label=way)


#: A 3x3 tail, a 1x1 tail with its residual, one with its projection, and one that is split along K.
STAGES = {("resnet18", "layer1"), ("resnet18", "layer4"), ("resnet50", "layer2"), ("resnet50", "layer3.0")}
REAL = [tail for tail in RESNET_TAILS if (tail.network, tail.stage) in STAGES]


@pytest.mark.parametrize("math", ["float16"], indirect=True)
@pytest.mark.parametrize("real", REAL, ids=lambda tail: f"{tail.network}-{tail.stage}")
def test_every_tile_of_triton(real: RealTail, math: str) -> None:
    """All tiles, by pointers and by descriptors, split and persistent: bit-exact, not only the one that wins."""
    problem = on_gpu(real.problem, math, n=2)
    backend = backends.get("triton")
    if (reason := backend.can_run(problem)) is not None:
        pytest.skip(reason)
    tail = make_tail(problem, "integers", device="cuda")
    exact = reference(tail.to(torch.float64))
    plain, candidates = {}, backend.candidates(problem, device())
    for config in candidates:  # of each tile its plain form, one split in order, one not, and one persistent
        form = (config.split_k > 1, config.ordered, config.persistent)
        plain.setdefault((config.m, config.n, config.k, config.warps, config.tma, form), config)
    assert len(plain) > 8
    for config in plain.values():
        assert_bitexact(backend.bind(problem, tail, config)(tail), exact, f"{config} {problem}")


@pytest.mark.parametrize("way", WAYS)
def test_at_a_batch_that_fills_the_gpu(way: str) -> None:
    """Sizes of the benchmarks, where a tile's offsets are large and all SMs are busy; the reference runs beside it."""
    for real in REAL[:2]:
        problem = on_gpu(real.problem, "float16", n=64)
        check_tail(ran(way, problem), problem, kinds=kinds_of(way), device="cuda", label=way)


@pytest.mark.parametrize("way", WAYS)
def test_in_a_cuda_graph(way: str) -> None:
    """Captured after one call, replayed on new values, the output poisoned between."""
    problem = on_gpu(Problem.parse("n=1,h=7,w=7,c=256,k=256,padding=1,residual=1"))
    tail = make_tail(problem, "integers", device="cuda")
    run = ran(way, problem)
    expected = run(tail).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(tail)
    for _ in range(3):
        captured.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, expected)


@pytest.mark.parametrize("way", ["cuda", "triton", "triton_tma", "two_pass"])
def test_on_a_stream_beside_a_busy_one(way: str) -> None:
    problem = on_gpu(Problem.parse("n=1,h=7,w=7,c=256,k=256,padding=1,residual=1"))
    tail = make_tail(problem, "random", device="cuda")
    run = ran(way, problem)
    expected = run(tail)
    busy, stream = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    busy @ busy
    with torch.cuda.stream(stream):
        results = [run(tail) for _ in range(5)]
    stream.synchronize()
    # not to the bit: partial sums that are added atomically come in any order
    assert all(torch.allclose(y, expected, rtol=1e-2, atol=1e-2) for y in results)


@pytest.mark.parametrize("way", ["triton", "triton_tma"])
def test_ordered_split_k_gives_the_same_bits_every_time(way: str) -> None:
    problem = on_gpu(Problem.parse("n=1,h=7,w=7,c=512,k=512,padding=1,residual=1"))
    backend = backends.get("triton")
    ran(way, problem)
    tail = make_tail(problem, "random", device="cuda")
    split = [
        c for c in backend.candidates(problem, device()) if c.split_k > 1 and c.ordered and c.tma == (way != "triton")
    ]
    assert split
    for config in split[:3]:
        call = backend.bind(problem, tail, config)
        first = call(tail).clone()
        assert all(torch.equal(call(tail), first) for _ in range(20)), str(config)


@pytest.mark.parametrize("way", WAYS)
def test_nan_and_infinity_as_in_eager(way: str) -> None:
    problem = on_gpu(dataclasses.replace(next(c.problem for c in PROBLEMS if c.name == "aligned"), c=64, bn=False))
    tail = make_tail(problem, "integers", device="cuda")
    tail.x[0, 0, 3, 2] = float("nan")
    tail.x[1, 1, 1, 1] = float("inf")
    actual, expected = ran(way, problem)(tail), reference(tail)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
