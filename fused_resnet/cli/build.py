"""``compile``: kernels ahead of time, for users of the CUDA driver API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import reports_errors, say, user_errors


def register(app: typer.Typer) -> None:
    app.command("compile")(reports_errors(compile_kernel))


def compile_kernel(
    problem: Annotated[str, typer.Option(help='as in "n=1,h=14,w=14,c=64,k=64,padding=1,dtype=float16,residual=1"')],
    out: Annotated[Path, typer.Option(help="folder for kernel.ptx, kernel.cubin and launch.json")],
    backend: Annotated[str, typer.Option(help="cuda or triton")] = "cuda",
    arch: Annotated[str, typer.Option(help="sm_75 or newer; triton: sm_80")] = "sm_80",
    proj: Annotated[str | None, typer.Option(help="projection, CxHxWxSTRIDE")] = None,
    splitk: Annotated[int | None, typer.Option(min=1, help="blocks that share one tile's sum")] = None,
    tile: Annotated[str | None, typer.Option(help="tile configuration, such as 128x64")] = None,
) -> None:
    """Compile the kernel of one problem with no GPU: PTX, cubin and everything a launch needs."""
    from .. import aot

    with user_errors(ValueError, RuntimeError, OSError):
        aot.compile(backend, arch, problem, out, proj=proj, splitk=splitk, tile=tile)
    for path in sorted(out.iterdir()):
        say(f"{path}  {path.stat().st_size:,} bytes")
