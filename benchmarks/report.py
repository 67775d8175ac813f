"""From benchmark JSON to a Markdown table and a plot, or to one HTML page with both.

    python -m benchmarks.report benchmarks/results/latest.json              # table.md and plot.png beside it
    python -m benchmarks.report benchmarks/results/cpu_1_thread.json --readme docs/performance.md
    python -m benchmarks.report OUT/gpu.json --readme docs/performance.md             # of benchmarks/gpu_day.sh
    python -m benchmarks.report benchmarks/results/cpu_1_thread.json --html report.html

``--readme`` replaces what stands between ``<!-- benchmark NAME -->`` and ``<!-- /benchmark -->``, NAME being the
JSON's file name without its suffix.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FUSED = "fused"
EAGER_LAYOUTS = ("eager", "eager channels_last")


@dataclass(frozen=True)
class Result:
    """One comparison of the JSON."""

    info: dict[str, Any]

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.info["rows"]}

    @property
    def case(self) -> str:
        stage = f" {self.info['stage']}" if self.info["stage"] else ""
        return f"{self.info['network']}{stage}, batch {self.info['batch']}"

    @property
    def section(self) -> tuple[str, str, str, int]:
        threads = self.info["threads"] if self.info["device"] == "cpu" else 0
        return self.info["kind"], self.info["device"], self.info["dtype"], threads


def load(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """The document and its comparisons."""
    document = json.loads(path.read_text())
    results = results_of(document)
    if not results and "steps" not in document:
        raise SystemExit(f"report: {path} holds no comparison of these benchmarks")
    return document, results


def results_of(document: dict[str, Any]) -> list[Result]:
    return [Result(b["extra_info"]) for b in document["benchmarks"] if "rows" in b.get("extra_info", {})]


def by_section(results: Iterable[Result]) -> dict[tuple[str, str, str, int], list[Result]]:
    sections: dict[tuple[str, str, str, int], list[Result]] = {}
    for result in results:
        sections.setdefault(result.section, []).append(result)
    return sections


def sides(results: Sequence[Result]) -> list[str]:
    """Names of all sides that were timed, in the order in which they were declared."""
    return list(dict.fromkeys(name for result in results for name in result.rows))


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))


_HEADINGS = {
    "tail": "Tails",
    "loop": "Tails in a loop, the same tensors in each call",
    "model": "Whole networks",
}


def heading(section: tuple[str, str, str, int]) -> str:
    kind, device, dtype, threads = section
    where = f"CPU, {threads} thread{'s' * (threads != 1)}" if device == "cpu" else "GPU"
    return f"{_HEADINGS[kind]}, {dtype}, {where}"


def shortened(text: str, limit: int = 140) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


GRAPH = ", graph"


def milliseconds(rows: dict[str, dict[str, Any]], name: str) -> str:
    """A side's median, in bold where no side is faster; behind a slash the same as a CUDA graph."""
    fastest = min(row["median_ms"] for row in rows.values())

    def one(name: str) -> str:
        if name not in rows:
            return "-"
        text = f"{rows[name]['median_ms']:.3g}"
        return f"**{text}**" if rows[name]["median_ms"] == fastest else text

    return f"{one(name)} / {one(name + GRAPH)}" if any(other.endswith(GRAPH) for other in rows) else one(name)


