"""benchmarks/report.py: from JSON to table, plot and README."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("matplotlib")
from benchmarks import report  # noqa: E402


def row(name: str, ms: float, speedup: float) -> dict[str, Any]:
    return {
        "name": name, "median_ms": ms, "speedup": speedup, "low": 0.9 * speedup, "high": 1.1 * speedup, "error": 4e-7,
        "roofline_fraction": 0.5, "images_per_second": 1e3 / ms, "preparation_s": 0.1,
    }  # fmt: skip


def comparison(stage: str, threads: int, eager: float, fused: float) -> dict[str, Any]:
    ratio = eager / fused
    info = {
        "kind": "tail", "network": "resnet18", "stage": stage, "batch": 1, "device": "cpu", "dtype": "float32",
        "threads": threads, "rounds": 30, "rows": [row("eager", eager, 1.0), row("fused", fused, ratio)],
        "absent": {"ncnn": "ModuleNotFoundError: " + "x" * 300},
        "fused_over": {"eager": [ratio, ratio - 0.1, ratio + 0.1]},
        "peaks": {"flops": 1e11, "bandwidth": 2e10}, "versions": {"torch": "2.14"},
    }  # fmt: skip
    return {"extra_info": info}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({
        "machine_info": {"fused_resnet": {"CPU": "Test CPU"}}, "datetime": "2026-11-22T08:00:00",
        "benchmarks": [comparison("layer1", 1, 4.0, 1.0), comparison("layer2", 1, 1.0, 1.0),
                       comparison("layer1", 2, 2.0, 1.0), {"extra_info": {}}],
    }))  # fmt: skip
    return path


def test_table_has_one_section_for_each_setting_and_bolds_the_fastest(results: Path, tmp_path: Path) -> None:
    document, loaded = report.load(results)
    text = report.markdown(document, loaded, Path("benchmarks/results/cpu.json"))
    assert text.count("**Tails, float32, CPU, 1 thread**") == 1
    assert text.count("**Tails, float32, CPU, 2 threads**") == 1
    assert "| resnet18 layer1, batch 1 | 4 | **1** | 4.00 [3.60, 4.40] | 4e-07 | 50% |" in text
    assert "eager 2.00x" in text  # the geometric mean of 4 and 1
    assert "Test CPU, 2026-11-22; torch 2.14" in text
    assert max(len(line) for line in text.splitlines() if line.startswith("Not timed")) < 170


def test_main_writes_table_plot_and_readme(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    readme = results.parent / "README.md"
    readme.write_text("before\n<!-- benchmark cpu -->\nstale\n<!-- /benchmark -->\nafter\n")
    report.main([str(results), "--readme", str(readme)])
    content = readme.read_text()
    assert content.startswith("before\n<!-- benchmark cpu -->\nMeasured on Test CPU")
    assert content.endswith("<!-- /benchmark -->\nafter\n")
    assert "stale" not in content
    assert (results.parent / "cpu.md").read_text() in content
    with Image.open(results.parent / "cpu.png") as picture:
        assert picture.width == 1200
    assert "layer2" in capsys.readouterr().out
    report.main([str(results), "--readme", str(readme)])  # again: the same
    assert readme.read_text() == content


def test_wrong_files_are_said(results: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no marker")
    with pytest.raises(SystemExit, match="has no marker <!-- benchmark cpu -->"):
        report.main([str(results), "--readme", str(tmp_path / "README.md")])
    empty = tmp_path / "empty.json"
    empty.write_text('{"benchmarks": []}')
    with pytest.raises(SystemExit, match="holds no comparison"):
        report.main([str(empty)])


def test_the_html_page_stands_alone(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    report.main([str(results), "--html", str(page)])
    assert not (tmp_path / "cpu.md").exists(), "nothing else is written"
    text = page.read_text()
    assert not re.findall(r"(?:src|href)=\"(?!#)[^\"]*\"|url\((?!#|'#)[^)]*\)|@import", text), "nothing is fetched"
    tree = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))  # every tag is closed
    tables = list(tree.iter("table"))
    assert len(tables) == 2
    header = [cell.text for cell in tables[0].iter("th")]
    assert header[:3] == ["median ms", "eager", "fused"]
    first = ["".join(cell.itertext()) for cell in next(tables[0].iter("tbody")).iter("td")]
    assert first[: len(header)] == ["resnet18 layer1, batch 1", "4", "1", "4.00 [3.60, 4.40]", "4e-07", "50%"]
    assert len(list(tree.iter("{http://www.w3.org/2000/svg}svg"))) == 3, "one of ratios, one of times for each section"
    assert "<script" not in text
    assert "ncnn" in text


def test_text_from_the_json_is_no_markup(results: Path, tmp_path: Path) -> None:
    document = json.loads(results.read_text())
    document["machine_info"]["fused_resnet"]["CPU"] = "<img src=x> & `co.`"
    results.write_text(json.dumps(document))
    report.main([str(results), "--html", str(tmp_path / "out.html")])
    text = (tmp_path / "out.html").read_text()
    assert "&lt;img src=x&gt; &amp; <code>co.</code>" in text
    assert "<img" not in text
