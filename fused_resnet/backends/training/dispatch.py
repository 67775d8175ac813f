"""Which training backend runs: the fastest that can, or the one asked for."""

from __future__ import annotations

import importlib

from torch import Tensor

from .base import TrainingBackend

#: In order of preference; ``eager`` can always run.
NAMES = ("cpu", "cuda", "triton", "eager")


def get(name: str) -> TrainingBackend:
    """The training backend called ``name``."""
    if name not in NAMES:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(NAMES)}, got {name!r}")
    module = importlib.import_module(f".{name}", __package__)
    backend: TrainingBackend = module.BACKEND
    return backend


def reasons(y: Tensor, *others: Tensor | None) -> dict[str, str | None]:
    """For every training backend None, or the sentence why it cannot handle these activations."""
    return {name: get(name).can_run(y, *others) for name in NAMES}


def choose(name: str, y: Tensor, *others: Tensor | None) -> TrainingBackend:
    """The backend called ``name``, which must be able to run, or for "auto" the first that can.

    ``others`` are the call's further activations: residual, proj_y, grad_out.
    """
    if name == "auto":
        for candidate in NAMES:
            backend = get(candidate)
            if backend.can_run(y, *others) is None:
                return backend
    backend = get(name)
    reason = backend.can_run(y, *others)
    if reason is not None:
        raise RuntimeError(reason)
    return backend
