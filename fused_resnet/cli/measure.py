"""``bench``: the fused model against eager and torch.compile, by the protocol of :mod:`fused_resnet.core.timing`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .common import (
    BackendOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    SizeOption,
    ThreadsOption,
    UserError,
    WeightsOption,
    WinogradOption,
    console,
    device_of,
    dtype_of,
    fused_copy,
    integers,
    progress_bar,
    reports_errors,
    user_errors,
)

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..core.timing import Comparison, Contender


def register(app: typer.Typer) -> None:
    app.command()(reports_errors(bench))


def bench(
    model: ModelArgument,
    weights: WeightsOption = None,
    batch: Annotated[str, typer.Option("--batch", "-b", help="batch sizes, such as 1,8")] = "1",
    size: SizeOption = 224,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    backend: BackendOption = "auto",
    winograd: WinogradOption = "auto",
    threads: ThreadsOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="alternating rounds; figures to report need 30")] = 30,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="also time torch.compile")] = True,
    blocks: Annotated[bool, typer.Option("--blocks/--no-blocks", help="also time each fused block by itself")] = True,
    as_json: JsonOption = False,
) -> None:
    """Time the fused model: eager in both layouts, torch.compile and fused in alternating rounds.

    Speed-ups are medians of the ratios of each round, over the faster eager layout, with a 95 % interval.
    """
    from ..comparison import sides
    from ..comparison.verify import block_inputs
    from .target import load_target

    where, what = device_of(device), dtype_of(dtype)
    target = load_target(model, weights)
    network = target.model.to(where, what)
    fused = fused_copy(network, backend, winograd).eval()
    names = _fused_names(fused)
    document: dict[str, Any] = {"model": target.name, "size": size, "dtype": dtype, "batches": []}
    for images in integers("--batch", batch):
        contenders = [sides.eager(network), sides.eager_channels_last(network)]
        contenders += [sides.compiled(network)] if compiled else []
        contenders.append(sides.fused(network, backend=backend, winograd=winograd))
        contenders.append(sides.frozen(network, backend=backend, winograd=winograd))

        def make_inputs(round_number: int, images: int = images) -> tuple[torch.Tensor]:
            return (target.example(images, size, where, what, seed=round_number),)

        result = _compare(f"{target.name}, batch {images}", contenders, make_inputs, rounds, where, threads)
        rows = sides.summary(result, images)
        title = f"{target.name}, batch {images}, {size}x{size}, {dtype}, {_where(result)}"
        entry: dict[str, Any] = {"batch": images, "threads": result.threads, "device": result.device,
                                 "rounds": rounds, "rows": rows, "absent": result.absent, "blocks": []}  # fmt: skip
        if not as_json:
            print_table(title, rows, result.absent)
        if blocks:
            inputs = block_inputs(network, names, *make_inputs(0))
            entry["blocks"] = [
                _time_block(network, fused, name, inputs[name], rounds, where, threads)
                for name in names
                if name in inputs
            ]
            if not as_json:
                print_blocks(entry["blocks"])
        document["batches"].append(entry)
    if as_json:
        console.print_json(json.dumps(document))


def _where(result: Comparison) -> str:
    return "GPU" if result.device == "cuda" else f"CPU, {result.threads} thread{'s' * (result.threads != 1)}"


def _compare(
    title: str, contenders: list[Contender], make_inputs: Any, rounds: int, device: torch.device, threads: int | None
) -> Comparison:
    from ..core.timing import compare

    with progress_bar() as progress:
        task = progress.add_task(title, total=rounds)
        with user_errors(RuntimeError, ValueError, TypeError, NotImplementedError, prefix=f"{title}: "):
            return compare(
                contenders, make_inputs, rounds=rounds, device=device, num_threads=threads,
                max_error=_MAX_ERROR, progress=lambda done, total: progress.update(task, completed=done),
            )  # fmt: skip


#: Between two right answers in 16-bit arithmetic; `verify` is the command that judges errors.
_MAX_ERROR = 5e-2


def _fused_names(fused: torch.nn.Module) -> list[str]:
    from ..surgery import explain

    names = [entry.name for entry in explain(fused).fused if entry.name]
    if not names:
        raise UserError("MODEL: no block of it is fused, so there is nothing to compare (`explain` gives the reasons)")
    return names


def _time_block(
    model: torch.nn.Module, fused: torch.nn.Module, name: str, x: torch.Tensor, rounds: int, device: torch.device,
    threads: int | None,
) -> dict[str, Any]:  # fmt: skip
    from ..comparison.sides import EAGER_LAYOUTS, FUSED, channels_last_inputs, eager, eager_channels_last
    from ..core.timing import Contender

    block, fused_block = model.get_submodule(name), fused.get_submodule(name)
    contenders = [eager(block), eager_channels_last(block), Contender(FUSED, lambda: fused_block, channels_last_inputs)]
    result = _compare(name, contenders, lambda _: (x,), rounds, device, threads)
    ratio = result.speedup(FUSED, EAGER_LAYOUTS)
    eager_name = result.best(EAGER_LAYOUTS)
    return {
        "name": name, "input": list(x.shape), "eager_layout": eager_name,
        "eager_ms": result.timings[eager_name].median * 1e3, "fused_ms": result.timings[FUSED].median * 1e3,
        "speedup": ratio.median, "low": ratio.low, "high": ratio.high,
    }  # fmt: skip


def print_table(title: str, rows: list[dict[str, Any]], absent: dict[str, str], console: Console = console) -> None:
    """The table of one comparison of whole models."""
    table = Table(title=title, header_style="bold", box=None, padding=(0, 2, 0, 0))
    for name in ("", "ms", "img/s", "speed-up [95 %]", "error", "ready in"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for row in rows:
        speedup = f"{row['speedup']:.2f}x [{row['low']:.2f}, {row['high']:.2f}]" if row["speedup"] else "-"
        table.add_row(
            row["name"], f"{row['median_ms']:.2f}", f"{row['images_per_second']:.1f}", escape(speedup),
            f"{row['error']:.1e}", f"{row['preparation_s']:.2f} s", style="bold" if row["name"] == "fused" else "",
        )  # fmt: skip
    console.print(table)
    console.print("medians; speed-up over the faster eager layout: median of each round's ratio", style="dim")
    for name, reason in absent.items():
        console.print(f"{name} was not timed: {reason}", markup=False, highlight=False, soft_wrap=True)


def print_blocks(rows: list[dict[str, Any]]) -> None:
    """The per-block table."""
    table = Table(title="each fused block by itself", header_style="bold", box=None, padding=(0, 2, 0, 0))
    for name in ("block", "input", "eager ms", "layout", "fused ms", "speed-up [95 %]"):
        table.add_column(name, justify="left" if name in ("block", "input", "layout") else "right", no_wrap=True)
    for row in rows:
        layout = "NHWC" if "channels_last" in row["eager_layout"] else "NCHW"
        table.add_row(
            row["name"], "x".join(map(str, row["input"])), f"{row['eager_ms']:.3f}", layout, f"{row['fused_ms']:.3f}",
            escape(f"{row['speedup']:.2f}x [{row['low']:.2f}, {row['high']:.2f}]"),
        )  # fmt: skip
    console.print(table)
