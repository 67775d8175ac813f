"""The backends: who can run a problem, who cannot and why, and which one ``auto`` takes.

A backend says with :meth:`Backend.can_run` whether it runs a problem, by None or by one sentence; the same
sentence serves ``explain``, logs and errors. The choice is the plain ladder of :func:`choose`.
"""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.problem import Problem
from ..core.reference import TailArguments

#: Every backend by name; each lives in the module of the same name, as ``BACKEND``.
NAMES: tuple[str, ...] = ("eager", "cpu", "triton", "cuda", "cudnn", "two_pass")

#: The order in which ``auto`` asks, per device type. The reason of each order stands in :func:`choose`.
_LADDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "eager"),
    "cuda": ("cuda", "triton", "cudnn", "two_pass", "eager"),
}


class Backend(ABC):
    """One way to compute the tail."""

    name: str

    @abstractmethod
    def can_run(self, problem: Problem) -> str | None:
        """None when this backend can run ``problem`` here and now, else one sentence that says why not."""

    @abstractmethod
    def run(self, problem: Problem, tail: TailArguments) -> Tensor:
        """Compute the tail. The arguments have been checked; any tensor may have any strides.

        The output has the memory format ``layout.output_memory_format(x, weight)`` and never shares memory
        with an argument.
        """

    def candidates(self, problem: Problem, device: torch.device) -> Sequence[Any]:
        """The configurations that compute ``problem`` on ``device``, the backend's own preference first.

        ``str(configuration)`` names one on disk and in tables, so it is unique among them, and stable as long as the
        configuration compiles to the same code. None stands for a backend that has nothing to choose.
        """
        return (None,)

    def bind(
        self, problem: Problem, tail: TailArguments, configuration: Any = None
    ) -> Callable[[TailArguments], Tensor]:
        """A function for calls like ``tail``, whose tensors agree with its in shape, strides, dtype and device.

        ``configuration`` is one of :meth:`candidates`, or None for the preferred one. Everything that depends on
        the signature alone is decided here, once; data pointers (their alignment too) differ from call to call.
        """
        return partial(self.run, problem)


_loaded: dict[str, Backend] = {}


def get(name: str) -> Backend:
    """The backend called ``name``; ValueError for an unknown name."""
    backend = _loaded.get(name)
    if backend is None:
        if name not in NAMES:
            raise ValueError(f"backend: expected 'auto' or one of {', '.join(NAMES)}, got {name!r}")
        backend = _loaded[name] = importlib.import_module(f".{name}", __name__).BACKEND
    return backend


def names() -> tuple[str, ...]:
    """The names of all backends, ``eager`` first."""
    return NAMES


def reasons(problem: Problem) -> dict[str, str | None]:
    """For each backend None (can run ``problem``) or the sentence that says why it cannot."""
    return {name: get(name).can_run(problem) for name in NAMES}


def default_backend() -> str:
    """The backend that ``auto`` stands for: the environment variable ``FUSED_RESNET_BACKEND``, else ``auto``."""
    return os.environ.get("FUSED_RESNET_BACKEND", "auto")


def choose(problem: Problem, name: str = "auto") -> Backend:
    """The backend for ``problem``: the named one, or for ``auto`` the first of a ladder that can run it.

    On the CPU there is one fused backend. On CUDA the ladder stands for a machine without a GPU, where nothing of it
    can run but its sentences are wanted; where there is one, the order is that of :mod:`.gpu_rule`,
    and a call takes what :mod:`fused_resnet.selection.choice` decides (measured, verified).
    RuntimeError with the backend's own sentence when a named backend cannot run the problem.
    """
    if name == "auto":
        name = default_backend()
    if name != "auto":
        backend = get(name)
        why_not = backend.can_run(problem)
        if why_not is not None:
            raise RuntimeError(why_not)
        return backend
    ladder = _LADDER.get(problem.device_type, ("eager",))
    if problem.device_type == "cuda" and torch.cuda.is_available():
        from . import gpu_rule

        ladder = gpu_rule.ladder(problem, torch.device("cuda", torch.cuda.current_device()))
    for candidate in ladder:
        backend = get(candidate)
        if backend.can_run(problem) is None:
            return backend
    return get("eager")
