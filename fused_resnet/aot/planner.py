"""The planner of csrc/cuda, called from Python without the extension: built from its sources, used through ctypes.

The planner is a pure host function, so neither a GPU nor torch's CUDA libraries are needed, only a C++ compiler;
and whoever compiles a kernel from these sources has the planner that belongs to it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from .. import user_cache
from ..problem import Problem, dtype_name
from .launch_json import Launch, TensorSpec, by_value, default_bn_dtype, tensor_specs, workspace_spec

_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}
_ABSENT = -1
#: The operation that a launch.json's problem names where the tail's kernel takes statistics instead.
CONV_STATS = "conv_bn_stats"


@dataclass(frozen=True)
class Device:
    """What the planner asks of a GPU: number of SMs, and shared memory in bytes."""

    sm_count: int
    capability: int
    shared_per_block: int
    shared_per_sm: int


def _device(capability: int, sm_count: int, shared_kib: int) -> Device:
    return Device(sm_count, capability, (shared_kib - 1) << 10, shared_kib << 10)


#: A full-size GPU of each architecture: A100, A40, Orin, L40S, H100, B200, B300, RTX 5090, GB10.
DEVICES = {
    d.capability: d
    for d in (
        _device(80, 108, 164), _device(86, 84, 100), _device(87, 16, 164), _device(89, 142, 100),
        _device(90, 132, 228), _device(100, 148, 228), _device(103, 148, 228), _device(120, 170, 100),
        _device(121, 48, 100),
    )
}  # fmt: skip


def _int32(names: str) -> list[tuple[str, type[ctypes.c_int32]]]:
    return [(name, ctypes.c_int32) for name in names.split()]


# Mirrors of the structs of csrc/cuda/plan.h; Planner compares their sizes with the library's.
class _NormRequest(ctypes.Structure):
    _fields_ = [*_int32("bias_dtype norm_dtype affine"), ("eps", ctypes.c_float)]


class PlanRequest(ctypes.Structure):
    _fields_ = [
        *_int32("n h w c k r s stride_h stride_w padding_h padding_w dilation_h dilation_w groups"),
        *_int32("dtype tf32 residual_dtype activation"),
        ("norm", _NormRequest),
        *_int32("projection proj_c proj_h proj_w proj_stride_h proj_stride_w"),
        ("proj_norm", _NormRequest),
        *_int32("alignment tile_m tile_n splits statistics"),
    ]


class DeviceProperties(ctypes.Structure):
    _fields_ = _int32("sm_count capability shared_bytes_per_block shared_bytes_per_sm")


_TENSORS = 19
_PARAMS_BYTES = 432


class Plan(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_int32),
        ("grid", ctypes.c_int32 * 3),
        ("block", ctypes.c_int32 * 3),
        ("dynamic_shared_bytes", ctypes.c_int32),
        ("workspace_bytes", ctypes.c_int64),
        ("counter_bytes", ctypes.c_int64),
        ("alignment", ctypes.c_int32 * _TENSORS),
        ("params", ctypes.c_int64 * (_PARAMS_BYTES // 8)),
    ]


class _KernelInfo(ctypes.Structure):
    _fields_ = [
        ("symbol", ctypes.c_char_p),
        *_int32("tile_m tile_n depth_bytes stages threads blocks_per_sm shared_bytes park_bytes math load epilogue"),
    ]


@dataclass(frozen=True)
class Entry:
    """One compiled unit: `definition` is the C++ that makes it entry points, with `header` and nothing else."""

    symbol: str
    definition: str
    threads: int
    shared_bytes: int
    header: ClassVar[str]
    parameters: ClassVar[str]  # the C++ type of the kernel's only parameter


@dataclass(frozen=True)
class Kernel(Entry):
    """One kernel of the convolutions' catalogue."""

    tile: str
    park_bytes: int
    math: str
    load: str
    epilogue: str  # "tail" or "statistics"
    header = "kernel_entry.cuh"
    parameters = "ConvParams"


_MATHS = ("float16", "bfloat16", "tf32", "float32")
_LOADS = ("vector", "gather")
_EPILOGUES = ("tail", "statistics")

_SOURCES = ("plan.cpp", "schedule.cpp", "bn_plan.cpp", "c_api.cpp")
# c_api.cpp also offers to launch; that part needs the CUDA runtime and is not wanted here.
_NO_LAUNCHER = """
#include <cstdio>
#include "bn_launch.h"
#include "launch.h"
namespace fused_resnet {
static int without(char* error, int bytes) {
  std::snprintf(error, bytes, "the planner was built without the CUDA runtime: it cannot launch");
  return 1;
}
int query_device(int, DeviceProperties&, char* error, int bytes) { return without(error, bytes); }
int launch_plan(const Plan&, const ConvParams&, void*, char* error, int bytes) { return without(error, bytes); }
int check_addresses(const Plan&, const void* const*, char* error, int bytes) { return without(error, bytes); }
int launch_bn_plan(const BnPlan&, const BnParams&, void*, char* error, int bytes) { return without(error, bytes); }
int check_bn_addresses(const BnPlan&, const void* const*, char* error, int bytes) { return without(error, bytes); }
}
"""


