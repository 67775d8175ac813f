"""The command line: ``fused-resnet`` and ``python -m fused_resnet``.

Each module of this package holds one group of commands. Heavy imports (torch, torchvision, …) stand inside the
commands, so that ``--help`` and completion answer at once.
"""

from __future__ import annotations

import typer

from . import build, export, inspect, measure, predict, train, tune
from .common import console
from .demo import command

__all__ = ["app"]

app = typer.Typer(
    name="fused-resnet",
    help="conv -> BN -> add -> ReLU in one pass: fuse, verify and measure the residual tails of a ResNet.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a traceback is for a bug, and then the plain one
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (inspect, measure, predict, export, command, train, tune, build):
    group.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        from ..core.version import __version__

        console.print(f"fused_resnet {__version__}", highlight=False)
        raise typer.Exit()


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass
