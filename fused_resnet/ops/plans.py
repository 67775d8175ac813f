"""Plans: what is decided once per signature of a call, so that a repeated call pays for its kernel only.

The signature is everything that the decision may depend on: shapes, strides, dtypes and devices of all tensors, the
options, and the switches of torch that change the arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import backends
from ..layout import empty_output, output_memory_format
from ..problem import Problem, tf32_allowed
from ..reference import Tail
from ..tuning import choice

Runner = Callable[[Tail], Tensor]


class Plan:
    """How calls of one signature run, and how many have."""

    __slots__ = ("calls", "run")

    def __init__(self, run: Runner) -> None:
        self.run = run
        self.calls = 0


_plans: dict[Any, Plan] = {}
_PLANS_KEPT = 4096


class Cache(Protocol):
    def clear(self) -> None: ...


#: Caches made from plans elsewhere; they go when the plans go.
derived: list[Cache] = []


#: How often the plans went, for what is made of plans and cannot be emptied from here.
clears = 0


def clear() -> None:
    """Forget which backend runs which call, for when the answer of ``can_run`` or of the tuner may have changed."""
    global clears
    clears += 1
    _plans.clear()
    for cache in derived:
        cache.clear()


# os.environ.get encodes the name anew on every call, 1.3 microseconds; the mapping below it takes 0.04.
_environment: Any = getattr(os.environ, "_data", os.environ)
_BACKEND_VARIABLE: Any = getattr(os.environ, "encodekey", str)("FUSED_RESNET_BACKEND")


def backend_variable() -> tuple[dict[Any, Any], Any, Any]:
    """Where the environment's choice of a backend stands, under what name, and what it is now (None: not set)."""
    return _environment, _BACKEND_VARIABLE, _environment.get(_BACKEND_VARIABLE)


def switches(x: Tensor) -> tuple[Any, ...]:
    """The state of the process that a plan depends on."""
    if not x.is_cuda:
        return (_environment.get(_BACKEND_VARIABLE),)
    tf32 = x.dtype is torch.float32 and tf32_allowed()
    return (_environment.get(_BACKEND_VARIABLE), tf32, torch._C._get_deterministic_algorithms())


def _of(t: Tensor | None) -> Any:
    return None if t is None else (t.shape, t.stride(), t.dtype, t.device)


def signature(tail: Tail, backend: str) -> tuple[Any, ...]:
    """The key of a call's plan."""
    x, conv, residual, *options, proj_x, proj, proj_stride, _, winograd = tail
    key = (backend, *options, proj_stride, winograd, conv.eps, switches(x), _of(residual), _of(x), *map(_of, conv[:6]))
    return key if proj is None else (*key, proj.eps, _of(proj_x), *map(_of, proj[:6]))


def known(tail: Tail, backend: str) -> Plan | None:
    """The plan for calls like ``tail``, if there is one already."""
    return _plans.get(signature(tail, backend))


def find(tail: Tail, backend: str) -> Runner:
    """What runs calls like ``tail``: checked and chosen at the first call of a signature, looked up afterwards."""
    key = signature(tail, backend)
    plan = _plans.get(key)
    if plan is None:
        run, keep = _decide(tail, backend)
        if not keep:
            return run
        if len(_plans) >= _PLANS_KEPT:  # shapes without end (a hypothesis test, a detector): start afresh
            clear()
        plan = _plans[key] = Plan(run)
    plan.calls += 1
    return plan.run


def _decide(tail: Tail, backend: str) -> tuple[Runner, bool]:
    """The checks and the choice. The flag says whether they hold for later calls too."""
    problem = Problem.from_tail(tail)
    if tail.winograd not in ("auto", "f2", "off"):
        raise ValueError(f"winograd: expected 'auto', 'f2' or 'off', got {tail.winograd!r}")
    if problem.n == 0:
        backends.choose(problem, backend)  # raises where the named backend could not have run it
        shape, dtype = problem.output_shape, problem.output_dtype
        return lambda t: empty_output(shape, dtype, t.x.device, output_memory_format(t.x, t.conv.weight)), True
    return choice.decide(problem, tail, backend)
