"""What one fused call costs the host, up to the driver: Python, dispatch, plan lookup, launch preparation.

    pytest benchmarks/bench_launch_cost.py --benchmark-only
    python -m benchmarks.bench_launch_cost                    # the table alone

Measured on the CPU with the launch itself stubbed, so it needs no GPU: the Triton path ends where the compiled
kernel's C launcher would be called, the extension's where ``cudaLaunchKernel`` would be. What the driver takes for
the launch itself is the same for everyone and not in these figures. All paths take turns in one process; the figure
is the best of many short rounds: what the code costs when nothing else runs. Bounds: 15 microseconds for
Triton, 10 for the extension, in inference mode.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fused_resnet import backends, functional
from fused_resnet.backends import registry
from fused_resnet.core.packed_weights import PackedWeights
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import TailArguments
from fused_resnet.selection import plans
from fused_resnet.testing import call_arguments, make_tail

ROOT = Path(__file__).parent.parent

#: Microseconds that a call may take in inference mode.
BOUNDS = {"triton": 15.0, "cuda": 10.0}

#: Short rounds, and many: on a busy machine some of them fit between two interruptions.
ROUNDS, CALLS = 200, 40

PROBLEMS = {
    "residual": Problem.parse("n=1,h=14,w=14,c=64,k=64,padding=1,dtype=float16,residual=1"),
    "split-K": Problem.parse("n=1,h=7,w=7,c=512,k=512,padding=1,dtype=float16,residual=1"),
    "projection": Problem.parse("n=1,h=14,w=14,c=64,k=64,padding=1,dtype=float16,proj=32x28x28x2"),
}


# ---- backends without a driver -----------------------------------------------------------------------------


class _Nothing(backends.Backend):
    """A kernel that is there already: what remains is the way to it."""

    name = "nothing"

    def __init__(self) -> None:
        self.output = torch.empty(1)

    def can_run(self, problem: Problem) -> str | None:
        return None

    def run(self, problem: Problem, tail: TailArguments) -> Tensor:
        return self.output


def _launcher() -> Any:
    """Triton's launcher of a compiled kernel, its Python part real and its C function replaced."""
    from triton.backends.nvidia.driver import CudaLauncher

    launcher = CudaLauncher.__new__(CudaLauncher)
    fields = ("global_scratch", "profile_scratch")
    launcher.__dict__ |= {f"{field}_{what}": 0 for field in fields for what in ("size", "align")}
    launcher.__dict__ |= {
        "gsan_enabled": False, "num_ctas": 1, "arg_annotations": (), "kernel_signature": b"",
        "launch_cooperative_grid": False, "launch_pdl": False, "launch": lambda *arguments: None,
    }  # fmt: skip
    return launcher


@contextmanager
def _triton() -> Iterator[None]:
    """The Triton backend on CPU tensors, planned for an H100, with a kernel that is compiled already."""
    triton = pytest.importorskip("triton")

    from fused_resnet.kernels import launch

    if launch.INTERPRETING:
        pytest.skip("TRITON_INTERPRET=1 is set: there is no launch to prepare")
    compiled = SimpleNamespace(run=_launcher(), function=0, packed_metadata=())

    class Bound(launch.BoundTail):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.compiled = compiled

    with (
        mock.patch.object(launch, "capability", return_value=90),
        mock.patch.object(launch, "sm_count", return_value=132),
        mock.patch.object(launch, "BoundTail", Bound),
        mock.patch.object(triton.runtime.driver, "_active", SimpleNamespace()),
        mock.patch.object(type(backends.get("triton")), "can_run", return_value=None),
    ):
        yield


@contextmanager
def _cuda() -> Iterator[None]:
    """The CUDA backend on CPU tensors: the extension's own module, built with a stub for the CUDA runtime."""
    from fused_resnet.backends import cuda

    module = _stub_module()
    with (
        mock.patch.object(cuda, "_loaded", return_value=module),
        mock.patch.object(cuda, "_properties", return_value=module.device_properties(0)),
        mock.patch.object(cuda, "_General"),
        mock.patch.object(cuda.CudaBackend, "can_run", return_value=None),
        mock.patch.object(cuda, "_current_device", lambda: 0),  # noqa: PT008
        mock.patch.object(cuda, "_stream", lambda index: 0),  # noqa: PT008
    ):
        yield


