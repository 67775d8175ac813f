"""The one timing protocol: command line, demo, tuner and benchmarks all time through :func:`compare`.

What makes two times comparable here: both sides run in one process, in inference mode, with the same number of
XX
A speed-up is the median of the ratios of each round, with a 95 % interval from order statistics (no assumption
about the distribution of times). "At least as fast" means that the interval's lower end is at least
:data:`AS_FAST`.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "AS_FAST", "ROUNDS", "Comparison", "Contender", "CudaStopwatch", "Ratio", "Timing", "compare", "first_tensor",
    "graphed", "median_interval", "relative_error", "stopwatch", "threads",
]  # fmt: skip

#: Fewest alternating rounds of a comparison whose figures are reported.
ROUNDS = 30

#: The lower end of a ratio's interval from which a side counts as at least as fast.
AS_FAST = 0.98

#: Untimed calls of each contender before the first round; caches, allocators and lazy initialisation settle.
_WARM_UP = 3

Inputs = tuple[Any, ...]


class Ratio(NamedTuple):
    """A median and the interval that holds the true median with 95 % confidence."""

    median: float
    low: float
    high: float

    @property
    def as_fast(self) -> bool:
        return self.low >= AS_FAST

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f}, {self.high:.2f}]"


def _fresh(*inputs: Any) -> Inputs:
    return tuple(t.clone() if isinstance(t, Tensor) else t for t in inputs)


def first_tensor(output: Any) -> Tensor:
    """The tensor of a model's output that is checked: itself, or the first in a tuple, list or dict."""
    while not isinstance(output, Tensor):
        if isinstance(output, dict):
            output = next(iter(output.values()))
        elif isinstance(output, (list, tuple)) and output:
            output = output[0]
        else:
            return torch.as_tensor(output)
    return output


@dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    Args:
        name: as it stands in tables.
        build: prepares (folds, compiles, exports, …) and returns the callable to time; its duration and that of
            the first call are reported as ``preparation``.
        inputs: makes this side's own copy of a round's inputs, untimed (in its memory format, or as numpy arrays).
        output: the tensor to check in what the callable returns, untimed.
        optional: whether a failure to build or run, or a wrong answer, makes it absent, with the reason (a rival
            that is not installed), instead of ending the comparison.
    """

    name: str
    build: Callable[[], Callable[..., Any]]
    inputs: Callable[..., Inputs] = _fresh
    output: Callable[[Any], Tensor] = first_tensor
    optional: bool = False


@dataclass
class Timing:
    """The times of one contender, in seconds, one per round."""

    name: str
    times: list[float] = field(default_factory=list)
    host_times: list[float] = field(default_factory=list)  # on CUDA: what the host took to queue each call
    preparation: float = 0.0
    error: float = 0.0  # largest |output - expected| / largest |expected|

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    def percentile(self, percent: float) -> float:
        ordered = sorted(self.times)
        return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]


@dataclass
class Comparison:
    """What :func:`compare` measured."""

    timings: dict[str, Timing]
    absent: dict[str, str]  # contender -> one sentence why it was not timed
    device: str
    threads: int
    rounds: int

    def best(self, names: Sequence[str]) -> str:
        """The one of ``names`` with the lowest median (of those that were timed)."""
        present = [name for name in names if name in self.timings]
        if not present:
            raise KeyError(f"none of {', '.join(names)} was timed")
        return min(present, key=lambda name: self.timings[name].median)

    def speedup(self, name: str, over: str | Sequence[str]) -> Ratio:
        """How many times faster ``name`` is than ``over``; with several, than the fastest of them."""
        baseline = self.timings[over if isinstance(over, str) else self.best(over)]
        return median_interval([b / t for b, t in zip(baseline.times, self.timings[name].times, strict=True)])


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Ratio:
    """The median with its distribution-free interval: the order statistics l and n + 1 - l of the largest l for
    which a Binomial(n, 1/2) falls below l with probability at most ``(1 - confidence) / 2``."""
    ordered = sorted(values)
    n = len(ordered)
    if n == 0:
        raise ValueError("median_interval: expected at least one value, got none")
    rank, tail = 0, 0.5**n
    while rank < n // 2 and tail <= (1 - confidence) / 2:
        rank += 1
        tail += math.comb(n, rank) * 0.5**n
    rank = max(rank, 1)  # below six values no such interval exists: the range is the honest answer
    return Ratio(statistics.median(ordered), ordered[rank - 1], ordered[n - rank])


#: Elements that are compared at once, in float64 and where they lie: a batch of 256 never travels to the host.
_COMPARED = 1 << 25


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over largest expected magnitude; inf where shapes differ or values are not finite."""
    if actual.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().to(expected.device), expected.detach()
    if actual.dim() == 0:
        actual, expected = actual[None], expected[None]
    rows = max(1, _COMPARED * len(actual) // actual.numel())
    maxima = []
    for a, e in zip(actual.split(rows), expected.split(rows), strict=True):
        e = e.to(torch.float64)
        maxima.append(torch.stack([(a.to(torch.float64) - e).abs().max(), e.abs().max()]))
    difference, scale = torch.stack(maxima).amax(0).tolist()
    return difference / scale if math.isfinite(difference) and scale > 0 else (0.0 if difference == 0 else math.inf)


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Run with ``count`` torch threads (None: as it is), and put the old number back."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def stopwatch(device: torch.device) -> Callable[[Callable[..., Any], Inputs], tuple[float, Any]]:
    """The timer for ``device``: ``seconds, output = timer(fn, inputs)``."""
    return CudaStopwatch(device) if device.type == "cuda" else _time_on_cpu


def _time_on_cpu(fn: Callable[..., Any], inputs: Inputs) -> tuple[float, Any]:
    start = time.perf_counter()
    output = fn(*inputs)
    return time.perf_counter() - start, output


class CudaStopwatch:
    """The seconds that a GPU takes for a call, without the host's.

    Events around a short kernel on an idle GPU measure the host that launches it. Here the GPU first flushes L2 and
    then spins for longer than the host needs to queue the call: the events stand next to its kernels. Was the spin
    over before all was queued, the call is timed again behind a longer one. A call that waits for the GPU itself is
    never queued in time: it is timed with the host.

    After a call, ``host`` is the seconds that the host took for it, and ``synchronised`` whether it waited.
    """

    #: Spins in seconds: of the first attempt and at most. Cycles of a clock of 2 GHz; a slower one spins longer.
    FIRST_SPIN, LONGEST_SPIN, CYCLES = 100e-6, 50e-3, 2e9

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host = 0.0
        self.synchronised = False
        self._spins: dict[int, float] = {}  # by the function's id; inf for one that waits
        # Twice L2, written before each call: no contender finds its operands in cache.
        properties = torch.cuda.get_device_properties(device)
        size = 2 * max(getattr(properties, "L2_cache_size", 0), 32 << 20)
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, fn: Callable[..., Any], inputs: Inputs) -> tuple[float, Any]:
        spin = self._spins.get(id(fn), self.FIRST_SPIN)
        while spin <= self.LONGEST_SPIN:
            seconds, output, queued = self._time(fn, inputs, spin)
            if queued:
                self._spins[id(fn)] = spin
                self.synchronised = False
                return seconds, output
            spin = max(2 * spin, 1.5 * self.host)
        self._spins[id(fn)] = math.inf
        seconds, output, _ = self._time(fn, inputs, 0.0)
        self.synchronised = True
        return seconds, output

    def _time(self, fn: Callable[..., Any], inputs: Inputs, spin: float) -> tuple[float, Any, bool]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        torch.cuda.synchronize(self.device)
        if spin:
            torch.cuda._sleep(int(spin * self.CYCLES))
        start.record()
        before = time.perf_counter()
        output = fn(*inputs)
        self.host = time.perf_counter() - before
        end.record()
        queued = not start.query()  # still spinning: nothing of the call has run yet
        end.synchronize()
        return start.elapsed_time(end) / 1e3, output, queued


def graphed(contender: Contender) -> Contender:
    """``contender`` as a CUDA graph: captured at its first call, replayed on inputs that are copied into its own.

    Optional: what cannot be captured is absent with the reason.
    """
    own: list[Inputs] = []
    captured: list[tuple[Any, Any]] = []

    def inputs(*given: Any) -> Inputs:
        fresh = contender.inputs(*given)
        if not own:
            own.append(fresh)
        for mine, new in zip(own[0], fresh, strict=True):
            if isinstance(mine, Tensor) and mine is not new:
                mine.copy_(new)
        return own[0]

    def build() -> Callable[..., Any]:
        fn = contender.build()

        def replay(*static: Any) -> Any:
            if not captured:
                captured.append(_capture(fn, static))
            graph, output = captured[0]
            graph.replay()
            return output

        return replay

    return Contender(f"{contender.name}, graph", build, inputs, contender.output, optional=True)


