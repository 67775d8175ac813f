"""Candidates: every way to run a call, each a backend with one of its configurations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..problem import Problem
from ..reference import Tail

logger = logging.getLogger("fused_resnet")


@dataclass(frozen=True)
class Candidate:
    """A backend and one of its configurations, or None where it has none to choose."""

    backend: str
    configuration: Any = None

    @property
    def name(self) -> str:
        """As in tables and on disk: ``"triton 128x64x32 …"``, or the backend alone."""
        return self.backend if self.configuration is None else f"{self.backend} {self.configuration}"

    def bind(self, problem: Problem, tail: Tail) -> Callable[[Tail], Tensor]:
        return backends.get(self.backend).bind(problem, tail, self.configuration)


def of_backend(name: str, problem: Problem, device: torch.device) -> list[Candidate]:
    """The candidates of one backend, its preference first; empty where it cannot run ``problem``."""
    backend = backends.get(name)
    if backend.can_run(problem) is not None:
        return []
    return [Candidate(name, configuration) for configuration in backend.candidates(problem, device)]


def every(problem: Problem, device: torch.device, limit: int | None = None) -> list[Candidate]:
    """All candidates for ``problem``, eager last; of each backend at most the ``limit`` that it prefers."""
    found: list[Candidate] = []
    for name in sorted(backends.names(), key=lambda name: name == "eager"):
        try:
            found += of_backend(name, problem, device)[:limit]
        except Exception as error:  # a broken installation of one backend is no reason to tune none
            logger.warning("fused_resnet: backend %s offers no candidates (%s)", name, first_line(error))
    return found


def by_name(candidates: Sequence[Candidate], names: Sequence[str]) -> list[Candidate]:
    """The candidates called ``names``, in that order; a name that no longer exists is left out."""
    known = {candidate.name: candidate for candidate in candidates}
    return [known[name] for name in names if name in known]


def first_line(error: BaseException) -> str:
    """An exception as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
