"""The backends: who can run a problem, who cannot and why, and which one ``auto`` takes.

A backend says with :meth:`Backend.can_run` whether it runs a problem, by None or by one sentence; the same
sentence serves ``explain``, logs and errors. The choice is the plain ladder of :func:`choose`.
"""

from __future__ import annotations

from .base import Backend
from .registry import choose, default_backend, get, names, reasons

__all__ = ["Backend", "choose", "default_backend", "get", "names", "reasons"]
