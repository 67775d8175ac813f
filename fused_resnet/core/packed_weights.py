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
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_owners: weakref.WeakValueDictionary[int, PackedWeights] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)
_MOST = 256  # copies of one owner
_MOST_OF_PROCESS = 4096


class Packed(NamedTuple):
    """A packed copy, and the checksum of what it was made from."""

    value: Any
    checksum: Tensor


class PackedWeights:
    """Packed copies of some convolutions' weights; empty when made, copied or unpickled.

    ``nbytes`` is the memory that the copies take, ``clear()`` gives it back. May be used by several threads.

    Args:
        checked: compare at each use. Only who knows that no weight changes any more (a frozen model, which owns
            all of them) leaves that out.
    """

    def __init__(self, checked: bool = True) -> None:
        self.checked = checked
        self.most = _MOST
        self.number = next(_numbers)
        """What stands for this object in an operator's arguments."""
        self._copies: dict[Hashable, Packed] = {}
        self._used: dict[Hashable, int] = {}
        self._clock = 0
        self._lock = threading.RLock()
        _owners[self.number] = self

    def find(self, weight: Tensor, key: Hashable, make: Callable[[], Packed]) -> Packed:
        """The copy of ``weight`` called ``key``, made by ``make`` where there is none.

        Whether it is still true is for the caller to compare; if not, :meth:`drop` comes before the next attempt.
        """
        # By address: nothing refers to the tensor itself, and whatever lies there is compared in full.
        place = (key, weight.data_ptr())
        self._clock += 1
        packed = self._copies.get(place)
        if packed is None:
            with self._lock:  # two threads never make the same copy twice
                packed = self._copies.get(place)
                if packed is None:
                    packed = make()
                    self._copies[place] = packed
                    self._used[place] = self._clock
                    self._forget_unused()
        self._used[place] = self._clock
        return packed

    def drop(self, weight: Tensor, key: Hashable) -> None:
        """Drop a copy whose weight has changed."""
        with self._lock:
            self._copies.pop((key, weight.data_ptr()), None)
            self._used.pop((key, weight.data_ptr()), None)

    def clear(self) -> None:
        """Forget all copies."""
        with self._lock:
            self._copies.clear()
            self._used.clear()

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(packed.value) for packed in list(self._copies.values()))

    def _forget_unused(self) -> None:
        # Weights that moved leave stale copies behind: drop what was not used while everything that is kept could have
        # been. That also drops copies for image sizes that have not come for long.
        oldest = self._clock - len(self._copies) - 16
        by_age = sorted(self._used.items(), key=lambda item: item[1])
        surplus = max(0, len(by_age) - self.most)
        for place in [place for i, (place, used) in enumerate(by_age) if i < surplus or used < oldest]:
            self._used.pop(place, None)
            self._copies.pop(place, None)

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
