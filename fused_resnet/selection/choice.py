"""What runs a call: the one place where it is decided, for ``auto`` and for a named backend.

1. Order: what the tuner measured on this device; without it, on CUDA :mod:`fused_resnet.backends.gpu_rule`, on the
   CPU the ladder of :func:`fused_resnet.backends.choose`.
2. Eligible is what has been verified here, or is verified now (:mod:`.verify`). Under stream capture nothing can be
   verified, so only what has been runs, eager if need be, and the decision is not kept.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .. import backends, devices
from ..backends import cuda_launch, gpu_rule
from ..core.problem import Problem
from ..core.reference import TailArguments
from . import candidates as _candidates
from . import search, verify
from .calls import Call
from .candidates import Candidate
from .environment import environment
from .store import Store

logger = logging.getLogger("fused_resnet")
_lock = threading.RLock()

Runner = Callable[[TailArguments], Tensor]


@functools.cache
def _store(device: torch.device, directory: str | None) -> Store:
    return Store(environment(device))


def store_for(device: torch.device) -> Store:
    """The verdicts and times of ``device``, read once in a process."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _store(device, os.environ.get("FUSED_RESNET_CACHE_DIR"))


def forget_stores() -> None:
    """Read the files of verdicts and times again."""
    _store.cache_clear()


def decide(problem: Problem, tail: TailArguments, backend: str = "auto") -> tuple[Runner, bool]:
    """The function that runs calls like ``tail``, and whether that holds for later ones too.

    RuntimeError with one sentence where a named backend cannot run the problem.
    """
    device = tail.x.device
    if backend == "auto":
        backend = backends.default_backend()
    if device.type != "cuda" and backend != "auto":
        return backends.choose(problem, backend).bind(problem, tail), True
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    with _lock:
        return _decide(Call.of(problem, tail), tail, backend, store_for(device), capturing)


def _decide(call: Call, tail: TailArguments, backend: str, store: Store, capturing: bool) -> tuple[Runner, bool]:
    device = tail.x.device
    ordered = in_order(call, device, backend, store, may_tune=not capturing)
    skipped: list[str] = []
    turns = _candidates.Turns()
    for candidate in ordered:
        if turns.why_ended(candidate) is not None:
            continue
        verdict = "ok" if not (verify.enabled() and verify.needed(candidate, device)) else _verdict(
            candidate, call, device, store, capturing
        )  # fmt: skip
        if verdict == "ok":
            # If something better could not be verified now, decide again at the next call.
            keep = not any(reason == UNVERIFIED for reason in skipped)
            return candidate.bind(call.problem, tail), keep
        turns.take(candidate, verdict, call.problem)
        skipped.append(verdict)
    if backend == "auto":
        return backends.get("eager").bind(call.problem, tail), UNVERIFIED not in skipped
    reasons = "; ".join(dict.fromkeys(skipped)) or "it offers no configuration"
    raise RuntimeError(f"{backend}: no configuration may run {call.problem} on this device ({reasons})")


#: Why a candidate is not eligible during a capture.
UNVERIFIED = "not verified, which a stream capture does not allow: call once before it, or run `fused-resnet selftest`"


def _verdict(candidate: Candidate, call: Call, device: torch.device, store: Store, capturing: bool) -> str:
    verdict = store.verdict(call.key, candidate.name)
    if verdict is not None:
        return verdict
    if capturing:
        return UNVERIFIED
    verdict = verify.judge(candidate, call, device, store)
    if verdict.startswith("wrong"):
        warnings.warn(
            f"fused_resnet: {candidate.name} computes wrong results on {store.environment['device']} for "
            f"{call.problem} ({verdict}); it will not run here, the next candidate does",
            RuntimeWarning,
            stacklevel=2,
        )
    elif verdict != "ok" and not verdict.startswith(_candidates.UNCOMPILED):
        logger.warning("fused_resnet: %s cannot run %s here: %s", candidate.name, call.problem, verdict)
    return verdict


def in_order(call: Call, device: torch.device, backend: str, store: Store, may_tune: bool = False) -> list[Candidate]:
    """The candidates for ``call``, the one to be tried first in front: measured ones before all others."""
    problem = call.problem
    if backend != "auto":
        why_not = backends.get(backend).can_run(problem)
        if why_not is not None:
            raise RuntimeError(why_not)
        offered = _candidates.of_backend(backend, problem, device)
    elif device.type == "cuda":
        offered = _candidates.every(problem, device)
        index = torch.cuda.current_device() if device.index is None else device.index
        names, here = dict.fromkeys(c.backend for c in offered), cuda_launch.of_index(index)
        order = gpu_rule.order(names, problem, devices.of(device), here)
        offered.sort(
            key=lambda candidate: order.index(candidate.backend)
        )  # stable: each backend's own preference stands
    else:
        offered = [Candidate(backends.choose(problem).name), Candidate("eager")]
    times = store.times(call.key)
    if times is None and may_tune and backend == "auto" and tunes_on_first_call():
        times = _tune_now(call, device, store)
    if not times:
        return offered
    if backend == "auto" and device.type != "cuda":
        offered = _candidates.every(problem, device)
    measured = _candidates.by_name(offered, list(times))
    return measured + [candidate for candidate in offered if candidate not in measured]


def tunes_on_first_call() -> bool:
    """Whether the environment variable ``FUSED_RESNET_TUNE`` is ``first_call``."""
    return os.environ.get("FUSED_RESNET_TUNE", "") == "first_call"


def _tune_now(call: Call, device: torch.device, store: Store) -> dict[str, float] | None:
    try:
        return search.tune_call(call, device, store).medians or None
    except verify.DeviceLost:
        raise
    except Exception as error:  # failing to tune must not fail the call
        logger.warning("fused_resnet: tuning %s failed (%s)", call.problem, _candidates.first_line(error))
        return None
