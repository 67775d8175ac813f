"""The one cache of folded, packed and transformed weights, for the backends ``cpu`` and ``cudnn``.

A packed copy is reused only while nothing it was made from has changed: the weight must be the same tensor object
with the same ``data_ptr`` and ``_version`` (inference tensors have none), 64 elements strided over it must have the
same bits, and the vectors folded into the copy (bias and BN) are compared in full. ``_version`` alone would miss
writes through ``.data`` and optimizers with ``fused=True``; what the samples could miss in turn, a write that keeps
all 64 of them, is what :func:`drop` is for (``train()`` and ``refresh()`` call it).

Copies live here, beside the model: they enter no ``state_dict``, pickle or deepcopy, and die with their weight. A call
in one piece (:mod:`.chain`) holds the copies it was made with, and the weights, until its module's next call after one
of them was replaced or dropped; it compares the same four things.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import _extension

T = TypeVar("T")

#: What is folded into a copy beside the weight: bias, bn_weight, bn_bias, running_mean, running_var.
Vectors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NO_VECTORS: Vectors = (None, None, None, None, None)

_SAMPLES = 64


class _Copy(NamedTuple):
    """One packed copy and what it was made from; csrc/repeat.cpp reads it."""

    value: Any
    data_ptr: int
    version: int
    snapshot: Tensor
    samples: Tensor | None
    """For operators that compare on their own: of float32 weights in the CPU's memory."""


class _Entry:
    """All copies made of one weight. The dictionary lives as long as the weight: csrc/repeat.cpp holds on to it."""

    __slots__ = ("copies", "weight")

    def __init__(self, weight: Tensor) -> None:
        key = id(weight)
        copies: dict[Hashable, _Copy] = {}

        def gone(_: Any) -> None:
            _entries.pop(key, None)
            copies.clear()

        self.weight = weakref.ref(weight, gone)
        self.copies = copies


_entries: dict[int, _Entry] = {}
_lock = threading.RLock()  # held while a copy is made; lookups need none, a dict's own atomicity is enough


def get(weight: Tensor, key: Hashable, vectors: Vectors, make: Callable[[], T]) -> T:
    """The copy of ``weight`` called ``key``: the kept one if it is still true, else the one that ``make`` makes.

    ``key`` names the kind of copy and every number in it that is no tensor (eps, say). Two threads never make the
    same copy twice.
    """
    return _current(weight, key, vectors, make).value


def sampled(weight: Tensor, key: Hashable, make: Callable[[Tensor, Any], Tensor]) -> tuple[Tensor, Tensor]:
    """The copy of a float32 ``weight`` and its samples, for an operator that returns nothing where they do not hold.

    ``make(weight, key)`` makes it. After an operator that returned nothing, :func:`forget` comes before the next
    attempt. What is saved is the call that compares.
    """
    entry = _entries.get(id(weight))
    copy = None if entry is None or entry.weight() is not weight else entry.copies.get(key)
    # A tensor without a version was one when the copy was made: asking it each time takes as long as all of this.
    if copy is None or (copy.version >= 0 and copy.version != weight._version):
        copy = _current(weight, key, NO_VECTORS, lambda: make(weight, key))
    assert copy.samples is not None
    return copy.value, copy.samples


def copies(weight: Tensor) -> dict[Hashable, Any]:
    """All copies of ``weight``, for csrc/repeat.cpp, which does what :func:`sampled` does; empty once it is gone."""
    return _of(weight).copies


def forget(weight: Tensor, key: Hashable) -> None:
    """Forget one copy, since it is no longer true."""
    entry = _entries.get(id(weight))
    if entry is not None:
        entry.copies.pop(key, None)


def drop(weight: Tensor) -> None:
    """Forget every copy made of ``weight``."""
    _count_drop()
    entry = _entries.get(id(weight))
    if entry is not None:
        entry.copies.clear()


