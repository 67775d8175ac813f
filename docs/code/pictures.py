"""The pictures of the documentation, drawn from the code's own rules and from committed measurements.

python docs/code/pictures.py OUT     # all of them as SVG files
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from fused_resnet import devices
from fused_resnet.core.problem import Problem
from fused_resnet.testing import RESNET_TAILS

matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"
BLUE, ORANGE, GREEN, GREY, PALE = "#3f51b5", "#e67e22", "#2e8b57", "#777777", "#e8eaf6"


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _board(width: float, height: float, x: float, y: float) -> tuple[Figure, Axes]:
    """A figure of these inches to draw on in units of one's own, y downwards."""
    figure = Figure(figsize=(width, height), layout="constrained")
    ax = figure.subplots()
    ax.set(xlim=(0, x), ylim=(y, 0), aspect="equal")
    ax.axis("off")
    return figure, ax


def _grid(
    ax: Axes, x: float, y: float, columns: int, rows: int, size: float = 1.0, colour: str = "white", edge: str = GREY
) -> None:
    for row in range(rows):
        for column in range(columns):
            ax.add_patch(Rectangle((x + column * size, y + row * size), size, size, facecolor=colour, edgecolor=edge,
                                   linewidth=0.6))  # fmt: skip


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=colour, linewidth=1.2))


def tiles() -> str:
    """Implicit GEMM: which part of the tensors one block of threads reads and writes."""
    figure, ax = _board(9, 3.9, 36, 15.6)
    ax.text(0.3, 0.9, "x: pixels, C channels deep")
    _grid(ax, 0.5, 1.6, 8, 8)
    _grid(ax, 0.5 + 2, 1.6 + 1, 4, 3, colour=PALE)  # the windows of two pixels, one beside the other
    ax.add_patch(Rectangle((2.5, 2.6), 3, 3, fill=False, edgecolor=BLUE, linewidth=2))
    ax.add_patch(Rectangle((3.5, 2.6), 3, 3, fill=False, edgecolor=ORANGE, linewidth=2))
    ax.text(0.5, 11.1, "the 3 x 3 windows of two outputs\noverlap: nothing is copied out,\nthe kernel computes "
            "addresses", va="top", color=GREY)  # fmt: skip

    ax.text(11.0, 0.9, "A: row = pixel, column = (tap, channel)")
    ax.add_patch(Rectangle((11.5, 1.6), 10, 9, facecolor="white", edgecolor=GREY))
    ax.add_patch(Rectangle((11.5, 4.6), 10, 3, facecolor=PALE, edgecolor="none"))
    for step in range(1, 5):
        ax.plot([11.5 + 2 * step] * 2, [4.6, 7.6], color=BLUE, linewidth=0.6, linestyle=":")
    ax.add_patch(Rectangle((11.5, 4.6), 10, 3, fill=False, edgecolor=BLUE, linewidth=1.5))
    ax.plot([11.5, 21.5], [4.9, 4.9], color=BLUE, linewidth=1.5)
    ax.plot([11.5, 21.5], [5.2, 5.2], color=ORANGE, linewidth=1.5)
    ax.text(16.5, 6.5, "the K-loop walks along\nR S C in steps", ha="center", va="center", color=BLUE)
    ax.text(11.2, 3.1, "N P Q\nrows", ha="right", va="center", rotation=90, color=GREY, fontsize=8)
    _arrow(ax, (5.5, 3.4), (11.4, 4.9), BLUE)
    _arrow(ax, (6.5, 3.9), (11.4, 5.2), ORANGE)

    ax.text(23.3, 0.9, "y = A x W: one tile for each block")
    tile = 3
    for row in range(3):
        for column in range(3):
            mine = row == 1 and column == 1
            ax.add_patch(Rectangle((24 + tile * column, 1.6 + tile * row), tile, tile, linewidth=0.8,
                                   facecolor=BLUE if mine else "white", edgecolor=GREY))  # fmt: skip
    ax.text(28.5, 6.1, "tile_m x\ntile_n", color="white", ha="center", va="center")
    ax.text(33.4, 6.1, "N P Q", rotation=90, va="center", color=GREY)
    ax.text(28.5, 11.3, "K output channels", ha="center", color=GREY)
    _arrow(ax, (21.6, 6.1), (26.9, 6.1), BLUE)
    ax.text(24, 12.4, "epilogue, while the tile is in registers:\nscale, shift, + residual, ReLU, one store", va="top",
            color=ORANGE)  # fmt: skip
    return _svg(figure)