def source_directory() -> Path:
    """The folder `csrc`: in the source tree, or inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "csrc", package.parent / "csrc"):
        if (candidate / "cuda" / "plan.cpp").exists():
            return candidate
    raise RuntimeError(
        f"compile: expected the CUDA sources in {package / 'csrc'} or {package.parent / 'csrc'}, found none; "
        "run it from the source tree"
    )


def cache_directory() -> Path:
    """Where compiled planners and kernels are kept (FUSED_RESNET_CACHE, else with the tuning results)."""
    path = Path(os.environ.get("FUSED_RESNET_CACHE") or user_cache.directory())
    path.mkdir(parents=True, exist_ok=True)
    return path


def _compiler() -> str:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"compile: expected a C++ compiler for the planner, found no {compiler!r} on PATH")
    return compiler


def _run(command: list[str], what: str, given: str | None = None) -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what}: {command[0]} failed:\n{done.stderr.strip()[-2000:]}")
    return done.stdout


def sources_key(csrc: Path, suffix: str) -> str:
    """Hash of the headers, and of the sources with this suffix: all that a kernel (.cuh) or the planner (.cpp) is."""
    paths = [*csrc.glob("*.h"), *csrc.glob("cuda/*.h"), *csrc.glob(f"cuda/*{suffix}")]
    key = hashlib.sha256()
    for path in sorted(paths):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    return key.hexdigest()[:16]


def expand_list(csrc: Path, header: str, macro: str) -> list[str]:
    """The rows of a list of kernels: the preprocessor expands it, so that nobody has to understand its macros."""
    text = f'#include "{header}"\n#define KERNEL(...) @@ __VA_ARGS__ @@\n{macro}(KERNEL)\n'
    command = [_compiler(), "-E", "-P", "-x", "c++", f"-I{csrc / 'cuda'}", "-"]
    return re.findall(r"@@([^@]*)@@", _run(command, "compile", text))


def device_for(arch: str) -> Device:
    """A full-size GPU of an architecture such as ``sm_80``."""
    device = DEVICES.get(int(arch.removeprefix("sm_").rstrip("af")))
    if device is None:
        raise ValueError(f"arch: expected one of {', '.join(f'sm_{c}' for c in DEVICES)}, got {arch!r}")
    return device


class Planner:
    """The planner of one source tree. ``library`` may be a shared object that holds more than the planner."""

    def __init__(self, csrc: Path, library_path: Path | None = None) -> None:
        self.csrc = csrc
        library = ctypes.CDLL(str(library_path or self._build()))
        library.fused_resnet_tensor_name.restype = ctypes.c_char_p
        library.fused_resnet_tensor_offset.restype = ctypes.c_int64
        library.fused_resnet_kernel_info.restype = ctypes.POINTER(_KernelInfo)
        sizes = (ctypes.c_int32 * 4)()
        library.fused_resnet_sizes(sizes)
        mirror = [ctypes.sizeof(t) for t in (PlanRequest, DeviceProperties, Plan)] + [_PARAMS_BYTES]
        if list(sizes) != mirror or library.fused_resnet_tensor_count() != _TENSORS:
            raise RuntimeError(f"compile: the planner's structs have sizes {list(sizes)}, expected {mirror}")
        self.library = library
        slots = range(_TENSORS)
        self.tensor_names = [library.fused_resnet_tensor_name(i).decode() for i in slots]
        self.tensor_offsets = [int(library.fused_resnet_tensor_offset(i)) for i in slots]
        self.kernels = self._catalogue()

    def _build(self) -> Path:
        stub_key = hashlib.sha256(_NO_LAUNCHER.encode()).hexdigest()[:8]
        out = cache_directory() / f"planner-{sources_key(self.csrc, '.cpp')}-{stub_key}.so"
        if not out.exists():
            with tempfile.TemporaryDirectory(dir=out.parent) as folder:
                stub, made = Path(folder) / "no_launcher.cpp", Path(folder) / "planner.so"
                stub.write_text(_NO_LAUNCHER)
                cuda = self.csrc / "cuda"
                command = [_compiler(), "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{cuda}", "-o", str(made)]
                _run([*command, *(str(cuda / name) for name in _SOURCES), str(stub)], "compile")
                os.replace(made, out)
        return out

    def _catalogue(self) -> dict[str, Kernel]:
        kernels: dict[str, Kernel] = {}
        for i, row in enumerate(expand_list(self.csrc, "tiles.h", "FUSED_RESNET_KERNELS")):
            symbol = row.split(",")[0].strip()
            info = self.library.fused_resnet_kernel_info(i).contents
            assert info.symbol.decode() == symbol, "the catalogue follows the list"
            kernels[symbol] = Kernel(
                symbol, f"FUSED_RESNET_DEFINE_KERNEL({' '.join(row.split())})", info.threads, info.shared_bytes,
                f"{info.tile_m}x{info.tile_n}", info.park_bytes, _MATHS[info.math], _LOADS[info.load],
                _EPILOGUES[info.epilogue],
            )  # fmt: skip
        return kernels

    def plan(
        self,
        problem: Problem,
        arch: str,
        *,
        splitk: int | None = None,
        tile: str | None = None,
        eps: float = 1e-5,
        proj_eps: float = 1e-5,
        alignment: int = 16,
        bn_dtype: torch.dtype | None = None,
        device: Device | None = None,
        statistics: bool = False,
    ) -> Launch:
        """What the extension would launch for dense channels_last tensors at multiples of ``alignment`` bytes.

        With ``statistics`` it is the convolution of a training tail: y alone, and the mean and variance of its
        channels. ValueError with the planner's sentence where it refuses.
        """
        device = device or device_for(arch)
        bn_dtype = bn_dtype or default_bn_dtype(problem)
        specs = tensor_specs(problem, alignment, bn_dtype)
        request = request_for(problem, bn_dtype, eps, proj_eps, alignment)
        if tile is not None:
            request.tile_m, request.tile_n = _tile(tile)
        request.splits = splitk or 0
        request.statistics = int(statistics)
        if statistics:
            specs |= {name: TensorSpec("float32", (problem.k,), (1,), 4) for name in ("mean", "var")}
        plan = self.ask(request, device)
        used = {name: slot for slot, name in enumerate(self.tensor_names) if plan.alignment[slot]}
        if plan.workspace_bytes:
            specs["workspace"] = workspace_spec(plan.workspace_bytes)
        return Launch(
            kernel=list(self.kernels)[plan.kernel],
            arch=arch,
            grid=tuple(plan.grid),
            block=tuple(plan.block),
            dynamic_shared_bytes=plan.dynamic_shared_bytes,
            workspace_bytes=plan.workspace_bytes,
            arguments=[by_value(bytes(plan.params), {self.tensor_offsets[slot]: name for name, slot in used.items()})],
            tensors={
                name: dataclasses.replace(spec, alignment=plan.alignment[used[name]]) for name, spec in specs.items()
            },
            problem=f"op={CONV_STATS},{problem}" if statistics else str(problem),
            eps=eps,
            proj_eps=proj_eps,
            workspace_initial="zeros" if plan.counter_bytes else None,
            extra={"planned_for": dataclasses.asdict(device)},
        )

    def ask(self, request: PlanRequest, device: Device) -> Plan:
        """The planner's answer as it is; ValueError with its sentence where it refuses."""
        plan = Plan()
        ask(self.library.fused_resnet_plan, request, device, plan)
        return plan


