"""The tail operators as PyTorch sees them: opcheck, memory formats, aliasing, errors, transforms, NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_resnet import backends, functional
from fused_resnet.core.layout import looks_channels_last, output_memory_format
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import TailArguments, reference
from fused_resnet.testing import PROBLEMS, call_arguments, make_tail
from tests.support import toolchain

BY_NAME = {case.name: case.problem for case in PROBLEMS}
CPU_BACKENDS = ["eager", "cpu"]
SMALL = Problem.parse("n=2,h=5,w=4,c=3,k=4,padding=1,residual=1")
SMALL_PROJECTED = Problem.parse("n=2,h=3,w=4,c=3,k=4,padding=1,proj=2x5x7x2,bias=1,proj_bias=1")


def call(backend: str = "auto", **arguments: Any) -> Tensor:
    if "proj_x" in arguments:
        return functional.conv_bn_proj_add_relu(**arguments, backend=backend)
    return functional.conv_bn_add_relu(**arguments, backend=backend)


def needs(backend: str, problem: Problem) -> None:
    why_not = backends.get(backend).can_run(problem)
    if why_not:
        pytest.skip(why_not)


def positional(tail: TailArguments, backend: str) -> tuple[Any, tuple[Any, ...]]:
    """The operator and its positional arguments, as opcheck wants them."""
    geometry = (tail.stride, tail.padding, tail.dilation, tail.groups)
    if tail.proj is None:
        op = torch.ops.fused_resnet.conv_bn_add_relu.default
        return op, (tail.x, *tail.conv, tail.residual, *geometry, tail.activation, backend)
    op = torch.ops.fused_resnet.conv_bn_proj_add_relu.default
    return op, (tail.x, *tail.conv, *geometry, tail.proj_x, *tail.proj, tail.proj_stride, tail.activation, backend)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "grad"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    "name", ["odd", "no_residual", "no_bn", "asymmetric", "relu6", "projection_odd", "empty_batch", "1x1_pixel"]
)
def test_opcheck(name: str, backend: str, requires_grad: bool) -> None:
    problem = BY_NAME[name]
    needs(backend, problem)
    tail = make_tail(problem)
    op, arguments = positional(tail, backend)
    if requires_grad:
        running = [tail.conv.running_mean, tail.conv.running_var]
        if tail.proj is not None:
            running += [tail.proj.running_mean, tail.proj.running_var]
        for t in arguments:
            if isinstance(t, Tensor) and not any(t is r for r in running):
                t.requires_grad_()
    torch.library.opcheck(op, arguments)


# ---- memory formats ----------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(shape=st.tuples(*(st.integers(0, 3) for _ in range(4))), order=st.permutations(range(4)))
def test_looks_channels_last_is_torchs_rule(shape: tuple[int, ...], order: list[int]) -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11) and 1 in shape:
        pytest.skip("torch 2.10 states another rule for dimensions of size 1, whose strides mean nothing")
    t = torch.empty([shape[i] for i in order]).permute([order.index(i) for i in range(4)])
    expected = torch._prims_common.suggest_memory_format(t) == torch.channels_last
    assert looks_channels_last(t.shape, t.stride()) == expected


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("weight_last", [False, True])
@pytest.mark.parametrize("name", ["odd", "1x1", "one_channel", "1x1_pixel", "no_bn", "stride2", "projection"])
def test_output_memory_format_is_eagers(name: str, x_last: bool, weight_last: bool, backend: str) -> None:
    problem = BY_NAME[name]
    needs(backend, problem)
    formats = {False: torch.contiguous_format, True: torch.channels_last}
    tail = make_tail(problem)
    weight = tail.conv.weight.contiguous(memory_format=formats[weight_last])
    tail = tail._replace(x=tail.x.contiguous(memory_format=formats[x_last]), conv=tail.conv._replace(weight=weight))
    got = call(backend, **call_arguments(tail))
    convolved = torch.nn.functional.conv2d(tail.x, weight, None, tail.stride, tail.padding, tail.dilation, tail.groups)
    promised = torch.empty(got.shape, memory_format=output_memory_format(tail.x, weight))
    # the stride of a dimension of size 1 means nothing, and eager itself is not consistent about it
    for i, size in enumerate(got.shape):
        assert size == 1 or got.stride(i) == convolved.stride(i) == promised.stride(i)


# ---- strides and aliasing of the residual --------------------------------------------------------------------

RESIDUAL_VIEWS: dict[str, Callable[[TailArguments, Tensor], Tensor]] = {
    "nchw": lambda tail, r: r.contiguous(),
    "sliced": lambda tail, r: torch.cat([r, r], dim=1)[:, ::2],
    "expanded": lambda tail, r: r[:, :, :1, :1].expand_as(r),
    "transposed": lambda tail, r: r.transpose(2, 3),
    "is_x": lambda tail, r: tail.x,
    "view_of_x": lambda tail, r: tail.x.transpose(2, 3),
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("view", RESIDUAL_VIEWS)
def test_residual_may_have_any_strides_and_may_be_x(view: str, backend: str) -> None:
    problem = Problem.parse("n=2,h=6,w=6,c=8,k=8,padding=1,residual=1")
    needs(backend, problem)
    tail = make_tail(problem)
    assert tail.residual is not None
    residual = RESIDUAL_VIEWS[view](tail, tail.residual)
    tail = tail._replace(residual=residual)
    x_before, residual_before = tail.x.clone(), residual.clone()
    got = call(backend, **call_arguments(tail))
    torch.testing.assert_close(got.double(), reference(tail.to(torch.float64)), rtol=1e-5, atol=1e-5)
    assert torch.equal(tail.x, x_before), "x was written to"
    assert torch.equal(residual, residual_before), "the residual was written to"
    owners = {t.untyped_storage().data_ptr() for t in (tail.x, residual)}
    assert got.untyped_storage().data_ptr() not in owners, "the output shares memory with an argument"


# ---- errors --------------------------------------------------------------------------------------------------


def _arguments(**changes: Any) -> dict[str, Any]:
    return call_arguments(make_tail(SMALL)) | changes


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": torch.zeros(3, 5, 4)}, ValueError, "x: expected 4 dimensions, got 3"),
        ({"x": torch.zeros(2, 3, 5, 4, dtype=torch.int32)}, TypeError, "x: expected dtype"),
        ({"weight": torch.zeros(4, 2, 3, 3)}, ValueError, "weight: expected"),
        ({"weight": torch.zeros(4, 3, 3, 3).half()}, TypeError, "weight: expected dtype float32"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias: expected shape \[4\]"),
        ({"running_mean": torch.zeros(1)}, ValueError, r"running_mean: expected shape \[4\]"),
        ({"running_var": None}, ValueError, "running_mean and running_var: expected both or neither"),
        ({"running_mean": None, "running_var": None}, ValueError, "bn_weight and bn_bias: expected None"),
        ({"bn_weight": torch.zeros(4).half()}, TypeError, "bn_weight: expected dtype float32, got float16"),
        ({"eps": -1.0}, ValueError, "eps: expected a number >= 0"),
        ({"residual": torch.zeros(2, 4, 1, 1)}, ValueError, r"residual: expected shape \[2, 4, 5, 4\]"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"stride": "2"}, TypeError, "stride: expected an int or a pair"),
        ({"padding": -1}, ValueError, "padding must be at least 0"),
        ({"groups": 2}, ValueError, "weight: expected"),
        ({"groups": 0}, ValueError, "weight: expected"),
        ({"activation": "gelu"}, ValueError, "activation: expected one of"),
        ({"winograd": "f6"}, ValueError, "winograd: expected"),
        ({"padding": 0, "dilation": 3}, ValueError, "too small"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], words: str, backend: str) -> None:
    with pytest.raises(error, match=words):
        call(backend, **_arguments(**changes))


def test_unknown_backend_and_backends_that_cannot_run() -> None:
    with pytest.raises(ValueError, match="backend: expected 'auto' or one of"):
        call("tpu", **_arguments())
    for name, why_not in backends.reasons(SMALL).items():
        if why_not is not None:
            assert why_not.startswith(f"{name}: ")
            assert "\n" not in why_not
            with pytest.raises(RuntimeError) as caught:
                call(name, **_arguments())
            assert str(caught.value) == why_not


def test_projection_errors() -> None:
    arguments = call_arguments(make_tail(SMALL_PROJECTED))
    with pytest.raises(ValueError, match="proj_weight: expected"):
        call(**(arguments | {"proj_weight": torch.zeros(4, 2, 3, 3)}))
    with pytest.raises(ValueError, match="proj_x: expected batch size 2, got 1"):
        call(**(arguments | {"proj_x": arguments["proj_x"][:1]}))
    with pytest.raises(ValueError, match="proj_x: its projection is"):
        call(**(arguments | {"proj_stride": 1}))


def test_arguments_are_checked_again_after_a_good_call() -> None:
    """The checks are kept per signature; a later call with one wrong vector must not slip through."""
    call(**_arguments())
    with pytest.raises(ValueError, match="bn_bias"):
        call(**_arguments(bn_bias=torch.zeros(7)))
    with pytest.raises(ValueError, match="eps"):
        call(**_arguments(eps=-1e-5))


# ---- transforms ----------------------------------------------------------------------------------------------


def test_vmap_is_right() -> None:
    tail = make_tail(SMALL)
    batch = torch.stack([tail.x, tail.x * 2])
    mapped = torch.vmap(lambda x: call(**(call_arguments(tail) | {"x": x})))(batch)
    for got, x in zip(mapped, batch, strict=True):
        torch.testing.assert_close(got, call(**(call_arguments(tail) | {"x": x})))


def _dual(loss: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        loss(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "grad": lambda loss, x: torch.func.grad(loss)(x),
    "jvp": lambda loss, x: torch.func.jvp(loss, (x,), (x,)),
    "dual": _dual,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_other_transforms_raise_rather_than_being_wrong(transform: str) -> None:
    arguments = _arguments()

    def loss(x: Tensor) -> Tensor:
        return call(**(arguments | {"x": x})).sum()

    with pytest.raises((RuntimeError, NotImplementedError)):
        TRANSFORMS[transform](loss, arguments["x"])


@pytest.mark.slow
@pytest.mark.skipif(toolchain.why_not("g++") is not None, reason="Inductor needs g++")
def test_torch_compile_fullgraph_with_dynamic_batch() -> None:
    arguments = _arguments(residual=None)

    def model(x: Tensor) -> Tensor:
        return call("eager", **(arguments | {"x": x})) * 2

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for n in (2, 3):
        x = torch.randn(n, *arguments["x"].shape[1:])
        torch.testing.assert_close(compiled(x), model(x))


# ---- NaN and Inf ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nan_and_inf_come_through_as_in_eager(backend: str, value: float) -> None:
    needs(backend, BY_NAME["odd"])
    tail = make_tail(BY_NAME["odd"])
    assert tail.residual is not None
    tail.x[0, 3, 4, 4] = value
    tail.residual[1, 0, 0, 0] = value
    got = functional.conv_bn_add_relu(**call_arguments(tail), backend=backend, winograd="off")
    expected = reference(tail)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())
