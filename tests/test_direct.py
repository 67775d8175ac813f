"""The direct path: a repeated call skips the dispatcher, and only where the dispatcher would do nothing.

Twice: found in Python, as on a GPU, and by the extension, which also runs it (csrc/repeat.cpp).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet import _extension, functional
from fused_resnet.ops import direct, plans
from fused_resnet.problem import Problem
from fused_resnet.reference import Tail, reference
from fused_resnet.testing import assert_bitexact, call_arguments, make_tail

PROBLEM = Problem.parse("n=1,h=5,w=4,c=3,k=4,padding=1,residual=1,bias=1,bn=1")
PROJECTED = Problem.parse("n=1,h=3,w=4,c=3,k=4,padding=1,proj=2x5x7x2,proj_bias=1")
CACHED = Problem.parse("n=1,h=5,w=4,c=32,k=32,padding=1,residual=1,bias=1,bn=1")


class Watched:
    """Calls the function on a tail and says whether the dispatcher was passed by."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, extension: bool) -> None:
        self.extension, self.problem = extension, CACHED if extension else PROBLEM
        self.found = 0
        find = direct.find

        def counting(tail: Tail, backend: str) -> Any:
            run = find(tail, backend)
            self.found += run is not None and not extension
            return run

        monkeypatch.setattr(direct, "find", counting)

    def __call__(self, tail: Tail, **options: Any) -> tuple[Tensor, bool]:
        before, repeat = self.found, direct.repeat
        function = functional.conv_bn_add_relu if tail.proj is None else functional.conv_bn_proj_add_relu

        def counting(*arguments: Any) -> Tensor | None:
            y = None if repeat is None else repeat(*arguments)
            self.found += y is not None
            return y

        direct.repeat = counting
        try:
            y = function(**call_arguments(tail), **{"cache_weights": self.extension, **options})
        finally:
            if direct.repeat is counting:  # else a call was remembered
                direct.repeat = repeat
        return y, self.found > before


@pytest.fixture(params=["python", "extension"])
def watched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Watched:
    extension = request.param == "extension"
    if extension and _extension.cpu() is None:
        pytest.skip(str(_extension.why_not_cpu()))
    plans.clear()
    return Watched(monkeypatch, extension)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("projected", [False, True], ids=["residual", "projection"])
def test_the_third_call_is_direct(watched: Watched, projected: bool, mode: Callable[..., Any]) -> None:
    if projected and watched.extension:
        pytest.skip("the extension repeats calls of conv_bn_add_relu")
    tail = make_tail(PROJECTED if projected else watched.problem, "integers")
    exact = reference(tail.to(torch.float64))
    with mode():
        calls = [watched(tail) for _ in range(4)]
    # the first makes the plan, the second proves that the signature comes again
    assert [was_direct for _, was_direct in calls] == [False, False, True, True]
    for y, _ in calls:
        assert_bitexact(y, exact, "direct")


def test_one_tensor_in_two_places(watched: Watched) -> None:
    tail = make_tail(dataclasses.replace(watched.problem, k=watched.problem.c), "integers")
    with torch.inference_mode():
        for _ in range(4):
            y, _ = watched(tail._replace(residual=tail.x))
    assert_bitexact(y, reference(tail._replace(residual=tail.x).to(torch.float64)), "x is its own residual")


def test_with_gradients_the_dispatcher_is_asked(watched: Watched) -> None:
    tail = make_tail(watched.problem)
    tail.conv.weight.requires_grad_()
    for _ in range(4):
        y, was_direct = watched(tail)
        assert not was_direct
        assert y.requires_grad


def test_shapes_without_end_leave_nothing_behind(watched: Watched) -> None:
    with torch.inference_mode():
        for height in range(5, 25):
            watched(make_tail(dataclasses.replace(watched.problem, h=height)))
    assert not direct._entries


# ---- a call that differs from the remembered one in a single thing -----------------------------------------


def _vector(field: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tail], Tail]:
    def apply(tail: Tail) -> Tail:
        vector = getattr(tail.conv, field)
        vector.data = change(vector.data)  # the same object with other contents, as .half() or an optimizer leaves it
        return tail

    return apply


def _weight_channels_last(tail: Tail) -> Tail:
    tail.conv.weight.data = tail.conv.weight.data.contiguous(memory_format=torch.contiguous_format)
    return tail


