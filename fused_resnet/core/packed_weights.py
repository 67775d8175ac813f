"""Packed copies of weights that the CPU backend keeps between calls, in an object that the caller owns.

A fused module owns one, and so can a caller of :mod:`fused_resnet.functional`. Nothing about a weight is taken on
trust: a copy serves again only after a checksum over all bytes of the weight (and of the vectors folded into the copy)
has agreed, so every way to write to a weight is seen, ``.data``, NumPy views and fused optimizers included.

Operators carry it as a number, since a schema knows no such objects; 0 stands for none.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_owners: weakref.WeakValueDictionary[int, PackedWeights] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)
_MOST = 256  # copies of one owner
_MOST_OF_PROCESS = 4096


#: What a copy is called, and the address of its weight.
Place = tuple[Hashable, int]


class Packed(NamedTuple):
    """A packed copy, and the checksum of what it was made from."""

    value: Any
    checksum: Tensor


class PackedWeights:
    """Packed copies of some convolutions' weights; empty when made, copied or unpickled.

    ``nbytes`` is the memory that the copies take, ``clear()`` gives it back. May be used by several threads.

    Args:
        checked: compare at each use. Only who knows that no weight changes any more (a frozen model, which owns
            all of them) leaves that out. Weights are then kept with their copies, so that no other ever lies at
            their address.
    """

    def __init__(self, checked: bool = True) -> None:
        self.checked = checked
        self.most = _MOST
        self.number = next(_numbers)
        """What stands for this object in an operator's arguments."""
        self._copies: dict[Place, Packed] = {}
        self._used: dict[Place, int] = {}
        self._weights: dict[Place, Tensor] = {}
        self._casts: PackedWeights | None = None
        self._clock = 0
        self._lock = threading.RLock()
        _owners[self.number] = self

    def find(self, weight: Tensor, key: Hashable, make: Callable[[], Packed]) -> Packed:
        """The copy of ``weight`` called ``key``, made by ``make`` where there is none.

        Whether it is still true is for the caller to compare; if not, :meth:`drop` comes before the next attempt.
        """
        # By address: whatever lies there is compared in full, or is the tensor itself, kept alive here.
        place = (key, weight.data_ptr())
        self._clock += 1
        packed = self._copies.get(place)
        if packed is None:
            with self._lock:  # two threads never make the same copy twice
                packed = self._copies.get(place)
                if packed is None:
                    packed = make()
                    if not self.checked:
                        self._weights[place] = weight
                    self._copies[place] = packed
                    self._used[place] = self._clock
                    self._forget_unused()
        self._used[place] = self._clock
        return packed

    def compared(self, tensors: Sequence[Tensor], key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` makes of ``tensors``, a weight and what goes into its copy, kept while none of them changes."""

        def packed() -> Packed:
            # The checksum first: a write that comes in between must make the copy stale, not true.
            checksum = self._checksum(tensors)
            return Packed(make(), checksum)

        found = self.find(tensors[0], key, packed)
        if self.checked and not torch.equal(found.checksum, self._checksum(tensors)):
            self.drop(tensors[0], key)
            found = self.find(tensors[0], key, packed)
        return found.value

    def _checksum(self, tensors: Sequence[Tensor]) -> Tensor:
        if not self.checked:
            return torch.empty(0)
        checksum: Tensor = torch.ops.fused_resnet_C.checksum.default(list(tensors))
        return checksum

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """``weight`` in ``dtype``: the same tensor as long as it does not change."""
        key = ("cast", dtype)
        before = self._copies.get((key, weight.data_ptr()))
        copy: Tensor = self.compared([weight.detach()], key, lambda: weight.detach().to(dtype))
        if before is not None and before.value is not copy:
            self.casts.drop_all(before.value)
        return copy

    @property
    def casts(self) -> PackedWeights:
        """What keeps packed copies of what :meth:`cast` has returned, to which nobody writes."""
        with self._lock:
            if self._casts is None:
                self._casts = PackedWeights(checked=False)
            return self._casts

    def drop(self, weight: Tensor, key: Hashable) -> None:
        """Drop a copy whose weight has changed."""
        with self._lock:
            self._forget((key, weight.data_ptr()))

    def drop_all(self, weight: Tensor) -> None:
        """Drop all copies of a weight that will not come again."""
        with self._lock:
            for place in [place for place in self._copies if place[1] == weight.data_ptr()]:
                self._forget(place)

    def clear(self) -> None:
        """Forget all copies."""
        with self._lock:
            for kept in (self._copies, self._used, self._weights):
                kept.clear()
            self._casts = None

    def _forget(self, place: Place) -> None:
        for kept in (self._copies, self._used, self._weights):
            kept.pop(place, None)

    @property
    def nbytes(self) -> int:
        casts = 0 if self._casts is None else self._casts.nbytes
        return casts + sum(_nbytes(packed.value) for packed in list(self._copies.values()))

    def _forget_unused(self) -> None:
        # Weights that moved leave stale copies behind: drop what was not used while everything that is kept could have
        # been. That also drops copies for image sizes that have not come for long.
        oldest = self._clock - len(self._copies) - 16
        by_age = sorted(self._used.items(), key=lambda item: item[1])
        surplus = max(0, len(by_age) - self.most)
        for place in [place for i, (place, used) in enumerate(by_age) if i < surplus or used < oldest]:
            self._forget(place)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeights:
        return PackedWeights(self.checked)

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[bool]]:
        return PackedWeights, (self.checked,)


def _of_the_process() -> PackedWeights:
    owner = PackedWeights()
    owner.number, owner.most = -1, _MOST_OF_PROCESS
    _owners[owner.number] = owner
    return owner


#: For programs, which outlive the process that exported them: its number means the same in every process.
OF_THE_PROCESS = _of_the_process()


def by_number(number: int) -> PackedWeights | None:
    """The object with this number; None for 0, and for one that no longer exists."""
    return _owners.get(number) if number else None


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return torch.ops.mkldnn._nbytes(value) if value.is_mkldnn else value.nbytes
    if isinstance(value, (tuple, list)):
        return sum(_nbytes(item) for item in value)
    return 0
