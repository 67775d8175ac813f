"""Ahead-of-time artifacts of the CUDA extension's kernels."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..core.problem import Problem
from .launch_json import Launch, write
from .planner import Entry, cache_directory, planner, source_directory, sources_key
from .training import TrainingCall, training_planner

#: As csrc/cuda_build.py compiles the extension.
NVCC_FLAGS = ("-std=c++17", "-O3")
#: Whose PTX the others' machine code is assembled from; sm_75 lacks what that uses, and kernels for sm_90a have more.
SHARED = "sm_80"
OWN = ("sm_75", "sm_90a")


def compile(
    problem: Problem,
    arch: str,
    out_dir: Path,
    *,
    splitk: int | None = None,
    tile: str | None = None,
    eps: float = 1e-5,
    proj_eps: float = 1e-5,
    statistics: bool = False,
) -> Launch:
    """Plan ``problem``, compile the one kernel of the plan, and write the three files to ``out_dir``."""
    if problem.n == 0:
        raise ValueError("problem: n is 0, expected at least one image: for an empty batch nothing is launched")
    launch = planner().plan(problem, arch, splitk=splitk, tile=tile, eps=eps, proj_eps=proj_eps, statistics=statistics)
    ptx, cubin = compile_kernel(planner().kernels[launch.kernel], arch)
    write(out_dir, launch, ptx, cubin)
    return launch


def compile_training(call: TrainingCall, arch: str, out_dir: Path) -> Launch:
    """The same for a training pass."""
    if call.numel == 0:
        raise ValueError("problem: n is 0, expected at least one image: for an empty batch nothing is launched")
    launch = training_planner().plan(call, arch)
    ptx, cubin = compile_kernel(training_planner().kernels[launch.kernel], arch)
    write(out_dir, launch, ptx, cubin)
    return launch


def compile_kernel(kernel: Entry, arch: str, csrc: Path | None = None) -> tuple[str, bytes]:
    """PTX and cubin of one kernel for ``arch``, by nvcc or from the cache."""
    arch = kernel.target(arch)
    return _ptx(kernel, arch, csrc).read_text(), _cubin(kernel, arch, arch, csrc).read_bytes()


def assemble_kernel(kernel: Entry, arch: str, csrc: Path | None = None) -> bytes:
    """The cubin as the extension holds it: assembled for ``arch`` from the PTX that most share (SHARED)."""
    own = kernel.target(arch)
    return _cubin(kernel, own if own in OWN else SHARED, own, csrc).read_bytes()


def _ptx(kernel: Entry, arch: str, csrc: Path | None) -> Path:
    csrc = csrc or source_directory()
    out = cache_directory() / f"{kernel.symbol}-{arch}-{sources_key(csrc, '.cuh')}-{toolkit().version}.ptx"
    if not out.exists():
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            source, made = Path(folder) / "kernel.cu", Path(folder) / "kernel.ptx"
            source.write_text(f'#include "{kernel.header}"\n{kernel.definition}\n')
            _nvcc(*NVCC_FLAGS, f"-arch={arch}", f"-I{csrc / 'cuda'}", "-ptx", "-o", str(made), str(source))
            os.replace(made, out)
    return out


def _cubin(kernel: Entry, ptx_arch: str, arch: str, csrc: Path | None) -> Path:
    # From the very PTX that is handed out: what a driver would compile and what ptxas made of it are one program.
    ptx = _ptx(kernel, ptx_arch, csrc)
    out = ptx.with_name(f"{ptx.stem}-{arch}.cubin")
    if not out.exists():
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            made = Path(folder) / "kernel.cubin"
            _nvcc(f"-arch={arch}", "-cubin", "-o", str(made), str(ptx))
            os.replace(made, out)
    return out


def build_module(csrc: Path) -> Any:
    """csrc/cuda_build.py, which lies beside the sources and knows where nvcc is."""
    spec = importlib.util.spec_from_file_location("fused_resnet_cuda_build", csrc / "cuda_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@lru_cache
def toolkit() -> Any:
    """The CUDA toolkit, as setup.py finds it; RuntimeError where there is none."""
    build = build_module(source_directory())
    try:
        return build.find_toolkit()
    except build.NoToolkit as reason:
        raise RuntimeError(
            f"compile: {reason}; install the CUDA toolkit or the package nvidia-cuda-nvcc (no GPU is needed)"
        ) from None


def _nvcc(*arguments: str) -> None:
    done = subprocess.run([toolkit().nvcc, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"compile: nvcc {' '.join(arguments)} failed:\n{done.stderr.strip()[-2000:]}")
