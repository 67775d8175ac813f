"""One comparison of :mod:`fused_resnet.core.timing` as an entry of the results that ``benchmarks/report.py`` reads."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from fused_resnet import __version__
from fused_resnet.comparison.sides import FUSED, summary
from fused_resnet.core.timing import Comparison, Contender, compare

from . import peaks


@dataclass(frozen=True)
class Work:
    """The size of one call."""

    flops: float
    bytes: float


def measure(
    sides: Sequence[Contender],
    make_inputs: Callable[[int], tuple[Tensor, ...]],
    *,
    title: dict[str, Any],
    work: Work,
    images: int,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    num_threads: int | None = None,
    expected: Callable[..., Tensor] | None = None,
    pause: float = 0.0,
) -> tuple[Comparison, dict[str, Any]]:
    """Compare ``sides``; the result, and all of it that a table needs as plain numbers."""
    torch._dynamo.reset()  # what earlier comparisons compiled would count as recompilation here
    result = compare(
        sides, make_inputs, rounds=rounds, device=device, num_threads=num_threads, expected=expected,
        max_error=1e-2 if dtype is torch.float32 else 5e-2, pause=pause if device.type == "cpu" else 0.0,
    )  # fmt: skip
    if not rounds:
        return result, {}
    roof = peaks.measured(device, dtype, result.threads)
    rows = summary(result, images)
    for row in rows:
        row["roofline_fraction"] = roof.bound(work.flops, work.bytes) / (row["median_ms"] / 1e3)
    others = [name for name in result.timings if name != FUSED and FUSED in result.timings]
    return result, {
        **title, "rows": rows, "fused_over": {name: list(result.speedup(FUSED, name)) for name in others},
        "absent": result.absent, "threads": result.threads, "device": device.type,
        "dtype": str(dtype).removeprefix("torch."), "rounds": rounds, "images": images, "flops": work.flops,
        "bytes": work.bytes, "peaks": asdict(roof), "versions": versions(),
    }  # fmt: skip


def versions() -> dict[str, str]:
    found = {"fused_resnet": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "torchvision", "onnxruntime", "openvino", "ncnn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