def ask(function: Any, request: ctypes.Structure, device: Device, plan: ctypes.Structure) -> None:
    """Fills `plan` by one of the library's planners; ValueError with its sentence where it refuses."""
    error = ctypes.create_string_buffer(512)
    limits = DeviceProperties(device.sm_count, device.capability, device.shared_per_block, device.shared_per_sm)
    if function(ctypes.byref(request), ctypes.byref(limits), ctypes.byref(plan), error, len(error)):
        raise ValueError(error.value.decode())


def request_for(
    problem: Problem, bn_dtype: torch.dtype | None, eps: float, proj_eps: float, alignment: int
) -> PlanRequest:
    """The problem as the planner's C++ reads it."""
    if problem.dtype not in _DTYPES:
        raise ValueError(f"cuda: dtype must be float16, bfloat16 or float32, got {dtype_name(problem.dtype)}")
    dtype = _DTYPES[problem.dtype]

    def norm(bias: bool, bn: bool, eps: float) -> _NormRequest:
        bn_code = _DTYPES[bn_dtype] if bn and bn_dtype else _ABSENT
        return _NormRequest(dtype if bias else _ABSENT, bn_code, int(bn), eps)

    request = PlanRequest(
        n=problem.n, h=problem.h, w=problem.w, c=problem.c, k=problem.k, r=problem.r, s=problem.s,
        stride_h=problem.stride[0], stride_w=problem.stride[1], padding_h=problem.padding[0],
        padding_w=problem.padding[1], dilation_h=problem.dilation[0], dilation_w=problem.dilation[1],
        groups=problem.groups, dtype=dtype, tf32=int(problem.tf32),
        residual_dtype=_ABSENT if problem.residual is None else _DTYPES[problem.residual],
        activation=_ACTIVATIONS[problem.activation], norm=norm(problem.bias, problem.bn, eps),
        proj_norm=_NormRequest(_ABSENT, _ABSENT, 0, proj_eps), alignment=alignment,
    )  # fmt: skip
    if (proj := problem.projection) is not None:
        request.projection, request.proj_c, request.proj_h, request.proj_w = 1, proj.c, proj.h, proj.w
        request.proj_stride_h, request.proj_stride_w = proj.stride
        request.proj_norm = norm(proj.bias, proj.bn, proj_eps)
    return request


def _tile(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise ValueError(f"tile: expected MxN as '128x64', got {text!r}")
    return int(found.group(1)), int(found.group(2))


@lru_cache
def planner() -> Planner:
    """The planner of the sources that belong to this package."""
    return Planner(source_directory())
