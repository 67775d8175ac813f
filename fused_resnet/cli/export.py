"""``export``: the model in a file for another runtime, checked against eager before it counts as done."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import first_line
from .common import (
    DeviceOption,
    DtypeOption,
    ModelArgument,
    SizeOption,
    UserError,
    WeightsOption,
    device_of,
    dtype_of,
    errors,
    reports_errors,
    say,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor


#: What a format needs beside torch.
_NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime")}


def register(app: typer.Typer) -> None:
    app.command()(reports_errors(export))


def export(
    model: ModelArgument,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            help="onnx: standard operators; pt2: torch.export's format, with the fused operators, for whoever imports "
            "fused_resnet; aoti: the model's own standard operators, compiled, for C++ without Python",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="file to write")],
    weights: WeightsOption = None,
    batch: Annotated[
        int | None, typer.Option("--batch", "-b", min=1, help="images in a batch; default: any number")
    ] = None,
    size: SizeOption = 224,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:  # fmt: skip
    """Write MODEL to a file for another runtime, then load the file and compare it with eager.

    Exit status 0 when the file computes what the model does, for two batch sizes unless --batch says one; 1 when it
    does not, and then no file is left.
    """
    from ..comparison.exported import check
    from .target import load_target

    if format not in _EXPORTERS:
        raise UserError(f"--format: expected one of {', '.join(_EXPORTERS)}, got {format!r}")
    missing = [name for name in _NEEDS.get(format, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format {format} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    _check_output(output)
    where, what = device_of(device), dtype_of(dtype)
    target = load_target(model, weights)
    network = target.model.to(where, what)
    sizes = (2, 3) if batch is None else (batch, batch)
    example, *inputs = (target.example(n, size, where, what, seed) for seed, n in enumerate((sizes[0], *sizes)))
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".fused_resnet_") as folder:
        path = Path(folder) / ("program.onnx" if format == "onnx" else "program.pt2")  # as torch wants them called
        with nullcontext() if debug else _quiet():
            try:
                note, run = _EXPORTERS[format](network, example, batch is None, path)
                checks = check(network, run, inputs)
            except Exception as error:  # dynamo, Inductor, ONNX and their runtimes raise what they like
                if debug:
                    raise
                hint = "" if batch else ", and --batch 1 asks for one batch size alone"
                raise UserError(
                    f"{target.name} cannot be exported as {format} ({first_line(error)}); --debug shows where{hint}"
                ) from error
        for line in checks:
            say(f"{'ok' if line.passed else 'FAILED'}  {line.sentence}")
        if not all(line.passed for line in checks):
            errors.print(
                "[bold red]error:[/] the exported file does not compute what the model does; nothing was written",
                soft_wrap=True, highlight=False,
            )  # fmt: skip
            raise typer.Exit(1)
        os.replace(path, output)
    images = "any number of images" if batch is None else f"batches of {batch}"
    say(f"{output}: {note}, {images} of {size}x{size}, {dtype}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn about their own code, log, and print graphs."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _check_output(output: Path) -> None:
    if not output.parent.is_dir():
        raise UserError(f"--output: no folder {str(output.parent)!r}")
    if output.is_dir():
        raise UserError(f"--output: expected a file, got the folder {str(output)!r}")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"--output: the folder {str(output.parent)!r} cannot be written to")


# ---- one function for each format: a note on what was written, and what runs the file -------------------------

_Exported = tuple[str, Callable[["Tensor"], Any]]


def _dynamic(any_batch: bool) -> Any:
    from torch.export import Dim

    return ({0: Dim("batch", min=1)},) if any_batch else None


def _onnx(model: torch.nn.Module, example: Tensor, any_batch: bool, path: Path) -> _Exported:
    import onnxruntime
    import torch

    torch.onnx.export(
        model, (example,), str(path), dynamo=True, verbose=False, external_data=False, input_names=["images"],
        dynamic_shapes=_dynamic(any_batch),
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.cpu().numpy()})[0]).to(x.device)

    return "ONNX of standard operators", run


def _pt2(model: torch.nn.Module, example: Tensor, any_batch: bool, path: Path) -> _Exported:
    import torch

    from ..surgery import export as export_fused

    program = export_fused(model, example, dynamic_shapes=_dynamic(any_batch))
    torch.export.save(program, path)
    module = torch.export.load(path).module()
    count = sum("fused_resnet" in str(node.target) for node in program.graph.nodes)
    return f"torch.export program with {count} fused operators", module


def _aoti(model: torch.nn.Module, example: Tensor, any_batch: bool, path: Path) -> _Exported:
    import torch

    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=_dynamic(any_batch))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    package = torch._inductor.aoti_load_package(str(path))
    return "AOTInductor package of standard operators", package


_EXPORTERS = {"onnx": _onnx, "pt2": _pt2, "aoti": _aoti}