@functools.cache
def _stub_module() -> Any:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    csrc, torch_root = ROOT / "csrc", Path(torch.__file__).parent
    sources = [ROOT / "benchmarks/launch_stub.cpp", csrc / "bindings_cuda.cpp", csrc / "bindings_planner.cpp"]
    sources += [csrc / f"cuda/{name}.cpp" for name in ("plan", "schedule", "bn_plan")]
    folder = Path(tempfile.mkdtemp(prefix="fused_resnet_launch_stub_"))
    library = folder / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [sysconfig.get_paths()["include"], str(torch_root / "include"), str(csrc)]
    names = [f'-DFUSED_RESNET_{name}="stub"' for name in ("ARCHITECTURES", "CUDART", "NVCC")]
    flags = [
        "-O3",
        "-std=c++17",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    command = [compiler, *flags, *names, *(f"-I{path}" for path in includes), *map(str, sources)]
    subprocess.run([*command, f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("_C_cuda", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.rmtree(folder)  # loaded: the file is not needed any more
    return module


# ---- measuring ---------------------------------------------------------------------------------------------


def _call(problem: Problem, backend: str) -> Callable[[], Tensor]:
    """The call as a module makes it: positional weight, the rest by name, tuples for the geometry."""
    arguments = call_arguments(make_tail(problem)) | {"backend": backend, "packed_weights": PackedWeights()}
    function = functional.conv_bn_proj_add_relu if "proj_x" in arguments else functional.conv_bn_add_relu
    x, weight = arguments.pop("x"), arguments.pop("weight")
    arguments = {sys.intern(name): value for name, value in arguments.items()}  # as names in source code are
    return lambda: function(x, weight, **arguments)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


def measure() -> dict[str, float]:
    """Microseconds a call, by path; see the module."""
    x = torch.empty(1, 64, 14, 14, dtype=torch.float16)
    plans.clear()
    known = mock.patch.object(registry, "NAMES", (*registry.NAMES, "nothing"))
    with _triton(), _cuda(), known, mock.patch.dict(registry._loaded, nothing=_Nothing()):
        paths = {"way to a kernel": _call(PROBLEMS["residual"], "nothing")}
        for backend in BOUNDS:
            paths |= {f"{backend}, {name}": _call(problem, backend) for name, problem in PROBLEMS.items()}
        grad = {f"{backend}, residual, grad mode": paths[f"{backend}, residual"] for backend in BOUNDS}
        best = dict.fromkeys([*paths, *grad, "torch.empty"], float("inf"))
        for _ in range(ROUNDS):
            with torch.inference_mode():
                for name, call in paths.items():
                    best[name] = min(best[name], _seconds(call))
                best["torch.empty"] = min(best["torch.empty"], _seconds(lambda: torch.empty_like(x)))
            for name, call in grad.items():
                best[name] = min(best[name], _seconds(call))
    plans.clear()
    return {name: 1e6 * seconds for name, seconds in best.items()}


@pytest.fixture(scope="module")
def table() -> dict[str, float]:
    return measure()


@pytest.mark.parametrize("backend", BOUNDS)
def test_launch_cost(benchmark: Any, table: dict[str, float], backend: str) -> None:
    benchmark.extra_info |= {"microseconds": table, "bound": BOUNDS[backend]}
    patched = {"triton": _triton, "cuda": _cuda}[backend]
    with patched(), torch.inference_mode():
        call = _call(PROBLEMS["residual"], backend)
        benchmark.pedantic(call, rounds=ROUNDS, iterations=CALLS, warmup_rounds=1)
    plans.clear()
    for name, microseconds in table.items():
        if name.startswith(backend) and "grad" not in name:
            assert microseconds <= BOUNDS[backend], f"{name}: {microseconds:.1f} us, allowed {BOUNDS[backend]:.0f}"


def main() -> None:
    for name, microseconds in measure().items():
        bound = BOUNDS.get(name.split(",")[0])
        limit = "" if bound is None or "grad" in name else f"   (allowed {bound:.0f})"
        print(f"{name:<32}{microseconds:6.1f} us{limit}")


if __name__ == "__main__":
    main()
