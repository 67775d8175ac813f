"""Repeated calls that the extension runs by itself: which repeat, what they keep, and that they notice every write.

What else makes a call a different one, ``tests/test_direct.py`` goes through.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fused_resnet import _extension, functional
from fused_resnet.backends import packing
from fused_resnet.ops import direct, plans
from fused_resnet.problem import Problem
from fused_resnet.reference import Tail, reference
from fused_resnet.testing import call_arguments, make_tail

PROBLEM = Problem.parse("n=1,h=5,w=4,c=32,k=32,padding=1,residual=1,bn=1")
EXTENSION: Any = _extension.cpu()

pytestmark = [
    pytest.mark.skipif(EXTENSION is None, reason=str(_extension.why_not_cpu())),
    pytest.mark.usefixtures("one_thread", "repeats"),
]


@pytest.fixture
def repeats() -> Iterator[None]:
    plans.clear()
    yield
    plans.clear()


def repeated(tail: Tail, **options: Any) -> Tensor | None:
    """What the extension makes of the call: None where it is not one that it remembers."""
    given = call_arguments(tail) | {"cache_weights": True, "backend": "auto", "winograd": "auto"} | options
    tensors = [given[name] for name in ("x", "weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var")]
    names = ["eps", "stride", "padding", "dilation", "groups", "activation", "backend", "cache_weights", "winograd"]
    y: Tensor | None = EXTENSION.repeat(*tensors, given["residual"], *[given[name] for name in names])
    return y


def call(tail: Tail, **options: Any) -> Tensor:
    return functional.conv_bn_add_relu(**call_arguments(tail) | {"cache_weights": True} | options)


def remembered(tail: Tail) -> Tail:
    with torch.no_grad():
        for _ in range(3):
            call(tail)
    return tail


def assert_right(y: Tensor | None, tail: Tail) -> None:
    assert y is not None
    torch.testing.assert_close(y, reference(tail.to(torch.float64)).float(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_pair_may_be_one_number() -> None:
    tail = remembered(make_tail(PROBLEM))
    for padding in (1, (1, 1)):
        assert_right(repeated(tail, padding=padding), tail)
    for other in (2, (1, 2), (1, 1, 1), [1, 1], 1.0, True, "1", None, torch.tensor(1)):
        assert repeated(tail, padding=other) is None, other


@torch.no_grad()
@pytest.mark.parametrize(
    "other",
    [{"eps": 1}, {"eps": float("nan")}, {"groups": 1.0}, {"activation": b"relu"}, {"backend": "cpu"},
     {"cache_weights": 1}, {"cache_weights": False}, {"winograd": "off"}, {"stride": (1,)}],
    ids=str,
)  # fmt: skip
def test_an_option_that_only_looks_the_same(other: dict[str, Any]) -> None:
    assert repeated(remembered(make_tail(PROBLEM)), **other) is None


@torch.no_grad()
def test_arguments_that_are_no_tensors() -> None:
    tail = remembered(make_tail(PROBLEM))
    for wrong in (None, 1, "x", object(), torch.nn.Parameter, [tail.x]):
        assert repeated(tail._replace(x=wrong)) is None
        assert repeated(tail._replace(residual=wrong)) is None
    with pytest.raises(TypeError, match="repeat: expected 17 arguments, got 3"):
        EXTENSION.repeat(1, 2, 3)


@torch.no_grad()
def test_several_sizes_of_one_weight_and_no_end_of_them() -> None:
    weight_of = make_tail(PROBLEM).conv
    tails = [make_tail(Problem.parse(f"n=1,h={h},w=4,c=32,k=32,padding=1,residual=1,bn=1")) for h in range(3, 13)]
    tails = [remembered(tail._replace(conv=weight_of)) for tail in tails]
    found = [repeated(tail) for tail in tails]
    assert [y is not None for y in found] == [False] * 2 + [True] * 8  # the newest eight
    for tail, y in zip(tails[2:], found[2:], strict=True):
        assert_right(y, tail)


@torch.no_grad()
def test_every_write_to_a_tensor_is_noticed() -> None:
    tail = remembered(make_tail(PROBLEM))
    weight = tail.conv.weight
    weight.mul_(2)  # counted by torch
    assert repeated(tail) is None
    assert_right(call(tail), tail)  # which makes a new copy
    assert_right(repeated(tail), tail)
    weight.data[0] += 1  # seen in the samples alone
    assert repeated(tail) is None
    assert_right(call(tail), tail)
    for vector in (tail.conv.running_mean, tail.conv.bn_weight, tail.x, tail.residual):
        vector.add_(1)
        assert_right(repeated(tail), tail)


@torch.no_grad()
def test_dropped_copies_are_not_used() -> None:
    tail = remembered(make_tail(PROBLEM))
    for drop in (lambda: packing.drop(tail.conv.weight), packing.clear):
        assert repeated(tail) is not None
        drop()
        assert repeated(tail) is None
        remembered(tail)


def test_the_copy_goes_with_its_weight() -> None:
    tail = remembered(make_tail(PROBLEM))
    (copy,) = packing.copies(tail.conv.weight).values()
    gone = [weakref.ref(t) for t in (tail.conv.weight, tail.conv.running_mean, tail.x, copy.value)]
    del tail, copy
    gc.collect()
    assert [reference() is None for reference in gone] == [True] * 4


def test_nothing_is_repeated_while_torch_watches() -> None:
    tail = remembered(make_tail(PROBLEM))
    assert repeated(tail) is None  # gradients are on, if none are wanted
    with torch.no_grad():
        assert repeated(tail) is not None
    with torch.inference_mode():
        assert repeated(tail) is None  # another state of the thread: remembered on its own
        for _ in range(2):
            call(tail)
        assert repeated(tail) is not None

    @torch.no_grad()
    def traced(x: Tensor) -> Tensor:
        return call(tail._replace(x=x))

    graph = make_fx(traced)(tail.x)
    assert torch.ops.fused_resnet.conv_bn_add_relu.default in [node.target for node in graph.graph.nodes]


def test_threads_that_call_and_forget() -> None:
    tail = make_tail(PROBLEM)
    expected, wrong = reference(tail.to(torch.float64)).float(), []

    @torch.no_grad()
    def work(forgets: bool) -> None:
        for i in range(300):
            y = call(tail)
            if not torch.allclose(y, expected, rtol=1e-5, atol=1e-5):
                wrong.append(i)
            if forgets and i % 7 == 0:
                plans.clear()
                packing.drop(tail.conv.weight)

    threads = [threading.Thread(target=work, args=(i == 0,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "repeat", None)
    monkeypatch.setitem(_extension._modules, "_C", "not built")
    tail = remembered(make_tail(PROBLEM))
    assert direct.repeat is None
    assert_right(call(tail), tail)