def _capture(fn: Callable[..., Any], inputs: Inputs) -> tuple[Any, Any]:
    """The graph of ``fn(*inputs)`` and its output; what is decided, compiled or allocated once is so before."""
    for _ in range(_WARM_UP):
        fn(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = fn(*inputs)
    return graph, output


def compare(
    contenders: Sequence[Contender],
    make_inputs: Callable[[int], Inputs],
    *,
    expected: Callable[..., Tensor] | None = None,
    max_error: float = 1e-2,
    rounds: int = ROUNDS,
    device: torch.device | str = "cpu",
    num_threads: int | None = None,
    pause: float = 0.0,
    timer: Callable[[Callable[..., Any], Inputs], tuple[float, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Time ``contenders`` against each other by the protocol of this module.

    Args:
        make_inputs: the inputs of a round, by its number; each contender gets its own copy of them.
        expected: computes the right output from a round's inputs; the first contender by default. An output whose
            :func:`relative_error` exceeds ``max_error`` raises RuntimeError (an optional contender is absent): the
            time of a wrong answer is no time.
        max_error: coarse on purpose; it tells a wrong result from a rounded one. The errors are in the result.
        rounds: each contender is called once per round, in an order drawn anew for each (from a fixed seed).
        num_threads: torch threads for all; None leaves them as they are.
        pause: seconds of sleep before each timed call, which lets thread pools of other libraries stop spinning.
        timer: replaces the clock of ``device`` (tests).
        progress: called as ``progress(done, total)`` after each round.
    """
    device = torch.device(device)
    timer = timer or stopwatch(device)
    timings: dict[str, Timing] = {}
    absent: dict[str, str] = {}
    running: list[tuple[Contender, Callable[..., Any]]] = []

    with threads(num_threads) as count, torch.inference_mode():
        first = make_inputs(0)
        answer = expected(*_fresh(*first)) if expected is not None else None

        def checked(contender: Contender, output: Any, answer: Tensor) -> None:
            timing = timings[contender.name]
            timing.error = max(timing.error, relative_error(contender.output(output), answer))
            if timing.error > max_error:
                raise RuntimeError(
                    f"{contender.name}: output differs from the expected one by {timing.error:.1e} of its largest "
                    f"value, allowed {max_error:.1e}; its time would be meaningless"
                )

        def drop(contender: Contender, error: Exception) -> None:
            if not contender.optional:
                raise error
            absent[contender.name] = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
            timings.pop(contender.name, None)

        for contender in contenders:
            start = time.perf_counter()
            try:
                fn = contender.build()
                output = fn(*contender.inputs(*first))
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                timings[contender.name] = Timing(contender.name, preparation=time.perf_counter() - start)
                if answer is None:
                    answer = contender.output(output).clone()
                checked(contender, output, answer)
                for _ in range(_WARM_UP):
                    fn(*contender.inputs(*first))
            except Exception as error:
                drop(contender, error)
            else:
                running.append((contender, fn))

        last: list[tuple[Contender, Any]] = []
        draw = random.Random(0)
        for round_number in range(1, rounds + 1):
            inputs = make_inputs(round_number)
            last = []
            # Drawn, not rotated: a contender that always followed the same one would pay for what that one leaves in
            # the caches and, where it has threads of its own, still spinning.
            for contender, fn in draw.sample(running, len(running)):
                own = contender.inputs(*inputs)
                if pause:
                    time.sleep(pause)
                seconds, output = timer(fn, own)
                timings[contender.name].times.append(seconds)
                if isinstance(timer, CudaStopwatch):
                    timings[contender.name].host_times.append(timer.host)
                if round_number == rounds:
                    last.append((contender, output))
            if progress is not None:
                progress(round_number, rounds)
        if last:
            by_name = {contender.name: output for contender, output in last}
            baseline = running[0][0]
            answer = expected(*_fresh(*inputs)) if expected else baseline.output(by_name[baseline.name])
            for contender, output in last:
                try:
                    checked(contender, output, answer)
                except RuntimeError as error:
                    drop(contender, error)
        if torch.get_num_threads() != count:
            raise RuntimeError(
                f"a contender changed the number of torch threads from {count} to {torch.get_num_threads()}; "
                f"the comparison is void"
            )
    return Comparison(timings, absent, device.type, count, rounds)
