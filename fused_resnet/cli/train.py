"""``train`` and ``finetune``: the recipes of :mod:`fused_resnet.trainer.loop`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..trainer.config import ConfigError, FinetuneConfig, ModelFactory, TrainConfig
from .common import UserError, console, reports_errors, say, user_errors

if TYPE_CHECKING:
    from ..trainer.loop import Result


def register(app: typer.Typer) -> None:
    for config, function in ((TrainConfig, train), (FinetuneConfig, finetune)):
        app.command()(reports_errors(_with_options_of(config, function)))


def train(**options: Any) -> None:
    """Train a ResNet with fused blocks from scratch; under torchrun, on many GPUs or CPUs.

    The folder of the run gets the last and the best checkpoint, weights.safetensors, log.csv and curves.png.
    """
    from ..trainer.loop import train as run

    _run(run, TrainConfig, options)


def finetune(**options: Any) -> None:
    """Train on your own classes, from the weights of another run: the classifier is new, first layers may be kept."""
    from ..trainer.loop import finetune as run

    _run(run, FinetuneConfig, options)


def _with_options_of(config: type[TrainConfig], function: Callable[..., None]) -> Callable[..., None]:
    """``function`` with a parameter for each option of ``config``, its own before those of every training."""
    common = TrainConfig.__dataclass_fields__
    parameters = []
    for item in sorted(fields(config), key=lambda item: item.name in common):
        if "option" in item.metadata:
            kind = str if item.name == "model" else item.type
            default = Parameter.empty if item.default is MISSING else item.default
            option = typer.Option(*item.metadata["flags"], **item.metadata["option"])
            annotation = Annotated[kind, option]  # type: ignore[valid-type]
            parameters.append(Parameter(item.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    function.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function


def _run(function: Callable[[Any], Result], config: type[TrainConfig], options: dict[str, Any]) -> None:
    from ..trainer.checkpoint import CheckpointError
    from ..trainer.data import DataError

    with user_errors(DataError, ConfigError, CheckpointError, OSError):
        result = function(config(**options | {"model": _factory(options["model"])}))
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
