"""Tuning: which kernel runs a call, found by verifying and timing all of them, kept per device and version."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run import Check, Tuning, selftest, selftest_table, tune

__all__ = ["Check", "Tuning", "selftest", "selftest_table", "tune"]


def __getattr__(name: str) -> Any:
    # The operators import this package for .choice; what only the user calls waits until it is called.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".run", __name__), name)
