"""The tuner on real Triton configurations, run by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet import backends
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import TailArguments
from fused_resnet.selection import verify
from fused_resnet.selection.candidates import Candidate, of_backend
from fused_resnet.selection.search import tune_call
from tests.support.tuning_fakes import CPU, call_for, clock, store_in

pytestmark = pytest.mark.interpreter

PROBLEM = Problem.parse("n=1,h=5,w=4,c=17,k=19,padding=1,dtype=float16,residual=1")
LIMIT = 3


@pytest.fixture
def miscompiled(monkeypatch: pytest.MonkeyPatch) -> str:
    """The preferred configuration loses the last channel, as a wrong mask would."""
    triton = backends.get("triton")
    victim = of_backend("triton", PROBLEM, CPU)[0]
    bind = triton.bind

    def broken(problem: Problem, tail: TailArguments, configuration: Any = None) -> Callable[[TailArguments], Tensor]:
        run = bind(problem, tail, configuration)
        if configuration != victim.configuration:
            return run
        return lambda tail: run(tail._replace(conv=tail.conv._replace(weight=tail.conv.weight * _without_last())))

    monkeypatch.setattr(triton, "bind", broken)
    return victim.name


def _without_last() -> Tensor:
    keep = torch.ones(1, PROBLEM.c, 1, 1, dtype=PROBLEM.dtype)
    keep[:, -1] = 0
    return keep


def test_configurations_have_names_of_their_own() -> None:
    for problem in (PROBLEM, Problem.parse("n=8,h=14,w=14,c=256,k=256,padding=1,dtype=float16,proj=128x28x28x2")):
        names = [candidate.name for candidate in of_backend("triton", problem, CPU)]
        assert len(names) > LIMIT
        assert len(set(names)) == len(names)


def test_right_configurations_pass_and_a_miscompiled_one_does_not(miscompiled: str, tmp_path: Path) -> None:
    store = store_in(tmp_path)
    result = tune_call(call_for(PROBLEM), CPU, store, timer=clock, rounds=1, limit=LIMIT)
    assert list(result.rejected) == [miscompiled]
    assert result.rejected[miscompiled].startswith("wrong: ")
    assert "outputs differ on small integers" in result.rejected[miscompiled]
    timed = [name for name in result.medians if name.startswith("triton")]
    assert len(timed) == LIMIT - 1
    assert "two_pass" in result.medians


def test_a_bound_configuration_is_the_one_that_runs() -> None:
    """Every candidate computes the call, also a projection, from the tensors that the tuner makes."""
    problem = Problem.parse("n=1,h=4,w=4,c=8,k=12,padding=1,dtype=bfloat16,proj=8x7x7x2")
    for candidate in [*of_backend("triton", problem, CPU)[:2], Candidate("two_pass")]:
        assert verify.mismatch(candidate, call_for(problem), CPU) is None
