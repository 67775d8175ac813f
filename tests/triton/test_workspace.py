"""The workspaces of Triton's launches: per stream, never in a graph's pool, zero where a kernel expects zeros."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_resnet.kernels import workspace as module
from fused_resnet.kernels.workspace import workspace
from tests.support.operators import Operators

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_kept", {})


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():
        yield


def test_launches_of_one_kind_and_stream_share_theirs() -> None:
    first = workspace("ordered", 100, 10, CPU, 1)
    assert not first.any()
    assert workspace("ordered", 50, 50, CPU, 1) is first
    others = [workspace("ordered", 100, 10, CPU, 2), workspace("atomic", 100, 10, CPU, 1)]
    assert len({t.data_ptr() for t in (first, *others)}) == 3
    larger = workspace("ordered", 101, 10, CPU, 1)
    assert larger.numel() >= 101
    assert workspace("ordered", 100, 10, CPU, 1) is larger


@pytest.mark.parametrize("zeros", [7, 1000])
def test_in_a_capture_only_what_must_be_zero_is_cleared_and_nothing_is_kept(capturing: None, zeros: int) -> None:
    cleared: list[Tensor] = []

    class Clearing(Operators):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func._schema.name == "aten::zero_":
                cleared.append(args[0])
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Clearing() as operators:
        first = workspace("ordered", 1000, zeros, CUDA, 1)
        assert workspace("ordered", 1000, zeros, CUDA, 1) is not first
    assert operators.kernels == ["zero_", "zero_"]
    assert [t.numel() for t in cleared] == [zeros, zeros]
    assert all(t.storage_offset() == 0 for t in cleared)
    assert not module._kept


def test_what_is_kept_is_allocated_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's warm-up sends the allocations of its own thread to its graphs' pool. Zeroed before it is used."""
    events: list[str] = []
    threads: set[int] = set()

    def zeros(words: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        threads.add(threading.get_ident())
        events.append("zeros")
        return torch.empty(words, dtype=dtype).zero_()

    stream = SimpleNamespace(synchronize=lambda: events.append("waited for"))
    monkeypatch.setattr(module.torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    first = workspace("tickets", 10, 10, CUDA, 1)
    assert workspace("tickets", 10, 10, CUDA, 1) is first
    assert events == ["zeros", "waited for"]
    assert threading.get_ident() not in threads

    recorded: list[object] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: recorded.append((self.data_ptr(), stream)))
    workspace("tickets", 20, 20, CUDA, 1)
    assert recorded == [(first.data_ptr(), stream)]  # launches may still count in it


def test_the_reason_of_a_failure_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", full)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        workspace("ordered", 10, 10, CUDA, 1)
    assert not module._kept
