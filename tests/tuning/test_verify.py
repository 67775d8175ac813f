"""Verification: wrong candidates are found out, on tensors like those of a call."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import TailArguments, reference
from fused_resnet.selection import verify
from fused_resnet.selection.calls import Call
from fused_resnet.selection.candidates import Candidate
from fused_resnet.testing import PROBLEMS, in_dtype, make_tail
from tests.support.tuning_fakes import (
    CPU,
    PROBLEM,
    Configuration,
    call_for,
    install,
    right,
    shifted,
)


def _last_image(tail: TailArguments) -> Tensor:
    y = right(tail)
    y[-1, -1, -1, -1] += 1
    return y


def _residual_after_relu(tail: TailArguments) -> Tensor:
    return right(tail._replace(residual=None)) + tail.residual


def _nan(tail: TailArguments) -> Tensor:
    y = right(tail)
    y[0, 0, 0, 0] = torch.nan
    return y


WRONG = {
    "shifted": shifted,
    "one_output": _last_image,
    "add_after_relu": _residual_after_relu,
    "no_eps": lambda tail: right(tail._replace(conv=tail.conv._replace(eps=1e-300))),  # torch 2.11 takes no zero
    "nan": _nan,
    "coarse": lambda tail: right(tail) * (1 + 1e-3),
    "half": lambda tail: right(tail).half(),
    "shape": lambda tail: right(tail)[:, :-1],
    "zeros": lambda tail: torch.zeros_like(right(tail)),
}


@pytest.mark.parametrize("run", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_candidate_is_found_out(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    install(monkeypatch, Configuration("a", run))
    assert verify.mismatch(Candidate("fake", Configuration("a", run)), call_for(), CPU) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["odd", "projection_odd", "no_bn", "relu6", "asymmetric", "1x1_pixel", "many_images"])
def test_a_right_candidate_passes(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    install(monkeypatch, Configuration("a"))
    problem = in_dtype(next(case.problem for case in PROBLEMS if case.name == name), dtype)
    assert verify.mismatch(Candidate("fake", Configuration("a")), call_for(problem), CPU) is None


def test_eager_itself_meets_the_bar() -> None:
    for dtype in (torch.float32, torch.float16):
        assert verify.mismatch(Candidate("eager"), call_for(in_dtype(PROBLEM, dtype)), CPU) is None


def test_images_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong image is found wherever the parts are cut, and the reference never sees more than a part."""
    problem = dataclasses.replace(PROBLEM, n=7)
    monkeypatch.setattr(verify, "_CHUNK_BYTES", 8 * 2 * (4 + 8) * 6 * 5)  # two images at a time
    seen: list[int] = []

    def counting(tail: TailArguments) -> Tensor:
        seen.append(tail.x.shape[0])
        return reference(tail.to(torch.float64))

    monkeypatch.setattr(verify, "_exact", counting)
    install(monkeypatch, Configuration("last", _last_image), Configuration("right"))
    assert verify.mismatch(Candidate("fake", Configuration("right")), call_for(problem), CPU) is None
    assert set(seen) == {1, 2}
    assert verify.mismatch(Candidate("fake", Configuration("last", _last_image)), call_for(problem), CPU) is not None


# ---- tensors like those of a call ----------------------------------------------------------------------------


def _tails() -> dict[str, TailArguments]:
    tail = make_tail(PROBLEM)
    unaligned = torch.empty(1 + tail.x.numel())[1:].as_strided(tail.x.shape, tail.x.stride()).copy_(tail.x)
    return {
        "dense": tail,
        "nchw_residual": tail._replace(residual=tail.residual.contiguous()),
        "strided_x": tail._replace(x=torch.zeros(2, 8, 6, 5)[:, ::2]),
        "expanded_residual": tail._replace(residual=torch.zeros(1, 8, 1, 1).expand(2, 8, 6, 5)),
        "unaligned_x": tail._replace(x=unaligned),
        "plain_bn": tail._replace(conv=tail.conv._replace(bn_weight=None, bn_bias=None)),
        "strided_bn": tail._replace(conv=tail.conv._replace(running_mean=torch.zeros(16)[::2])),
        "half_bn": make_tail(in_dtype(PROBLEM, torch.float16))._replace(
            conv=make_tail(in_dtype(PROBLEM, torch.float16)).conv.to(torch.float16)
        ),
        "projection": make_tail(Problem.parse("n=1,h=3,w=4,c=3,k=4,padding=1,proj=2x5x7x2,proj_bias=1")),
    }


@pytest.mark.parametrize("name", _tails().keys())
def test_synthesised_tensors_are_like_the_calls(name: str) -> None:
    tail = _tails()[name]
    call = Call.of(Problem.from_tail(tail), tail)
    for kind in ("integers", "random"):
        made = call.tail(kind, 0, CPU)  # type: ignore[arg-type]
        assert Call.of(Problem.from_tail(made), made) == call
        assert torch.isfinite(right(made)).all()


def test_keys_tell_calls_apart_and_stay_readable() -> None:
    keys = {name: Call.of(Problem.from_tail(tail), tail).key for name, tail in _tails().items()}
    assert len(set(keys.values())) == len(keys)
    assert keys["dense"] == str(PROBLEM)
    assert keys["nchw_residual"] == f"{PROBLEM}|residual:nchw"


@pytest.mark.parametrize("name", _tails().keys())
def test_a_call_survives_json(name: str) -> None:
    tail = _tails()[name]
    call = Call.of(Problem.from_tail(tail), tail)
    assert Call.from_json(call.as_json()) == call
