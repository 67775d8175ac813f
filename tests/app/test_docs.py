"""The documentation: its code runs, its lists are those of the code, its site builds without a warning."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytest.importorskip("torchvision")


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """The code blocks of a page and the lines that they begin in."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        if match[1] == language:
            yield text[: match.start(2)].count("\n"), match[2]


@pytest.fixture
def quiet_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own, and torch's random state as it was."""
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


WITH_CODE = [page for page in [*PAGES, ROOT / "README.md"] if list(blocks(page, "python"))]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, quiet_state: None) -> None:
    """All blocks of a page, one after the other, as its reader would type them."""
    names: dict[str, Any] = {"__name__": page.stem}
    for line, source in blocks(page, "python"):
        exec(compile("\n" * line + source, str(page), "exec"), names)


def test_the_notebook_runs(quiet_state: None) -> None:
    notebook = json.loads((DOCS / "quick_start.ipynb").read_text())
    assert notebook["nbformat"] == 4
    names: dict[str, Any] = {"__name__": "quick_start"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "committed without outputs"
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)


def test_the_notebook_is_one_by_jupyters_rules() -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbformat.validate(nbformat.read(DOCS / "quick_start.ipynb", as_version=4))


def test_what_works_with_what_names_tests_that_exist() -> None:
    rows = [line for line in (DOCS / "compatibility.md").read_text().splitlines() if line.startswith("| ")]
    claims = [row for row in rows if not re.match(r"\| (with|---)", row)]
    assert len(claims) > 30
    for row in claims:
        match = re.search(r"\| `(tests/\S+\.py)::(\w+)` \|$", row)
        assert match is not None, f"no test in: {row}"
        path = ROOT / match[1]
        assert path.exists(), row
        functions = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
        assert match[2] in functions, row


def test_pages_link_to_what_exists() -> None:
    """mkdocs sees to the links between pages; these are those that leave docs/."""
    for page in PAGES:
        for target in re.findall(r"\]\(\.\./([^)#\s]+)", page.read_text()):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


def test_commands_in_the_pages_exist() -> None:
    """Every `fused-resnet COMMAND --option` in docs and README is one of the command line."""
    typer = pytest.importorskip("typer")
    from fused_resnet.cli import app

    commands = typer.main.get_command(app).commands
    for page in [*PAGES, ROOT / "README.md"]:
        for _, source in blocks(page, "bash"):
            for line in source.replace("\\\n", " ").splitlines():
                match = re.search(r"(?:^|-m )fused[-_]resnet ([a-z]+)(.*)$", line.split(" #")[0])
                if match is None:
                    continue
                assert match[1] in commands, line
                known = {option for p in commands[match[1]].params for option in (*p.opts, *p.secondary_opts)}
                assert set(re.findall(r"--[a-z-]+", match[2])) <= known, line


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "code" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_refusals_are_read_from_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = load("sentences")
    known = code.sentences()
    texts = {sentence.text for sentence in known}
    assert "cuda: groups must be 1, got …" in texts
    stale = [words for words, _ in code.REMEDIES if not any(re.search(words, sentence.text) for sentence in known)]
    assert not stale, f"remedies of docs/code/sentences.py for sentences that nothing says any more: {stale}"

    (tmp_path / "backends").mkdir()
    (tmp_path / "backends" / "new.py").write_text(
        "def can_run(problem) -> str | None:\n    return f'new: needs a Tuesday, got {problem.day}'\n"
        "def run(x):\n    raise ValueError(f'new: x: expected {x} and ' f'more, got {x}')\n"
    )
    monkeypatch.setattr(code, "PACKAGE", tmp_path)
    assert {s.text for s in code.sentences()} == {
        "new: needs a Tuesday, got …", "new: x: expected … and more, got …"
    }  # fmt: skip
    assert "`new: needs a Tuesday, got …`" in code.markdown()


def test_the_readme_is_one_page() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert {"make demo", "make test"} <= {line.split("  ")[0].strip() for line in lines}


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed (pip install 'fused_resnet[docs]')")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed (pip install 'fused_resnet[docs]')")
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    assert "groups must be 1" in (site / "troubleshooting/index.html").read_text()
    assert "conv_bn_add_relu" in (site / "reference/index.html").read_text()
    assert (site / "pictures/tiles.svg").stat().st_size > 1000
    fetched = re.compile(r'<(?:script|img|iframe)[^>]+src="https?:[^"]+"|<link[^>]+stylesheet[^>]+href="https?:[^"]+"')
    for page in site.rglob("*.html"):  # nothing is fetched from elsewhere: the site works offline
        assert not fetched.search(page.read_text()), page
