"""The Triton tail in Triton's interpreter: every configuration, every problem of the conformance list, the traps.

Needs TRITON_INTERPRET=1 before the process starts. What the interpreter cannot show (layouts, pipelining, split-K's
races) is left to test_triton_ptx.py, where the compiled code runs.
"""

from __future__ import annotations

import dataclasses
import os
import re

import pytest
import torch

from fused_resnet.backends.triton import BACKEND
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import reference
from fused_resnet.kernels.config import FP32, HALF, TF32, TailConfig, candidates, why_not_tma
from fused_resnet.testing import PROBLEMS, check_tail, in_dtype, make_tail

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start"),
]
pytest.importorskip("triton")

#: Odd in every size, with a halo, several images to a tile, and neither C nor K a multiple of a vector.
ODD = Problem.parse("n=3,h=7,w=5,c=19,k=37,r=3,s=3,stride=2:1,padding=1,residual=1,relu=0")
#: One tile deep and wide enough that splits get several steps each.
DEEP = Problem.parse("n=1,h=5,w=6,c=72,k=40,r=3,s=3,padding=1,residual=1,relu=0")
PROJECTED = Problem.parse("n=2,h=5,w=4,c=24,k=33,r=3,s=3,padding=1,proj=17x9x8x2,relu=0")


def check(problem: Problem, config: TailConfig | None = None, **options: object) -> None:
    check_tail(lambda tail: BACKEND.run(problem, tail, config), problem, label=str(config), **options)


def typed(problem: Problem, family: tuple[TailConfig, ...]) -> Problem:
    if family is HALF:
        return in_dtype(problem, torch.float16)
    # tf32 is the tensor cores' business: here its tiles compute in fp32
    return problem


@pytest.mark.parametrize(
    ("family", "config"),
    [(f, c) for f in (HALF, TF32, FP32) for c in f],
    ids=lambda v: str(v) if isinstance(v, TailConfig) else "",
)
def test_every_configuration(family: tuple[TailConfig, ...], config: TailConfig) -> None:
    check(typed(ODD, family), config)
    if config.m * config.n <= 64 * 32 * config.warps:
        check(typed(PROJECTED, family), config)


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "atomic"])
@pytest.mark.parametrize("split", [2, 3, 8])
def test_split_k_leaves_a_clean_workspace(split: int, ordered: bool) -> None:
    config = TailConfig(64, 32, 32, 4, 3, split_k=split, ordered=ordered)
    for _ in range(2):  # the second launch meets what the first one left
        check(in_dtype(DEEP, torch.float16), config)
    check(in_dtype(PROJECTED, torch.float16), config)


def test_split_k_workspace_is_shared_between_problems() -> None:
    small, large = (TailConfig(m, 32, 32, 4, 3, split_k=2) for m in (64, 32))
    many = dataclasses.replace(DEEP, h=11, w=13)
    for _ in range(2):
        check(DEEP, large, kinds=("integers",))
        check(many, small, kinds=("integers",))


@pytest.mark.parametrize(
    "text",
    [
        "n=3,h=9,w=7,c=64,k=37,padding=1,residual=1",
        "n=3,h=9,w=7,c=128,k=70,r=1,residual=1",
        "n=2,h=9,w=7,c=64,k=40,r=1,stride=2:1,residual=1",
        "n=2,h=9,w=11,c=64,k=40,r=3,s=5,padding=2:1,dilation=2:1",
        "n=2,h=9,w=7,c=64,k=40,padding=1,proj=64x17x13x2",
        "n=2,h=5,w=7,c=64,k=40,r=1,proj=128x5x7x1",
    ],
)
@pytest.mark.parametrize("split", [1, 3])
def test_tensor_descriptors(text: str, split: int) -> None:
    check(Problem.parse(text + ",relu=0,dtype=float16"), TailConfig(64, 64, 64, 4, 3, split_k=split, tma=True))


@pytest.mark.parametrize(
    ("text", "capability", "sentence"),
    [
        ("h=8,w=8,c=64,k=64,padding=1,dtype=float16", 80, "compute capability 9.0 or newer, got 8.0"),
        ("h=8,w=8,c=64,k=64,padding=1,dtype=tf32", 90, "float16 and bfloat16, got float32"),
        ("h=8,w=8,c=40,k=64,padding=1,dtype=float16", 90, "multiple of 64 channels, got c=40"),
        ("h=8,w=8,c=64,k=64,padding=1,proj=24,dtype=float16", 90, "got proj c=24"),
        ("h=8,w=8,c=64,k=64,padding=1,stride=2,dtype=float16", 90, r"stride 1 .* got \(2, 2\)"),
    ],
)
def test_refusals_of_tensor_descriptors_are_sentences(text: str, capability: int, sentence: str) -> None:
    problem = Problem.parse(text)
    reason = why_not_tma(problem, capability)
    assert reason is not None
    assert re.search(sentence, reason)
    assert not any(config.tma for config in candidates(problem, capability, 132, deterministic=False))