def traffic() -> str:
    """Tensors read and written by one tail, eager against fused."""
    steps = [("convolution", 1, 1), ("batch norm", 1, 1), ("add", 2, 1), ("ReLU", 1, 1)]
    figure = Figure(figsize=(7.5, 2.4), layout="constrained")
    ax = figure.subplots()
    for y, parts in ((1, steps), (0, [("fused tail", 2, 1)])):
        left = 0
        for name, reads, writes in parts:
            ax.barh(y, reads, left=left, color=BLUE, edgecolor="white", height=0.55)
            ax.barh(y, writes, left=left + reads, color=ORANGE, edgecolor="white", height=0.55)
            ax.text(left + (reads + writes) / 2, y + 0.36, name, ha="center", va="bottom")
            left += reads + writes
        ax.text(left + 0.15, y, f"{left}", va="center", fontweight="bold")
    ax.barh(0, 0, color=BLUE, label="activations read")
    ax.barh(0, 0, color=ORANGE, label="activations written")
    ax.set(yticks=[0, 1], yticklabels=["fused", "eager"], ylim=(-0.5, 1.75), xlim=(0, 10),
           xlabel="activation tensors moved by one tail (as many channels out as in)")  # fmt: skip
    ax.legend(frameon=False, loc="lower right")
    return _svg(figure)


def _eager_bytes(problem: Problem) -> int:
    """Compulsory bytes of the four eager steps: the convolution's own, then three passes over its output."""
    y = problem.n * problem.p * problem.q * problem.k * problem.dtype.itemsize
    x = problem.n * problem.h * problem.w * problem.c * problem.dtype.itemsize
    weight = problem.k * problem.c * problem.r * problem.s * problem.dtype.itemsize
    return x + weight + y + 2 * y + 3 * y + 2 * y


def roofline() -> str:
    """Bounds of real tails on one GPU, from datasheet rates: what is possible, nothing that was measured."""
    import dataclasses

    import torch

    device = devices.find("H100 datasheet")
    peak, bandwidth = device.flops(torch.float16), device.bandwidth
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    ax = figure.subplots()
    ridge = peak / bandwidth
    span = [10.0, ridge, 3000.0]
    ax.plot(span, [min(peak, x * bandwidth) / 1e12 for x in span], color="black")
    ax.axvline(ridge, color=GREY, linestyle=":", linewidth=0.8)
    ax.text(ridge * 1.05, 40, f"{ridge:.0f} FLOP per byte", color=GREY)
    for tail in RESNET_TAILS:
        problem = dataclasses.replace(tail.problem, n=64, dtype=torch.float16)
        if problem.projection is not None:
            continue
        if problem.residual is not None:
            problem = dataclasses.replace(problem, residual=torch.float16)
        flops = 2.0 * problem.n * problem.p * problem.q * problem.k * problem.c * problem.r * problem.s
        y = problem.n * problem.p * problem.q * problem.k * 2
        eager, fused = _eager_bytes(problem), _eager_bytes(problem) - 6 * y
        points = [(flops / b, min(peak, flops / b * bandwidth) / 1e12) for b in (eager, fused)]
        ax.annotate("", points[1], points[0], arrowprops={"arrowstyle": "-", "color": "#bbbbbb"})
        ax.plot(*points[0], "o", color=BLUE)
        ax.plot(*points[1], "^", color=ORANGE)
    ax.plot([], [], "o", color=BLUE, label="eager, four passes")
    ax.plot([], [], "^", color=ORANGE, label="fused, one pass")
    ax.set(xscale="log", yscale="log", xlabel="FLOP per byte of memory traffic", ylabel="TFLOP/s at most",
           title="Tails of ResNet-18 and -50, float16, batch 64, under the roof of an H100's datasheet")  # fmt: skip
    ax.title.set_fontsize(9.5)
    ax.legend(frameon=False, loc="lower right")
    return _svg(figure)


def roofline_cpu() -> str:
    """The tails that were measured on one CPU thread, under that machine's measured roof."""
    document = json.loads((RESULTS / "cpu_tails_1_thread.json").read_text())
    results: list[dict[str, Any]] = [b["extra_info"] for b in document["benchmarks"]]
    results = [r for r in results if r["dtype"] == "float32"]
    peaks = results[0]["peaks"]
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    ax = figure.subplots()
    span = [5.0, peaks["flops"] / peaks["bandwidth"], 400.0]
    ax.plot(span, [min(peaks["flops"], x * peaks["bandwidth"]) / 1e9 for x in span], color="black")
    for side, marker, colour in (("eager channels_last", "o", BLUE), ("fused", "^", ORANGE)):
        rows = [(r, next(row for row in r["rows"] if row["name"] == side)) for r in results]
        points = [(r["flops"] / r["bytes"], r["flops"] / row["median_ms"] / 1e6) for r, row in rows]
        ax.scatter(*zip(*points, strict=True), marker=marker, color=colour, s=22, label=side)
    machine = document["machine_info"]["fused_resnet"]["CPU"]
    ax.set(xscale="log", yscale="log", xlabel="FLOP per compulsory byte",
           ylabel="GFLOP/s, counted as direct convolution")  # fmt: skip
    ax.set_title(f"Measured tails, float32, one thread: {machine.split(' (')[0]}", fontsize=9.5)
    ax.text(5.2, peaks["flops"] / 1e9 * 1.08, "peak of the float32 vector unit", color=GREY)
    ax.legend(frameon=False, loc="lower right")
    return _svg(figure)


