"""The search: wrong, crashing and tying candidates, interrupts, resuming; with an injected clock."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_resnet.selection.candidates import Candidate, Turns, by_name, every
from fused_resnet.selection.search import FINALISTS, LIMIT, TIE, tune_call
from tests.support.tuning_fakes import (
    CPU,
    PROBLEM,
    Configuration,
    call_for,
    clock,
    install,
    raising,
    shifted,
    store_in,
)

# ---- the search ----------------------------------------------------------------------------------------------


def test_the_fastest_right_candidate_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(
        monkeypatch,
        Configuration("slow", seconds=3.0),
        Configuration("wrong", shifted, seconds=0.1),
        Configuration("fast", seconds=1.0),
        Configuration("broken", raising(ValueError("too much shared memory")), seconds=0.1),
    )
    store = store_in(tmp_path)
    with caplog.at_level(logging.INFO, "fused_resnet"):
        result = tune_call(call_for(), CPU, store, timer=clock)
    assert result.winner == "fake fast"
    assert "fake wrong" not in result.medians
    assert result.rejected["fake wrong"].startswith("wrong:")
    assert result.rejected["fake broken"] == "failed: ValueError: too much shared memory"
    assert "fake wrong is left out" in caplog.text
    assert "fake broken is left out" in caplog.text
    assert store_in(tmp_path).times(call_for().key) == result.medians  # and it is on disk


def test_ties_go_to_the_backends_preference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(
        monkeypatch,
        Configuration("first", seconds=1.0 + TIE / 2),
        Configuration("second", seconds=1.0),
        Configuration("third", seconds=1.0 + 2 * TIE),
    )
    result = tune_call(call_for(), CPU, store_in(tmp_path), timer=clock)
    assert list(result.medians)[:3] == ["fake first", "fake second", "fake third"]


def test_noise_does_not_decide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A lower median that the rounds do not bear out leaves the preferred candidate in front; a real lead does not."""
    install(monkeypatch, Configuration("preferred", seconds=1.0), Configuration("other", seconds=2.0))
    rounds = dict.fromkeys((1.0, 2.0, 10.0), 0)

    def noisy(lead: float) -> Any:
        def timer(fn: Any, arguments: Any) -> Any:
            which = getattr(fn, "seconds", 10.0)
            rounds[which] += 1
            wave = 1.0 + 0.2 * ((rounds[which] * (7 if which == 1.0 else 5)) % 11) / 11
            return {1.0: 1.0, 2.0: 1.0 - lead, 10.0: 10.0}[which] * wave, fn(*arguments)

        return timer

    call = call_for()
    assert tune_call(call, CPU, store_in(tmp_path), timer=noisy(0.02)).winner == "fake preferred"
    assert tune_call(call, CPU, store_in(tmp_path), timer=noisy(0.3), force=True).winner == "fake other"


def test_candidates_take_turns_and_the_slow_ones_drop_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = [Configuration(f"c{i}", seconds=1.0 + 0.04 * i) for i in range(12)]
    backend = install(monkeypatch, *names, Configuration("far", seconds=5.0))
    order: list[str] = []

    def recording(fn: Any, arguments: Any) -> Any:
        seconds, output = clock(fn, arguments)
        order.append(backend.ran[-1] if hasattr(fn, "seconds") else "eager")
        return seconds, output

    result = tune_call(call_for(), CPU, store_in(tmp_path), timer=recording, rounds=20, limit=None)
    assert len(result.medians) == FINALISTS
    assert "fake far" not in result.medians
    assert order.count("far") == 5
    final = order[5 * 14 :]
    assert len(final) == 20 * FINALISTS
    for i in range(0, len(final), FINALISTS):  # each round holds each finalist once, and starts with another one
        assert sorted(final[i : i + FINALISTS]) == sorted(f"c{j}" for j in range(FINALISTS))
    assert len({final[i] for i in range(0, len(final), FINALISTS)}) == FINALISTS


def test_one_that_fails_while_it_is_timed_is_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, Configuration("flaky", seconds=0.5), Configuration("steady", seconds=1.0))
    count = 0

    def failing(fn: Any, arguments: Any) -> Any:
        nonlocal count
        if getattr(fn, "seconds", 0) == 0.5:
            count += 1
            if count > 3:
                raise RuntimeError("launch failed")
        return clock(fn, arguments)

    store = store_in(tmp_path)
    result = tune_call(call_for(), CPU, store, timer=failing)
    assert result.winner == "fake steady"
    assert result.rejected["fake flaky"] == "failed: RuntimeError: launch failed"
    assert store.verdict(call_for().key, "fake flaky") == "failed: RuntimeError: launch failed"


