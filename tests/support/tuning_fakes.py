"""A backend made of plain functions, for the tests of the tuner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet.backends import Backend, registry
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import TailArguments, reference
from fused_resnet.selection import verify
from fused_resnet.selection.calls import Call
from fused_resnet.selection.store import Store
from fused_resnet.testing import make_tail

CPU = torch.device("cpu")
ENVIRONMENT = {"device": "Abacus 3000", "driver": "1", "torch": "2"}
PROBLEM = Problem.parse("n=2,h=6,w=5,c=4,k=8,padding=1,residual=1")

Run = Callable[[TailArguments], Tensor]


def right(tail: TailArguments) -> Tensor:
    """The exact result, rounded once."""
    dtype = tail.x.dtype if tail.residual is None else torch.promote_types(tail.x.dtype, tail.residual.dtype)
    return reference(tail.to(torch.float64)).to(dtype)


def raising(error: BaseException) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        raise error

    return run


class Configuration(str):
    """A configuration that computes with ``run`` and, by the injected clock, takes ``seconds``."""

    run: Run
    seconds: float

    def __new__(cls, name: str, run: Run = right, seconds: float = 1.0) -> Configuration:
        made = super().__new__(cls, name)
        made.run, made.seconds = run, seconds
        return made


class FakeBackend(Backend):
    name = "fake"

    def __init__(self, configurations: Sequence[Configuration] = ()) -> None:
        self.configurations = list(configurations)
        self.ran: list[str] = []

    def can_run(self, problem: Problem) -> str | None:
        return None if problem.groups == 1 else f"fake: groups must be 1, got {problem.groups}"

    def run(self, problem: Problem, tail: TailArguments) -> Tensor:
        return self.bind(problem, tail)(tail)

    def candidates(self, problem: Problem, device: torch.device) -> Sequence[Any]:
        return self.configurations

    def bind(self, problem: Problem, tail: TailArguments, configuration: Any = None) -> Run:
        chosen = configuration or self.configurations[0]

        def bound(tail: TailArguments) -> Tensor:
            self.ran.append(str(chosen))
            return chosen.run(tail)

        bound.seconds = chosen.seconds  # type: ignore[attr-defined]
        return bound


def install(monkeypatch: pytest.MonkeyPatch, *configurations: Configuration) -> FakeBackend:
    """Make eager and the fake the only backends, and have the fake verified on first use."""
    backend = FakeBackend(configurations)
    monkeypatch.setitem(registry._loaded, "fake", backend)
    monkeypatch.setattr(registry, "NAMES", ("eager", "fake"))
    monkeypatch.setattr(registry, "_LADDER", {"cpu": ("eager",)})
    monkeypatch.setattr(verify, "needed", lambda candidate, device: candidate.backend == "fake")
    return backend


def clock(fn: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[float, Any]:
    """Runs the candidate and returns the seconds that its configuration claims; eager takes ten."""
    output = fn(*arguments)
    return getattr(fn, "seconds", 10.0), output


def call_for(problem: Problem = PROBLEM, **options: Any) -> Call:
    return Call.of(problem, make_tail(problem, **options))


def store_in(path: Any, environment: dict[str, str] = ENVIRONMENT) -> Store:
    return Store(environment, path / "tuning.json")


def shifted(tail: TailArguments) -> Tensor:
    return torch.roll(right(tail), 1, 3)
