"""CUDA graphs on a GPU, with every backend: side by side, beside launches, and Inductor's (`pytest -m gpu`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet import backends, functional
from fused_resnet.core.problem import Problem
from fused_resnet.testing import call_arguments, make_tail

pytestmark = pytest.mark.gpu

BACKENDS = ("cuda", "triton", "cudnn", "two_pass")
#: Small images of many channels, whose sums are split.
TEXTS = ("n=1,h=7,w=7,c=512,k=512,padding=1,residual=1", "n=1,h=7,w=7,c=512,k=512,padding=1,proj=256x14x14x2")


def call_of(name: str, text: str) -> Any:
    """A function of x alone, and an x."""
    problem = dataclasses.replace(Problem.parse(f"{text},dtype=float16"), device_type="cuda")
    if reason := backends.get(name).can_run(problem):
        pytest.skip(reason)
    arguments = call_arguments(make_tail(problem, device="cuda")) | {"backend": name}
    function = functional.conv_bn_proj_add_relu if "proj_x" in arguments else functional.conv_bn_add_relu
    x = arguments.pop("x")
    return (lambda x: function(x, **arguments)), x


def captured(call: Any, x: Tensor) -> tuple[Any, Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x)
        for _ in range(3):
            y = y + call(x)
    return graph, y


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", BACKENDS)
@torch.inference_mode()
def test_graphs_beside_each_other_and_beside_launches(name: str, text: str) -> None:
    call, x = call_of(name, text)
    expected = call(x)
    four = expected + expected + expected + expected
    graphs = [captured(call, x) for _ in range(3)]
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for (graph, y), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                y.fill_(torch.nan)
                graph.replay()
        torch.testing.assert_close(call(x), expected)
        torch.cuda.synchronize()
        for _, y in graphs:
            torch.testing.assert_close(y, four)
    del graphs[0]  # what its launches counted in now serves another
    graph, y = captured(call, x)
    for each in (graph, *(other for other, _ in graphs)):
        each.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(y, four)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", BACKENDS)
def test_reduce_overhead(name: str, text: str) -> None:
    """Inductor checks its graphs' pool around each warm-up and recording, and raises over what was kept there."""
    call, x = call_of(name, text)
    torch._dynamo.reset()
    compiled = torch.compile(call, mode="reduce-overhead")
    with torch.inference_mode():
        expected = call(x)
        for _ in range(5):
            torch.testing.assert_close(compiled(x).clone(), expected)
            torch.testing.assert_close(call(x), expected)


@pytest.mark.parametrize("name", ["cudnn", "two_pass"])
@torch.inference_mode()
def test_nothing_waits_for_the_device(name: str) -> None:
    for text in TEXTS:
        call, x = call_of(name, text)
        expected = call(x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = call(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(y, expected)
