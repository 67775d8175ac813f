"""``tune``, ``selftest``, ``precompile`` and ``roofline``: which kernel runs, is every one right, what is the limit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    SizeOption,
    UserError,
    WeightsOption,
    console,
    device_of,
    dtype_of,
    integers,
    progress_bar,
    reports_errors,
    say,
    user_errors,
)

LimitOption = Annotated[int, typer.Option(min=1, help="so many configurations of each backend, those it prefers")]
BackendsOption = Annotated[list[str] | None, typer.Option("--backend", help="only this one (may be repeated)")]
SecondsOption = Annotated[float | None, typer.Option(min=0.0, help="begin nothing new after so many seconds")]
JobsOption = Annotated[int | None, typer.Option(min=1, help="processes that compile; default: one a core")]


def register(app: typer.Typer) -> None:
    for function in (tune, selftest, precompile, roofline):
        app.command()(reports_errors(function))


def tune(
    model: ModelArgument,
    weights: WeightsOption = None,
    batch: Annotated[str, typer.Option("--batch", "-b", help="batch sizes, such as 1,8,256")] = "1",
    size: SizeOption = 224,
    device: DeviceOption = None,
    dtype: DtypeOption = "float16",
    channels_last: Annotated[bool, typer.Option("--channels-last/--contiguous", help="layout of the input")] = True,
    rounds: Annotated[int | None, typer.Option(min=1, help="alternating rounds for each candidate")] = None,
    limit: LimitOption = 6,
    backend: BackendsOption = None,
    seconds: SecondsOption = None,
    jobs: JobsOption = None,
    force: Annotated[bool, typer.Option("--force", help="time again what is known")] = False,
) -> None:
    """Find the fastest right kernel for every call of a network, and keep the result for this device.

    Each candidate is verified against the reference before it is timed. Ctrl-C keeps what is done.
    """
    import torch

    from .. import tuning
    from ..selection.search import ROUNDS
    from .target import load_target

    where, what = device_of(device), dtype_of(dtype)
    if where.type == "cpu":
        what = torch.float32 if what is torch.float16 else what  # the CPU's own default
    target = load_target(model, weights)
    network = target.model.to(where, what)
    interrupted = False
    left = _clock(seconds)
    for images in integers("--batch", batch):
        x = target.example(images, size, where, what)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        with user_errors(ValueError, RuntimeError, prefix=f"{target.name}, batch {images}: "):
            result = tuning.tune(
                network,
                x,
                rounds=rounds or ROUNDS,
                limit=limit,
                backends=backend,
                seconds=left(),
                jobs=jobs,
                force=force,
            )
        console.print(result.table())
        for call, reason in result.unfinished.items():
            say(f"unfinished: {call}: {reason}")
        interrupted = result.interrupted
        if interrupted:
            break
    if interrupted:
        raise typer.Exit(130)


def selftest(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="default: calls of all kinds")] = None,
    weights: WeightsOption = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="images in a batch")] = 1,
    size: SizeOption = 224,
    device: DeviceOption = None,
    dtype: DtypeOption = "float16",
    limit: LimitOption = 6,
    backend: BackendsOption = None,
    seconds: SecondsOption = None,
    jobs: JobsOption = None,
) -> None:
    """Compare every kernel configuration with the reference on this device; a wrong one is never run again.

    Exit status 1 when one was wrong.
    """
    from .. import tuning
    from .target import load_target

    where, what = device_of(device), dtype_of(dtype)
    options: dict[str, Any] = {"limit": limit, "backends": backend, "seconds": seconds, "jobs": jobs}
    with user_errors(ValueError, RuntimeError):
        if model is None:
            checks = tuning.selftest(device=where, **options)
        else:
            target = load_target(model, weights)
            example = target.example(batch, size, where, what)
            checks = tuning.selftest(target.model.to(where, what), example, **options)
    console.print(tuning.selftest_table(checks))
    if not checks:
        if backend or seconds is not None:
            raise UserError("selftest: nothing was checked (no such backend can run here, or --seconds was too short)")
        say(f"no backend but eager can run these calls on {where.type}: nothing was checked (fused-resnet doctor)")
        return
    wrong = [check for check in checks if check.verdict.startswith(("wrong", "crashed"))]
    say(f"{len(wrong)} of {len(checks)} checks failed" if wrong else f"all {len(checks)} checks passed or were refused")
    if wrong:
        raise typer.Exit(1)


def precompile(
    model: Annotated[list[str], typer.Argument(help="torchvision or timm names, or file.py:object")],
    batch: Annotated[str, typer.Option("--batch", "-b", help="batch sizes, such as 1,8,256")] = "1,32,256",
    size: SizeOption = 224,
    dtype: Annotated[str, typer.Option("--dtype", help="one or several, such as float16,bfloat16")] = "float16",
    arch: Annotated[str, typer.Option("--arch", help="the GPU's compute capability")] = "9.0",
    sms: Annotated[int, typer.Option("--sms", min=1, help="its multiprocessors: they decide what is preferred")] = 132,
    limit: LimitOption = 6,
    seconds: SecondsOption = None,
    jobs: JobsOption = None,
    out: Annotated[Path | None, typer.Option(help="also put the kernels into this .tar.gz")] = None,
    load: Annotated[Path | None, typer.Option(help="first take over the kernels of this .tar.gz")] = None,
) -> None:
    """Compile the Triton kernels of networks into Triton's cache, without a GPU, for one that will run them.

    The GPU's machine must have the same Triton. Exit status 1 where a kernel does not compile.
    """
    import triton

    from ..tuning import precompile as kernels
    from .target import load_target

    cache = Path(triton.knobs.cache.dir)
    with user_errors(OSError, ValueError):
        capability = round(float(arch) * 10)
        if load is not None:
            say(f"{kernels.unpack(load, cache)} kernels from {load}")
    calls: dict[str, Any] = {}
    for name in model:
        target = load_target(name, None)
        for images in integers("--batch", batch):
            for what in map(dtype_of, dtype.split(",")):
                shape = (images, target.in_channels, size, size)
                calls |= {call.key: call for call in kernels.network_calls(target.model, shape, what)}
    with progress_bar() as bar:
        task = bar.add_task("compiling")
        failed = kernels.precompile(
            list(calls.values()), capability, sms, limit=limit, jobs=jobs, seconds=seconds,
            report=lambda done, total, text: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    for name, why in failed.items():
        say(f"failed: {name}: {why}")
    say(f"{len(calls)} calls, Triton's cache: {cache}")
    if out is not None:
        with user_errors(OSError):
            say(f"{kernels.pack(cache, out)} kernels in {out}")
    if failed:
        raise typer.Exit(1)


def _clock(seconds: float | None) -> Callable[[], float | None]:
    """What is left of ``seconds`` from now on."""
    end = None if seconds is None else time.monotonic() + seconds
    return lambda: None if end is None else max(0.0, end - time.monotonic())


def roofline(
    model: ModelArgument,
    weights: WeightsOption = None,
    device: Annotated[str, typer.Option("--device", help="a GPU of the table, such as H100 or 'A100 40GB'")] = "H100",
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="images in a batch")] = 256,
    size: SizeOption = 224,
    dtype: DtypeOption = "float16",
    tflops: Annotated[float | None, typer.Option(min=0.0, help="your own 16-bit peak instead of the table's")] = None,
    bandwidth: Annotated[float | None, typer.Option(min=0.0, help="your own memory bandwidth, TB/s")] = None,
    expected: Annotated[bool, typer.Option("--expected", help="also what a model, unmeasured, expects")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="also run it on this machine's GPU")] = False,
    plot: Annotated[Path | None, typer.Option(help="file for a roofline plot")] = None,
    as_json: JsonOption = False,
) -> None:
    """Bound what fusion can give on a GPU: FLOPs, bytes, launches and least times of each block, eager and fused.

    Needs no GPU; only --measure does. --expected adds each kernel's time by a model, and the family that multiplies.
    """
    from .. import devices
    from .. import roofline as rooflines
    from ..surgery import fuse
    from .target import load_target

    what = dtype_of(dtype)
    target = load_target(model, weights)
    with user_errors(ValueError):
        gpu = devices.find(device)
    if tflops or bandwidth:
        gpu = gpu.with_rates(tflops and tflops * devices.TERA, bandwidth and bandwidth * devices.TERA)
    fused = fuse(target.model)
    with user_errors(ValueError, RuntimeError, NotImplementedError, prefix=f"{target.name}: "):
        result = rooflines.roofline(target.model, (batch, target.in_channels, size, size), what, gpu, fused)
    if measure:
        where = device_of(None)
        if where.type != "cuda":
            raise UserError("--measure: torch sees no GPU (`fused-resnet doctor` says more)")
        networks = (target.model.to(where, what), fused.to(where, what))
        result = rooflines.measure(result, *networks, target.example(batch, size, where, what))
    if as_json:
        console.print_json(json.dumps(result.as_dict()))
    else:
        console.print(result.table())
        if expected:
            console.print(rooflines.expected.table(result.tails(), gpu))
        say(f"full fusion can be at most {result.speedup:.2f}x as fast as eager on this device, by its bounds")
    if plot is not None:
        with user_errors(ImportError, OSError, ValueError, prefix="--plot: "):
            result.plot(plot)
        say(f"plot: {plot}")
