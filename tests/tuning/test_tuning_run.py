"""tune() and selftest() on networks: progress, interrupts, child processes that die."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import fused_resnet
from fused_resnet.core.packed_weights import PackedWeights
from fused_resnet.nn import FusedBasicBlock
from fused_resnet.selection import choice, plans
from fused_resnet.selection.calls import Call
from fused_resnet.selection.search import Result, tune_call
from fused_resnet.tuning import isolate, selftest, selftest_table, tune
from fused_resnet.tuning.collect import calls_of
from tests.support.tuning_fakes import CPU, Configuration, call_for, clock, install, raising, right, store_in

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FUSED_RESNET_CACHE_DIR", str(tmp_path))
    plans.forget()
    yield
    plans.forget()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    downsample = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
    last = FusedBasicBlock(8, 16, stride=2, downsample=downsample)
    return nn.Sequential(FusedBasicBlock(8, 8), FusedBasicBlock(8, 8), last).eval()


X = torch.randn(1, 8, 8, 8)


def _text(table: Any) -> str:
    console = Console(width=250, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_the_calls_of_a_network(model: nn.Module) -> None:
    calls = calls_of(model, X)
    problems = [call.problem for call in calls]
    # two equal blocks are one pair of calls; the third adds a strided convolution and a tail with a projection
    assert len(calls) == 4
    assert [p.residual is not None for p in problems] == [False, True, False, False]
    assert [p.projection is not None for p in problems] == [False, False, False, True]
    assert all(call.cache_weights for call in calls)


def test_an_unfused_network_is_looked_at_fused() -> None:
    torchvision = pytest.importorskip("torchvision")
    block = torchvision.models.resnet.BasicBlock(8, 8).eval()
    assert len(calls_of(nn.Sequential(block), X)) == 2
    assert type(block) is torchvision.models.resnet.BasicBlock


def test_tune_keeps_a_winner_for_each_call(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = install(monkeypatch, Configuration("slow", seconds=2.0), Configuration("fast", seconds=0.5))
    seen: list[tuple[int, int, str]] = []
    tuning = tune(model, X, timer=clock, rounds=2, progress=lambda *progress: seen.append(progress))
    assert [result.winner for result in tuning.results] == ["fake fast"] * 4
    assert not tuning.interrupted
    assert {total for _, total, _ in seen} == {4}
    assert any("verifying 1/3 fake slow" in text for _, _, text in seen)
    assert "20.00x" in _text(tuning.table())  # eager takes ten of the clock's seconds

    backend.ran.clear()
    again = tune(model, X, timer=clock)
    assert all(result.resumed for result in again.results)
    with torch.inference_mode():
        model(X)
    assert set(backend.ran) == {"fast"}  # what auto runs now, in this process too


def test_an_interrupt_ends_it_and_keeps_what_is_done(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def interrupted(tail: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if tail.proj is not None:
            raise KeyboardInterrupt
        return right(tail)

    install(monkeypatch, Configuration("a", interrupted, seconds=0.1))
    tuning = tune(model, X, timer=clock, rounds=1)
    assert tuning.interrupted
    assert len(tuning.results) == 3
    assert "interrupted after 3 of 4" in _text(tuning.table())


def test_a_call_for_which_nothing_is_right_runs_eager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, Configuration("bad", lambda tail: right(tail) + 1))
    result = tune_call(call_for(), CPU, store_in(tmp_path), timer=clock, rounds=1)
    assert result.winner == "eager"
    assert list(result.rejected) == ["fake bad"]


def test_selftest_verifies_every_configuration(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        monkeypatch,
        Configuration("good"),
        Configuration("bad", lambda tail: right(tail) + 1),
        Configuration("absent", raising(ValueError("needs Triton 3.6"))),
    )
    checks = selftest(model, X, progress=False)
    assert len(checks) == 3 * 4
    text = _text(selftest_table(checks))
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if "│ fake" in line}
    assert [cell.strip() for cell in rows["fake good"].split("│")[2:5]] == ["4", "0", "0"]
    assert [cell.strip() for cell in rows["fake bad"].split("│")[2:5]] == ["0", "4", "0"]
    assert [cell.strip() for cell in rows["fake absent"].split("│")[2:5]] == ["0", "0", "4"]
    assert "ValueError: needs Triton 3.6" in rows["fake absent"]
    # and the verdicts are the ones that a first use asks for
    store = choice.store_for(CPU)
    assert store.verdict(calls_of(model, X)[0].key, "fake good") == "ok"


def test_selftest_without_a_model_takes_the_problem_list(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_resnet.testing import PROBLEMS

    install(monkeypatch, Configuration("good"))
    monkeypatch.setattr("fused_resnet.testing.PROBLEMS", [c for c in PROBLEMS if c.name in ("odd", "empty_batch")])
    checks = selftest(device="cpu", progress=False)
    assert [str(check.call.problem.dtype) for check in checks] == ["torch.float16", "torch.bfloat16", "torch.float32"]
    assert {check.verdict for check in checks} == {"ok"}


def test_a_real_backend_end_to_end(model: nn.Module) -> None:
    """On the CPU, with the clock that there is: what is found is right and is used."""
    with torch.inference_mode():
        before = model(X)
    tuning = tune(model, X, rounds=2, progress=False)
    assert len(tuning.results) == 4
    assert all(result.winner for result in tuning.results)
    with torch.inference_mode():
        torch.testing.assert_close(model(X), before)


def test_selftest_within_a_time_and_of_one_backend(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *(Configuration(f"{i}") for i in range(9)))
    x = torch.randn(1, 8, 8, 8)
    names = {check.candidate for check in selftest(model, x, backends=["fake"])}
    assert names == {f"fake {i}" for i in range(6)}
    assert selftest(model, x, force=True, seconds=-1.0) == []


def test_tune_begins_no_call_after_its_time(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Configuration("a"))
    result = tune(model, torch.randn(1, 8, 8, 8), timer=clock, seconds=-1.0)
    assert result.results == []
    assert len(result.unfinished) == result.calls > 0
    assert all("not begun" in why for why in result.unfinished.values())


def test_the_functions_are_public() -> None:
    assert fused_resnet.tune is tune
    assert fused_resnet.selftest is selftest


# ---- in child processes --------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys
sys.path.insert(0, {root!r})
import pytest
from tests.support.tuning_fakes import Configuration, clock, install, right
from fused_resnet.core import timing
from fused_resnet.tuning import worker
def killed(tail):
    os.kill(os.getpid(), signal.SIGSEGV)
def interrupted(tail):
    raise KeyboardInterrupt
def lost(tail):
    from fused_resnet.selection import verify
    verify.lost = lambda device: True
    raise RuntimeError("an illegal memory access was encountered")
install(pytest.MonkeyPatch(), *[{configurations}])
timing.stopwatch = lambda device: clock
worker.run()
"""


