"""Gradients of the tail operators (BN with running statistics) and autocast."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet import backends, functional
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import reference
from fused_resnet.testing import PROBLEMS, Case, assert_gradients, call_arguments, in_dtype, make_tail

BY_NAME = {case.name: case.problem for case in PROBLEMS}
SMALL = Problem.parse("n=2,h=5,w=4,c=3,k=4,padding=1,residual=1,dtype=float64")
SMALL_PROJECTED = Problem.parse("n=2,h=3,w=4,c=3,k=4,padding=1,proj=2x5x7x2,bias=1,proj_bias=1,dtype=float64")
BN_FIELDS = ("bn_weight", "bn_bias", "running_mean", "running_var")


def call(backend: str = "auto", **arguments: Any) -> Tensor:
    if "proj_x" in arguments:
        return functional.conv_bn_proj_add_relu(**arguments, backend=backend)
    return functional.conv_bn_add_relu(**arguments, backend=backend)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("case", PROBLEMS, ids=[case.name for case in PROBLEMS])
def test_gradients_obey_the_bar(case: Case, backend: str) -> None:
    why_not = backends.get(backend).can_run(case.problem)
    if why_not:
        pytest.skip(why_not)
    assert_gradients(lambda **arguments: call(backend, **arguments), case.problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["odd", "projection", "1x1"])
def test_gradients_obey_the_bar_in_16_bits(name: str, dtype: torch.dtype) -> None:
    assert_gradients(call, in_dtype(BY_NAME[name], dtype))


@pytest.mark.parametrize("activation", ["relu", "relu6", "none"])
@pytest.mark.parametrize("problem", [SMALL, SMALL_PROJECTED], ids=["residual", "projection"])
def test_gradcheck_and_gradgradcheck(problem: Problem, activation: str) -> None:
    arguments = call_arguments(make_tail(dataclasses.replace(problem, activation=activation)))
    names = [n for n, t in arguments.items() if isinstance(t, Tensor) and "running" not in n]

    def fn(*tensors: Tensor) -> Tensor:
        return call("eager", **(arguments | dict(zip(names, tensors, strict=True))))

    leaves = tuple(arguments[name].detach().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(fn, leaves)
    assert torch.autograd.gradgradcheck(fn, leaves)


def test_gradient_passes_where_the_output_is_nan_as_in_eager() -> None:
    tail = make_tail(BY_NAME["odd"])
    tail.x[0, 0, 0, 0] = torch.nan
    assert tail.residual is not None
    grads = []
    for fn in (lambda t: call("eager", **call_arguments(t)), reference):
        residual = tail.residual.clone().requires_grad_()
        fn(tail._replace(residual=residual)).sum().backward()
        grads.append(residual.grad)
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["odd", "projection_odd"])
def test_autocast_casts_to_the_active_dtype_and_leaves_bn(name: str, dtype: torch.dtype) -> None:
    tail = make_tail(BY_NAME[name])
    with torch.autocast("cpu", dtype):
        got = call("eager", **call_arguments(tail))
    assert got.dtype == dtype
    half = tail.to(dtype)
    half = half._replace(conv=half.conv._replace(**{f: getattr(tail.conv, f) for f in BN_FIELDS}))
    if tail.proj is not None and half.proj is not None:
        half = half._replace(proj=half.proj._replace(**{f: getattr(tail.proj, f) for f in BN_FIELDS}))
    assert torch.equal(got, call("eager", **call_arguments(half)))


def test_autocast_gradients_reach_float32_leaves() -> None:
    tail = make_tail(BY_NAME["odd"])
    weight = tail.conv.weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = call("eager", **call_arguments(tail))
    out.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone() -> None:
    tail = make_tail(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        assert call("eager", **call_arguments(tail)).dtype == torch.float64
