"""Eager and fused training from the same seeds on digits: final accuracies, and the curves in one picture.

    python -m benchmarks.train_digits [--epochs 15] [--seeds 3] [--output benchmarks/results]

Both runs of a seed start from the same weights and see the same batches; they differ in how a block is computed. What
that difference is worth shows beside the differences between seeds of one and the same side, which the report has as
well. Writes digits_training.json and digits_training.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from fused_resnet.trainer.log import Epoch, draw_curves
from fused_resnet.trainer.loop import TrainConfig, train

#: 22 steps an epoch are too few to recover from the first steps at 0.1, the default.
_LEARNING_RATE = 0.05


def mean_history(histories: list[list[Epoch]]) -> list[Epoch]:
    """The mean over seeds of every column, epoch by epoch."""
    means = []
    for lines in zip(*histories, strict=True):
        columns = {name: sum(asdict(line)[name] for line in lines) / len(lines) for name in asdict(lines[0])}
        means.append(Epoch(**(columns | {"epoch": lines[0].epoch})))
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()

    histories: dict[str, list[list[Epoch]]] = {"eager": [], "fused": []}
    for seed in range(arguments.seeds):
        for name, runs in histories.items():
            with tempfile.TemporaryDirectory() as folder:
                config = TrainConfig(
                    model=arguments.model, fused=name == "fused", epochs=arguments.epochs, seed=seed, lr=_LEARNING_RATE,
                    output=Path(folder) / "run", progress=False,
                )  # fmt: skip
                result = train(config)
            runs.append(result.history)
            print(
                f"seed {seed} {name:5s}  {result.accuracy:.2f} %  loss {result.history[-1].test_loss:.4f}", flush=True
            )

    final = {name: [history[-1].test_accuracy for history in runs] for name, runs in histories.items()}
    means = {name: sum(values) / len(values) for name, values in final.items()}
    difference = means["fused"] - means["eager"]
    between_seeds = {name: max(values) - min(values) for name, values in final.items()}
    print(f"mean over {arguments.seeds} seeds: eager {means['eager']:.2f} %, fused {means['fused']:.2f} %, "
          f"difference {difference:+.2f} points; between seeds eager {between_seeds['eager']:.2f}, "
          f"fused {between_seeds['fused']:.2f} points")  # fmt: skip
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = {
        "data": "digits",
        "model": f"{arguments.model}, CIFAR stem",
        "epochs": arguments.epochs,
        "batch_size": 64,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "test_accuracy": final,
        "difference_of_means": difference,
        "largest_difference_between_seeds": between_seeds,
        "learning_rate": _LEARNING_RATE,
        "histories": {name: [[asdict(line) for line in run] for run in runs] for name, runs in histories.items()},
    }
    (arguments.output / "digits_training.json").write_text(json.dumps(report, indent=1) + "\n")
    draw_curves(
        arguments.output / "digits_training.png",
        {f"{name} (mean of {arguments.seeds} seeds)": mean_history(runs) for name, runs in histories.items()},
    )


if __name__ == "__main__":
    main()
