"""What a verdict or a time depends on besides the call: device, driver, versions and the kernels' own code."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import re
from pathlib import Path

import torch

from ..core import extensions
from ..core.version import __version__

_PACKAGE = Path(__file__).parent.parent


def environment(device: torch.device) -> dict[str, str]:
    """The identity of ``device`` and of everything that generates code for it."""
    found = {
        "fused_resnet": __version__,
        "code": code_digest(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(index)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "sms": str(properties.multi_processor_count),  # a MIG slice or a cut-down part of the same name
            "driver": driver_version(),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
        }
    else:
        extension = extensions.cpu()
        found |= {
            "device": f"{device.type} {cpu_name()}",
            "capability": torch.backends.cpu.get_cpu_capability(),
            "kernels": "none" if extension is None else extension.build_info()["cpu_isa"],
            "threads": str(torch.get_num_threads()),
        }
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def code_digest() -> str:
    """A hash of the kernels: their sources and the built extension. A rebuilt kernel is verified and timed anew."""
    digest = hashlib.sha256()
    files = [*_PACKAGE.glob("kernels/**/*.py"), *_PACKAGE.glob("backends/**/*.py"), *_PACKAGE.glob("_C*")]
    for path in sorted(path for path in files if path.is_file()):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def driver_version() -> str:
    """The display driver's version (Linux), else the CUDA version that the driver supports."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
        match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
        if match:
            return match.group(1)
    except OSError:
        pass
    return f"cuda {torch._C._cuda_getDriverVersion()}" if hasattr(torch._C, "_cuda_getDriverVersion") else "unknown"


@functools.cache
def cpu_name() -> str:
    """The processor's name, as Linux tells it or else as Python does."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
