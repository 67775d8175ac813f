"""Backend ``cudnn``: its refusals anywhere; its results, and the traps of cuDNN's operator, on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fused_resnet import backends
from fused_resnet.backends import cudnn
from fused_resnet.problem import Problem
from fused_resnet.reference import Tail, reference
from fused_resnet.testing import PROBLEMS, Case, check_tail, in_dtype, make_tail

BACKEND = backends.get("cudnn")


def run(tail: Tail) -> Tensor:
    return BACKEND.run(Problem.from_tail(tail), tail)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("device=cpu", "cudnn: device must be cuda, got cpu"),
        ("device=cuda,dtype=float64", "cudnn: dtype must be float32, float16 or bfloat16, got float64"),
        ("device=cuda,activation=relu6", "cudnn: activation must be relu, got relu6"),
        (
            "device=cuda,dtype=float16,residual=float32",
            "cudnn: residual must have the dtype of x, float16, got float32",
        ),
    ],
)
def test_refusals(text: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert BACKEND.can_run(Problem.parse(f"h=8,w=8,c=16,k=16,padding=1,{text}")) == sentence


def test_it_runs_what_it_does_not_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that reach cuDNN, on the CPU with its operator replaced: z never shares memory with x."""
    calls: list[tuple[Tensor, Tensor]] = []

    class Stub:
        @staticmethod
        def default(
            x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor | None, *geometry: object
        ) -> Tensor:
            calls.append((x, z))
            assert alpha == 1.0
            assert not cudnn._share_memory(x, z)
            assert z.is_contiguous(memory_format=torch.channels_last)
            y = torch.ops.aten.convolution(x, weight, bias, *geometry[:3], False, [0, 0], geometry[3])
            return (y + z).relu()

    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_add_relu", Stub, raising=False)
    for text in ("padding=1", "padding=1,groups=2"):
        tail = make_tail(Problem.parse(f"n=2,h=8,w=8,c=16,k=16,{text}"), "integers")
        tail = tail._replace(residual=tail.x)
        assert torch.equal(run(tail).double(), reference(tail.to(torch.float64)))
    check_tail(run, Problem.parse("n=2,h=8,w=8,c=16,k=16,padding=1,proj=8"))
    assert calls


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", PROBLEMS, ids=[case.name for case in PROBLEMS])
def test_numerical_bar(case: Case, dtype: torch.dtype) -> None:
    problem = dataclasses.replace(in_dtype(case.problem, dtype), device_type="cuda")
    why_not = BACKEND.can_run(problem)
    if why_not is not None or not problem.n:
        pytest.skip(str(why_not))
    check_tail(run, problem, kinds=("random",), device="cuda")


@pytest.mark.gpu
def test_residual_may_be_x_itself() -> None:
    tail = make_tail(Problem.parse("n=2,h=8,w=8,c=32,k=32,padding=1,dtype=float16"), device="cuda")
    assert torch.equal(run(tail._replace(residual=tail.x)), run(tail._replace(residual=tail.x.clone())))
