"""The timing protocol: fair order, fresh inputs, checked outputs, honest intervals."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet.core import timing
from fused_resnet.core.timing import (
    AS_FAST,
    Contender,
    CudaStopwatch,
    Ratio,
    compare,
    first_tensor,
    graphed,
    median_interval,
    relative_error,
    threads,
)


def doubled(x: Tensor) -> Tensor:
    return x * 2


def inputs_of(round_number: int) -> tuple[Tensor]:
    return (torch.full((4,), float(round_number + 1)),)


def injected(seconds: dict[Callable[..., Any], float], log: list[Any] | None = None) -> Callable[..., Any]:
    """A timer that answers from a table, and logs which function saw which input."""

    def timer(fn: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[float, Any]:
        if log is not None:
            log.append((fn, inputs[0]))
        return seconds[fn], fn(*inputs)

    return timer


def distinct() -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return (lambda x: x + x), (lambda x: 2 * x)


def test_speedup_is_the_median_of_the_ratios_of_each_round() -> None:
    slow, fast = distinct()
    result = compare(
        [Contender("slow", lambda: slow), Contender("fast", lambda: fast)],
        inputs_of,
        timer=injected({slow: 3.0, fast: 2.0}),
    )
    assert result.rounds == 30
    assert len(result.timings["fast"].times) == 30
    assert result.speedup("fast", "slow") == Ratio(1.5, 1.5, 1.5)
    assert result.speedup("slow", "fast").median == pytest.approx(2 / 3)


def test_the_faster_layout_is_the_baseline() -> None:
    nchw, nhwc, ours = (lambda x: x + x), (lambda x: 2 * x), (lambda x: x * 2)
    result = compare(
        [Contender("nchw", lambda: nchw), Contender("nhwc", lambda: nhwc), Contender("ours", lambda: ours)],
        inputs_of,
        timer=injected({nchw: 4.0, nhwc: 3.0, ours: 2.0}),
    )
    assert result.best(["nchw", "nhwc"]) == "nhwc"
    assert result.speedup("ours", ["nchw", "nhwc"]).median == 1.5
    with pytest.raises(KeyError, match="none of missing"):
        result.best(["missing"])


def test_order_is_drawn_anew_and_each_call_has_its_own_fresh_input() -> None:
    a, b = distinct()

    def measured() -> list[Any]:
        log: list[Any] = []
        sides = [Contender("a", lambda: a), Contender("b", lambda: b)]
        compare(sides, inputs_of, rounds=20, timer=injected({a: 1.0, b: 1.0}, log))
        return log

    log = measured()
    rounds = [[fn for fn, _ in log[i : i + 2]] for i in range(0, 40, 2)]
    assert all(set(order) == {a, b} for order in rounds)  # each once per round
    assert 5 <= rounds.count([a, b]) <= 15  # neither side is always second
    assert [fn for fn, _ in measured()] == [fn for fn, _ in log]  # the same order each time
    assert len({x.data_ptr() for _, x in log}) == len(log)  # all still alive, so no storage was handed out twice
    values = [float(x[0]) for _, x in log]
    assert values == [float(2 + i // 2) for i in range(40)]  # both sides of a round see equal values


def test_inference_mode_and_thread_number_hold_for_all() -> None:
    seen: list[tuple[bool, int]] = []

    def observe(x: Tensor) -> Tensor:
        seen.append((torch.is_inference_mode_enabled(), torch.get_num_threads()))
        return x

    before = torch.get_num_threads()
    result = compare([Contender("observe", lambda: observe)], inputs_of, rounds=2, num_threads=1)
    assert set(seen) == {(True, 1)}
    assert result.threads == 1
    assert torch.get_num_threads() == before


def test_a_contender_that_changes_the_threads_voids_the_comparison() -> None:
    def meddle(x: Tensor) -> Tensor:
        torch.set_num_threads(3)
        return x

    with threads(1), pytest.raises(RuntimeError, match="from 1 to 3"):
        compare([Contender("meddle", lambda: meddle)], inputs_of, rounds=1)


@pytest.mark.parametrize("wrong_from", [0, 6], ids=["from the start", "in the last round"])
def test_a_wrong_output_is_not_timed(wrong_from: int) -> None:
    calls = itertools.count()

    def wrong(x: Tensor) -> Tensor:
        return x * 2.2 if next(calls) >= wrong_from else x * 2

    with pytest.raises(RuntimeError, match=r"wrong: output differs .* 1\.0e-01"):
        compare([Contender("right", lambda: doubled), Contender("wrong", lambda: wrong)], inputs_of, rounds=3)


def test_expected_is_the_oracle_when_given() -> None:
    with pytest.raises(RuntimeError, match="first: output differs"):
        compare([Contender("first", lambda: lambda x: x)], inputs_of, expected=doubled, rounds=1)
    off = Contender("off", lambda: lambda x: x * 2.001)
    result = compare([off], inputs_of, expected=doubled, rounds=1)
    assert result.timings["off"].error == pytest.approx(5e-4, rel=1e-3)


def test_an_optional_rival_is_absent_with_its_reason_and_others_raise() -> None:
    def missing() -> Callable[..., Any]:
        raise ImportError("No module named 'rival'\nsecond line")

    ours = Contender("ours", lambda: doubled)
    result = compare([ours, Contender("rival", missing, optional=True)], inputs_of, rounds=1)
    assert result.absent == {"rival": "ImportError: No module named 'rival'"}
    assert list(result.timings) == ["ours"]
    with pytest.raises(ImportError, match="rival"):
        compare([ours, Contender("rival", missing)], inputs_of, rounds=1)


def test_own_inputs_and_outputs_of_a_foreign_runtime() -> None:
    foreign = Contender(
        "numpy",
        lambda: lambda a: {"y": a * 2},
        inputs=lambda x: (x.numpy().copy(),),
        output=lambda r: torch.tensor(r["y"]),
    )
    result = compare([Contender("torch", lambda: doubled), foreign], inputs_of, rounds=2)
    assert result.timings["numpy"].error == 0.0
    assert result.timings["numpy"].preparation > 0.0


def test_progress_and_the_real_clock() -> None:
    done: list[tuple[int, int]] = []
    result = compare(
        [Contender("x", lambda: doubled)], inputs_of, rounds=3, pause=1e-3, progress=lambda *step: done.append(step)
    )
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert 0 < result.timings["x"].median < 1
    assert result.timings["x"].percentile(0) <= result.timings["x"].median <= result.timings["x"].percentile(100)


def test_median_interval_is_the_order_statistics_of_thirty() -> None:
    # For n = 30 the textbook interval is from the 10th to the 21st value (coverage 0.957).
    values = [float(v) for v in range(1, 31)]
    random.Random(0).shuffle(values)
    assert median_interval(values) == Ratio(15.5, 10.0, 21.0)


@pytest.mark.parametrize("n", [6, 11, 30, 101])
def test_median_interval_covers_and_is_no_wider_than_needed(n: int) -> None:
    _, low, high = median_interval([float(v) for v in range(1, n + 1)])
    rank = int(low)
    assert high == n + 1 - rank
    outside = 2 * sum(math.comb(n, k) for k in range(rank)) / 2**n
    narrower = 2 * sum(math.comb(n, k) for k in range(rank + 1)) / 2**n
    assert outside <= 0.05 < narrower


def test_median_interval_of_few_values_is_their_range() -> None:
    assert median_interval([3.0]) == Ratio(3.0, 3.0, 3.0)
    assert median_interval([1.0, 2.0, 9.0]) == Ratio(2.0, 1.0, 9.0)
    with pytest.raises(ValueError, match="at least one"):
        median_interval([])


def test_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    rng = random.Random(1)
    hits = 0
    for _ in range(400):
        interval = median_interval([rng.lognormvariate(0.0, 1.0) for _ in range(30)])
        hits += interval.low <= 1.0 <= interval.high
    assert hits / 400 > 0.92  # 0.957 expected, standard deviation 0.011


def test_as_fast_is_a_statement_about_the_lower_end() -> None:
    assert Ratio(1.2, AS_FAST, 1.4).as_fast
    assert not Ratio(1.2, 0.97, 1.4).as_fast
    assert str(Ratio(1.234, 1.1, 1.3)) == "1.23x [1.10, 1.30]"


def test_relative_error_and_first_tensor() -> None:
    a = torch.tensor([1.0, -4.0])
    assert relative_error(a, a) == 0.0
    assert relative_error(a + torch.tensor([0.0, 1.0]), a) == 0.25
    assert relative_error(a, a[:1]) == math.inf
    assert relative_error(torch.tensor([1.0, math.nan]), a) == math.inf
    assert relative_error(torch.empty(0), torch.empty(0)) == 0.0
    assert first_tensor({"out": [(a,), None]}) is a
    assert statistics.mean(first_tensor([a.numpy()]).tolist()) == -1.5


# ---- on a GPU, by a stand-in for its clock -------------------------------------------------------------------


class Gpu:
    """A GPU that works through its queue while the host goes on: kernels take ``work`` seconds, launches ``host``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0  # the host's clock
        self.free = 0.0  # when the GPU has done all that is queued
        gpu = self

        class Event:
            def __init__(self, **options: Any) -> None:
                pass

            def record(self) -> None:
                self.at = max(gpu.now, gpu.free)

            def query(self) -> bool:
                return gpu.now >= self.at

            def synchronize(self) -> None:
                gpu.synchronize()

            def elapsed_time(self, other: Any) -> float:
                return 1e3 * (other.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: self.synchronize())
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.queue(cycles / CudaStopwatch.CYCLES))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: None)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        self.stopwatch = CudaStopwatch(torch.device("cpu"))

    def queue(self, seconds: float) -> None:
        self.free = max(self.now, self.free) + seconds

    def synchronize(self) -> None:
        self.now = max(self.now, self.free)

    def call(self, work: float, host: float, waits: bool = False) -> Callable[[], str]:
        def fn() -> str:
            self.now += host
            self.queue(work)
            if waits:
                self.synchronize()
            return "done"

        return fn


