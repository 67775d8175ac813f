"""What a training run leaves behind for people: a CSV log, a picture of the curves, a progress bar."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .checkpoint import write_atomically


@dataclass(frozen=True)
class Epoch:
    """One line of the log. Accuracies are percentages of the test images."""

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    learning_rate: float
    seconds: float


def write_csv(path: Path, history: Sequence[Epoch]) -> None:
    """The whole history, one line an epoch."""

    def write(temporary: str) -> None:
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Epoch)])
            writer.writeheader()
            writer.writerows(asdict(epoch) for epoch in history)

    write_atomically(path, write)


def read_csv(path: Path) -> list[Epoch]:
    """What :func:`write_csv` wrote."""
    with open(path, newline="") as file:
        return [Epoch(int(row.pop("epoch")), **{k: float(v) for k, v in row.items()}) for row in csv.DictReader(file)]


def draw_curves(path: Path, runs: dict[str, Sequence[Epoch]]) -> bool:
    """Loss and accuracy over the epochs, one colour a run; False where matplotlib is not installed."""
    try:
        import matplotlib.figure
    except ImportError:
        return False
    # Figure without pyplot: no global state, no display, safe in any thread.
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for i, (name, history) in enumerate(runs.items()):
        epochs = [e.epoch for e in history]
        label = f"{name} " if name else ""
        loss.plot(epochs, [e.train_loss for e in history], color=f"C{i}", label=f"{label}train")
        loss.plot(epochs, [e.test_loss for e in history], color=f"C{i}", linestyle="--", label=f"{label}test")
        accuracy.plot(epochs, [e.train_accuracy for e in history], color=f"C{i}", label=f"{label}train")
        accuracy.plot(epochs, [e.test_accuracy for e in history], color=f"C{i}", linestyle="--", label=f"{label}test")
    loss.set(xlabel="epoch", ylabel="cross-entropy", yscale="log")
    accuracy.set(xlabel="epoch", ylabel="accuracy (%)")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return True


class Progress:
    """A bar over the steps of one epoch; silent when ``shown`` is False."""

    def __init__(self, shown: bool) -> None:
        self._bar: Any = None
        self._shown = shown
        self._task: Any = None

    @contextmanager
    def epoch(self, epoch: int, epochs: int, steps: int) -> Iterator[None]:
        if not self._shown:
            yield
            return
        import rich
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # In a file or a pipe a bar would be nothing but an empty line.
        with Bar(*columns, transient=True, disable=not rich.get_console().is_terminal) as self._bar:
            self._task = self._bar.add_task(f"epoch {epoch}/{epochs}", total=steps)
            yield
        self._bar = None

    def step(self, loss: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, advance=1)

    def say(self, line: str) -> None:
        if self._shown:
            import rich

            rich.print(line)
