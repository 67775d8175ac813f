"""The Triton tail as compiled for sm_80 and sm_90, executed by the PTX interpreter through ordinary launches.

Triton specialises, compiles and launches exactly as on a GPU; PTXI_HOME's triton_device stands in for the driver. It
reports races, uninitialised data, accesses out of bounds and copies read too early, none of which Triton's own
interpreter can see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fused_resnet.backends.triton import TritonBackend, why_not_problem
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import reference
from fused_resnet.kernels.config import FP32, HALF, TF32, TailConfig, fits
from fused_resnet.testing import DESCRIBED, PROBLEMS, Case, check_tail, in_dtype, make_tail
from tests.support.launch_harness import triton_device

pytest.importorskip("triton")

pytestmark = [pytest.mark.ptx]

#: fp16's problems; C is a whole number of 16-byte copies but not of BLOCK_K, so copies are asynchronous and have tails.
ODD = Problem.parse("n=3,h=7,w=5,c=40,k=37,r=3,s=3,stride=2:1,padding=1,residual=1,relu=0,dtype=float16")
PROJECTED = Problem.parse("n=2,h=5,w=4,c=24,k=33,r=3,s=3,padding=1,proj=16x9x8x2,relu=0,dtype=float16")


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def device(request: pytest.FixtureRequest) -> Any:
    """The stand-in driver, with blocks interleaved at random and races between blocks reported."""
    return triton_device(request.param)


@pytest.fixture
def check(device: Any) -> Callable[..., None]:
    backend = TritonBackend()  # its plans are for one device

    def run(problem: Problem, config: TailConfig | None = None, **options: Any) -> None:
        check_tail(lambda tail: backend.run(problem, tail, config), problem, label=str(config), **options)

    return run


def typed(problem: Problem, family: tuple[TailConfig, ...]) -> Problem:
    return problem if family is HALF else in_dtype(problem, torch.float32, tf32=family is TF32)


@pytest.mark.parametrize(
    ("family", "config"),
    [(f, c) for f in (HALF, TF32, FP32) for c in f],
    ids=lambda v: str(v) if isinstance(v, TailConfig) else "",
)
def test_every_configuration(
    check: Callable[..., None], device: Any, family: tuple[TailConfig, ...], config: TailConfig
) -> None:
    problem = typed(ODD, family)
    if not fits(config, problem, device.capability):
        pytest.skip(f"{config} is not for sm_{device.capability}")
    check(problem, config)
    # no masks at all: whole steps of channels, whole tiles of filters, a 1x1 filter
    aligned = Problem.parse(f"n=2,h=5,w=7,c={2 * config.k},k={config.n},r=1,residual=1")
    check(typed(in_dtype(aligned, torch.float16), family), config, kinds=("integers",))


@pytest.mark.parametrize("config", [TailConfig(64, 64, 32, 4, 3), TailConfig(128, 128, 64, 8, 3)], ids=str)
def test_projection(check: Callable[..., None], config: TailConfig) -> None:
    check(PROJECTED, config)


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "atomic"])
@pytest.mark.parametrize("split", [2, 5])
def test_split_k_leaves_a_clean_workspace(check: Callable[..., None], split: int, ordered: bool) -> None:
    config = TailConfig(64, 32, 32, 4, 3, split_k=split, ordered=ordered)
    for _ in range(2):
        check(ODD, config)
    check(PROJECTED, config, kinds=("integers",))


def test_ordered_split_k_does_not_depend_on_timing(device: Any) -> None:
    problem = Problem.parse("n=2,h=5,w=6,c=72,k=40,padding=1,residual=1,dtype=float16")
    tail, config = make_tail(problem), TailConfig(64, 32, 32, 4, 3, split_k=5)
    results = []
    for seed in range(4):
        device.options.update(seed=seed, resident=1 + 3 * seed)
        results.append(TritonBackend().run(problem, tail, config))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("split", [1, 2])
def test_persistent(check: Callable[..., None], split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_resnet.kernels import launch

    monkeypatch.setattr(launch, "sm_count", lambda device: 2)
    check(dataclasses.replace(ODD, h=23), TailConfig(64, 32, 32, 4, 3, split_k=split, persistent=True))


@pytest.mark.parametrize("case", DESCRIBED, ids=lambda case: case.name)
@pytest.mark.parametrize("device", [90], indirect=True, ids=["sm_90"])
def test_tensor_descriptors(check: Callable[..., None], case: Case) -> None:
    check(in_dtype(case.problem, torch.bfloat16), TailConfig(64, 64, 64, 4, 3, tma=True))


@pytest.mark.parametrize("device", [90], indirect=True, ids=["sm_90"])
@pytest.mark.parametrize(
    "config", [replace(c, tma=True) for c in HALF if c.k == 64] + [
        TailConfig(64, 64, 64, 4, 3, split_k=3, tma=True),
        TailConfig(64, 64, 64, 4, 3, split_k=3, ordered=False, tma=True),
        TailConfig(32, 64, 64, 4, 3, persistent=True, tma=True),
    ], ids=str,
)  # fmt: skip
def test_every_configuration_with_tensor_descriptors(
    check: Callable[..., None], config: TailConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fused_resnet.kernels import launch

    monkeypatch.setattr(launch, "sm_count", lambda device: 2)
    problem = in_dtype(DESCRIBED[0].problem, torch.float16)
    for _ in range(2 if config.split_k > 1 else 1):
        check(problem, config)


@pytest.mark.parametrize(
    "text",
    [
        "h=14,w=9,c=3,k=8,r=7,stride=2,padding=3",  # taps of a row fused: bits over rows, two-byte loads
        "h=14,w=9,c=8,k=24,r=5,padding=2",  # fused, in 16-byte copies
        "h=13,w=12,c=40,k=8,r=7,s=5,padding=3:2",  # 35 taps: no bits, no fusing
        "h=9,w=9,c=72,k=40,dilation=1:2,padding=0:2,stride=1:2",
        "h=9,w=9,c=20,k=40",  # no halo, 8-byte copies
    ],
)
def test_halo_strategies(check: Callable[..., None], text: str) -> None:
    check(Problem.parse("dtype=float16,residual=1,relu=0," + text), TailConfig(64, 32, 32, 4, 3))


def test_wide_offsets(device: Any) -> None:
    from fused_resnet.kernels.launch import BoundTail

    tail = make_tail(PROJECTED, "integers")
    bound = BoundTail(PROJECTED, tail)
    conv, proj_conv = (dataclasses.replace(c, wide=True) for c in (bound.plan.conv, bound.plan.proj_conv))
    bound.constants = (*bound.plan.sizes, conv, proj_conv, bound.plan.tile)
    assert torch.equal(bound(tail), reference(tail.to(torch.float64)).half())


@pytest.mark.parametrize("dtype", ["bfloat16", "tf32", "float32", "mixed"])
@pytest.mark.parametrize("name", ["odd", "projection_odd"])
def test_dtypes(check: Callable[..., None], name: str, dtype: str) -> None:
    problem = next(c for c in PROBLEMS if c.name == name).problem
    if dtype == "mixed":
        problem = in_dtype(problem, torch.float16, torch.float32)
    elif dtype == "tf32":
        problem = dataclasses.replace(problem, tf32=True)
    else:
        problem = in_dtype(problem, getattr(torch, dtype))
    assert why_not_problem(problem) is None
    check(problem)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_nan_and_infinity_as_in_eager(device: Any, activation: str) -> None:
    problem = dataclasses.replace(ODD, activation=activation)
    tail = make_tail(problem, "integers")
    tail.x[0, 0, 3, 2] = float("nan")
    tail.x[1, 1, 1, 1] = float("inf")
    tail.residual[2, 5] = float("-inf")
    torch.testing.assert_close(TritonBackend().run(problem, tail), reference(tail), equal_nan=True, rtol=0, atol=0)


def test_a_nan_survives_the_rounding_to_tf32(device: Any) -> None:
    """0x7fffffff is CUDA's canonical NaN: adding half a unit in the last place to its bits would make it -0."""
    problem = Problem.parse("h=4,w=4,c=16,k=8,r=1,relu=0,bn=0,dtype=tf32")
    tail = make_tail(problem, "integers")
    tail.x[0, 3, 1, 2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    got = TritonBackend().run(problem, tail)
    assert got[0, :, 1, 2].isnan().all()
    assert got.isnan().sum() == problem.k


def test_repeated_calls_take_the_fast_path(device: Any) -> None:
    """The second call with aligned tensors skips Triton's specialisation; an unaligned one must not."""
    backend, config = TritonBackend(), TailConfig(64, 32, 32, 4, 3)
    tail = make_tail(ODD, "integers")
    expected = reference(tail.to(torch.float64)).half()
    for _ in range(2):
        assert torch.equal(backend.run(ODD, tail, config), expected)
    (bound,) = backend._bound.values()
    fresh, slow_path = make_tail(ODD, "integers", seed=5), bound.kernel
    bound.kernel = None  # the fast path does without
    assert torch.equal(backend.run(ODD, fresh, config), reference(fresh.to(torch.float64)).half())
    bound.kernel = slow_path
    storage = torch.empty(tail.x.numel() + 1, dtype=torch.float16)
    n, c, h, w = tail.x.shape
    shifted = storage[1:].as_strided((n, c, h, w), tail.x.stride())
    shifted.copy_(tail.x)
    assert shifted.data_ptr() % 16
    assert torch.equal(backend.run(ODD, tail._replace(x=shifted), config), expected)
