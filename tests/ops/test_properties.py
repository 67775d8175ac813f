"""The operator over random shapes (hypothesis): whatever the geometry, the bar holds and the output is as promised."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fused_resnet import backends, functional
from fused_resnet.core.packed_weights import PackedWeights
from fused_resnet.core.problem import Problem, Projection
from fused_resnet.testing import call_arguments, check_tail


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Small problems of any geometry, with and without each option."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    window = draw(st.sampled_from([(3, 3), (1, 1), (3, 1), (2, 3), (5, 5)]))
    add = draw(st.sampled_from(["residual", "projection", "nothing"]))
    problem = Problem(
        draw(st.integers(0, 3)),
        *draw(pairs(1, 12)),
        groups * draw(st.integers(1, 20)),
        groups * draw(st.integers(1, 20)),
        *window,
        stride=draw(pairs(1, 3)),
        padding=draw(pairs(0, 3)),
        dilation=draw(pairs(1, 2)),
        groups=groups,
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        bias=draw(st.booleans()),
        bn=draw(st.booleans()),
        activation=draw(st.sampled_from(["relu", "none", "relu6"])),
        channels_last=draw(st.booleans()),
    )
    assume(problem.p >= 1 and problem.q >= 1)
    if add == "residual":
        return dataclasses.replace(problem, residual=draw(st.sampled_from([problem.dtype, torch.float32])))
    if add == "projection":
        stride = draw(pairs(1, 2))
        size = [
            (n - 1) * step + 1 + draw(st.integers(0, step - 1))
            for n, step in zip((problem.p, problem.q), stride, strict=True)
        ]
        projection = Projection(draw(st.integers(1, 9)), *size, stride, draw(st.booleans()), problem.bn)
        return dataclasses.replace(problem, projection=projection)
    return problem


@pytest.mark.parametrize("backend", ["cpu", "auto"])
@settings(max_examples=60, deadline=None)
@given(problem=problems(), winograd=st.sampled_from(["f2", "off"]), kept=st.booleans())
def test_the_bar_holds(backend: str, problem: Problem, winograd: str, kept: bool) -> None:
    assert Problem.parse(str(problem)) == problem
    chosen = backends.choose(problem, backend) if backend == "auto" else backends.get(backend)
    assume(chosen.can_run(problem) is None)
    # eager rounds between its steps; whatever rounds once is bit-exact on integers in 16 bits, too
    rounds_once = chosen.name != "eager" or problem.dtype is torch.float32
    call = functional.conv_bn_add_relu if problem.projection is None else functional.conv_bn_proj_add_relu
    weights = PackedWeights() if kept else None  # with it the CPU's own kernels run

    check_tail(
        lambda tail: call(**call_arguments(tail), backend=backend, winograd=winograd, packed_weights=weights),
        problem,
        kinds=("integers", "random") if rounds_once else ("random",),
        any_order=chosen.name == "cpu",  # weights that may not be kept: oneDNN adds up, in an order of its own
    )
