"""Every backend by name: who can run a problem, who cannot and why, and which one ``auto`` takes."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence

import torch

from .. import devices
from ..core.problem import Problem
from . import cuda_launch, gpu_rule
from .base import Backend

#: Every backend by name; each lives in the module of the same name, as ``BACKEND``.
NAMES: tuple[str, ...] = ("eager", "cpu", "triton", "cuda", "cudnn", "two_pass")

#: The order in which ``auto`` asks, per device type. The reason of each order stands in :func:`choose`.
_LADDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "eager"),
    "cuda": ("cuda", "triton", "cudnn", "two_pass", "eager"),
}

_loaded: dict[str, Backend] = {}


def get(name: str) -> Backend:
    """The backend called ``name``; ValueError for an unknown name."""
    backend = _loaded.get(name)
    if backend is None:
        if name not in NAMES:
            raise ValueError(f"backend: expected 'auto' or one of {', '.join(NAMES)}, got {name!r}")
        backend = _loaded[name] = importlib.import_module(f".{name}", __package__).BACKEND
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
    ladder: Sequence[str] = _LADDER.get(problem.device_type, ("eager",))
    if problem.device_type == "cuda" and torch.cuda.is_available():
        index = torch.cuda.current_device()
        device = devices.of(torch.device("cuda", index))
        ladder = gpu_rule.order(gpu_rule.PREFERENCE, problem, device, cuda_launch.of_index(index))
    for candidate in ladder:
        backend = get(candidate)
        if backend.can_run(problem) is None:
            return backend
    return get("eager")
