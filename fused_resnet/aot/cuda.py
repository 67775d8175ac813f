"""Ahead-of-time artifacts of the CUDA extension's kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from ..problem import Problem
from .launch_json import Launch, write
from .planner import Kernel, cache_directory, planner, source_directory, sources_key

#: As setup.py compiles the extension.
NVCC_FLAGS = ("-std=c++17", "-O3")


def compile(
    problem: Problem,
    arch: str,
    out_dir: Path,
    *,
    splitk: int | None = None,
    tile: str | None = None,
    eps: float = 1e-5,
    proj_eps: float = 1e-5,
) -> Launch:
    """Plan ``problem``, compile the one kernel of the plan, and write the three files to ``out_dir``."""
    if problem.n == 0:
        raise ValueError("problem: n is 0, expected at least one image: for an empty batch nothing is launched")
    launch = planner().plan(problem, arch, splitk=splitk, tile=tile, eps=eps, proj_eps=proj_eps)
    ptx, cubin = compile_kernel(planner().kernels[launch.kernel], arch)
    write(out_dir, launch, ptx, cubin)
    return launch


def compile_kernel(kernel: Kernel, arch: str, csrc: Path | None = None) -> tuple[str, bytes]:
    """PTX and cubin of one kernel for ``arch``, by nvcc or from the cache."""
    csrc = csrc or source_directory()
    out = cache_directory() / f"{kernel.symbol}-{arch}-{sources_key(csrc)}-{nvcc_release()}"
    ptx, cubin = out.with_suffix(".ptx"), out.with_suffix(".cubin")
    if not cubin.exists():
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            source, made_ptx, made_cubin = (Path(folder) / f"kernel{s}" for s in (".cu", ".ptx", ".cubin"))
            source.write_text(f'#include "kernel_entry.cuh"\n{kernel.definition}\n')
            # From this one PTX: what the driver would compile and what ptxas made of it are then the same program.
            _nvcc(*NVCC_FLAGS, f"-arch={arch}", f"-I{csrc / 'cuda'}", "-ptx", "-o", str(made_ptx), str(source))
            _nvcc(f"-arch={arch}", "-cubin", "-o", str(made_cubin), str(made_ptx))
            os.replace(made_ptx, ptx)
            os.replace(made_cubin, cubin)
    return ptx.read_text(), cubin.read_bytes()


@lru_cache
def nvcc() -> str:
    """nvcc of CUDA_HOME, of PATH, or of the PyPI package nvidia-cuda-nvcc; RuntimeError where there is none."""
    if home := os.environ.get("CUDA_HOME"):
        candidate = Path(home) / "bin" / "nvcc"
        if candidate.exists():
            return str(candidate)
    if found := shutil.which("nvcc"):
        return found
    for package in ("nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu13", "nvidia-cuda-nvcc-cu12"):
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == "nvcc":
                return str(file.locate())
    raise RuntimeError(
        "compile: expected nvcc in CUDA_HOME/bin, on PATH or from the package nvidia-cuda-nvcc, found none; "
        "install the CUDA toolkit 12.8 or newer (no GPU is needed)"
    )


@lru_cache
def nvcc_release() -> str:
    """The toolkit's version, as in "13.0.88"."""
    text = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return text.split(", V")[-1].split()[0]


def _nvcc(*arguments: str) -> None:
    done = subprocess.run([nvcc(), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"compile: nvcc {' '.join(arguments)} failed:\n{done.stderr.strip()[-2000:]}")