def table(results: Sequence[Result]) -> str:
    """Median ms of each side, the fused side's speed-up over the faster eager layout, its error and roof fraction."""
    names = [name for name in sides(results) if not name.endswith(GRAPH)]
    fused_rows = [result.rows[FUSED] for result in results if FUSED in result.rows]
    over = "eager" if any(row["speedup"] is not None for row in fused_rows) else "the rival"
    head = ["median ms", *names, f"speed-up over {over} [95 %]", "error", "of the roof"]
    host = any(row.get("host_us") for row in fused_rows)
    head += ["host us"] if host else []
    lines = ["| " + " | ".join(head) + " |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    for result in results:
        rows = result.rows
        cells = [result.case, *(milliseconds(rows, name) for name in names)]
        fused = rows.get(FUSED)
        if fused is None:
            cells += ["-"] * (3 + host)
        else:
            # Without eager there is one rival in each row.
            speedup = (fused["speedup"], fused["low"], fused["high"])
            mean, low, high = next(iter(result.info["fused_over"].values())) if over != "eager" else speedup
            cells += [
                f"{mean:.2f} [{low:.2f}, {high:.2f}]",
                f"{fused['error']:.0e}",
                f"{fused['roofline_fraction']:.0%}",
            ]
            cells += [f"{fused['host_us']:.0f}"] if host else []
        lines.append("| " + " | ".join(cells) + " |")
    means = {
        name: geometric_mean([r.info["fused_over"][name][0] for r in results if name in r.info["fused_over"]])
        for name in names
        if any(name in r.info["fused_over"] for r in results)
    }
    text = ", ".join(f"{name} {mean:.2f}x" for name, mean in means.items() if not name.startswith("fused"))
    lines += ["", f"`fused` is faster, as a geometric mean over these rows, than: {text}."] if text else [""]
    absent = {name: why for result in results for name, why in result.info["absent"].items()}
    lines += [f"Not timed{_where(results, name)}: {name} ({shortened(why)})." for name, why in absent.items()]
    return "\n".join(lines)


def _where(results: Sequence[Result], name: str) -> str:
    """In how many rows ``name`` is missing, where it is not in all."""
    missing = sum(name in result.info["absent"] for result in results)
    return "" if missing == len(results) else f" in {missing} of {len(results)}"


_ON_CUDA = (
    "Each figure is the GPU's own time: events around a call queued behind a spinning kernel, after a flush of L2; "
    "behind the slash the same call as a CUDA graph. `host us` is what the host takes to queue one fused call: a loop "
    "without graphs takes the larger of the two. Networks are checked against float32 without tf32."
)


def markdown(document: dict[str, Any], results: Sequence[Result], path: Path) -> str:
    """All tables, with the machine and the versions they were measured on."""
    info = results[0].info
    machine = document["machine_info"].get("fused_resnet", {})
    inputs = "the same inputs" if info["kind"] == "loop" else "fresh inputs"
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    where = machine.get("GPU 0") if info["device"] == "cuda" else machine.get("CPU", "unknown CPU")
    lines = [
        f"Measured on {where}, {document['datetime'][:10]}; {versions}. Medians of {info['rounds']} "
        f"rounds in one process, in random order, {inputs}, outputs checked against float64; the fastest side of "
        "a row is bold.",
        *([_ON_CUDA] if info["device"] == "cuda" else []),
        "`of the roof`: the larger of FLOP / peak and compulsory bytes / bandwidth, both measured on this machine, "
        "over the time taken; that peak is the vector unit's in float32, which Winograd's fewer multiplications and "
        "matrix tiles may pass.",
    ]
    for section, own in by_section(results).items():
        peak = own[0].info["peaks"]
        roof = f"roof: {peak['flops'] / 1e9:,.0f} GFLOP/s, {peak['bandwidth'] / 1e9:,.0f} GB/s"
        lines += ["", f"**{heading(section)}** ({roof})", "", table(own)]
    lines += ["", f"From `{path.as_posix()}`."]
    return "\n".join(lines) + "\n"


def day(document: dict[str, Any], name: str) -> str:
    """The results of benchmarks/gpu_day.py: its steps, tests and counters, then the tables."""
    dry = "A dry run on stand-ins: no figure here is a GPU's.\n\n" if document.get("dry") else ""
    lines = [dry + "| step | seconds | |", "| --- | ---: | --- |"]
    lines += [f"| {step['name']} | {step['seconds']:.0f} | {step['status']} |" for step in document["steps"]]
    for tests, found in document["tests"].items():
        passed = found["tests"] - found["failures"] - found["errors"] - found["skipped"]
        lines += [
            "",
            f"{tests}: {passed} passed, {found['failures'] + found['errors']} failed, {found['skipped']} skipped.",
        ]
        lines += [f"- {bad['test']}: {shortened(bad['message'].splitlines()[0] if bad['message'] else '')}"
                  for bad in found["failed"]]  # fmt: skip
    for kind, rest in document.get("not_compared", {}).items():
        lines += ["", f"{kind}: {len(rest['failed'])} comparisons failed, {rest['left']} were left for want of time."]
        lines += [f"- {cell}: {shortened(why)}" for cell, why in rest["failed"].items()]
    if document["counters"]:
        shown = [key for key in document["counters"][0] if key not in ("problem", "kernel", "grid")][:8]
        lines += ["", "| kernel | " + " | ".join(shown) + " |", "| --- " * (len(shown) + 1) + "|"]
        for row in document["counters"]:
            lines.append(
                f"| {row['kernel'][:60]}, {row['problem']} | " + " | ".join(row.get(k, "-") for k in shown) + " |"
            )
    results = results_of(document)
    tables = markdown(document, results, Path(name)) if results else ""
    return "\n".join(lines) + "\n\n" + tables


def plot(results: Sequence[Result]) -> Figure:
    """One panel for each section: how many times faster `fused` is than each other side, with its interval."""
    from matplotlib.figure import Figure

    sections = by_section(results)
    heights = [1.2 + 0.42 * len(own) for own in sections.values()]
    figure = Figure(figsize=(10, sum(heights)), dpi=120, layout="constrained")
    panels = figure.subplots(len(sections), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (section, own) in zip(panels, sections.items(), strict=True):
        rivals = [name for name in sides(own) if not name.startswith("fused")]
        for i, rival in enumerate(rivals):
            points = [(y, r.info["fused_over"][rival]) for y, r in enumerate(own) if rival in r.info["fused_over"]]
            offset = 0.6 * (i / max(1, len(rivals) - 1) - 0.5)
            medians = [ratio[0] for _, ratio in points]
            errors = ([r[0] - r[1] for _, r in points], [r[2] - r[0] for _, r in points])
            ax.errorbar(
                medians, [y + offset for y, _ in points], xerr=errors, fmt="o", markersize=4, linewidth=1,
                color=f"C{i}", label=f"over {rival}",
            )  # fmt: skip
        ax.axvline(1.0, color="#444444", linewidth=1)
        ax.set_yticks(range(len(own)), [r.case for r in own])
        ax.set_ylim(len(own) - 0.4, -0.6)
        ax.set_xlim(left=0)
        ax.grid(axis="x", alpha=0.3)
        ax.set_title(heading(section), fontsize=11, loc="left")
        ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    panels[-1].set_xlabel("times as fast as the other side (median of ratios, 95 % interval); right of 1 is faster")
    return figure


def fill_readme(readme: Path, name: str, text: str) -> None:
    """Put ``text`` between the markers of ``name``."""
    pattern = re.compile(rf"(<!-- benchmark {re.escape(name)} -->\n).*?(<!-- /benchmark -->)", re.DOTALL)
    content = readme.read_text()
    if not pattern.search(content):
        raise SystemExit(f"report: {readme} has no marker <!-- benchmark {name} -->")
    readme.write_text(pattern.sub(lambda match: match[1] + text + match[2], content))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--out", type=Path, help="folder for table and plot; default: beside the JSON")
    parser.add_argument("--readme", type=Path, help="file whose section for this JSON is replaced")
    parser.add_argument("--html", type=Path, help="write this page, tables and plots in one file, and nothing else")
    options = parser.parse_args(arguments)
    document, results = load(options.json)
    text = day(document, options.json.name) if "steps" in document else markdown(document, results, options.json)
    if options.html:
        from . import report_html

        options.html.write_text(report_html.page(options.json.stem, text, results))
        return
    out: Path = options.out or options.json.parent
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{options.json.stem}.md").write_text(text)
    if results:
        plot(results).savefig(out / f"{options.json.stem}.png")
    if options.readme:
        fill_readme(options.readme, options.json.stem, text)
    print(text)


if __name__ == "__main__":
    main()
