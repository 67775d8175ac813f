"""Candidates: every way to run a call, each a backend with one of its configurations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import backends
from ..core.problem import Problem
from ..core.reference import TailArguments

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

    def bind(self, problem: Problem, tail: TailArguments) -> Callable[[TailArguments], Tensor]:
        return backends.get(self.backend).bind(problem, tail, self.configuration)


def of_backend(name: str, problem: Problem, device: torch.device) -> list[Candidate]:
    """The candidates of one backend, its preference first; empty where it cannot run ``problem``."""
    backend = backends.get(name)
    if backend.can_run(problem) is not None:
        return []
    return [Candidate(name, configuration) for configuration in backend.candidates(problem, device)]


def every(
    problem: Problem, device: torch.device, limit: int | None = None, only: Sequence[str] | None = None
) -> list[Candidate]:
    """All candidates for ``problem``, eager last; of each backend at most the ``limit`` that it prefers.

    ``only`` names the backends that are asked, besides eager, which others are compared with.
    """
    found: list[Candidate] = []
    for name in sorted(backends.names(), key=lambda name: name == "eager"):
        if only and name != "eager" and name not in only:
            continue
        try:
            found += of_backend(name, problem, device)[:limit]
        except Exception as error:  # one broken installation must not stop the tuning of all backends
            logger.warning("fused_resnet: backend %s offers no candidates (%s)", name, first_line(error))
    return found


def by_name(candidates: Sequence[Candidate], names: Sequence[str]) -> list[Candidate]:
    """The candidates called ``names``, in that order; names that no longer exist are left out."""
    known = {candidate.name: candidate for candidate in candidates}
    return [known[name] for name in names if name in known]


#: The beginning of the verdict on a candidate that did not compile.
UNCOMPILED = "failed to compile"

#: What Triton raises when its compiler, or ptxas behind it, fails; a tile too large for the GPU is no such failure.
_COMPILER_ERRORS = {"CompilationError", "PTXASError", "InterpreterError"}


def is_compiler_error(error: BaseException) -> bool:
    """Whether a kernel's code could not be made, rather than run."""
    named = any(c.__name__ in _COMPILER_ERRORS and c.__module__.startswith("triton") for c in type(error).__mro__)
    return named or "PassManager::run failed" in str(error)


class Turns:
    """Backends to skip for the rest of a call: where one candidate does not compile, the others would not either."""

    #: Backends that this process has warned about.
    _warned: ClassVar[set[str]] = set()

    def __init__(self) -> None:
        self._ended: dict[str, str] = {}

    def why_ended(self, candidate: Candidate) -> str | None:
        return self._ended.get(candidate.backend)

    def take(self, candidate: Candidate, verdict: str, problem: Problem) -> None:
        """Record the verdict of a candidate."""
        if not verdict.startswith(UNCOMPILED):
            return
        self._ended[candidate.backend] = verdict
        if candidate.backend not in self._warned:
            self._warned.add(candidate.backend)
            logger.warning(
                "fused_resnet: %s does not compile here for %s (%s); the backend's other configurations are left out",
                candidate.name, problem, verdict.removeprefix(UNCOMPILED).strip(": "),
            )  # fmt: skip


def first_line(error: BaseException) -> str:
    """An exception as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
