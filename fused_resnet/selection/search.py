"""The search for one call: verify every candidate, time the right ones against each other, keep the order.

Timing is that of :mod:`fused_resnet.core.timing` (events, L2 flushed, synchronised); the candidates take turns, so that
clocks and temperature drift for all alike. A short first part drops what is far behind.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core import timing
from . import candidates as _candidates
from . import verify
from .calls import Call
from .candidates import Candidate, first_line
from .store import Store

logger = logging.getLogger("fused_resnet")

#: Rounds of the first part, and what survives it: within this factor of the best, and at most so many.
SCREENING_ROUNDS, SCREENING_FACTOR, FINALISTS = 5, 1.5, 8
ROUNDS = 30

#: Configurations of each backend that are looked at: its first few hold the winner, and each takes a compilation.
LIMIT = 6

#: Closer than this is a tie, and the candidate that stands first wins (its backend's preference, fused before eager):
#: it costs nothing and keeps the choice the same from run to run, however noisy the machine.
TIE = 0.01

Timer = Callable[[Callable[..., Any], tuple[Any, ...]], tuple[float, Any]]
Report = Callable[[str], None]


@dataclass
class Result:
    """The result of the search for one call."""

    call: Call
    medians: dict[str, float]  # seconds by candidate, the winner first
    rejected: dict[str, str] = field(default_factory=dict)  # candidate -> verdict
    resumed: bool = False

    @property
    def winner(self) -> str | None:
        return next(iter(self.medians), None)


def tune_call(
    call: Call,
    device: torch.device,
    store: Store,
    *,
    candidates: Sequence[Candidate] | None = None,
    timer: Timer | None = None,
    rounds: int = ROUNDS,
    limit: int | None = LIMIT,
    backends: Sequence[str] | None = None,
    force: bool = False,
    report: Report = lambda _: None,
) -> Result:
    """Find the fastest right candidate for ``call`` and keep the result in ``store``.

    A call that is in the store already is not timed again unless ``force``. ``limit`` is how many configurations
    of each backend are looked at, ``backends`` which (eager always). A candidate that is wrong or raises is left out,
    logged and reported; one that does not compile ends its backend's turn; one that ends the process is known to the
    next run. An interrupt keeps the verdicts so far and the calls done before.
    """
    known = store.times(call.key)
    if known and not force:
        return Result(call, known, _rejected(store, call), resumed=True)
    if candidates is None:
        candidates = _candidates.every(call.problem, device, limit, backends)
    right = []
    turns = _candidates.Turns()
    for i, candidate in enumerate(candidates, 1):
        if turns.why_ended(candidate) is not None:
            continue
        report(f"verifying {i}/{len(candidates)} {candidate.name}")
        verdict = _verdict(candidate, call, device, store)
        turns.take(candidate, verdict, call.problem)
        if verdict == "ok":
            right.append(candidate)
    result = Result(call, {}, _rejected(store, call))
    if not right:
        return result

    def drop(name: str, error: Exception) -> None:
        """A candidate that was right and raises now: a launch that fails now and then, say. It is out for good."""
        lost = verify.lost(device)
        result.rejected[name] = f"{'crashed' if lost else 'failed'}: {first_line(error)}"
        store.set_verdict(call.key, name, result.rejected[name])
        logger.warning("fused_resnet: %s is left out for %s: %s", name, call.problem, result.rejected[name])
        if lost:
            raise verify.DeviceLost(f"{name} broke the CUDA context while it was timed on {call.problem}") from error

    times = _race(right, call, device, timer or timing.stopwatch(device), rounds, drop, report)
    result.medians = _ordered(right, times)
    if result.medians:
        store.set_times(call.key, result.medians, rounds)
    return result


def _verdict(candidate: Candidate, call: Call, device: torch.device, store: Store) -> str:
    verdict = store.verdict(call.key, candidate.name)
    if verdict is None or verdict.startswith("failed"):
        # what failed may have failed for want of memory or of a compiler that is there now: ask again when tuning
        verdict = "ok" if candidate.backend == "eager" else verify.judge(candidate, call, device, store)
        if verdict != "ok" and not verdict.startswith(_candidates.UNCOMPILED):
            level = logging.INFO if verdict.startswith("failed") else logging.WARNING
            logger.log(level, "fused_resnet: %s is left out for %s: %s", candidate.name, call.problem, verdict)
    return verdict


def _rejected(store: Store, call: Call) -> dict[str, str]:
    return {name: verdict for name, verdict in store.verdicts().get(call.key, {}).items() if verdict not in ("ok", "")}


def _race(
    right: Sequence[Candidate],
    call: Call,
    device: torch.device,
    timer: Timer,
    rounds: int,
    drop: Callable[[str, Exception], None],
    report: Report,
) -> dict[str, list[float]]:
    """Seconds per round of each candidate that stayed in the race to its end."""
    tail = call.tail("random", 1, device)
    with torch.inference_mode():
        runners: dict[str, Callable[..., Any]] = {}
        for candidate in right:
            try:
                runner = candidate.bind(call.problem, tail)
                runner(tail)  # compiles, allocates its workspace
                runners[candidate.name] = runner
            except Exception as error:
                drop(candidate.name, error)
        screening = min(SCREENING_ROUNDS, rounds)
        times = _rounds(runners, tail, timer, screening, drop, report)
        if screening == rounds or not times:
            return times
        medians = {name: statistics.median(values) for name, values in times.items()}
        limit = SCREENING_FACTOR * min(medians.values())
        finalists = sorted((name for name in medians if medians[name] <= limit), key=medians.__getitem__)[:FINALISTS]
        final = {name: runners[name] for name in runners if name in finalists}  # in the candidates' order
        return _rounds(final, tail, timer, rounds, drop, report)


def _rounds(
    runners: dict[str, Callable[..., Any]],
    tail: Any,
    timer: Timer,
    rounds: int,
    drop: Callable[[str, Exception], None],
    report: Report,
) -> dict[str, list[float]]:
    racing = dict(runners)
    times: dict[str, list[float]] = {name: [] for name in racing}
    for i in range(rounds):
        report(f"timing {len(racing)} candidates, round {i + 1}/{rounds}")
        names = list(racing)
        turn = i % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            try:
                times[name].append(timer(racing[name], (tail,))[0])
            except Exception as error:
                drop(name, error)
                del racing[name], times[name]
    return times


def _ordered(candidates: Sequence[Candidate], times: dict[str, list[float]]) -> dict[str, float]:
    """Medians, best first; but in front the first of ``candidates`` that is not slower than the best beyond doubt.

    In doubt: the 95 % interval of the ratio of their times, round by round, reaches down to a tie.
    """
    medians = {c.name: statistics.median(times[c.name]) for c in candidates if times.get(c.name)}
    if not medians:
        return {}
    best = min(medians, key=medians.__getitem__)

    def ties(name: str) -> bool:
        ratios = [mine / its for mine, its in zip(times[name], times[best], strict=True)]
        return timing.median_interval(ratios).low <= 1 + TIE

    winner = next(name for name in medians if ties(name))
    rest = sorted((name for name in medians if name != winner), key=medians.__getitem__)
    return {name: medians[name] for name in [winner, *rest]}
