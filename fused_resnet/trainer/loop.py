"""Training and fine-tuning ResNets with fused blocks: ``train(TrainConfig(...))``, ``finetune(FinetuneConfig(...))``.

One process or many (torchrun), CPU or GPU. Every epoch ends with a checkpoint from which the run goes on to the
result it would have had.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint
from .config import ConfigError, FinetuneConfig, ModelFactory, TrainConfig
from .data import Batches, Data, DataError, evaluation_batches, load_data
from .distributed import Group, process_group
from .log import Epoch, Progress, draw_curves, write_csv
from .recipe import build_model, frozen_modules, load_pretrained, make_average, make_optimizer, make_schedule

__all__ = ["ConfigError", "FinetuneConfig", "ModelFactory", "Result", "TrainConfig", "finetune", "train"]


@dataclass(frozen=True)
class Result:
    """How a run ended. Accuracies are percentages of the test images."""

    accuracy: float
    best_accuracy: float
    per_class: dict[str, float]
    history: list[Epoch]
    last: Path
    best: Path
    weights: Path
    model: nn.Module = field(repr=False)


def train(config: TrainConfig) -> Result:
    """Train a model from scratch, or go on with a run (``resume``). Raises DataError, ConfigError."""
    with process_group(config.device) as group:
        data = load_data(config.data, config.data_root, config.image_size, config.workers)
        return _Run(config, group, data).run()


def finetune(config: FinetuneConfig) -> Result:
    """Train a model that starts from the weights of another one. Raises DataError, ConfigError, CheckpointError."""
    return train(config)


# ---- the run ---------------------------------------------------------------------------------------------


class _Run:
    """One training run of one process."""

    def __init__(self, config: TrainConfig, group: Group, data: Data) -> None:
        self.config, self.group, self.data = config, group, data
        self.dtype = config.dtype or torch.float32
        self.last, self.best = config.output / "last.pt", config.output / "best.pt"
        if self.last.exists() and not config.resume:
            raise ConfigError(f"output: {config.output} holds a run; give --resume or another --output")
        torch.manual_seed(config.seed)
        model = build_model(config, data)
        self.frozen: list[nn.Module] = []
        if isinstance(config, FinetuneConfig):
            load_pretrained(model, config, data)
            self.frozen = [] if config.freeze_until is None else frozen_modules(model, config.freeze_until)
        for module in self.frozen:
            module.requires_grad_(False)
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        model = model.to(device=group.device, dtype=self.dtype, memory_format=memory_format)  # type: ignore[call-overload]
        self.model, self.parallel = group.wrap(model)
        self.ema = make_average(self.model, config.ema)
        self.optimizer = make_optimizer(config, self.model)
        self.schedule = make_schedule(config, self.optimizer)
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=config.amp == "fp16")
        self.batches = Batches(data, config.batch_size, config.seed, group.rank, group.world)
        self.history: list[Epoch] = []
        self.best_accuracy = -1.0
        self.per_class: dict[str, float] = {}
        self.progress = Progress(config.progress and group.leads)
        if config.amp == "fp16" and group.device.type == "cpu":
            self.progress.say("torch computes float16 gradients on the CPU some hundred times slower than bfloat16's")

    @property
    def judged(self) -> nn.Module:
        """The model that is tested and exported."""
        return self.model if self.ema is None else self.ema.module

    def run(self) -> Result:
        if self.config.resume and self.last.exists():
            self._restore()
        for epoch in range(len(self.history) + 1, self.config.epochs + 1):
            with self._keeping_the_run(epoch):
                self._epoch(epoch)
        weights = self.config.output / "weights.safetensors"
        if self.group.leads:
            checkpoint.export_safetensors(weights, self.judged, self._meta())
        accuracy = self.history[-1].test_accuracy
        return Result(
            accuracy, self.best_accuracy, self.per_class, self.history, self.last, self.best, weights, self.judged
        )

    @contextmanager
    def _keeping_the_run(self, epoch: int) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            kept = f"the run up to epoch {epoch - 1} is kept in {self.last}" if epoch > 1 else "no epoch was finished"
            raise DataError(f"{error}; {kept}") from error

    def _epoch(self, epoch: int) -> None:
        start = time.perf_counter()
        lr = self.optimizer.param_groups[0]["lr"]
        self.parallel.train()
        for module in self.frozen:
            module.eval()
        totals = torch.zeros(2, dtype=torch.float64)  # loss, correct
        with self.progress.epoch(epoch, self.config.epochs, len(self.batches)):
            for images, labels in self.batches.epoch(epoch):
                loss, correct = self._step(images, labels)
                totals += torch.tensor([loss, correct], dtype=torch.float64)
                self.progress.step(loss)
        self.schedule.step()
        steps = len(self.batches) * self.group.world
        train_loss, correct = (self.group.sum(totals) / steps).tolist()
        test_loss, test_accuracy, self.per_class = self.evaluate()
        line = Epoch(
            epoch, train_loss, 100 * correct / self.config.batch_size, test_loss, test_accuracy, lr,
            time.perf_counter() - start,
        )  # fmt: skip
        self.history.append(line)
        self._save(test_accuracy)
        self.progress.say(
            f"epoch {epoch:3d}  loss {train_loss:.4f}  train {line.train_accuracy:.2f} %  test {test_accuracy:.2f} %"
            f"  {line.seconds:.1f} s"
        )

    def _step(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """One optimizer step; the loss and the number of right answers."""
        images, labels = self._to_device(images), labels.to(self.group.device)
        with self._autocast():
            logits = self.parallel(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return loss.item(), float((logits.argmax(1) == labels).sum())

    def _to_device(self, images: Tensor) -> Tensor:
        memory_format = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return images.to(self.group.device, self.dtype, memory_format=memory_format)

    def _autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.config.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.group.device.type, dtype, enabled=self.config.amp != "off")

    def evaluate(self) -> tuple[float, float, dict[str, float]]:
        """Loss, accuracy and accuracy per class (percent) of the judged model on the test images."""
        try:
            from torchmetrics import MeanMetric
            from torchmetrics.classification import MulticlassAccuracy
        except ImportError:
            raise ConfigError("training needs torchmetrics; install fused_resnet[demo]") from None
        classes = len(self.data.classes)
        mean_loss = MeanMetric().to(self.group.device)
        accuracy = MulticlassAccuracy(classes, average="micro").to(self.group.device)
        per_class = MulticlassAccuracy(classes, average=None).to(self.group.device)
        model = self.judged.eval()
        with torch.no_grad(), self._autocast():
            for images, labels in evaluation_batches(
                self.data, self.config.batch_size, self.group.rank, self.group.world
            ):
                logits, labels = model(self._to_device(images)).float(), labels.to(self.group.device)
                mean_loss.update(F.cross_entropy(logits, labels), len(labels))
                accuracy.update(logits, labels)
                per_class.update(logits, labels)
        values = (100 * per_class.compute()).tolist()
        named = dict(zip(self.data.classes, values, strict=True))
        return float(mean_loss.compute()), 100 * float(accuracy.compute()), named

    # ---- what is kept

    def _meta(self) -> dict[str, Any]:
        name = self.config.model if isinstance(self.config.model, str) else getattr(self.config.model, "__name__", "")
        return {
            "model": name,
            "stem": self.config.stem,
            "classes": list(self.data.classes),
            "in_channels": self.data.channels,
            "size": self.data.size,
            "mean": list(self.data.mean),
            "std": list(self.data.std),
            "epoch": len(self.history),
            "accuracy": self.history[-1].test_accuracy if self.history else None,
        }

    def _save(self, accuracy: float) -> None:
        """The checkpoint of a finished epoch, its log and its picture; only the leading process writes."""
        improved = accuracy > self.best_accuracy
        self.best_accuracy = max(accuracy, self.best_accuracy)
        rng = self.group.gather(checkpoint.rng_state())
        if not self.group.leads:
            return
        content = {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "ema_updates": 0 if self.ema is None else int(self.ema.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": rng,
            "history": [asdict(line) for line in self.history],
            "best_accuracy": self.best_accuracy,
            "per_class": self.per_class,
            "fingerprint": self._fingerprint(),
            "meta": self._meta(),
        }
        checkpoint.save(self.last, content)
        if improved:
            checkpoint.save(self.best, content)
        write_csv(self.config.output / "log.csv", self.history)
        draw_curves(self.config.output / "curves.png", {"": self.history})

    def _fingerprint(self) -> dict[str, Any]:
        """What must not change between a run and its continuation."""
        names = ("data", "stem", "epochs", "batch_size", "optimizer", "schedule", "seed", "amp", "ema")
        kept = {name: getattr(self.config, name) for name in names}
        return kept | {"model": self._meta()["model"], "classes": list(self.data.classes), "world": self.group.world}

    def _restore(self) -> None:
        """Go back to the end of the last finished epoch."""
        content = checkpoint.load(self.last)
        for name, value in self._fingerprint().items():
            if content["fingerprint"].get(name) != value:
                raise ConfigError(
                    f"resume: {name}: expected {content['fingerprint'].get(name)!r}, as in {self.last}, got {value!r}"
                )
        self.model.load_state_dict(content["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(content["ema"])
            self.ema.n_averaged.fill_(content["ema_updates"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        self.scaler.load_state_dict(content["scaler"])
        checkpoint.set_rng_state(content["rng"][self.group.rank])
        self.history = [Epoch(**line) for line in content["history"]]
        self.best_accuracy, self.per_class = content["best_accuracy"], content["per_class"]
        self.progress.say(f"going on after epoch {len(self.history)} of {self.last}")