def test_persistent_programs_take_several_tiles() -> None:
    many = dataclasses.replace(DEEP, h=13, w=15, c=8)
    config = TailConfig(32, 32, 16, 4, 3, persistent=True)
    from fused_resnet.kernels.launch import sm_count

    tiles = -(-13 * 15 // 32) * 2
    assert tiles > 2 * sm_count(torch.device("cpu"))
    check(many, config)


@pytest.mark.parametrize("case", [c for c in PROBLEMS if c.problem.groups == 1], ids=lambda c: c.name)
def test_conformance_list_in_half_precision(case) -> None:
    check(in_dtype(case.problem, torch.float16))


@pytest.mark.parametrize("name", ["odd", "projection_odd", "stem"])
@pytest.mark.parametrize(
    ("dtype", "residual"),
    [(torch.bfloat16, None), (torch.float32, None), (torch.float16, torch.float32), (torch.bfloat16, torch.float32),
     (torch.float32, torch.float16)],
)  # fmt: skip
def test_dtypes(name: str, dtype: torch.dtype, residual: torch.dtype | None) -> None:
    case = next(c for c in PROBLEMS if c.name == name)
    check(in_dtype(case.problem, dtype, residual))


@pytest.mark.parametrize(
    "text",
    [
        "h=14,w=9,c=3,k=8,r=7,stride=2,padding=3",  # taps of a row fused: bits over rows
        "h=37,w=9,c=3,k=8,r=33,s=3,padding=3:1",  # fused, too many rows for bits
        "h=13,w=12,c=40,k=8,r=7,s=5,padding=3:2",  # 35 taps: no bits, no fusing
        "h=13,w=12,c=40,k=8,r=5,s=5,padding=2,dilation=1:2",  # 25 taps in bits
        "h=9,w=9,c=5,k=8,r=3,s=3",  # fused without padding
    ],
)
def test_halo_strategies(text: str) -> None:
    check(Problem.parse("residual=1,relu=0," + text), TailConfig(32, 32, 32, 4, 3))


def test_wide_offsets() -> None:
    """Offsets of 64 bits inside a tile: forced on a small problem, since 2**31 elements do not fit this test."""
    from fused_resnet.kernels import launch

    problem = in_dtype(PROJECTED, torch.float16)
    tail = make_tail(problem, "integers")
    bound = launch.BoundTail(problem, tail)
    assert not bound.plan.conv.wide
    wide = dataclasses.replace(
        bound.plan,
        conv=dataclasses.replace(bound.plan.conv, wide=True),
        proj_conv=dataclasses.replace(bound.plan.proj_conv, wide=True),
    )
    bound.constants = (*wide.sizes, wide.conv, wide.proj_conv, wide.tile)
    assert torch.equal(bound(tail), reference(tail.to(torch.float64)).half())


@pytest.mark.parametrize("activation", ["relu", "relu6", "none"])
def test_nan_and_infinity_as_in_eager(activation: str) -> None:
    problem = dataclasses.replace(ODD, activation=activation)
    tail = make_tail(problem, "integers")
    tail.x[0, 0, 3, 2] = float("nan")
    tail.x[1, 1, 1, 1] = float("inf")
    tail.residual[2, 5] = float("-inf")
    tail.residual[2, 6] = float("nan")
    expected = reference(tail)
    assert torch.equal(torch.isnan(BACKEND.run(problem, tail)), torch.isnan(expected))
    torch.testing.assert_close(BACKEND.run(problem, tail), expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["nchw", "expanded", "strided", "aliased"])
def test_strides_of_the_inputs(layout: str) -> None:
    problem = Problem.parse("n=2,h=6,w=6,c=16,k=16,padding=1,residual=1")
    tail = make_tail(problem, "integers")
    if layout == "nchw":
        tail = tail._replace(x=tail.x.contiguous(), residual=tail.residual.contiguous())
    elif layout == "expanded":
        tail = tail._replace(residual=tail.residual[:1, :, :1].expand(2, 16, 6, 6))
    elif layout == "strided":
        tail = tail._replace(residual=torch.stack([tail.residual, tail.residual + 1], -1)[..., 0])
        padded = torch.zeros(2, 16, 8, 9).contiguous(memory_format=torch.channels_last)
        padded[:, :, 1:7, 2:8] = tail.x
        tail = tail._replace(x=padded[:, :, 1:7, 2:8])
    else:
        tail = tail._replace(residual=tail.x)
    kept = tail.residual.clone()
    got = BACKEND.run(problem, tail)
    expected = reference(tail)
    assert torch.equal(got, expected)
    assert got.stride() == expected.stride()
    assert torch.equal(tail.residual, kept)


def test_vectors_that_are_views() -> None:
    problem = Problem.parse("h=5,w=5,c=8,k=8,padding=1,residual=1,bias=1")
    tail = make_tail(problem, "integers")
    vectors = {name: v for name, v in tail.conv._asdict().items() if getattr(v, "ndim", 0) == 1}
    spread = {name: torch.stack([v, v + 1], 1)[:, 0] for name, v in vectors.items()}
    assert all(not v.is_contiguous() for v in spread.values())
    assert torch.equal(BACKEND.run(problem, tail._replace(conv=tail.conv._replace(**spread))), reference(tail))


@pytest.mark.xfail(strict=False, reason="Triton 3.8's interpreter computes bf16 dots wrongly; fixed when this passes")
def test_canary_bf16_dot() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def square(a_ptr, out_ptr):
        i = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        a = tl.load(a_ptr + i)
        tl.store(out_ptr + i, tl.dot(a, a))

    a = torch.randint(-3, 4, (16, 16)).bfloat16()
    out = torch.empty(16, 16)
    square[(1,)](a, out)
    assert torch.equal(out, a.float() @ a.float())
