"""Triton's kernels compiled without the GPU that runs them: the same keys, in parallel, and carried elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_resnet import models
from fused_resnet.core.problem import Problem
from fused_resnet.selection.calls import Call
from fused_resnet.testing import make_tail
from fused_resnet.tuning import precompile

pytest.importorskip("triton")

PROBLEM = Problem.parse("n=2,h=9,w=7,c=64,k=40,padding=1,residual=1,dtype=float16,device=cuda")

#: A launch on the PTX interpreter's driver, which reports whether each kernel came from the cache.
LAUNCH = """
import json, sys
from triton import knobs
from tests.support.launch_harness import triton_device
from fused_resnet.backends.triton import TritonBackend
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import reference
from fused_resnet.testing import make_tail
import torch

hits = []
knobs.compilation.listener = lambda **facts: hits.append(facts["cache_hit"])
triton_device(90)
problem = Problem.parse(sys.argv[1])
tail = make_tail(problem, "integers")
backend = TritonBackend()
names = json.loads(sys.argv[2])
for config in backend.candidates(problem, tail.x.device):
    if str(config) in names:
        assert torch.equal(backend.run(problem, tail, config), reference(tail.to(torch.float64)).half())
print(json.dumps(hits))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    return folder


@pytest.mark.ptx
@pytest.mark.slow
def test_carried_kernels_are_found_by_a_launch(cache: Path, tmp_path: Path) -> None:
    call = precompile.tail_call(PROBLEM)
    names = [name for _, name in precompile.wanted([call], 90, 132, 1)]
    assert len(names) == 2  # the preferred one, and the first with tensor descriptors
    assert precompile.precompile([call], 90, 132, limit=1, jobs=1) == {}
    assert precompile.pack(cache, tmp_path / "kernels.tar.gz") == 2
    elsewhere = tmp_path / "elsewhere"
    cache.rename(tmp_path / "gone")  # what the archive says of its old place must not matter
    assert precompile.unpack(tmp_path / "kernels.tar.gz", elsewhere) == 2
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_CACHE_DIR": str(elsewhere)}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment.setdefault("PTXI_ALLOW_MISSING_PROXY_FENCE", "1")  # Triton 3.6 leaves that fence out
    plain = str(PROBLEM).replace(",device=cuda", "")
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, plain, json.dumps(names)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [True, True]


def test_a_call_without_memory_looks_like_the_call() -> None:
    tail = make_tail(PROBLEM)
    call = Call.of(PROBLEM, tail)
    assert precompile.tail_call(PROBLEM) == call
    empty = call.empty(torch.device("meta"))
    assert Call.of(PROBLEM, empty) == call
    assert empty.x.is_meta
    assert empty._replace(x=tail.x, conv=tail.conv, residual=tail.residual) == tail


def test_the_calls_of_a_network_are_those_of_a_gpu() -> None:
    model = models.resnet18(num_classes=10)
    calls = precompile.network_calls(model, (2, 3, 64, 64), torch.float16)
    problems = {str(call.problem) for call in calls}
    assert all("device=cuda" in text and "dtype=float16" in text for text in problems)
    assert any("proj=64x16x16x2" in text for text in problems)
    assert next(model.parameters()).dtype is torch.float32  # it worked on a copy


def test_wanted_takes_each_calls_best_first() -> None:
    calls = [precompile.tail_call(PROBLEM), precompile.tail_call(Problem.parse("n=1,h=9,w=9,c=32,k=32,dtype=float16"))]
    found = precompile.wanted(calls, 90, 132, 2)
    assert [call for call, _ in found[:2]] == calls
    assert len({(call.key, name) for call, name in found}) == len(found) == 5  # one call has no tensor descriptors
    grouped = precompile.tail_call(Problem.parse("n=1,h=9,w=9,c=32,k=32,groups=2,dtype=float16"))
    assert precompile.wanted([grouped], 90, 132, 2) == []


class _Pool:
    """Runs what is submitted at once, in this process."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def submit(self, function: Any, *arguments: Any) -> Any:
        from concurrent.futures import Future

        future: Any = Future()
        future.set_result(function(*arguments))
        return future


def test_one_failure_ends_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tried: list[str] = []

    def fail(data: Any, name: str) -> str:
        tried.append(name)
        return "CompilationError: 'int' object has no attribute 'type'"

    monkeypatch.setattr(precompile, "ProcessPoolExecutor", _Pool)
    monkeypatch.setattr(precompile, "compile_one", fail)
    failed = precompile.precompile([precompile.tail_call(PROBLEM)], 90, 132, jobs=1)
    assert len(tried) == 1 < len(precompile.wanted([precompile.tail_call(PROBLEM)], 90, 132, None))
    assert len(failed) == len(tried)
    assert len(caplog.records) == 1


def test_nothing_is_begun_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompile, "ProcessPoolExecutor", _Pool)
    monkeypatch.setattr(precompile, "compile_one", lambda data, name: pytest.fail("was begun"))
    assert precompile.precompile([precompile.tail_call(PROBLEM)], 90, 132, jobs=1, seconds=-1.0) == {}
