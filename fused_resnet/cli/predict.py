"""``predict``: classify images with the fused model."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .common import (
    BackendOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    UserError,
    WeightsOption,
    console,
    device_of,
    dtype_of,
    errors,
    fused_copy,
    progress_bar,
    reports_errors,
    user_errors,
)


def register(app: typer.Typer) -> None:
    app.command()(reports_errors(predict))


def predict(
    model: ModelArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="image files, or folders of them")],
    weights: WeightsOption = None,
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="classes to show for each image")] = 5,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="images in a batch")] = 16,
    size: Annotated[
        int | None, typer.Option("--size", "-s", min=1, help="input size; default: the weights', or 224")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="class names: a text file with one on each line, or a JSON list")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="also write a CSV file")] = None,
    fuse: Annotated[bool, typer.Option("--fuse/--no-fuse", help="run the fused model or the original")] = True,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    backend: BackendOption = "auto",
) -> None:
    """Classify images: the top classes of each, with their probabilities.

    An unreadable image is reported and left out; exit status 1 says that there was one.
    """
    import torch

    from .images import Preprocessing, batches, find_images
    from .target import load_target

    where, what = device_of(device), dtype_of(dtype)
    target = load_target(model, weights)
    if weights is None:
        errors.print(
            f"[yellow]note:[/] {target.name} runs without trained weights (--weights), so its answers mean nothing"
        )
    with user_errors(FileNotFoundError, prefix="IMAGES: "):
        paths = find_images(images)
    if not paths:
        raise UserError(f"IMAGES: found no image in {', '.join(map(str, images))}")
    with user_errors(ValueError):
        side = size or target.size or 224
        preprocessing = Preprocessing(side, target.in_channels, target.mean, target.std)
    network = target.model.to(where, what)
    if fuse:
        network = fused_copy(network, backend, "auto")
    names = _read_labels(labels) if labels else target.classes

    rows: list[tuple[Path, list[tuple[str, float]]]] = []
    broken: list[tuple[Path, str]] = []
    with progress_bar() as progress, torch.inference_mode():
        task = progress.add_task("images", total=len(paths))
        for good, x, bad in batches(paths, preprocessing, batch):
            broken += bad
            if good:
                logits = network(x.to(where, what).contiguous(memory_format=torch.channels_last))
                probabilities, classes = _top(logits, top)
                names = names or _imagenet_names(logits.shape[1])
                for path, p, c in zip(good, probabilities, classes, strict=True):
                    rows.append((path, [(_name(names, i), float(v)) for v, i in zip(p, c, strict=True)]))
            progress.advance(task, len(good) + len(bad))
    _show(rows)
    for path, reason in broken:
        errors.print(f"[yellow]unreadable:[/] {escape(f'{path}: {reason}')}", soft_wrap=True, highlight=False)
    if output is not None:
        with user_errors(OSError, prefix="--output: "):
            _write(output, rows, top)
    if not rows:
        raise UserError("IMAGES: none of them could be read")
    if broken:
        raise typer.Exit(1)


def _top(logits: object, top: int) -> tuple[list[list[float]], list[list[int]]]:
    import torch

    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise UserError("MODEL: predict needs a classifier, whose output is [images, classes]")
    if bool(logits.isnan().any()):
        raise UserError("MODEL: expected numbers from the network, got NaN; are the weights those of a finished run?")
    values, indices = logits.float().softmax(1).topk(min(top, logits.shape[1]))
    return values.tolist(), indices.tolist()


def _read_labels(path: Path) -> list[str]:
    with user_errors(OSError, UnicodeDecodeError, prefix="--labels: "):
        text = path.read_text()
    if path.suffix == ".json":
        with user_errors(json.JSONDecodeError, prefix=f"--labels: {path}: "):
            content = json.loads(text)
        if not isinstance(content, list):
            raise UserError(f"--labels: {path}: expected a JSON list of names, got a {type(content).__name__}")
        return [str(name) for name in content]
    return [line.strip() for line in text.splitlines() if line.strip()]


def _imagenet_names(classes: int) -> list[str]:
    """torchvision carries ImageNet's names with its weights' metadata; no download."""
    if classes != 1000:
        return []
    try:
        from torchvision.models import ResNet18_Weights
    except ImportError:
        return []
    return list(ResNet18_Weights.DEFAULT.meta["categories"])


def _name(names: list[str] | None, index: int) -> str:
    return names[index] if names and index < len(names) else str(index)


def _show(rows: list[tuple[Path, list[tuple[str, float]]]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    for path, best in rows:
        for i, (name, probability) in enumerate(best):
            table.add_row(escape(str(path)) if i == 0 else "", name, f"{probability:.1%}")
    console.print(table)


def _write(path: Path, rows: list[tuple[Path, list[tuple[str, float]]]], top: int) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        most = max((len(best) for _, best in rows), default=top)
        writer.writerow(["image"] + [f"{what}_{i}" for i in range(1, most + 1) for what in ("class", "probability")])
        for image, best in rows:
            writer.writerow([image] + [value for name, p in best for value in (name, f"{p:.6f}")])