@pytest.mark.parametrize(("work", "host"), [(5e-6, 15e-6), (5e-6, 3e-3), (4e-3, 10e-6)], ids=["short", "slow", "long"])
def test_a_gpus_time_is_without_the_hosts(work: float, host: float, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    fn = gpu.call(work, host)
    for _ in range(2):
        seconds, output = gpu.stopwatch(fn, ())
        assert seconds == pytest.approx(work)
        assert output == "done"
        assert gpu.stopwatch.host == pytest.approx(host)
        assert not gpu.stopwatch.synchronised


def test_a_call_that_waits_is_timed_with_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    fn = gpu.call(5e-6, 40e-6, waits=True)
    for _ in range(2):
        assert gpu.stopwatch(fn, ())[0] == pytest.approx(45e-6)
        assert gpu.stopwatch.synchronised
    assert gpu.stopwatch(gpu.call(5e-6, 40e-6), ())[0] == pytest.approx(5e-6)  # it says nothing about others


def test_what_is_wrong_and_optional_is_absent() -> None:
    calls = itertools.count()
    late = Contender("late", lambda: lambda x: x * (2 if next(calls) < 6 else 3), optional=True)
    wrong = Contender("wrong", lambda: lambda x: x, optional=True)
    result = compare([Contender("right", lambda: doubled), wrong, late], inputs_of, rounds=3)
    assert list(result.timings) == ["right"]
    assert "output differs" in result.absent["wrong"]
    assert "output differs" in result.absent["late"]


def test_a_graph_replays_into_the_inputs_it_was_captured_with(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[Tensor] = []

    class Graph:
        def __init__(self, x: Tensor, y: Tensor) -> None:
            self.x, self.y = x, y

        def replay(self) -> None:
            self.y.copy_(self.x * 2)

    def capture(fn: Any, inputs: tuple[Tensor]) -> tuple[Graph, Tensor]:
        captured.append(inputs[0])
        y = fn(*inputs)
        return Graph(inputs[0], y), y

    monkeypatch.setattr(timing, "_capture", capture)
    side = Contender("ours", lambda: doubled)
    result = compare([side, graphed(side)], inputs_of, rounds=3)  # fresh inputs each round: a stale one would be wrong
    assert list(result.timings) == ["ours", "ours, graph"]
    assert len(captured) == 1
    assert graphed(side).optional


def test_errors_are_found_where_the_tensors_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, so that a large batch needs no float64 copy of itself."""
    monkeypatch.setattr(timing, "_COMPARED", 8)
    expected = torch.arange(1.0, 61.0).view(5, 3, 2, 2)
    actual = expected.clone()
    actual[4, 2, 1, 1] = 57.0
    assert relative_error(actual, expected) == pytest.approx(3 / 60)
    actual[0, 0, 0, 0] = math.nan
    assert relative_error(actual, expected) == math.inf
