"""``tune`` and ``selftest``: many calls, with progress, in a process of their own where a kernel might end it."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..selection import candidates as _candidates
from ..selection import choice, plans, verify
from ..selection.calls import Call
from ..selection.search import LIMIT, ROUNDS, Result, Timer, tune_call
from . import isolate, precompile
from .collect import calls_of

if TYPE_CHECKING:
    from rich.table import Table

Progress = Callable[[int, int, str], None]


@dataclass
class Tuning:
    """What :func:`tune` found: one result for each distinct call of the network that was finished."""

    results: list[Result]
    calls: int
    path: str
    interrupted: bool = False
    unfinished: dict[str, str] = field(default_factory=dict)  # call -> one sentence

    def table(self) -> Table:
        """The winners as a table for the terminal."""
        from rich.table import Table

        state = f", interrupted after {len(self.results)} of {self.calls}" if self.interrupted else ""
        table = Table(title=f"Tuned {len(self.results)} calls{state}", caption=self.path)
        table.add_column("problem")
        table.add_column("fastest")
        for name in ("us", "eager us", "speed-up", "candidates", "left out"):
            table.add_column(name, justify="right")
        for result in self.results:
            best = result.medians[result.winner] if result.winner else None
            eager = result.medians.get("eager")
            table.add_row(
                str(result.call.problem),
                (result.winner or "none was right") + (" (known)" if result.resumed else ""),
                "-" if best is None else f"{best * 1e6:.1f}",
                "-" if eager is None else f"{eager * 1e6:.1f}",
                f"{eager / best:.2f}x" if best and eager else "-",
                str(len(result.medians)),
                str(len(result.rejected)) if result.rejected else "",
            )
        return table


def tune(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    *,
    rounds: int = ROUNDS,
    limit: int | None = LIMIT,
    backends: Sequence[str] | None = None,
    seconds: float | None = None,
    jobs: int | None = None,
    force: bool = False,
    progress: bool | Progress | None = None,
    isolated: bool | None = None,
    timer: Timer | None = None,
) -> Tuning:
    """Find the fastest right kernel for every fused call of ``model(example)`` and keep the result for this device.

    Later calls with ``backend="auto"``, in this process and in others, take it. Each candidate is verified against
    the reference on the very problem before it is timed. Ctrl-C ends the tuning and keeps what is done; the next
    run goes on from there.

    Args:
        model: fused or not (then a fused copy is looked at), on the device to tune for.
        example: an input, or a tuple of inputs.
        rounds: alternating rounds of timing per call.
        limit: look only at so many configurations of each backend, those that it prefers; None for all.
        backends: look only at these, and at eager.
        seconds: begin no call after so long; the next run goes on with the rest.
        jobs: processes that compile Triton's kernels beforehand; default: one a core, at most 16.
        force: time again what is known.
        progress: False for silence, True for a bar on stderr, or a function ``(done, total, text)``; default: a bar
            where stderr is a terminal.
        isolated: do the work in a child process, which a crashing kernel may end without ending the tuning; default:
            on CUDA.
        timer: replaces the clock (tests); not with ``isolated``.

    Returns:
        the results, with a ``table()``.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    device = next((t.device for t in inputs if isinstance(t, Tensor)), torch.device("cpu"))
    calls = calls_of(model, example)
    store = choice.store_for(device)
    tuning = Tuning([], len(calls), str(store.path))
    if isolated is None:
        isolated = device.type == "cuda" and timer is None
    known = {call.key for call in calls if store.times(call.key) and not force}
    end = None if seconds is None else time.monotonic() + seconds
    with _reporter(progress) as report:

        def report_call(i: int, text: str) -> None:
            report(i, len(calls), text)

        try:
            if isolated:
                todo = [call for call in calls if call.key not in known]
                if not backends or "triton" in backends:
                    compiling = None if end is None else (end - time.monotonic()) / 2
                    precompile.on_device(todo, device, limit=limit, jobs=jobs, seconds=compiling, report=report)
                options = {"rounds": rounds, "limit": limit, "backends": backends, "force": force}
                left = None if end is None else end - time.monotonic()
                tuning.unfinished = isolate.tune_calls(todo, device, store, options, report_call, seconds=left)
            else:
                for i, call in enumerate(calls):
                    if end is not None and time.monotonic() > end:
                        tuning.unfinished[call.key] = f"{call.problem}: {isolate.NO_TIME}"
                        continue
                    tune_call(
                        call, device, store, timer=timer, rounds=rounds, limit=limit, backends=backends, force=force,
                        report=functools.partial(report_call, i),
                    )  # fmt: skip
        except KeyboardInterrupt:
            tuning.interrupted = True
    store.reload()
    for call in calls:
        medians = store.times(call.key)
        rejected = {name: v for name, v in store.verdicts().get(call.key, {}).items() if v not in ("ok", "")}
        if medians or (rejected and not tuning.interrupted):
            tuning.results.append(Result(call, medians or {}, rejected, call.key in known))
    plans.forget()
    return tuning


