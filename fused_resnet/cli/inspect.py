"""``doctor``, ``explain`` and ``verify``: what is there, what would be fused, and is it right."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from .common import (
    BackendOption,
    BatchOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    SizeOption,
    WeightsOption,
    WinogradOption,
    console,
    device_of,
    dtype_of,
    fused_copy,
    reports_errors,
    say,
    user_errors,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..comparison.verify import Verification
    from ..surgery import Explanation


def register(app: typer.Typer) -> None:
    for function in (doctor, explain, verify):
        app.command()(reports_errors(function))


# ---- doctor --------------------------------------------------------------------------------------------------


def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has: versions, GPU, compiler, extension, and which backend runs or why it does not."""
    facts = environment()
    backends, training = backend_states(), training_states()
    if as_json:
        console.print_json(json.dumps({"environment": facts, "backends": backends, "training": training}))
        return
    for name, value in facts.items():
        say(f"{name + ':':<24}{value}")
    say()
    say("Backends, for a 3x3 tail with a residual (float32 on the CPU, float16 on CUDA):")
    _say_states(backends)
    say()
    say("Training backends, for the same:")
    _say_states(training)


def _say_states(backends: dict[str, dict[str, str | None]]) -> None:
    for name, states in backends.items():
        for device, reason in states.items():
            label = f"  {name} on {device}:"
            say(f"{label:<24}{'runs' if reason is None else 'no: ' + reason}")


def environment() -> dict[str, str]:
    """One line for each thing that decides what can run."""
    import torch

    from ..core import extensions
    from ..core.version import __version__

    facts = {
        "fused_resnet": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
    }
    for name in ("torchvision", "timm", "triton"):
        facts[name] = _version_of(name)
    facts["CPU"] = f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            facts[f"GPU {i}"] = (
                f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {p.total_memory >> 30} GiB"
            )
    else:
        built = "which is built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        facts["GPU"] = f"none seen by torch {torch.__version__}, {built}"
    facts["nvcc"] = _nvcc()
    facts["extension _C"] = _extension_state(extensions.cpu(), extensions.why_not_cpu())
    facts["extension _C_cuda"] = _extension_state(extensions.cuda(), extensions.why_not_cuda())
    return facts