def test_out_of_memory_says_nothing_about_a_candidate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, Configuration("big", raising(torch.OutOfMemoryError("no memory left"))))
    store = store_in(tmp_path)
    result = tune_call(call_for(), CPU, store, timer=clock)
    assert result.winner == "eager"
    assert store.verdict(call_for().key, "fake big") is None


def test_an_interrupt_keeps_what_is_done_and_the_next_run_resumes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = call_for(), call_for(dataclasses.replace(PROBLEM, n=3))
    backend = install(monkeypatch, Configuration("a"), Configuration("b", seconds=0.5))
    tune_call(first, CPU, store_in(tmp_path), timer=clock)

    install(monkeypatch, Configuration("a"), Configuration("b", raising(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        tune_call(second, CPU, store_in(tmp_path), timer=clock)
    left = store_in(tmp_path)
    assert left.times(first.key)
    assert left.verdict(second.key, "fake a") == "ok"
    assert left.verdict(second.key, "fake b") is None, "the user's interrupt is not the candidate's fault"

    backend = install(monkeypatch, Configuration("a"), Configuration("b", seconds=0.5))
    again = tune_call(first, CPU, store_in(tmp_path), timer=clock)
    assert again.resumed
    assert backend.ran == []
    assert tune_call(second, CPU, store_in(tmp_path), timer=clock).winner == "fake b"
    assert tune_call(first, CPU, store_in(tmp_path), timer=clock, force=True).resumed is False


def test_limit_takes_what_each_backend_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *(Configuration(str(i)) for i in range(5)))
    assert [c.name for c in every(PROBLEM, CPU, limit=2)] == ["fake 0", "fake 1", "eager"]


def test_six_of_each_backend_unless_asked_for_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, *(Configuration(f"{i}") for i in range(9)))
    found = [tune_call(call_for(), CPU, store_in(tmp_path / str(i)), timer=clock, rounds=1, **options)
             for i, options in enumerate(({}, {"limit": None}, {"backends": ["eager"]}))]  # fmt: skip
    assert [len(result.medians) for result in found] == [LIMIT + 1, 10, 1]
    assert LIMIT == 6


class CompilationError(Exception):
    """Named and placed like Triton's, which need not be installed."""


CompilationError.__module__ = "triton.compiler.errors"


def test_one_that_does_not_compile_ends_its_backends_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One attempt and one warning for each backend, where there were one for each configuration."""
    monkeypatch.setattr(Turns, "_warned", set())
    broken = raising(CompilationError("'int' object has no attribute 'type'"))
    backend = install(monkeypatch, *(Configuration(f"{i}", broken) for i in range(5)))
    for number in range(2):
        call = call_for(dataclasses.replace(PROBLEM, n=1 + number))
        result = tune_call(call, CPU, store_in(tmp_path), timer=clock, rounds=1)
        assert list(result.medians) == ["eager"]
        assert result.rejected == {
            "fake 0": "failed to compile: CompilationError: 'int' object has no attribute 'type'"
        }
    assert backend.ran == ["0", "0"]
    assert [record.message.count("does not compile here") for record in caplog.records] == [1]


def test_too_large_a_tile_ends_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(
        monkeypatch, Configuration("large", raising(RuntimeError("out of resource: shared memory"))), Configuration("b")
    )
    result = tune_call(call_for(), CPU, store_in(tmp_path), timer=clock, rounds=1)
    assert list(result.medians) == ["fake b", "eager"]


def test_a_backend_that_cannot_list_its_candidates_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = install(monkeypatch, Configuration("a"))
    monkeypatch.setattr(backend, "candidates", raising(ImportError("libcuda.so.1")))
    assert [c.name for c in every(PROBLEM, CPU)] == ["eager"]
    assert "backend fake offers no candidates" in caplog.text


def test_names_on_disk_that_no_longer_exist_are_ignored() -> None:
    offered = [Candidate("fake", Configuration(name)) for name in "abc"]
    assert [c.name for c in by_name(offered, ["fake c", "fake removed", "fake a"])] == ["fake c", "fake a"]
