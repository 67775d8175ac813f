"""What GPUs can do at most: the figures behind the roofline and behind the choice among unmeasured kernels.

Peaks are the vendor's, dense (no structured sparsity), with float32 accumulation, at boost clock.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass

import torch

TERA = 1e12


@dataclass(frozen=True)
class Device:
    """Peak rates of one GPU: FLOP/s by kind of product, DRAM bytes/s."""

    name: str
    capability: tuple[int, int]
    sms: int
    tensor16: float  # float16 and bfloat16 on tensor cores
    tf32: float
    fp32: float
    bandwidth: float
    source: str

    def flops(self, dtype: torch.dtype, tf32: bool = False) -> float:
        """Peak FLOP/s for products in ``dtype``; float64 is taken as half of float32, generous for most."""
        if dtype.itemsize == 2:
            return self.tensor16
        if dtype is torch.float64:
            return self.fp32 / 2
        return self.tf32 if tf32 else self.fp32

    def with_rates(self, tensor16: float | None = None, bandwidth: float | None = None) -> Device:
        """The same device with rates of one's own, in FLOP/s and bytes/s; the other products scale with tensor16."""
        factor = 1.0 if tensor16 is None else tensor16 / self.tensor16
        return dataclasses.replace(
            self,
            tensor16=self.tensor16 * factor,
            tf32=self.tf32 * factor,
            fp32=self.fp32 * factor,
            bandwidth=bandwidth or self.bandwidth,
            source="given on the command line" if tensor16 or bandwidth else self.source,
        )


def _device(
    name: str, capability: tuple[int, int], sms: int, tensor16: float, tf32: float, fp32: float, tbytes: float,
    source: str,
) -> Device:  # fmt: skip
    return Device(name, capability, sms, tensor16 * TERA, tf32 * TERA, fp32 * TERA, tbytes * TERA, source)


#: One row per GPU; rates in TFLOP/s and TB/s.
DEVICES: tuple[Device, ...] = (
    _device("T4", (7, 5), 40, 65, 8.1, 8.1, 0.320, "NVIDIA T4 datasheet; no tf32"),
    _device("A10", (8, 6), 72, 125, 62.5, 31.2, 0.600, "NVIDIA A10 datasheet"),
    _device("A100 40GB", (8, 0), 108, 312, 156, 19.5, 1.555, "NVIDIA A100 Tensor Core GPU datasheet (SXM4 40 GB)"),
    _device("A100 PCIe", (8, 0), 108, 312, 156, 19.5, 1.935, "NVIDIA A100 Tensor Core GPU datasheet (PCIe 80 GB)"),
    _device("A100", (8, 0), 108, 312, 156, 19.5, 2.039, "NVIDIA A100 Tensor Core GPU datasheet (SXM4 80 GB)"),
    _device("RTX 3090", (8, 6), 82, 71, 35.6, 35.6, 0.936, "NVIDIA Ampere GA102 architecture whitepaper"),
    _device("L4", (8, 9), 58, 121, 60, 30.3, 0.300, "NVIDIA L4 datasheet (dense: half of the sparse figures)"),
    _device("L40S", (8, 9), 142, 362, 183, 91.6, 0.864, "NVIDIA L40S datasheet (dense)"),
    _device("RTX 4090", (8, 9), 128, 165.2, 82.6, 82.6, 1.008, "NVIDIA Ada architecture whitepaper (fp32 accumulate)"),
    _device("H100 PCIe", (9, 0), 114, 756, 378, 51, 2.0, "NVIDIA H100 Tensor Core GPU datasheet (PCIe, dense)"),
    _device("H100 datasheet", (9, 0), 132, 989, 494.5, 67, 3.35, "NVIDIA H100 Tensor Core GPU datasheet (SXM5, dense)"),
    _device("H100", (9, 0), 132, 790, 395, 53.5, 3.0,
            "SXM5; bf16 GEMM and copy measured (790 TFLOP/s, 3.0 TB/s), the rest of the datasheet scaled alike"),
    _device("H200 datasheet", (9, 0), 132, 989, 494.5, 67, 4.8, "NVIDIA H200 Tensor Core GPU datasheet (SXM, dense)"),
    _device("H200", (9, 0), 132, 790, 395, 53.5, 4.3,
            "SXM; bf16 GEMM and copy measured (790 TFLOP/s, 4.3 TB/s), the rest of the datasheet scaled alike"),
    _device("B200", (10, 0), 148, 2250, 1125, 75, 8.0, "NVIDIA DGX B200 datasheet, an eighth of it (dense)"),
    _device("RTX 5090", (12, 0), 170, 209.5, 104.8, 104.8, 1.792, "NVIDIA RTX Blackwell whitepaper (fp32 accumulate)"),
)  # fmt: skip


def names() -> list[str]:
    return [device.name for device in DEVICES]


def _words(name: str) -> set[str]:
    """The words of a GPU's name in which models differ: ``"NVIDIA H100 80GB HBM3"`` -> {"h100", "80gb", "hbm3"}."""
    return set(re.split(r"[\s\-_/]+", name.lower())) - {"nvidia", "geforce", "tesla", "sxm4", "sxm5", "gpu", ""}


def find(name: str) -> Device:
    """The device called ``name``: exactly, or the one whose words all stand in it (most words first)."""
    for device in DEVICES:
        if device.name.lower() == name.strip().lower():
            return device
    asked = _words(name)
    fitting = [device for device in DEVICES if _words(device.name) <= asked]
    if not fitting:
        raise ValueError(f"device: expected one of {', '.join(names())}, got {name!r}")
    return max(fitting, key=lambda device: len(_words(device.name)))


@functools.cache
def of(device: torch.device) -> Device:
    """The row for a GPU of this machine; one that is not in the table is estimated from its SMs and memory clock."""
    properties = torch.cuda.get_device_properties(device)
    try:
        return find(properties.name)
    except ValueError:
        return estimated(properties)


#: Dense 16-bit FMA per SM and cycle with float32 accumulation; 256 on the consumer parts (8.6, 8.9, 12.0).
_FMA_PER_SM = {
    (7, 5): 256,
    (8, 0): 1024,
    (8, 6): 256,
    (8, 7): 512,
    (8, 9): 256,
    (9, 0): 2048,
    (10, 0): 4096,
    (10, 3): 4096,
    (12, 0): 256,
}


def estimated(properties: object) -> Device:
    """A device that is not in the table, from what CUDA says of it (an upper bound, like the others)."""
    major, minor = getattr(properties, "major", 8), getattr(properties, "minor", 0)
    sms = getattr(properties, "multi_processor_count", 1)
    clock = 1e3 * getattr(properties, "clock_rate", 1_500_000)  # kHz
    memory_clock = 1e3 * getattr(properties, "memory_clock_rate", 1_200_000)
    bus = getattr(properties, "memory_bus_width", 256) / 8
    per_sm = _FMA_PER_SM.get((major, minor), 256)
    fp32 = 2.0 * (64 if (major, minor) in ((7, 5), (8, 0)) else 128) * sms * clock
    tensor16 = 2.0 * per_sm * sms * clock
    return Device(
        getattr(properties, "name", "unknown GPU"), (major, minor), sms, tensor16, tensor16 / 2 if major >= 8 else fp32,
        fp32, 2.0 * memory_clock * bus, "estimated from the device's SMs and clocks",
    )  # fmt: skip
