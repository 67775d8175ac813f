"""Problem: the text form, the derived sizes and the argument checks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_resnet.core.problem import Problem, Projection, tf32_allowed
from fused_resnet.core.reference import reference
from fused_resnet.testing import PROBLEMS, RESNET_TAILS, Case, in_dtype, make_tail

PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@pytest.mark.parametrize("case", PROBLEMS, ids=[case.name for case in PROBLEMS])
def test_text_round_trip(case: Case) -> None:
    for problem in (case.problem, in_dtype(case.problem, torch.bfloat16, torch.float32)):
        assert Problem.parse(str(problem)) == problem


def test_parse_of_the_documented_form() -> None:
    problem = Problem.parse(
        "n=1,h=14,w=14,c=64,k=64,r=3,s=3,stride=1,padding=1,dilation=1,dtype=float16,residual=1,relu=1,bn=1"
    )
    assert problem == Problem(1, 14, 14, 64, 64, 3, 3, padding=(1, 1), dtype=torch.float16, residual=torch.float16)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h=4,w=4,c=4", "'k' is missing"),
        ("h=4,w=4,c=4,k=4,colour=1", "unknown field 'colour'"),
        ("h=4,w=4,c=4,k=x", "k: expected an integer, got 'x'"),
        ("h=4,w=4,c=4,k=4,stride=1:2:3", "stride: expected an integer or two"),
        ("h=4,w=4,c=4,k=4,dtype=int8", "dtype: expected one of"),
        ("h=4,w=4,c=4,k=4,activation=gelu", "activation: expected one of"),
        ("h=2,w=2,c=4,k=4", "too small for a 3x3 filter"),
        ("h=4,w=4,c=4,k=4,groups=3", "groups=3 must divide"),
        ("h=4,w=4,c=4,k=4,padding=1,residual=1,proj=4", "expected none beside a projection"),
        ("h=4,w=4,c=4,k=4,padding=1,proj=4x9x9x1", "its projection is 9x9, expected 4x4"),
        ("h=4,h=5,w=4,c=4,k=4", "'h' stands twice"),
        ("h", "expected name=value"),
    ],
)
def test_parse_errors_name_the_field(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Problem.parse(text)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=PAIR,
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=PAIR,
)
def test_output_size_is_torchs(
    size: tuple[int, int],
    window: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    problem = Problem(1, *size, 2, 3, *window, stride, padding, dilation, residual=None)
    if problem.p < 1 or problem.q < 1:
        with pytest.raises(ValueError, match="too small"):
            problem.checked()
        return
    assert tuple(reference(make_tail(problem)).shape) == problem.output_shape


def test_flops_and_bytes_by_hand() -> None:
    problem = Problem(2, 4, 4, 8, 16, 3, 3, padding=(1, 1), residual=torch.float32)
    assert problem.flops == 2 * (2 * 4 * 4) * 16 * (9 * 8)
    assert problem.compulsory_bytes == 4 * (2 * 16 * 8 + 16 * 72 + 2 * (2 * 16 * 16) + 4 * 16)
    projected = dataclasses.replace(problem, residual=None, projection=Projection(4, 8, 8, (2, 2), False, False))
    assert projected.flops == 2 * 32 * 16 * (72 + 4)
    assert projected.compulsory_bytes == 4 * (2 * 16 * 8 + 16 * 72 + 512 + 4 * 16 + 32 * 4 + 16 * 4)


def test_real_tails_count_the_blocks_of_the_networks() -> None:
    count = {name: sum(t.blocks for t in RESNET_TAILS if t.network == name) for name in ("resnet18", "resnet50")}
    assert count == {"resnet18": 8, "resnet50": 16}


def test_tf32_follows_the_new_switch_without_reading_the_old_one() -> None:
    """Once the new switch has been set, reading allow_tf32 raises; ours must not."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        conv.fp32_precision = "ieee"
        assert tf32_allowed() is False
        conv.fp32_precision = "tf32"
        assert tf32_allowed() is True
    finally:
        conv.fp32_precision = before