def winograd() -> str:
    """F(2x2, 3x3): 16 multiplications where direct convolution needs 36; and how that goes on."""
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2.2, 1])
    left.set(xlim=(0, 26), ylim=(9.5, 0), aspect="equal")
    left.axis("off")
    _grid(left, 0.5, 2, 4, 4, colour=PALE)
    left.text(2.5, 1.4, "4 x 4 inputs d", ha="center")
    _arrow(left, (4.8, 4), (7.4, 4))
    left.text(6.1, 3.5, r"$B^T d\,B$", ha="center")
    _grid(left, 7.8, 2, 4, 4, colour=PALE)
    left.text(13.1, 4.1, r"$\odot$", ha="center", va="center", fontsize=16)
    _grid(left, 14.2, 2, 4, 4, colour="#fdebd0")
    left.text(16.2, 1.4, r"weights, $G\,g\,G^T$", ha="center")
    left.text(13.1, 7.3, "16 products, summed over\nthe channels: 16 small GEMMs", ha="center", color=GREY, va="top")
    _arrow(left, (18.5, 4), (21.3, 4))
    left.text(19.9, 3.5, r"$A^T m\,A$", ha="center")
    _grid(left, 21.8, 3, 2, 2, colour="#d5f0e0")
    left.text(22.8, 2.4, "2 x 2 outputs", ha="center")
    names, multiplications = ["direct", "F(2x2)", "F(4x4)"], [9.0, 16 / 4, 36 / 16]
    bars = right.bar(names, multiplications, color=[GREY, BLUE, ORANGE], width=0.6)
    right.bar_label(bars, [f"{value:g}" for value in multiplications])
    right.set(ylabel="multiplications per output", ylim=(0, 10))
    return _svg(figure)


def bf16x3() -> str:
    """A float32 as three bfloat16, and which products of their parts are made."""
    figure, ax = _board(8.5, 3.2, 34, 12.5)
    ax.text(0.5, 1.0, "the 24 significant bits of a float32")
    shades = ["#3f51b5", "#7986cb", "#c5cae9"]
    for bit in range(24):
        ax.add_patch(Rectangle((0.5 + 0.7 * bit, 1.6), 0.7, 1.2, facecolor=shades[bit // 8], edgecolor="white",
                               linewidth=0.6))  # fmt: skip
    for part, (name, how) in enumerate(
        [("x0", "bf16(x)"), ("x1", "bf16(x - x0)"), ("x2", "bf16(x - x0 - x1)")]
    ):  # eight bits each, with an exponent of its own
        x = 0.5 + 5.6 * part
        _arrow(ax, (x + 2.8, 3.0), (x + 2.8, 5.0))
        ax.add_patch(Rectangle((x + 0.2, 5.2), 5.2, 1.2, facecolor=shades[part], edgecolor="white"))
        ax.text(x + 2.8, 5.8, name, ha="center", va="center", color="white" if part < 2 else "black")
        ax.text(x + 2.8, 7.3, how, ha="center", color=GREY)
    ax.text(0.5, 9.4, "x = x0 + x1 + x2 exactly; each part is a bfloat16,\nwhich the matrix tiles multiply, with "
            "float32 sums", va="top")  # fmt: skip
    made = {(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)}  # kProducts of csrc/cpu/bf16x3.h
    ax.text(27.2, 1.0, "products that are made", ha="center")
    for i in range(3):
        ax.text(23.4 + 2.7 * i, 2.6, f"w{i}", ha="center", color=GREY)
        ax.text(21.5, 4.3 + 2.6 * i, f"x{i}", ha="center", va="center", color=GREY)
        for j in range(3):
            yes = (i, j) in made
            ax.add_patch(Rectangle((22.2 + 2.7 * j, 3.1 + 2.6 * i), 2.5, 2.4, edgecolor=GREY, linewidth=0.8,
                                   facecolor=GREEN if yes else "white"))  # fmt: skip
            ax.text(23.45 + 2.7 * j, 4.3 + 2.6 * i, f"2$^{{-{8 * (i + j)}}}$" if i + j else "1", ha="center",
                    va="center", color="white" if yes else GREY)  # fmt: skip
    ax.text(26.2, 11.9, "six of nine; the others would not change the result", ha="center", color=GREY)
    return _svg(figure)


PICTURES: dict[str, Callable[[], str]] = {
    "tiles": tiles,
    "traffic": traffic,
    "roofline": roofline,
    "roofline_cpu": roofline_cpu,
    "winograd": winograd,
    "bf16x3": bf16x3,
}

if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (out / f"{name}.svg").write_text(draw())
