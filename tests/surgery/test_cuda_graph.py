"""What a frozen model does around a CUDA graph, with stand-ins for torch's; on a GPU, the graph itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet.surgery.cuda_graph import CudaGraph


class Watched(nn.Module):
    """Notes each call: its inputs, and the stream it came on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, ...]] = []
        self.streams: list[str] = []
        self.output = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((x,))
        self.streams.append(_Stream.current)
        self.output = self.inner(x)
        return self.output

    def inner(self, x: Tensor) -> Tensor:
        return x * 2 + 1


class _Stream:
    current = "default"
    waited: list[Any] = []  # noqa: RUF012

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        _Stream.waited.append(event)


class _Event:
    def record(self, stream: Any) -> None:
        self.recorded = stream


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    model = Watched()

    @contextlib.contextmanager
    def on(name: str) -> Iterator[None]:
        before, _Stream.current = _Stream.current, name
        try:
            yield
        finally:
            _Stream.current = before

    class Graph:
        """Replays by doing what was captured: the last call of the model, into the same output."""

        def replay(self) -> None:
            self.output.copy_(model.inner(*self.inputs))

    @contextlib.contextmanager
    def capture(graph: Any) -> Iterator[None]:
        with on("capture"):
            yield
        graph.inputs, graph.output = model.calls[-1], model.output

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: on("side"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return model


def test_capture_and_replay(watched: Watched) -> None:
    example = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    graph = CudaGraph(watched, (example,))
    # what has to happen before a capture happens on a side stream: kernels are chosen and verified there
    assert watched.streams == ["side"] * 3 + ["capture"]
    own = watched.calls[-1][0]
    assert own.data_ptr() != example.data_ptr()
    assert own.is_contiguous(memory_format=torch.channels_last)

    before = len(watched.calls)
    first, second = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    y1, y2 = graph(first), graph(second)
    assert len(watched.calls) == before, "a replay does not call the model"
    assert torch.equal(y1, watched.inner(first)), "a copy: the second call has not overwritten it"
    assert torch.equal(y2, watched.inner(second))


def test_each_call_waits_for_the_one_before_on_whatever_stream_it_came(watched: Watched) -> None:
    graph = CudaGraph(watched, (torch.randn(2, 3, 8, 8),))
    _Stream.waited.clear()
    for _ in range(2):
        graph(torch.randn(2, 3, 8, 8))
    assert _Stream.waited == [graph._done, graph._done]


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18().eval().cuda().half()
    fast = fused_resnet.freeze(model)
    for n in (4, 1):
        for _ in range(3):
            x = torch.randn(n, 3, 224, 224, device="cuda", dtype=torch.float16)
            with torch.inference_mode():
                torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2)
                assert torch.equal(fast(x), fast(x))
    assert len(list(fast.prepared_for())) == 2
    with torch.no_grad():
        before = fast(x)
        model.layer1[0].bn2.weight.mul_(-1)
        assert torch.equal(fast(x), before)
        torch.testing.assert_close(fast.refresh()(x), model(x), rtol=2e-2, atol=2e-2)
