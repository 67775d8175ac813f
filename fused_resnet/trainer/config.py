"""What a training run depends on: the one list of its options, of which the command line makes its own.

Neither torch nor future annotations here: the command line reads the types, and answers `--help` at once.
"""

# ruff: noqa: RUF009 (option makes a field)

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Builds a model from the number of classes and of input channels.
ModelFactory = Callable[[int, int], "nn.Module"]


class ConfigError(ValueError):
    """The configuration does not fit; the message is one sentence."""


def option(default: Any, text: str, *flags: str, **limits: Any) -> Any:
    """A field that is an option of the command line too: its help, its flags where they are not its name, and what
    ``typer.Option`` takes as ``limits``."""
    metadata = {"option": {"help": text, **limits}, "flags": flags}
    return field(default=default, kw_only=default is MISSING, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on. ``batch_size`` is per process; ``lr=None`` is 0.1 for SGD and 0.001 for Adam."""

    data: str = option("digits", "digits, cifar10 or folder:PATH")
    data_root: Path = option(Path("data"), "where cifar-10-python.tar.gz is")
    image_size: int | None = option(None, "size of the images of a folder", "--size", min=8)
    model: str | ModelFactory = option(
        "resnet18", "resnet18, 34, 50, 101, 152, or file.py:factory of (classes, channels)"
    )
    stem: Literal["cifar", "imagenet"] = option("cifar", "first convolution: 3x3, or 7x7 and pooling")
    fused: bool = option(True, "train fused blocks, or plain PyTorch", "--fused/--eager")
    epochs: int = option(30, "times through the training images", min=1)
    batch_size: int = option(64, "images in a batch, per process", "--batch", "-b", min=1)
    optimizer: Literal["sgd", "adam"] = option("sgd", "SGD with momentum, or Adam")
    lr: float | None = option(None, "learning rate", min=0.0)
    momentum: float = option(0.9, "of SGD", min=0.0)
    weight_decay: float = option(5e-4, "of every parameter that is trained", min=0.0)
    schedule: Literal["cosine", "step", "constant"] = option("cosine", "of the learning rate")
    label_smoothing: float = option(0.0, "share of the target spread over all classes", min=0.0, max=1.0)
    ema: float | None = option(None, "decay of an exponential moving average of the weights")
    amp: Literal["off", "bf16", "fp16"] = option("off", "automatic mixed precision")
    channels_last: bool = option(True, "memory format", "--channels-last/--contiguous")
    dtype: "torch.dtype | None" = None
    """None is float32."""
    device: str = option("auto", "auto, cpu or cuda")
    seed: int = option(0, "of weights, order and augmentation")
    workers: int = option(4, "threads that decode images", min=1)
    output: Path = option(Path("runs/train"), "folder of the run", "--output", "-o")
    resume: bool = option(False, "go on with the run in --output", "--resume")
    progress: bool = True

    def __post_init__(self) -> None:
        for item in fields(self):
            value, limits = getattr(self, item.name), item.metadata.get("option", {})
            choices = get_args(item.type) if get_origin(item.type) is Literal else (value,)
            if value not in choices:
                raise ConfigError(f"{item.name}: expected one of {', '.join(choices)}, got {value!r}")
            if value is not None and "min" in limits and value < limits["min"]:
                raise ConfigError(f"{item.name}: expected at least {limits['min']}, got {value}")
            if value is not None and "max" in limits and value > limits["max"]:
                raise ConfigError(f"{item.name}: expected at most {limits['max']}, got {value}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"ema: expected a decay between 0 and 1, got {self.ema}")


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """Training that starts from ``weights`` with a new classifier.

    ``freeze_until="layer3"`` keeps everything before ``layer3`` as it is, its BN statistics included.
    ``num_classes`` is checked against the data.
    """

    weights: Path = option(MISSING, "checkpoint to start from (.pt or .safetensors)")
    num_classes: int | None = option(None, "checked against the data", min=2)
    freeze_until: str | None = option(None, "keep what stands before this layer, such as layer3")
    epochs: int = option(10, "times through the training images", min=1)
    lr: float | None = option(0.01, "learning rate", min=0.0)
    output: Path = option(Path("runs/finetune"), "folder of the run", "--output", "-o")
