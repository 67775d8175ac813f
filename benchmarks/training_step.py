"""One training step of a CIFAR ResNet-18 on the CPU, eager against fused: time, saved memory.

    python -m benchmarks.training_step [--rounds 30] [--batch 64] [--threads 2] [--output benchmarks/results]

A step is forward, loss, backward and SGD. Eager runs in both memory formats; the better one counts. All sides run
in one process in alternating order and end every round with equal losses (they start from the same weights).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.core.timing import median_interval
from fused_resnet.trainer.config import TrainConfig
from fused_resnet.trainer.recipe import build_model


class Side:
    """A model with its optimizer, in one memory format."""

    def __init__(self, fused: bool, memory_format: torch.memory_format, amp: bool) -> None:
        torch.manual_seed(0)
        self.model = _model(fused).to(memory_format=memory_format)
        self.memory_format = memory_format
        self.amp = amp
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
            return F.cross_entropy(self.model(images).float(), labels)

    def step(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """Seconds and loss of one step."""
        images = images.contiguous(memory_format=self.memory_format)
        start = time.perf_counter()
        loss = self.loss(images, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start, loss.item()

    def saved_bytes(self, images: Tensor, labels: Tensor) -> int:
        """Bytes kept between forward and backward, parameters excluded, shared memory counted once."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def note(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = self.loss(images.contiguous(memory_format=self.memory_format), labels)
        total = sum(kept.values())
        del loss
        return total


def _model(fused: bool) -> nn.Module:
    class Shape:
        classes = tuple(str(i) for i in range(10))
        channels = 3

    return build_model(TrainConfig(model="resnet18", stem="cifar", fused=fused), Shape())  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sides = {
        "eager": Side(False, torch.contiguous_format, arguments.amp),
        "eager channels_last": Side(False, torch.channels_last, arguments.amp),
        "fused": Side(True, torch.channels_last, arguments.amp),
    }
    g = torch.Generator().manual_seed(0)
    images = torch.randn(arguments.batch, 3, 32, 32, generator=g)
    labels = torch.randint(0, 10, (arguments.batch,), generator=g)
    saved = {name: side.saved_bytes(images, labels) for name, side in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for round_number in range(-2, arguments.rounds):
        images = torch.randn(arguments.batch, 3, 32, 32, generator=g)
        turn = round_number % len(names)
        losses = {}
        for name in names[turn:] + names[:turn]:
            seconds, losses[name] = sides[name].step(images, labels)
            if round_number >= 0:
                times[name].append(seconds)
        spread = max(losses.values()) - min(losses.values())
        if not spread <= 0.05 * max(1.0, max(losses.values())):
            raise RuntimeError(f"the losses differ: {losses}; the time of a wrong step is no time")
    best = min(names[:2], key=lambda name: statistics.median(times[name]))
    ratio = median_interval([a / b for a, b in zip(times[best], times["fused"], strict=True)])
    for name in names:
        median, fastest = 1e3 * statistics.median(times[name]), 1e3 * min(times[name])
        print(
            f"{name:20s} median {median:8.1f} ms  fastest {fastest:8.1f} ms  "
            f"saved for backward {saved[name] / 2**20:7.1f} MiB"
        )
    print(f"fused over {best}: {ratio}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = {
        "step": f"CIFAR ResNet-18, batch {arguments.batch}, {'bfloat16 autocast' if arguments.amp else 'float32'}",
        "threads": arguments.threads,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "seconds": times,
        "saved_bytes": saved,
        "baseline": best,
        "speedup": ratio._asdict() if hasattr(ratio, "_asdict") else str(ratio),
    }
    name = f"training_step_{'bf16' if arguments.amp else 'fp32'}.json"
    (arguments.output / name).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
