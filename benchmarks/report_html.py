"""The report of a benchmark run as one HTML page that needs no other file: tables, and plots as inline SVG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from .report import GRAPH, Result, by_section, heading, plot, sides

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tbody tr:hover { background: #f2f4ff; }
td strong { color: #1a5fb4; }
code { background: #f2f2f2; padding: 0 .2em; }
svg { max-width: 100%; height: auto; }
"""


def page(name: str, text: str, results: Sequence[Result]) -> str:
    """The page of a run called ``name``; ``text`` is its report in Markdown."""
    body = [f"<h1>{html.escape(name.replace('_', ' '))}</h1>", *from_markdown(text)]
    if results:
        body += ["<h2>How many times as fast</h2>", svg(plot(results))]
        body += [f"<h2>Times: {html.escape(heading(section))}</h2>{svg(times(own))}"
                 for section, own in by_section(results).items()]  # fmt: skip
    head = f'<meta charset="utf-8"/><title>{html.escape(name)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def from_markdown(text: str) -> Iterator[str]:
    """HTML of what :mod:`.report` writes: paragraphs, lists, tables, bold and code."""
    for kind, lines in groupby(text.splitlines(), lambda line: line[:1] if line[:1] in "|-" else "p" if line else ""):
        block = list(lines)
        if kind == "|":
            yield _table(block)
        elif kind == "-":
            yield "<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in block) + "</ul>"
        elif kind == "p":
            yield from (f"<p>{_inline(line)}</p>" for line in block)


def _table(lines: Sequence[str]) -> str:
    def row(line: str, tag: str) -> str:
        cells = (cell.strip() for cell in line.strip().strip("|").split("|"))
        return "<tr>" + "".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in cells) + "</tr>"

    head, _, *rows = lines
    body = "".join(row(line, "td") for line in rows)
    return f'<div class="wide"><table><thead>{row(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def svg(figure: Figure) -> str:
    """The figure's ``<svg>`` element."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def times(results: Sequence[Result]) -> Figure:
    """Median of every side of every row, from the tenth to the ninetieth percentile."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    names = [name for name in sides(results) if not name.endswith(GRAPH)]
    figure = Figure(figsize=(10, 1.2 + 0.5 * len(results)), layout="constrained")
    ax = figure.subplots()
    for i, name in enumerate(names):
        offset = 0.7 * (i / max(1, len(names) - 1) - 0.5)
        points = [(y + offset, r.rows[name]) for y, r in enumerate(results) if name in r.rows]
        medians = [row["median_ms"] for _, row in points]
        around = (
            [row["median_ms"] - row.get("p10_ms", row["median_ms"]) for _, row in points],
            [row.get("p90_ms", row["median_ms"]) - row["median_ms"] for _, row in points],
        )
        ours = name.startswith("fused")
        ax.errorbar(
            medians, [y for y, _ in points], xerr=around, fmt="D" if ours else "o", markersize=5 if ours else 3.5,
            linewidth=1, color=f"C{i % 10}", label=name,
        )  # fmt: skip
    ax.set_yticks(range(len(results)), [r.case for r in results])
    ax.set(xscale="log", xlabel="ms, median and 10th to 90th percentile", ylim=(len(results) - 0.4, -0.6))
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis="x", alpha=0.3)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return figure
