"""The one question that every fused forward asks before it runs: is somebody else looking at this call?

Whoever exports, traces or transforms a model wants its own forward, in operators that everybody knows; so do tensors
that are more than numbers (a proxy, a distributed tensor). Plain calls and ``torch.compile`` run fused, and those who
export the fused operators on purpose see them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ..core.forward_mode import has_tangent
from . import pristine

_PLAIN = (Tensor, nn.Parameter)


def watched(x: Any) -> bool:
    """Whether a call with the input ``x`` must run the unfused forward."""
    if torch.compiler.is_compiling():
        return _watched_while_compiling()
    return type(x) not in _PLAIN or has_tangent(x) or _is_looked_at()


_shown: ContextVar[bool] = ContextVar("_shown", default=False)


@contextmanager
def shown_fused() -> Iterator[None]:
    """Who looks in this context sees the fused forward."""
    token = _shown.set(True)
    try:
        yield
    finally:
        _shown.reset(token)


def _is_looked_at() -> bool:
    return not _shown.get() and (
        torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()  # torch.func has no public word for it
        or get_proxy_mode() is not None  # make_fx
    )


@pristine.constant  # asked in Python while a graph is made, where the compiler's own answers differ between versions
def _watched_while_compiling() -> bool:
    return _is_looked_at()
