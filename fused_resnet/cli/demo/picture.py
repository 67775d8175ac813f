"""The demo's picture: digits with their predictions, the learning curve, and the times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .outcome import Outcome, Timed

# Okabe-Ito: told apart by readers with any colour vision; the fused side stands out, the rest is grey to blue.
_COLOURS = {
    "eager": "#9a9a9a", "eager channels_last": "#6f7f8f", "torch.compile": "#56b4e9", "fused": "#d55e00",
}  # fmt: skip
_ROWS, _COLUMNS = 3, 8


def draw(outcome: Outcome, path: Path) -> Path:
    """Draw and save the picture; returns ``path``."""
    from matplotlib.figure import Figure

    # Not through pyplot: no window system is asked for, and no global state is left behind.
    figure = Figure(figsize=(12, 7.2), dpi=130, layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.0, 1.0], hspace=0.05)
    left, right = halves[0].subfigures(1, 2, width_ratios=[1.25, 1.0])
    figure.suptitle("fused_resnet: one pass for conv, BN, residual and ReLU", fontsize=15, fontweight="bold")
    _draw_digits(left, outcome)
    _draw_training(right.subplots(), outcome)
    axes = halves[1].subplots(1, len(outcome.timed), squeeze=False)[0]
    for ax, timed in zip(axes, outcome.timed, strict=True):
        _draw_times(ax, timed)
    halves[1].supxlabel("median ms for the batch (bars: 10th to 90th percentile); less is better", fontsize=9)
    figure.savefig(path)
    return path


def _draw_digits(figure: Any, outcome: Outcome) -> None:
    right = outcome.answers == outcome.labels
    wrong_first = torch.argsort(right.int(), stable=True)[: _ROWS * _COLUMNS]
    figure.suptitle(
        f"Held-out digits: {100 * float(right.float().mean()):.1f} % right; "
        f"fused gives eager's answer on {outcome.same_predictions} of {len(right)}",
        fontsize=11,
    )
    axes = figure.subplots(_ROWS, _COLUMNS)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, i in zip(axes.flat, wrong_first.tolist(), strict=False):
        ax.imshow(outcome.pixels[i, 0].numpy(), cmap="gray_r", vmin=0, vmax=255)
        answer, label = int(outcome.answers[i]), int(outcome.labels[i])
        ax.set_title(
            f"{answer}" if answer == label else f"{answer}, is {label}",
            fontsize=9, color="#333333" if answer == label else "#d55e00", pad=3,
        )  # fmt: skip


def _draw_training(ax: Any, outcome: Outcome) -> None:
    history = outcome.training.history
    epochs = [line.epoch for line in history]
    ax.plot(epochs, [line.test_accuracy for line in history], color="#0072b2", marker="o")
    ax.set_xlabel("epoch")
    ax.set_ylabel("held-out accuracy (%)", color="#0072b2")
    ax.set_ylim(top=101)
    ax.set_xticks(epochs)
    loss = ax.twinx()
    loss.plot(epochs, [line.train_loss for line in history], color="#9a9a9a", linestyle="--", marker=".")
    loss.set_ylabel("training loss", color="#777777")
    loss.set_ylim(bottom=0)
    ax.set_title("Training", fontsize=11)
    for side in (ax, loss):
        side.spines["top"].set_visible(False)


def _draw_times(ax: Any, timed: Timed) -> None:
    names = [row["name"] for row in timed.rows]
    medians = [row["median_ms"] for row in timed.rows]
    low = [max(0.0, row["median_ms"] - row["p10_ms"]) for row in timed.rows]
    high = [max(0.0, row["p90_ms"] - row["median_ms"]) for row in timed.rows]
    positions = range(len(names))[::-1]
    ax.barh(
        positions, medians, xerr=(low, high), height=0.62, color=[_COLOURS.get(n, "#cccccc") for n in names],
        error_kw={"elinewidth": 1, "ecolor": "#444444", "capsize": 2},
    )  # fmt: skip
    room = max(row["p90_ms"] for row in timed.rows)
    for position, row in zip(positions, timed.rows, strict=True):
        fused = row["name"] == "fused"
        text = f"{row['median_ms']:.1f} ms"
        if fused:
            text += f"   {row['speedup']:.2f}x [{row['low']:.2f}, {row['high']:.2f}]"
        ax.text(
            row["p90_ms"] + 0.015 * room, position, text, va="center", fontsize=9,
            fontweight="bold" if fused else "normal",
        )  # fmt: skip
    ax.set_yticks(list(positions), names)
    ax.set_xlim(0, 1.6 * room)
    ax.set_title(timed.title, fontsize=11)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
