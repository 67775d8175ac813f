"""What lies between tails: an activation, always in channels_last, which is what the kernels read and write.

Whatever the model's own layout is: where an activation reaches anything else, :func:`leave` gives it the strides that
eager's would have there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.layout import looks_channels_last

#: ``nn.Module.__call__`` as it was when this file was imported.
MODULE_CALL = nn.Module.__call__


class Value(NamedTuple):
    """An activation between tails."""

    tensor: Tensor
    channels_last: bool
    """Whether eager's would be in channels_last here."""
    original: Tensor | None = None
    """What eager has here, where it is not ``tensor``, or strided in a way that neither format describes."""

    @property
    def fresh(self) -> bool:
        """Whether ``tensor`` is what eager has here, in another layout at most, and no copy beside it."""
        return self.original is None


def enter(x: Any) -> Any:
    """``x`` as a :class:`Value`; anything that is not an image in a plain floating-point tensor stays what it is."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        return x
    tensor, channels_last = x.contiguous(memory_format=torch.channels_last), looks_channels_last(x.shape, x.stride())
    return Value(tensor, channels_last, None if channels_last and tensor is x else x)


def leave(x: Any) -> Any:
    """The tensor of a :class:`Value`, strided as eager's would be; anything else stays what it is."""
    if not isinstance(x, Value):
        return x
    if x.original is not None:
        return x.original
    wanted = torch.channels_last if x.channels_last else torch.contiguous_format
    return x.tensor.contiguous(memory_format=wanted)


class Recorded:
    """Stands for a :class:`Value` while a network is frozen: tails are noted instead of run."""

    fresh = False
    """See :attr:`Value.fresh`."""

    def tail(
        self, conv: nn.Conv2d, bn: Any, residual: Any, projection: Any, pool: Any, activation: str, options: Any,
        residual_first: bool = False,
    ) -> Any:  # fmt: skip
        """The value of ``pool(act(bn(conv(self)) + residual))``, or with ``projection(residual)`` added."""
        raise NotImplementedError

    def call(self, module: nn.Module) -> Any:
        """What ``module`` makes of it."""
        raise NotImplementedError

    def apply(self, function: Callable[[Tensor], Any]) -> Any:
        """See :func:`apply`."""
        raise NotImplementedError

    def in_any_layout(self, function: Callable[..., Any]) -> Any:
        """See :func:`.between.in_any_layout`."""
        raise NotImplementedError

    @staticmethod
    def joined(values: list[Any], dim: int) -> Any:
        """See :func:`.between.cat`."""
        raise NotImplementedError


def apply(function: Callable[[Tensor], Any], x: Any) -> Any:
    """``function`` of the tensor that eager would have in place of ``x``."""
    return x.apply(function) if isinstance(x, Recorded) else enter(function(leave(x)))
