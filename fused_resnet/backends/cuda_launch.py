"""What the backend ``cuda`` would launch on a GPU, asked of its planner without one.

Which family of kernels takes a problem is decided in csrc/cuda/plan.cpp and nowhere else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import torch

from .. import devices
from ..core import extensions
from ..core.problem import Problem, dtype_name
from ..kernels.gpu_model import Launch
from . import cuda


@dataclass(frozen=True)
class Device:
    """What the planner asks of a GPU: number of SMs, and shared memory in bytes."""

    sm_count: int
    capability: int
    shared_per_block: int
    shared_per_sm: int
    wgmma: bool = False  # whether it runs the kernels on wgmma and tensor maps

    @property
    def properties(self) -> dict[str, int]:
        """As the planner takes them."""
        return {
            "sm_count": self.sm_count, "capability": self.capability,
            "shared_bytes_per_block": self.shared_per_block, "shared_bytes_per_sm": self.shared_per_sm,
            "wgmma": int(self.wgmma),
        }  # fmt: skip


def _device(capability: int, sm_count: int, shared_kib: int) -> Device:
    return Device(sm_count, capability, (shared_kib - 1) << 10, shared_kib << 10, wgmma=capability == 90)


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


def of_row(row: devices.Device) -> Device:
    """A GPU of the table of rates, with a build of the extension that has all its code."""
    major, minor = row.capability
    capability = 10 * major + minor
    return dataclasses.replace(DEVICES.get(capability, _device(capability, 1, 100)), sm_count=row.sms)


def of_index(index: int) -> Device | None:
    """This machine's GPU as its driver and the build of the extension say; None where the extension does not run."""
    if (found := cuda.properties(index)) is None:
        return None
    shared = found["shared_bytes_per_block"], found["shared_bytes_per_sm"]
    return Device(found["sm_count"], found["capability"], *shared, wgmma=bool(found.get("wgmma", 0)))


#: A problem that every family takes where it runs at all.
_LARGE = Problem.parse("n=256,h=56,w=56,c=64,k=64,padding=1,dtype=float16,device=cuda")


@lru_cache(maxsize=4096)
def expected(problem: Problem, device: Device) -> Launch | None:
    """What the planner would launch for aligned tensors; None where it refuses, or where no extension is built."""
    if (extension := extensions.cpu() or extensions.cuda()) is None:
        return None
    try:
        plan = extension.plan(device.properties, **cuda.request_of(extension, problem))
    except ValueError:
        return None
    kernel = plan.configuration
    if kernel["load"] == "tensor_map":
        family = "wgmma"
    else:
        family = "FMA" if kernel["math"] == "float32" else "mma.sync"
    step = kernel["depth_bytes"] // problem.dtype.itemsize
    return Launch(family, kernel["tile_m"], kernel["tile_n"], plan.splits, plan.steps * step)


def arithmetic(dtype: torch.dtype, device: Device) -> str | None:
    """One sentence on what multiplies a 16-bit type there; None where nothing of ours does."""
    launch = expected(dataclasses.replace(_LARGE, dtype=dtype), device)
    if launch is None:
        return None
    how = launch.family
    if how == "wgmma":
        how += (
            " where there are tiles enough for its multiprocessors and tensor maps describe the call, else by mma.sync"
        )
    return f"cuda: {dtype_name(dtype)} is multiplied by {how}"
