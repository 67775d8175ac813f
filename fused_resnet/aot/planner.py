"""The launch planner of the CUDA kernels, asked without a GPU: a pure function of the extension ``_C``."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, TypeVar

import torch

from ..backends.cuda import NormRequest, plan_request
from ..core import extensions, user_cache
from ..core.problem import Problem
from .launch_json import Launch, TensorSpec, by_value, default_bn_dtype, tensor_specs, workspace_spec

#: The operation that a launch.json's problem names where the tail's kernel takes statistics instead.
CONV_STATS = "conv_bn_stats"


@dataclass(frozen=True)
class Device:
    """What the planner asks of a GPU: number of SMs, and shared memory in bytes."""

    sm_count: int
    capability: int
    shared_per_block: int
    shared_per_sm: int

    @property
    def properties(self) -> dict[str, int]:
        """As the planner takes them."""
        return {
            "sm_count": self.sm_count, "capability": self.capability,
            "shared_bytes_per_block": self.shared_per_block, "shared_bytes_per_sm": self.shared_per_sm,
        }  # fmt: skip


def _device(capability: int, sm_count: int, shared_kib: int) -> Device:
    return Device(sm_count, capability, (shared_kib - 1) << 10, shared_kib << 10)


#: A full-size GPU of each architecture: T4, A100, A40, Orin, L40S, H100, B200, B300, RTX 5090, GB10.
DEVICES = {
    d.capability: d
    for d in (
        Device(40, 75, 64 << 10, 64 << 10),
        _device(80, 108, 164), _device(86, 84, 100), _device(87, 16, 164), _device(89, 142, 100),
        _device(90, 132, 228), _device(100, 148, 228), _device(103, 148, 228), _device(120, 170, 100),
        _device(121, 48, 100),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One compiled unit: `definition` is the C++ that makes it entry points, with `header` and nothing else."""

    symbol: str
    definition: str
    threads: int
    shared_bytes: int
    header: ClassVar[str]
    parameters: ClassVar[str]  # the C++ type of the kernel's only parameter


EntryT = TypeVar("EntryT", bound=Entry)


@dataclass(frozen=True)
class Kernel(Entry):
    """One kernel of the convolutions' catalogue."""

    tile: str
    turing_shared_bytes: int  # in place of shared_bytes on sm_75; 0 where the kernel does not run there
    park_bytes: int
    blocks_per_sm: int
    math: str
    load: str
    epilogue: str  # "tail" or "statistics"
    header = "kernel_entry.cuh"
    parameters = "ConvParams"

    def runs_on(self, arch: str) -> bool:
        """Whether a GPU of this architecture has the arithmetic and the registers."""
        return arch != "sm_75" or self.turing_shared_bytes > 0


def source_directory() -> Path:
    """The folder `csrc`: in the source tree, or inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "csrc", package.parent / "csrc"):
        if (candidate / "cuda" / "kernel_entry.cuh").exists():
            return candidate
    raise RuntimeError(
        f"compile: expected the CUDA sources in {package / 'csrc'} or {package.parent / 'csrc'}, found none; "
        "run it from the source tree"
    )


def cache_directory() -> Path:
    """Where compiled kernels are kept (FUSED_RESNET_CACHE, else with the tuning results)."""
    path = Path(os.environ.get("FUSED_RESNET_CACHE") or user_cache.directory())
    path.mkdir(parents=True, exist_ok=True)
    return path


def sources_key(csrc: Path, suffix: str) -> str:
    """Hash of the headers, and of the sources with this suffix: a kernel is made of headers and .cuh."""
    paths = [*csrc.glob("*.h"), *csrc.glob("cuda/*.h"), *csrc.glob(f"cuda/*{suffix}")]
    key = hashlib.sha256()
    for path in sorted(paths):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    return key.hexdigest()[:16]


def device_for(arch: str) -> Device:
    """A full-size GPU of an architecture such as ``sm_80``."""
    device = DEVICES.get(int(arch.removeprefix("sm_").rstrip("af")))
    if device is None:
        raise ValueError(f"arch: expected one of {', '.join(f'sm_{c}' for c in DEVICES)}, got {arch!r}")
    return device


class Planner:
    """The planner of ``extension``: ``_C``, or a module with another one."""

    def __init__(self, extension: ModuleType) -> None:
        self.extension = extension
        self.kernels = {row["symbol"]: kernel_of(Kernel, row) for row in extension.catalogue()}

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
        tile_m, tile_n = (0, 0) if tile is None else _tile(tile)
        request = self.request(problem, bn_dtype, eps, proj_eps, alignment) | {
            "tile_m": tile_m, "tile_n": tile_n, "splits": splitk or 0, "statistics": int(statistics),
        }  # fmt: skip
        if statistics:
            specs |= {name: TensorSpec("float32", (problem.k,), (1,), 4) for name in ("mean", "var")}
        plan = self.ask(request, device)
        if plan.workspace_bytes:
            specs["workspace"] = workspace_spec(plan.workspace_bytes)
        return Launch(
            kernel=plan.kernel,
            arch=arch,
            grid=plan.grid,
            block=plan.block,
            dynamic_shared_bytes=plan.dynamic_shared_bytes,
            workspace_bytes=plan.workspace_bytes,
            arguments=[by_value(plan.argument, plan.pointers)],
            tensors={name: dataclasses.replace(spec, alignment=plan.alignment[name]) for name, spec in specs.items()},
            problem=f"op={CONV_STATS},{problem}" if statistics else str(problem),
            eps=eps,
            proj_eps=proj_eps,
            workspace_initial="zeros" if plan.counter_bytes else None,
            extra={"planned_for": dataclasses.asdict(device)},
        )

    def request(
        self, problem: Problem, bn_dtype: torch.dtype | None, eps: float, proj_eps: float, alignment: int
    ) -> dict[str, int | float]:
        """The problem as the planner reads it."""

        def norm(bias: bool, bn: bool, eps: float) -> NormRequest:
            return NormRequest(problem.dtype if bias else None, bn_dtype if bn else None, eps=eps)

        proj = problem.projection
        return plan_request(
            self.extension, problem, norm(problem.bias, problem.bn, eps),
            NormRequest() if proj is None else norm(proj.bias, proj.bn, proj_eps),
        ) | {"alignment": alignment}  # fmt: skip

    def ask(self, request: dict[str, int | float], device: Device) -> Any:
        """The planner's answer as it is; ValueError with its sentence where it refuses."""
        return self.extension.plan(device.properties, **request)


def kernel_of(kind: type[EntryT], row: dict[str, Any]) -> EntryT:
    """A kernel from its row in a catalogue, which may say more."""
    return kind(**{field.name: row[field.name] for field in dataclasses.fields(kind)})


def _tile(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise ValueError(f"tile: expected MxN as '128x64', got {text!r}")
    return int(found.group(1)), int(found.group(2))


@lru_cache
def planner() -> Planner:
    """The planner of this package; RuntimeError where ``_C`` is not there."""
    if (extension := extensions.cpu()) is None:
        raise RuntimeError(f"compile: needs the launch planner, but {extensions.why_not_cpu()}")
    return Planner(extension)
