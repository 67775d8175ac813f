"""Plans: decisions made once per signature of a call, so that a repeated call pays for its kernel only.

The signature is everything that the decision may depend on: shapes, strides, dtypes and devices of all tensors, the
options, and the switches of torch that change the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..core.layout import empty_output, output_memory_format
from ..core.problem import Problem, tf32_allowed
from ..core.reference import TailArguments
from . import choice

Runner = Callable[[TailArguments], Tensor]


_plans: dict[Any, Runner] = {}
_PLANS_KEPT = 4096


def clear() -> None:
    """Forget which backend runs which call, because ``can_run`` or the tuner may answer differently now."""
    _plans.clear()


def forget() -> None:
    """Read the verdicts and times of every device again, and decide every call again."""
    choice.forget_stores()
    clear()


def switches(x: Tensor) -> tuple[Any, ...]:
    """The state of the process that a plan depends on."""
    backend = backends.default_backend()
    if not x.is_cuda:
        return (backend,)
    tf32 = x.dtype is torch.float32 and tf32_allowed()
    return (backend, tf32, torch.are_deterministic_algorithms_enabled())


def _of(t: Tensor | None) -> Any:
    return None if t is None else (t.shape, t.stride(), t.dtype, t.device)


def signature(tail: TailArguments, backend: str) -> tuple[Any, ...]:
    """The key of a call's plan."""
    x, conv, residual, *options, proj_x, proj, proj_stride, _, winograd = tail
    key = (backend, *options, proj_stride, winograd, conv.eps, switches(x), _of(residual), _of(x), *map(_of, conv[:6]))
    return key if proj is None else (*key, proj.eps, _of(proj_x), *map(_of, proj[:6]))


def find(tail: TailArguments, backend: str) -> Runner:
    """What runs calls like ``tail``: checked and chosen at the first call of a signature, looked up afterwards."""
    key = signature(tail, backend)
    run = _plans.get(key)
    if run is None:
        run, keep = _decide(tail, backend)
        if keep:
            if len(_plans) >= _PLANS_KEPT:  # an endless variety of shapes (a detector): start afresh
                clear()
            _plans[key] = run
    return run


def _decide(tail: TailArguments, backend: str) -> tuple[Runner, bool]:
    """The checks and the choice. The flag says whether they hold for later calls too."""
    problem = Problem.from_tail(tail)
    if tail.winograd not in ("auto", "f2", "off"):
        raise ValueError(f"winograd: expected 'auto', 'f2' or 'off', got {tail.winograd!r}")
    if problem.n == 0:
        backends.choose(problem, backend)  # raises where the named backend could not have run it
        shape, dtype = problem.output_shape, problem.output_dtype
        return lambda t: empty_output(shape, dtype, t.x.device, output_memory_format(t.x, t.conv.weight)), True
    return choice.decide(problem, tail, backend)
