"""``demo``: the main job on real images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..common import UserError, console, reports_errors


def register(app: typer.Typer) -> None:
    app.command()(reports_errors(demo))


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for checkpoint, images and picture")] = Path(
        "demo_output"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="epochs of training")] = 12,
    rounds: Annotated[int, typer.Option(min=1, help="alternating rounds of each timing")] = 30,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="also time torch.compile")] = True,
    imagenet: Annotated[bool, typer.Option("--imagenet/--no-imagenet", help="also time ResNet-18 at 224x224")] = True,
) -> None:
    """Train a small ResNet on handwritten digits, fuse it, show that nothing changed but the time, draw it."""
    try:
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
        import sklearn  # noqa: F401
        import torchvision  # noqa: F401
    except ImportError as error:
        raise UserError(f"the demo needs {error.name}: pip install 'fused_resnet[demo]'") from error
    from .run import run

    try:
        run(out, epochs=epochs, rounds=rounds, compiled=compiled, imagenet=imagenet, console=console)
    except OSError as error:
        raise UserError(f"--out: {error}") from error
    except RuntimeError as error:
        # A promise that was not kept is a failed check, not the user's mistake.
        console.print(f"[bold red]{error}[/]", soft_wrap=True)
        raise typer.Exit(1) from None
