"""The script of the support matrix, on a tree whose Makefile only says what it would do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import matrix

#: Builds and tests nothing; `install` and the tests read what is to happen from files of the tree.
MAKEFILE = """
.venv/.torch:
\t@if [ "$(TORCH)" = "torch==0" ]; then echo "ERROR: no matching distribution"; exit 1; fi
\t@mkdir -p .venv/bin; cp python.sh .venv/bin/python; touch .venv/.torch
install:
\t@echo built >> builds; touch .venv/.installed; exit $$(cat install.status)
test-interpreter:
\t@echo "==== 3 passed, 2 skipped in 1.00s ===="
test-rest:
\t@echo "==== $$FUSED_RESNET_CPU_ISA $(TESTS) ===="; echo "1 failed, 7 passed in 2.00s"; exit $$(cat test.status)
"""
DOCTOR = {"python": "3.12.3 on Linux", "torch": "2.11.0+cu130", "triton": "3.6.0", "torchvision": "0.26.0", "CPU": "it",
          "extension _C": "loaded", "extension _C_cuda": "loaded"}  # fmt: skip
THIS = (f"{sys.version_info[0]}.{sys.version_info[1]}",)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "tree"
    root.mkdir()
    (root / "Makefile").write_text(MAKEFILE)
    (root / ".gitignore").write_text(".matrix/\n")
    (root / "python.sh").write_text(f"#!/bin/sh\necho '{json.dumps({'environment': DOCTOR})}'\n")
    (root / "python.sh").chmod(0o755)
    for name in ("install.status", "test.status"):
        (root / name).write_text("0")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    monkeypatch.setattr(matrix, "ROOT", root)
    monkeypatch.setattr(
        matrix,
        "LEGS",
        (
            matrix.Leg("here", THIS, "torch==2.11.0"),
            matrix.Leg("here-avx2", (), "", {"FUSED_RESNET_CPU_ISA": "avx2"}, same_as="here"),
            matrix.Leg("no-python", ("3.99",), "torch"),
            matrix.Leg("no-torch", THIS, "torch==0"),
        ),
    )
    monkeypatch.setattr(matrix, "find_python", find)
    return root


def find(versions: tuple[str, ...]) -> str:
    if versions == THIS:
        return sys.executable
    raise matrix.NotHere(f"Python {versions[0]} is not there")


def run(tree: Path, *arguments: str) -> tuple[int, dict[str, dict[str, str]], str]:
    sys.argv = ["matrix.py", "--folder", str(tree / ".matrix"), *arguments]
    with pytest.raises(SystemExit) as ended:
        matrix.main()
    report = json.loads((tree / ".matrix/results.json").read_text())
    legs = {leg["leg"]: leg for leg in report["legs"]}
    return int(ended.value.code or 0), legs, (tree / ".matrix/results.md").read_text()


def test_legs_run_and_what_cannot_be_had_fails_nothing(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    status, legs, table = run(tree)
    assert status == 0
    assert legs["here"]["ok"]
    assert legs["here"]["steps"] == {
        "build": "ok", "test-interpreter": "3 passed, 2 skipped in 1.00s", "test-rest": "1 failed, 7 passed in 2.00s",
    }  # fmt: skip
    assert legs["here"]["stack"]["python"] == "3.12.3"
    assert "avx2" in (tree / ".matrix/logs/here-avx2-test-rest.log").read_text(), "the leg's variables are set"
    assert "Python 3.99 is not there" in legs["no-python"]["absent"]
    assert "torch==0 cannot be installed: ERROR: no matching distribution" in legs["no-torch"]["absent"]
    assert "| here | 3.12.3 | 2.11.0+cu130 | 3.6.0 | this CPU's best | ok |" in table
    assert "| no-python | not run: " in table


def test_a_failing_leg_fails_the_run_and_the_copy_is_used_again(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert run(tree, "--legs", "here", "--short")[0] == 0
    assert "tests/ops/test_ops.py" in (tree / ".matrix/logs/here-test-rest.log").read_text()
    copy = tree / ".matrix/here"
    before = (copy / "Makefile").stat().st_mtime_ns
    (tree / "test.status").write_text("1")
    (tree / "python.sh").write_text((tree / "python.sh").read_text() + "# changed\n")
    status, legs, _ = run(tree, "--legs", "here")
    assert status == 1
    assert legs["here"]["steps"]["test-rest"].endswith("(exit 2)")
    assert (copy / "Makefile").stat().st_mtime_ns == before, "only what changed is copied"
    assert "# changed" in (copy / "python.sh").read_text()

    (tree / "install.status").write_text("1")
    status, legs, _ = run(tree, "--legs", "here")
    assert status == 1
    assert legs["here"]["steps"]["build"].startswith("failed")
    assert "test-rest" not in legs["here"]["steps"]


def test_unknown_legs_are_named(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["matrix.py", "--legs", "here,there"])
    with pytest.raises(SystemExit):
        matrix.main()
    assert "expected some of here, here-avx2, no-python, no-torch, got there" in capsys.readouterr().err


def test_a_python_that_is_not_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    with pytest.raises(matrix.NotHere, match=r"Python 3\.99 is not on PATH"):
        matrix.find_python(("3.99",))
    assert matrix.find_python((*THIS, "3.99"))