def _tune_isolated(
    configurations: str, calls: Sequence[Call], report: Any = lambda i, text: None
) -> tuple[list[Result], dict[str, str]]:
    code = CHILD.format(root=str(ROOT), configurations=configurations)
    store = choice.store_for(CPU)
    options = {"rounds": 1, "limit": None, "force": False}
    given_up = isolate.tune_calls(calls, CPU, store, options, report, (sys.executable, "-c", code))
    results = [Result(call, store.times(call.key) or {}, store.verdicts().get(call.key, {})) for call in calls]
    return results, given_up


def test_a_child_does_the_search() -> None:
    said: list[str] = []
    results, given_up = _tune_isolated(
        'Configuration("a"), Configuration("b", seconds=0.5)',
        [call_for(), call_for(packed_weights=PackedWeights())],
        lambda i, text: said.append(f"{i} {text}"),
    )
    assert given_up == {}
    assert [result.winner for result in results] == ["fake b", "fake b"]
    assert "1 verifying 2/3 fake b" in said


def test_candidates_that_end_the_process_or_break_the_gpu_do_not_end_the_tuning() -> None:
    said: list[str] = []
    (result,), given_up = _tune_isolated(
        'Configuration("deadly", killed, 0.1), Configuration("illegal", lost, 0.1), Configuration("b", seconds=0.5)',
        [call_for()],
        lambda i, text: said.append(text),
    )
    assert given_up == {}
    assert result.winner == "fake b"
    assert result.rejected["fake deadly"] == "crashed: it ended two processes that tried it"
    assert result.rejected["fake illegal"].startswith("crashed: RuntimeError: an illegal memory access")
    assert sum("the process ended" in text for text in said) == 3


def test_an_interrupted_child_interrupts() -> None:
    with pytest.raises(KeyboardInterrupt):
        _tune_isolated('Configuration("b", interrupted)', [call_for()])


def test_children_that_never_get_anywhere_are_given_up(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "import sys; sys.stderr.write('no CUDA driver'); sys.exit(1)")
    call = call_for()
    given_up = isolate.tune_calls([call], CPU, store_in(tmp_path), {}, lambda i, text: None, command)
    assert list(given_up) == [call.key]
    assert given_up[call.key].endswith("given up after 3 processes that ended (no CUDA driver)")


def test_two_tuners_at_once(tmp_path: Path) -> None:
    """Two processes tune the same calls at the same time: both finish, and the file holds one whole result."""
    code = CHILD.format(root=str(ROOT), configurations='Configuration("a"), Configuration("b", seconds=0.5)')
    calls = [call_for(), call_for(packed_weights=PackedWeights())]
    request = isolate._Child((sys.executable, "-c", code), {
        "calls": [call.as_json() for call in calls], "device": "cpu",
        "options": {"rounds": 3, "limit": None, "force": True},
    })._request  # fmt: skip
    pipe = subprocess.PIPE
    both = [subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    for process in both:
        assert process.stdin is not None
        process.stdin.write(request)
        process.stdin.close()
    for process in both:
        assert process.stdout is not None
        assert '"finished"' in process.stdout.read()
        process.stdout.close()
        assert process.wait() == 0
    store = choice.store_for(CPU)
    store.reload()
    for call in calls:
        assert next(iter(store.times(call.key) or {})) == "fake b"
        assert store.verdict(call.key, "fake a") == store.verdict(call.key, "fake b") == "ok"
