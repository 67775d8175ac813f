"""``train`` and ``finetune``: the recipes of :mod:`fused_resnet.trainer.loop`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from .common import UserError, console, reports_errors, say, user_errors

if TYPE_CHECKING:
    from ..trainer.loop import ModelFactory, Result, TrainConfig


def register(app: typer.Typer) -> None:
    for function in (train, finetune):
        app.command()(reports_errors(function))


Data = Annotated[str, typer.Option(help="digits, cifar10 or folder:PATH")]
DataRoot = Annotated[Path, typer.Option(help="where cifar-10-python.tar.gz is")]
ImageSize = Annotated[int | None, typer.Option("--size", min=8, help="size of the images of a folder")]
Model = Annotated[str, typer.Option(help="resnet18, 34, 50, 101, 152, or file.py:factory of (classes, channels)")]
Stem = Annotated[Literal["cifar", "imagenet"], typer.Option(help="first convolution: 3x3, or 7x7 and pooling")]
Fused = Annotated[bool, typer.Option("--fused/--eager", help="train fused blocks, or plain PyTorch")]
Epochs = Annotated[int, typer.Option(min=1)]
BatchSize = Annotated[int, typer.Option("--batch", "-b", min=1, help="images in a batch, per process")]
Optimizer = Annotated[Literal["sgd", "adam"], typer.Option()]
LearningRate = Annotated[float | None, typer.Option("--lr", min=0.0, help="learning rate", show_default=False)]
Momentum = Annotated[float, typer.Option(min=0.0)]
WeightDecay = Annotated[float, typer.Option(min=0.0)]
Schedule = Annotated[Literal["cosine", "step", "constant"], typer.Option(help="of the learning rate")]
Smoothing = Annotated[float, typer.Option("--label-smoothing", min=0.0, max=1.0)]
Ema = Annotated[float | None, typer.Option(help="decay of an exponential moving average of the weights")]
Amp = Annotated[Literal["off", "bf16", "fp16"], typer.Option(help="automatic mixed precision")]
Layout = Annotated[bool, typer.Option("--channels-last/--contiguous", help="memory format")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Seed = Annotated[int, typer.Option()]
Workers = Annotated[int, typer.Option(min=1, help="threads that decode images")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with the run in --output")]


def train(
    data: Data = "digits",
    data_root: DataRoot = Path("data"),
    size: ImageSize = None,
    model: Model = "resnet18",
    stem: Stem = "cifar",
    fused: Fused = True,
    epochs: Epochs = 30,
    batch: BatchSize = 64,
    optimizer: Optimizer = "sgd",
    lr: LearningRate = None,
    momentum: Momentum = 0.9,
    weight_decay: WeightDecay = 5e-4,
    schedule: Schedule = "cosine",
    label_smoothing: Smoothing = 0.0,
    ema: Ema = None,
    amp: Amp = "off",
    channels_last: Layout = True,
    device: Device = "auto",
    seed: Seed = 0,
    workers: Workers = 4,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder of the run")] = Path("runs/train"),
    resume: Resume = False,
) -> None:
    """Train a ResNet with fused blocks from scratch; under torchrun, on many GPUs or CPUs.

    The folder of the run gets the last and the best checkpoint, weights.safetensors, log.csv and curves.png.
    """
    from ..trainer.loop import TrainConfig
    from ..trainer.loop import train as run

    _run(run, lambda: TrainConfig(
        data=data, data_root=data_root, image_size=size, model=_factory(model), stem=stem, fused=fused, epochs=epochs,
        batch_size=batch, optimizer=optimizer, lr=lr, momentum=momentum, weight_decay=weight_decay, schedule=schedule,
        label_smoothing=label_smoothing, ema=ema, amp=amp, channels_last=channels_last, device=device, seed=seed,
        workers=workers, output=output, resume=resume,
    ))  # fmt: skip


def finetune(
    weights: Annotated[Path, typer.Option(help="checkpoint to start from (.pt or .safetensors)")],
    data: Data = "digits",
    num_classes: Annotated[int | None, typer.Option(min=2, help="checked against the data")] = None,
    freeze_until: Annotated[str | None, typer.Option(help="keep what stands before this layer, such as layer3")] = None,
    data_root: DataRoot = Path("data"),
    size: ImageSize = None,
    model: Model = "resnet18",
    stem: Stem = "cifar",
    fused: Fused = True,
    epochs: Epochs = 10,
    batch: BatchSize = 64,
    optimizer: Optimizer = "sgd",
    lr: LearningRate = 0.01,
    momentum: Momentum = 0.9,
    weight_decay: WeightDecay = 5e-4,
    schedule: Schedule = "cosine",
    label_smoothing: Smoothing = 0.0,
    ema: Ema = None,
    amp: Amp = "off",
    channels_last: Layout = True,
    device: Device = "auto",
    seed: Seed = 0,
    workers: Workers = 4,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder of the run")] = Path("runs/finetune"),
    resume: Resume = False,
) -> None:
    """Train on your own classes, from the weights of another run: the classifier is new, first layers may be kept."""
    from ..trainer.loop import FinetuneConfig
    from ..trainer.loop import finetune as run

    _run(run, lambda: FinetuneConfig(
        weights=weights, num_classes=num_classes, freeze_until=freeze_until,
        data=data, data_root=data_root, image_size=size, model=_factory(model), stem=stem, fused=fused, epochs=epochs,
        batch_size=batch, optimizer=optimizer, lr=lr, momentum=momentum, weight_decay=weight_decay, schedule=schedule,
        label_smoothing=label_smoothing, ema=ema, amp=amp, channels_last=channels_last, device=device, seed=seed,
        workers=workers, output=output, resume=resume,
    ))  # fmt: skip


def _run(function: Callable[[Any], Result], config: Callable[[], TrainConfig]) -> None:
    from ..trainer.checkpoint import CheckpointError
    from ..trainer.data import DataError
    from ..trainer.loop import ConfigError

    with user_errors(DataError, ConfigError, CheckpointError, OSError):
        result = function(config())
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("class")
    table.add_column("accuracy", justify="right")
    for name, accuracy in result.per_class.items():
        table.add_row(name, f"{accuracy:.1f} %")
    console.print(table)
    say(f"accuracy {result.accuracy:.2f} %, best {result.best_accuracy:.2f} %")
    for path in (result.last, result.best, result.weights):
        say(f"  {path}")


def _factory(text: str) -> str | ModelFactory:
    """A name, or the factory that ``file.py:factory`` names."""
    if ":" not in text:
        return text
    from .target import attribute_of

    factory = attribute_of(text)
    if not callable(factory):
        raise UserError(f"--model: {text} must be callable with (classes, channels), got a {type(factory).__name__}")
    chosen: ModelFactory = factory
    return chosen
