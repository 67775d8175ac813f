"""What runs a call: verified on first use, banned when wrong, never unverified in a capture."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_resnet import functional
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import TailArguments
from fused_resnet.selection import choice, plans, search, verify
from fused_resnet.selection.store import Store
from fused_resnet.testing import call_arguments, make_tail
from tests.support.tuning_fakes import CPU, PROBLEM, Configuration, call_for, clock, install, raising, right, store_in


def _wrong(tail: TailArguments) -> torch.Tensor:
    return right(tail) + 1


def _decide(store: Store, backend: str = "fake", capturing: bool = False, problem: Problem = PROBLEM) -> Any:
    tail = make_tail(problem)
    run, keep = choice._decide(call_for(problem), tail, backend, store, capturing)
    return run, keep, tail


def test_verified_once_then_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = install(monkeypatch, Configuration("a"))
    run, keep, tail = _decide(store_in(tmp_path))
    assert keep
    assert backend.ran == ["a", "a"]  # integers and random values
    run(tail)
    _decide(store_in(tmp_path))  # another process: the verdict is on disk
    assert backend.ran == ["a", "a", "a"]


def test_a_mismatch_bans_with_one_warning_and_the_next_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = install(monkeypatch, Configuration("bad", _wrong), Configuration("good"))
    with pytest.warns(RuntimeWarning, match="fake bad computes wrong results on Abacus 3000 for n=2") as caught:
        run, keep, tail = _decide(store_in(tmp_path))
    assert len(caught) == 1
    assert keep
    torch.testing.assert_close(run(tail), right(tail))
    backend.ran.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _decide(store_in(tmp_path))  # known to be wrong now: neither run nor mentioned
    assert backend.ran == []


def test_all_banned_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, Configuration("bad", _wrong), Configuration("broken", raising(OSError("ptxas: not found"))))
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match=r"fake: no configuration may run n=2.*ptxas"):
        _decide(store_in(tmp_path))


def test_all_banned_auto_falls_back_to_eager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, Configuration("bad", _wrong))
    store = store_in(tmp_path)
    store.set_times(call_for().key, {"fake bad": 1.0}, 1)
    with pytest.warns(RuntimeWarning):
        run, keep, tail = _decide(store, "auto")
    assert keep
    torch.testing.assert_close(run(tail), right(tail))


def test_a_named_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, Configuration("a"))
    with pytest.raises(RuntimeError, match="fake: groups must be 1, got 2"):
        _decide(store_in(tmp_path), problem=dataclasses.replace(PROBLEM, groups=2))


def test_nothing_is_verified_in_a_capture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = install(monkeypatch, Configuration("a"), Configuration("b"))
    store = store_in(tmp_path)
    store.set_times(call_for().key, {"fake a": 1.0, "fake b": 2.0}, 1)
    run, keep, tail = _decide(store, "auto", capturing=True)
    run(tail)
    assert backend.ran == []  # eager ran
    assert not keep  # and after the capture it is decided again

    store.set_verdict(call_for().key, "fake b", "ok")
    run, keep, tail = _decide(store, "auto", capturing=True)
    run(tail)
    assert backend.ran == ["b"]  # the verified one, although the other is faster
    assert not keep
    with pytest.raises(RuntimeError, match=r"fake: no configuration may run .* selftest"):
        _decide(store_in(tmp_path / "empty"), capturing=True)

    backend.ran.clear()
    run, keep, tail = _decide(store, "auto")
    assert keep
    run(tail)
    assert backend.ran == ["a", "a", "a"]


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = install(monkeypatch, Configuration("a", _wrong))
    monkeypatch.setenv("FUSED_RESNET_VERIFY", "0")
    _, keep, _ = _decide(store_in(tmp_path), capturing=True)
    assert keep
    assert backend.ran == []


def test_measured_order_before_the_backends_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = install(monkeypatch, *(Configuration(name) for name in "abc"))
    store = store_in(tmp_path)
    store.set_times(call_for().key, {"fake c": 1.0, "fake gone": 1.5, "fake b": 2.0}, 1)
    names = [c.name for c in choice.in_order(call_for(), CPU, "fake", store)]
    assert names == ["fake c", "fake b", "fake a"]
    run, _, tail = _decide(store)
    run(tail)
    assert set(backend.ran) == {"c"}


def test_first_call_tunes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = install(monkeypatch, Configuration("slow", seconds=2.0), Configuration("fast", seconds=1.0))
    monkeypatch.setattr(search.timing, "stopwatch", lambda device: clock)
    store = store_in(tmp_path)
    _decide(store, "auto")
    assert store.times(call_for().key) is None
    monkeypatch.setenv("FUSED_RESNET_TUNE", "first_call")
    _decide(store, "auto", capturing=True)
    assert store.times(call_for().key) is None  # not in a capture
    run, _, tail = _decide(store, "auto")
    backend.ran.clear()
    run(tail)
    assert backend.ran == ["fast"]
    assert next(iter(store.times(call_for().key) or {})) == "fake fast"


def test_a_tuning_that_fails_does_not_fail_the_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, Configuration("a"))
    monkeypatch.setenv("FUSED_RESNET_TUNE", "first_call")
    monkeypatch.setattr(search, "tune_call", raising(RuntimeError("no clock")))
    run, _, tail = _decide(store_in(tmp_path), "auto")
    torch.testing.assert_close(run(tail), right(tail))
    assert "failed (RuntimeError: no clock)" in caplog.text


def test_a_lost_device_ends_the_call_and_bans_the_candidate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, Configuration("a", raising(RuntimeError("an illegal memory access was encountered"))))
    monkeypatch.setattr(verify, "lost", lambda device: True)
    store = store_in(tmp_path)
    with pytest.raises(verify.DeviceLost, match="fake a broke the CUDA context"):
        _decide(store)
    assert (store.verdict(call_for().key, "fake a") or "").startswith("crashed: RuntimeError: an illegal")


def test_threads_verify_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = install(monkeypatch, Configuration("a"))
    store = store_in(tmp_path)
    monkeypatch.setattr(choice, "store_for", lambda device: store)
    monkeypatch.setattr(choice.backends, "choose", lambda problem, name="auto": backend)
    tail = make_tail(PROBLEM)
    threads = [threading.Thread(target=choice.decide, args=(PROBLEM, tail)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert backend.ran == ["a", "a"]


def test_the_operator_takes_the_tuned_candidate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From functional.conv_bn_add_relu down to the winner of a tuning file."""
    monkeypatch.setenv("FUSED_RESNET_CACHE_DIR", str(tmp_path))
    plans.forget()
    backend = install(monkeypatch, Configuration("a"), Configuration("b"))
    tail = make_tail(PROBLEM)
    functional.conv_bn_add_relu(**call_arguments(tail))
    assert backend.ran == []
    choice.store_for(CPU).set_times(call_for().key, {"fake b": 1.0}, 1)
    plans.clear()
    y = functional.conv_bn_add_relu(**call_arguments(tail))
    assert backend.ran == ["b", "b", "b"]
    torch.testing.assert_close(y, right(tail))
    plans.forget()