CHANGES: dict[str, Callable[[Tail], Tail]] = {
    "x_strides": lambda tail: tail._replace(x=tail.x.contiguous(memory_format=torch.contiguous_format)),
    "x_strided": lambda tail: tail._replace(x=tail.x.repeat(1, 1, 1, 2)[..., ::2]),
    "x_negative": lambda tail: tail._replace(x=torch._neg_view(-tail.x)),
    "x_batch": lambda tail: tail._replace(x=tail.x.repeat(2, 1, 1, 1), residual=tail.residual.repeat(2, 1, 1, 1)),
    "residual_strides": lambda tail: tail._replace(residual=tail.residual.transpose(2, 3).contiguous().transpose(2, 3)),
    "residual_absent": lambda tail: tail._replace(residual=None),
    "residual_dtype": lambda tail: tail._replace(residual=tail.residual.double()),
    "weight_strides": _weight_channels_last,
    "bias_absent": lambda tail: tail._replace(conv=tail.conv._replace(bias=None)),
    "gamma_strides": _vector("bn_weight", lambda t: t.repeat_interleave(3)[::3]),
    "mean_other": _vector("running_mean", lambda t: t + 1),
    "eps": lambda tail: tail._replace(conv=tail.conv._replace(eps=4.0)),
    "activation": lambda tail: tail._replace(activation="none"),
    "padding": lambda tail: tail._replace(padding=(2, 2), residual=None),
    "double": lambda tail: tail.to(torch.float64),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_one_difference(watched: Watched, change: Callable[[Tail], Tail]) -> None:
    with torch.inference_mode():
        tail = make_tail(watched.problem, "integers")
        for _ in range(3):
            watched(tail)
        assert direct._entries
        changed = change(tail)
        y, _ = watched(changed)
        torch.testing.assert_close(y, reference(changed.to(torch.float64)).to(y.dtype))
        assert y.dtype == torch.promote_types(changed.x.dtype, getattr(changed.residual, "dtype", changed.x.dtype))


def test_a_vector_that_no_longer_fits_is_refused(watched: Watched) -> None:
    tail = make_tail(watched.problem)
    with torch.inference_mode():
        for _ in range(3):
            watched(tail)
        tail.conv.running_var.data = torch.ones(3)
        with pytest.raises(ValueError, match=rf"running_var: expected shape \[{watched.problem.k}\]"):
            watched(tail)


def test_the_environment_is_read_on_each_call(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    tail = make_tail(watched.problem)
    with torch.inference_mode():
        for _ in range(3):
            watched(tail)
        monkeypatch.setenv("FUSED_RESNET_BACKEND", "abacus")
        with pytest.raises(ValueError, match="abacus"):
            watched(tail)
        monkeypatch.setenv("FUSED_RESNET_BACKEND", "eager")
        torch.testing.assert_close(watched(tail)[0], reference(tail))


# ---- states of torch in which the dispatcher has something to do -------------------------------------------


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Function(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


STATES: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "dispatch_mode": _Dispatch,
    "function_mode": _Function,
    "profiler": lambda: torch.autograd.profiler.profile(),
    "grad": torch.enable_grad,
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
def test_not_direct_in(watched: Watched, state: Callable[[], Any]) -> None:
    tail = make_tail(watched.problem)
    with torch.no_grad():
        for _ in range(3):
            watched(tail)
        assert watched(tail)[1]
        with state():
            assert not any(watched(tail)[1] for _ in range(3))
        assert watched(tail)[1]


def test_not_direct_under_transforms(watched: Watched) -> None:
    tail = make_tail(watched.problem)
    batch = torch.stack([tail.x, tail.x + 1, tail.x - 1])
    with torch.no_grad():
        for _ in range(3):
            watched(tail)
        seen: list[bool] = []

        def call(x: Tensor) -> Tensor:
            y, was_direct = watched(tail._replace(x=x))
            seen.append(was_direct)
            return y

        with contextlib.suppress(RuntimeError):  # whether vmap is supported at all is not the question here
            torch.func.vmap(call)(batch)
    assert not any(seen)


def test_forward_mode_raises_also_when_remembered(watched: Watched) -> None:
    tail = make_tail(watched.problem)
    with torch.no_grad():
        for _ in range(3):
            watched(tail)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
            watched(tail._replace(x=forward_ad.make_dual(tail.x, torch.ones_like(tail.x))))


@pytest.mark.parametrize("cached", [False, True])
def test_compiled_graph_holds_the_operator(cached: bool) -> None:
    tail = make_tail(CACHED if cached else PROBLEM)
    targets: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        targets.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    arguments = call_arguments(tail) | {"cache_weights": cached}
    with torch.no_grad():
        for _ in range(3):
            functional.conv_bn_add_relu(**arguments)
        compiled = torch.compile(functional.conv_bn_add_relu, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(**arguments), reference(tail))
    assert torch.ops.fused_resnet.conv_bn_add_relu.default in targets


def test_a_repeated_triton_call_goes_straight_to_the_launcher() -> None:
    """Past Triton's own ``kernel[grid](…)``, which would look for a driver here and fail."""
    pytest.importorskip("triton")
    launch_cost = pytest.importorskip("benchmarks.bench_launch_cost")
    with launch_cost._triton(), torch.inference_mode():
        call = launch_cost._call(launch_cost.PROBLEMS["projection"], "triton")
        for _ in range(4):
            assert call().shape == (1, 64, 14, 14)
    plans.clear()
