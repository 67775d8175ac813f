"""Which training backend runs: the fastest that can, or the one asked for."""

from __future__ import annotations

import importlib

from torch import Tensor

from .training_base import TrainingBackend

#: In order of preference; ``eager`` can always run.
NAMES = ("eager",)


def get(name: str) -> TrainingBackend:
    """The training backend called ``name``."""
    if name not in NAMES:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(NAMES)}, got {name!r}")
    module = importlib.import_module(f"fused_resnet.backends.training_{name}")
    backend: TrainingBackend = module.BACKEND
    return backend


def reasons(y: Tensor) -> dict[str, str | None]:
    """For every training backend None, or the sentence why it cannot handle activations like ``y``."""
    return {name: get(name).can_run(y) for name in NAMES}


def choose(y: Tensor, name: str = "auto") -> TrainingBackend:
    """The backend called ``name``, which must be able to run, or for "auto" the first that can."""
    if name == "auto":
        for candidate in NAMES:
            backend = get(candidate)
            if backend.can_run(y) is None:
                return backend
    backend = get(name)
    reason = backend.can_run(y)
    if reason is not None:
        raise RuntimeError(reason)
    return backend
