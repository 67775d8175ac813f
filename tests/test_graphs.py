"""CUDA graphs of a network: the sentence on the CPU, and what is done around a capture."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet import graphs
from fused_resnet.graphs import GraphedModel


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


def test_on_the_cpu_it_runs_the_model_and_says_why() -> None:
    model, x = _model(), torch.randn(2, 3, 8, 8)
    fast = fused_resnet.graph(model, x)
    assert fast.why_not == "no CUDA graph: the model and its example must be on a CUDA device, got cpu"
    assert "must be on a CUDA device" in repr(fast)
    torch.testing.assert_close(fast(x), model(x))
    assert not fast(x).requires_grad


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model: expected evaluation mode \(model.eval\(\)\), got training mode"):
        fused_resnet.graph(_model().train(), torch.randn(2, 3, 8, 8))


def test_an_example_without_a_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="example: expected a tensor or a tuple with one"):
        fused_resnet.graph(_model(), (3,))


class FakeGraph:
    """Replays by doing what was captured: the last call of the model, into the same output."""

    captured: Any = None

    def replay(self) -> None:
        model, inputs, output = self.captured
        output.copy_(model.forward(*inputs))


class Watched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _model()
        self.calls: list[tuple[Tensor, ...]] = []
        self.streams: list[str] = []
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def __call__(self, *args: Tensor) -> Tensor:
        self.calls.append(args)
        self.streams.append(_Stream.current)
        return self.forward(*args)


class _Stream:
    current = "default"

    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def on(name: str) -> Any:
        before, _Stream.current = _Stream.current, name
        try:
            yield
        finally:
            _Stream.current = before

    @contextlib.contextmanager
    def capture(graph: FakeGraph) -> Any:
        with on("capture"):
            yield
        graph.captured = WATCHED[-1], WATCHED[-1].calls[-1], OUTPUTS[-1]

    monkeypatch.setattr(graphs, "_why_not", lambda model, example: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: on("side"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)


WATCHED: list[Watched] = []
OUTPUTS: list[Tensor] = []


@pytest.fixture
def watched(fake_cuda: None) -> Watched:
    model = Watched()
    WATCHED.append(model)
    forward = model.forward

    def remembering(x: Tensor) -> Tensor:
        y = forward(x)
        if _Stream.current == "capture":
            OUTPUTS.append(y)
        return y

    model.forward = remembering  # type: ignore[method-assign]
    return model


def test_capture_and_replay(watched: Watched) -> None:
    example = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    fast = GraphedModel(watched, (example,))
    # what has to happen before a capture happens on a side stream: kernels are chosen and verified there
    assert watched.streams == ["side"] * 3 + ["capture"]
    own = watched.calls[-1][0]
    assert own.data_ptr() != example.data_ptr()
    assert own.is_contiguous(memory_format=torch.channels_last)

    before = len(watched.calls)
    first, second = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    y1, y2 = fast(first), fast(second)
    assert len(watched.calls) == before, "a replay does not call the model"
    torch.testing.assert_close(y1, watched.inner(first))  # a copy: the second call has not overwritten it
    torch.testing.assert_close(y2, watched.inner(second))


def test_without_copies_the_output_is_the_graphs_own(watched: Watched) -> None:
    fast = GraphedModel(watched, (torch.randn(2, 3, 8, 8),), copy=False)
    y1 = fast(torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    assert fast(x) is y1
    torch.testing.assert_close(y1, watched.inner(x))


@pytest.mark.parametrize(
    "x", [torch.randn(3, 3, 8, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 8, 8, dtype=torch.float64)]
)
def test_another_shape_or_dtype_runs_the_model(watched: Watched, x: Tensor) -> None:
    fast = GraphedModel(watched, (torch.randn(2, 3, 8, 8),))
    watched.inner.to(x.dtype)
    before = len(watched.calls)
    torch.testing.assert_close(fast(x), watched.inner(x))
    assert len(watched.calls) == before + 1


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = fused_resnet.fuse(torchvision.models.resnet18().eval().cuda().half())
    example = torch.randn(4, 3, 224, 224, device="cuda", dtype=torch.float16)
    fast = fused_resnet.graph(model, example)
    assert fast.why_not is None
    for _ in range(3):
        x = torch.randn_like(example)
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), model(x))
    # a changed BN shows without another capture where BN is live
    with torch.no_grad():
        model.layer1[0].bn2.weight.mul_(-1)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x))
