"""The operator of the CUDA extension and the way past it, on CPU tensors: everything from torch to the launch is run.

The module is compiled as it is, except for csrc/cuda/torch_device.h (device, guard, stream), above the stand-in for the
CUDA runtime that the PTX interpreter comes with.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from tests.support.toolchain import why_not

if reason := why_not("g++", "nvcc"):
    pytest.skip(reason, allow_module_level=True)


from fused_resnet.aot.cuda import build_module
from fused_resnet.aot.planner import cache_directory, source_directory
from tests.support.host_cuda.host import locked
from tests.support.launch_harness import interpreter

pytestmark = [pytest.mark.ptx, pytest.mark.aot]

SUPPORT = Path(__file__).parents[1] / "support"
#: Functions of the stand-in that host_cuda/capture.cpp puts its own in front of.
WRAPPED = (
    "cudaMalloc", "cudaMemsetAsync", "cudaStreamCreateWithFlags", "cudaStreamSynchronize", "cudaFuncSetAttribute",
)  # fmt: skip
#: These kernels are compiled; the others are empty functions, which nothing here launches.
COMPILED = (
    "kernels_f16", "kernels_gather_f16", "kernels_f32", "kernels_gather_f32", "kernels_stats_f16", "kernels_stats_f32",
    "bn_stats", "bn_apply", "bn_backward_reduce", "bn_backward_apply",
)  # fmt: skip
SOURCES = (
    "plan", "catalogue", "tensor_maps", "schedule", "launch", "encode_maps", "tensors", "counters", "workspace",
    "conv_call", "conv_bn_add_relu", "conv_stats",
    "bn_plan", "bn_launch", "bn_training",
)  # fmt: skip


def _compile(folder: Path, csrc: Path) -> Path:
    toolkit = build_module(csrc).find_toolkit()
    sources = folder / "csrc"
    shutil.copytree(csrc, sources)
    shutil.copy(SUPPORT / "cuda_operator" / "torch_device.h", sources / "cuda" / "torch_device.h")
    # A short catalogue, for the compiler's sake: what is around the kernels neither knows nor cares.
    tiles = sources / "cuda" / "tiles.h"
    text = re.sub(r"X\(prefix##_(?!32x32|64x64)\w+, [^)]*\)", "", tiles.read_text())
    tiles.write_text(re.sub(r"FUSED_RESNET_STATISTICS\(X, conv_\w+_stats_128x128, [^)]*\)", "", text))
    ptxi_home = Path(os.environ["PTXI_HOME"])
    torch_include = Path(torch.__file__).parent / "include"
    includes = [
        *(f"-I{d}" for d in toolkit.include_dirs), f"-I{sources}",
        f"-I{sysconfig.get_paths()['include']}", f"-I{torch_include}",
    ]  # fmt: skip
    flags = [
        "-std=c++17", "-O1", "-w", "-fPIC", "-DABOVE_STAND_IN", "-DTORCH_TARGET_VERSION=0x020a000000000000",
        '-DFUSED_RESNET_ARCHITECTURES="compute_80"', '-DFUSED_RESNET_CUDART="stand-in"', '-DFUSED_RESNET_NVCC="any"',
    ]  # fmt: skip
    (folder / "empty.cpp").write_text(
        '#include "cuda/tiles.h"\n'
        '#define EMPTY(symbol, ...) extern "C" __attribute__((weak)) void symbol() {}\n'
        "FUSED_RESNET_KERNELS(EMPTY)\n"
        "namespace fused_resnet { void* stream_of_the_tests = nullptr; extern const bool kHopperCode = false; }\n"
        'extern "C" void test_use_stream(void* stream) { fused_resnet::stream_of_the_tests = stream; }\n'
    )
    # The stand-in's constructors must run before those that register kernels with it: it is linked first.
    host = [ptxi_home / "fake_cudart" / "cudart.cpp", SUPPORT / "host_cuda" / "capture.cpp", folder / "empty.cpp"]
    host += [sources / "bindings_cuda.cpp", sources / "bindings_planner.cpp"]
    host += [sources / "cuda" / f"{name}.cpp" for name in SOURCES]
    commands = [["g++", *flags, *includes, "-c", str(f), "-o", str(folder / f"{f.stem}.o")] for f in host]
    kernels = [sources / "cuda" / f"{name}.cu" for name in COMPILED]
    commands += [
        [toolkit.nvcc, "-std=c++17", "-O2", "-gencode=arch=compute_80,code=compute_80", "-Xcompiler", "-fPIC",
         "-c", str(f), "-o", str(folder / f"{f.stem}.o")]
        for f in kernels
    ]  # fmt: skip
    running = []
    for command in commands:
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        if len(running) == 2 or command is commands[-1]:
            for process in running:
                _, error = process.communicate()
                assert process.returncode == 0, error
            running = []
    module = folder / "_C_cuda.so"
    objects = [str(folder / f"{f.stem}.o") for f in [*host, *kernels]]
    wrapped = [f"-Wl,--wrap={name}" for name in WRAPPED]
    # -Bsymbolic: torch brings the real CUDA runtime into the process, which must not take the stand-in's place
    subprocess.run(
        ["g++", "-shared", "-Wl,-Bsymbolic", *wrapped, "-o", str(module), *objects, interpreter().lib._name,
         f"-L{torch_include.parent / 'lib'}", "-ltorch_cpu", "-ldl"],
        check=True,
    )  # fmt: skip
    return module


@lru_cache
def module() -> Path:
    csrc = source_directory()
    key = hashlib.sha256(f"{torch.__version__} {build_module(csrc).find_toolkit().version}".encode())
    stand_ins = [SUPPORT / "cuda_operator" / "torch_device.h", SUPPORT / "host_cuda" / "capture.cpp"]
    for path in sorted([*csrc.glob("*.*"), *csrc.glob("cuda/*"), *stand_ins, Path(__file__)]):
        key.update(path.read_bytes())
    out = cache_directory() / f"operator-{key.hexdigest()[:16]}.so"
    with locked(out):
        if not out.exists():
            folder = out.with_suffix(".build")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _compile(folder, csrc).rename(out)
            shutil.rmtree(folder)
    return out


@pytest.mark.parametrize(
    "check", ["operator", "errors", "direct", "statistics", "training", "training_errors", "captures"]
)
def test_operator(check: str) -> None:
    sys.path.insert(0, str(Path(os.environ["PTXI_HOME"]) / "fake_cudart"))
    import fake_cudart

    environment = os.environ | {"PTXI_ARCH": "80", "PTXI_CUOBJDUMP": fake_cudart.cuobjdump()}
    environment["PYTHONPATH"] = os.pathsep.join([str(SUPPORT.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "cuda_operator" / "checks.py"), str(module()), check],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "ok"