def _version_of(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return f"not installed (pip install {package})"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        return "not on PATH (only needed to build the CUDA extension)"
    result = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    line = next((line for line in result.stdout.splitlines() if "release" in line), f"exit status {result.returncode}")
    return f"{path}: {line.strip()}"


def _extension_state(module: Any, why_not: str | None) -> str:
    if module is None:
        return why_not or "not there"
    info = module.build_info() if hasattr(module, "build_info") else {}
    return "loaded" + (
        f" ({', '.join(f'{k} {v}' for k, v in info.items())})" if isinstance(info, dict) and info else ""
    )


def backend_states() -> dict[str, dict[str, str | None]]:
    """For each backend and device None (runs) or its sentence why not."""
    import dataclasses

    import torch

    from .. import backends
    from ..core.problem import Problem

    cpu = Problem.parse("n=1,h=14,w=14,c=64,k=64,padding=1,residual=1")
    cuda = dataclasses.replace(cpu, dtype=torch.float16, residual=torch.float16, device_type="cuda")
    states: dict[str, dict[str, str | None]] = {}
    for name in backends.names():
        states[name] = {"cpu": backends.get(name).can_run(cpu)}
        if torch.cuda.is_available():
            states[name]["cuda"] = backends.get(name).can_run(cuda)
        else:
            states[name]["cuda"] = "there is no GPU"
    return states


def training_states() -> dict[str, dict[str, str | None]]:
    """The same for the passes of a training tail."""
    import torch

    from ..backends.training import dispatch as training_dispatch

    def reasons(device: str, dtype: torch.dtype) -> dict[str, str | None]:
        y = torch.empty(1, 64, 1, 1, dtype=dtype, device=device)
        return training_dispatch.reasons(y)

    cpu = reasons("cpu", torch.float32)
    no_gpu: dict[str, str | None] = dict.fromkeys(cpu, "there is no GPU")
    cuda = reasons("cuda", torch.float16) if torch.cuda.is_available() else no_gpu
    return {name: {"cpu": cpu[name], "cuda": cuda[name]} for name in cpu}


# ---- explain -------------------------------------------------------------------------------------------------


def explain(model: ModelArgument, weights: WeightsOption = None, as_json: JsonOption = False) -> None:
    """Say for every block how it is fused, or why it is left as it is."""
    from ..surgery import explain as explain_model
    from .target import load_target

    explanation = explain_model(load_target(model, weights).model)
    if as_json:
        console.print_json(json.dumps(explanation.to_dict()))
    else:
        print_explanation(explanation)


def print_explanation(explanation: Explanation, console: Console = console) -> None:
    """One line for each block, coloured by its state, and the notes."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=True, header_style="bold")
    table.add_column("block", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("how, or why not", overflow="fold")
    colours = {"fused": "green", "fusable": "green", "blocked": "yellow", "unfused": "yellow"}
    for entry in explanation:
        colour = colours.get(entry.state, "white")
        table.add_row(escape(entry.title), f"[{colour}]{entry.state}[/]", escape(entry.sentence))
    if len(explanation):
        console.print(table)
    for note in explanation.notes:
        console.print(note, markup=False, highlight=False)


# ---- verify --------------------------------------------------------------------------------------------------


def verify(
    model: ModelArgument,
    weights: WeightsOption = None,
    batch: BatchOption = 2,
    size: SizeOption = 224,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    backend: BackendOption = "auto",
    winograd: WinogradOption = "auto",
    seed: Annotated[int, typer.Option(help="seed of the random images")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare the fused model with the original against float64, per block and end to end.

    Exit status 0 when every row passes, 1 when one does not.
    """
    from ..comparison.verify import to_dict
    from ..comparison.verify import verify as verify_model
    from .target import load_target

    where, what = device_of(device), dtype_of(dtype)
    target = load_target(model, weights)
    original = target.model.to(where, what)
    fused = fused_copy(original, backend, winograd)
    x = target.example(batch, size, where, what, seed)
    with user_errors(ValueError, RuntimeError, NotImplementedError, prefix=f"{target.name}: "):
        may_be_winograd = where.type == "cpu" and dtype == "float32" and winograd == "auto"
        result = verify_model(original, fused, x, winograd=may_be_winograd)
    if as_json:
        console.print_json(json.dumps(to_dict(result)))
    else:
        print_verification(result)
    if not result.passed:
        raise typer.Exit(1)


def print_verification(result: Verification) -> None:
    """The table of ``verify`` and its last line."""
    title = "errors against float64, relative to the largest exact value"
    table = Table(title=title, header_style="bold", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("block", "eager max", "fused max", "eager rms", "fused rms", "ratio", ""):
        table.add_column(name, justify="left" if name in ("block", "") else "right", no_wrap=True)
    for row in result.rows:
        if not row.name:
            table.add_section()
        mark = "[green]ok[/]" if row.passed else "[red]FAIL[/]"
        if row.passed and "rms" in row.rule:
            mark += " (rms)"
        figures = (f"{value:.1e}" for value in (row.eager_max, row.fused_max, row.eager_rms, row.fused_rms))
        table.add_row(row.name or "end to end", *figures, f"{row.ratio:.2f}", mark)
    console.print(table)
    failed = [row for row in result.rows if not row.passed]
    say(f"top-1 equal to eager's on {result.same_top1} of {result.images} images")
    for rule in dict.fromkeys(row.rule for row in result.rows):
        say(f"rule: {rule} + one rounding")
    if failed:
        say(f"FAILED: {', '.join(row.name or 'end to end' for row in failed)}")
    else:
        say("every block and the whole model are within the bar")