@dataclass
class Check:
    """One line of :func:`selftest`."""

    call: Call
    candidate: str
    verdict: str


def selftest(
    model: nn.Module | None = None,
    example: Tensor | tuple[Any, ...] | None = None,
    *,
    device: torch.device | str | None = None,
    calls: Sequence[Call] | None = None,
    backends: Sequence[str] | None = None,
    limit: int | None = LIMIT,
    seconds: float | None = None,
    jobs: int | None = None,
    force: bool = False,
    progress: bool | Progress | None = None,
) -> list[Check]:
    """Verify every configuration beforehand, so that none has to be on its first use (or cannot, in a capture).

    For the calls of ``model(example)``; without a model, for the problems of :mod:`fused_resnet.testing` in the
    dtypes of the device. The verdicts are kept like those of a first use. :func:`selftest_table` prints them. The
    options are those of :func:`tune`; after ``seconds`` no further configuration is begun.
    """
    end = None if seconds is None else time.monotonic() + seconds
    if calls is None:
        if model is not None and example is not None:
            calls = calls_of(model, example)
            inputs = example if isinstance(example, tuple) else (example,)
            device = device or next(t.device for t in inputs if isinstance(t, Tensor))
        else:
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            calls = _standard_calls(device)
    device = torch.device(device or "cpu")
    store = choice.store_for(device)
    checks: list[Check] = []
    with _reporter(progress) as report:
        if not backends or "triton" in backends:
            compiling = None if seconds is None else seconds / 2
            precompile.on_device(calls, device, limit=limit, jobs=jobs, seconds=compiling, report=report)
        for i, call in enumerate(calls):
            turns = _candidates.Turns()
            for candidate in _candidates.every(call.problem, device, limit, backends):
                if candidate.backend == "eager" or turns.why_ended(candidate) is not None:
                    continue
                if end is not None and time.monotonic() > end:
                    break
                report(i, len(calls), f"{candidate.name}: {call.problem}")
                verdict = None if force else store.verdict(call.key, candidate.name)
                if verdict is None:
                    verdict = verify.judge(candidate, call, device, store)
                turns.take(candidate, verdict, call.problem)
                checks.append(Check(call, candidate.name, verdict))
    plans.forget()
    return checks


def _standard_calls(device: torch.device) -> list[Call]:
    """The problem list of the tests, in each dtype that the device's kernels know."""
    import dataclasses

    from ..testing import PROBLEMS, in_dtype, make_tail

    found = []
    for case in PROBLEMS:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            problem = in_dtype(case.problem, dtype, device_type=device.type)
            if problem.n == 0:
                continue
            for tf32 in (False, True) if device.type == "cuda" and dtype is torch.float32 else (False,):
                tail = make_tail(problem, device=device)
                found.append(Call.of(dataclasses.replace(problem, tf32=tf32), tail))
    return found


def selftest_table(checks: Sequence[Check]) -> Table:
    """A row for each configuration: on how many calls it is right, wrong or cannot run, and the first reason."""
    from rich.table import Table

    rows: dict[str, list[Check]] = {}
    for check in checks:
        rows.setdefault(check.candidate, []).append(check)
    table = Table(title=f"Selftest: {len(rows)} configurations, {len(checks)} checks")
    table.add_column("configuration")
    for name in ("right", "wrong", "cannot run"):
        table.add_column(name, justify="right")
    table.add_column("first reason")
    for name, own in rows.items():
        wrong = [c for c in own if c.verdict.startswith(("wrong", "crashed"))]
        failed = [c for c in own if c.verdict.startswith("failed")]
        first = next(iter(wrong + failed), None)
        reason = "" if first is None else f"{first.verdict} ({first.call.problem})"
        right = len(own) - len(wrong) - len(failed)
        table.add_row(name, str(right), str(len(wrong)), str(len(failed)), reason)
    return table


# ---- progress ----------------------------------------------------------------------------------------------


class _reporter:
    """A progress bar, a function or silence, as a context manager that gives ``report(done, total, text)``."""

    def __init__(self, progress: bool | Progress | None) -> None:
        self._function: Progress | None = progress if callable(progress) else None
        self._bar: Any = None
        if self._function is None and (sys.stderr.isatty() if progress is None else progress):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> Progress:
        if self._bar is None:
            return self._function or (lambda done, total, text: None)
        self._bar.start()
        task = self._bar.add_task("", total=None)
        return lambda done, total, text: self._bar.update(task, completed=done, total=total, description=text)

    def __exit__(self, *exception: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
