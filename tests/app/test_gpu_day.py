"""The GPU day's script without a GPU: time limits, files, merging, table. `--dry` runs the steps themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_counters, gpu_day, gpu_speed, report
from fused_resnet.testing import RESNET_TAILS


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu_day.Day:
    day = gpu_day.Day(tmp_path, 9.0, dry=False)
    steps = [
        gpu_day.Step("good", python("print('fine')"), 60, lambda: {"benchmarks": [1], "tests": {"good": outcome(1)}}),
        gpu_day.Step("bad", python("print('why'); raise SystemExit(3)"), 60, lambda: {"benchmarks": [2]}),
        gpu_day.Step("slow", python("import time; print('begun', flush=True); time.sleep(60)"), 2),
        gpu_day.Step("half", python("pass"), 60, lambda: json.loads("{")),
    ]
    monkeypatch.setattr(day, "steps", lambda: steps)
    return day


def outcome(tests: int) -> dict[str, object]:
    return {"tests": tests, "failures": 0, "errors": 0, "skipped": 0, "failed": [], "skips": {}}


def test_whatever_ends_a_step_the_next_begins(day: gpu_day.Day, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "results_of", lambda document: [])
    assert not day.run([])
    document = json.loads((day.out / "gpu.json").read_text())
    states = {step["name"]: step["status"] for step in document["steps"]}
    assert states == {"good": "ok", "bad": "exit status 3", "slow": "stopped after 2 s", "half": "ok"}
    assert "JSONDecodeError" in document["steps"][3]["collect"]
    assert document["benchmarks"] == [1, 2]
    log = (day.out / "log.txt").read_text()
    assert all(word in log for word in ("fine", "why", "begun"))
    text = (day.out / "gpu.md").read_text()
    assert "| slow | 2 | stopped after 2 s |" in text
    assert "good: 1 passed, 0 failed, 0 skipped." in text
    assert len(list(day.out.iterdir())) <= 8


def test_steps_that_are_not_wanted_or_have_no_time(day: gpu_day.Day, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "results_of", lambda document: [])
    day.end = 0.0
    day.run(["good"])
    assert [(step["name"], step["status"]) for step in day.document["steps"]] == [("good", "no time left")]


def test_the_steps_of_a_day_name_modules_that_exist(tmp_path: Path) -> None:
    for dry in (False, True):
        steps = gpu_day.Day(tmp_path, 9.0, dry).steps()
        names = [step.name for step in steps]
        assert names[:4] == ["build", "doctor", "conformance", "tests"]
        assert sum(step.seconds for step in steps) < 1000
        for step in steps:
            module = step.command[step.command.index("-m") + 1]
            assert module == "pytest" or subprocess.run(python(f"import {module}"), cwd=gpu_day.ROOT).returncode == 0


def test_junit_files_are_counted(tmp_path: Path) -> None:
    xml = tmp_path / "t.xml"
    xml.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">'
        '<testcase classname="a" name="b"/><testcase classname="a" name="c"><failure message="wrong"/></testcase>'
        '<testcase classname="a" name="d"><skipped message="groups"/></testcase></testsuite></testsuites>'
    )
    found = gpu_day.outcome(xml)
    assert (found["tests"], found["failures"], found["skipped"]) == (3, 1, 1)
    assert found["failed"] == [{"test": "a::c", "message": "wrong"}]
    assert found["skips"] == {"groups": 1}


def test_counters_are_read_from_ncus_csv_and_asked_of_the_worst() -> None:
    text = (
        "# fused, cuda: n=256\n"
        '"ID","Kernel Name","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","conv_f16","(8, 1, 1)","SOL","Duration","us","12,5"\n'
        '"0","conv_f16","(8, 1, 1)","SOL","DRAM Throughput","%","71"\n'
    )
    assert gpu_counters.rows(text) == [
        {"problem": "fused, cuda: n=256", "kernel": "conv_f16", "grid": "(8, 1, 1)", "Duration": "12,5 us",
         "DRAM Throughput": "71 %"}
    ]  # fmt: skip

    def entry(problem: str, cuda: float, triton: float) -> dict[str, object]:
        rows = [{"name": "eager", "roofline_fraction": 0.01}, {"name": "fused, cuda", "roofline_fraction": cuda},
                {"name": "fused, triton", "roofline_fraction": triton}]  # fmt: skip
        return {"extra_info": {"problem": problem, "rows": rows}}

    document = {"benchmarks": [entry("a", 0.5, 0.4), entry("b", 0.1, 0.3), entry("c", 0.9, 0.8), entry("d", 0.2, 0.1)]}
    assert [found[:2] for found in gpu_counters.worst(document)] == [
        ("d", "fused, cuda"), ("b", "fused, triton"), ("a", "fused, cuda"),
    ]  # fmt: skip
    command = gpu_counters.ncu(["python3", "-m", "benchmarks.gpu_speed"], stand_in=False)
    assert command[command.index("--clock-control") + 1] == "none"
    assert command[-3:] == ["python3", "-m", "benchmarks.gpu_speed"]


def test_small_tails_are_of_the_same_kind() -> None:
    for tail in RESNET_TAILS:
        small = gpu_speed.small(tail.problem)
        assert (small.r, small.stride, small.padding) == (tail.problem.r, tail.problem.stride, tail.problem.padding)
        assert (small.projection is None) == (tail.problem.projection is None)
        if small.projection is not None:
            assert -(-small.projection.h // small.projection.stride[0]) == small.p
        assert small.flops < tail.problem.flops / 20
        assert small.c % 64 == 0  # tensor descriptors take it