def clear() -> None:
    """Forget everything."""
    _count_drop()
    while _entries:
        _entries.popitem()[1].copies.clear()


#: How often something was dropped: who holds a copy beyond one call lets go of it when this has changed.
drops = 0


def _count_drop() -> None:
    global drops
    with _lock:
        drops += 1


def nbytes(weight: Tensor) -> int:
    """The memory that copies of ``weight`` take now, in bytes."""
    entry = _entries.get(id(weight))
    if entry is None or entry.weight() is not weight:
        return 0
    return sum(_nbytes(copy.value) for copy in list(entry.copies.values()))


def _current(weight: Tensor, key: Hashable, vectors: Vectors, make: Callable[[], Any]) -> _Copy:
    copy = _find(weight, key, vectors)
    if copy is None:
        with _lock:
            copy = _find(weight, key, vectors)
            if copy is None:
                copy = _make(weight, key, vectors, make)
    return copy


def _find(weight: Tensor, key: Hashable, vectors: Vectors) -> _Copy | None:
    entry = _entries.get(id(weight))
    if entry is None or entry.weight() is not weight:
        return None
    copy = entry.copies.get(key)
    if copy is None or copy.data_ptr != weight.data_ptr() or copy.version != _version(weight):
        return None
    return copy if _unchanged(copy.snapshot, weight, vectors) else None


def _make(weight: Tensor, key: Hashable, vectors: Vectors, make: Callable[[], Any]) -> _Copy:
    # Remembered before the copy is made: a write that comes in between must make the copy stale, not true.
    data_ptr, version, snapshot = weight.data_ptr(), _version(weight), _snapshot(weight, vectors)
    samples = _samples(weight)
    with torch.no_grad():
        copy = _Copy(make(), data_ptr, version, snapshot, samples)
    _of(weight).copies[key] = copy
    return copy


def _of(weight: Tensor) -> _Entry:
    entry = _entries.get(id(weight))
    if entry is None or entry.weight() is not weight:
        entry = _entries[id(weight)] = _Entry(weight)
    return entry


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


def _samples(weight: Tensor) -> Tensor | None:
    plain = weight.is_cpu and weight.dtype is torch.float32 and weight.dim() == 4 and weight.numel() > 0
    return torch.ops.fused_resnet_C.samples.default(weight) if plain and _extension.cpu() is not None else None


def _snapshot(weight: Tensor, vectors: Vectors) -> Tensor:
    if weight.is_cpu and _extension.cpu() is not None:
        return torch.ops.fused_resnet_C.snapshot.default(weight, *vectors)
    return _snapshot_in_python(weight, vectors)


def _unchanged(snapshot: Tensor, weight: Tensor, vectors: Vectors) -> bool:
    if weight.is_cpu and _extension.cpu() is not None:
        return torch.ops.fused_resnet_C.unchanged.default(snapshot, weight, *vectors)
    return torch.equal(snapshot, _snapshot_in_python(weight, vectors))


def _snapshot_in_python(weight: Tensor, vectors: Vectors) -> Tensor:
    """The same bytes as ``fused_resnet_C::snapshot``: samples of the weight, then each vector in full."""
    weight = weight.detach()
    parts: list[Tensor] = []
    count = weight.numel()
    if count:
        index = torch.arange(_SAMPLES, device=weight.device) * (count - 1) // (_SAMPLES - 1)
        parts.append(weight[torch.unravel_index(index, weight.shape)].contiguous().view(torch.uint8))
    for vector in vectors:
        parts.append(torch.tensor([vector is not None], dtype=torch.uint8, device=weight.device))
        if vector is not None:
            parts.append(vector.detach().contiguous().view(torch.uint8))
    return torch.cat(parts)


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return torch.ops.mkldnn._nbytes(value) if value.is_mkldnn else value.nbytes
    if isinstance(value, (tuple, list)):
        return sum(_nbytes(item) for item in value)
    return 0
