"""The roofline of a network: how fast eager and fused can be on a GPU at most, block by block.

Each kernel takes at least ``max(FLOPs / peak FLOP/s, compulsory bytes / DRAM bandwidth)``: every input read once,
the output written once, no time for launches. Fusion lowers the bytes and the launches, not the FLOPs; the ratio of
the two sums bounds what it can give. :mod:`.expected` has what the model behind the rule of ``auto`` expects of each
kernel, and :func:`measure` adds what a GPU really takes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import devices
from ..devices import Device
from ..kernels import gpu_model
from . import expected
from .kernel_count import Kernel, count

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Work:
    """The kernels of one block, run one way."""

    kernels: tuple[Kernel, ...] = ()

    @property
    def flops(self) -> int:
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def launches(self) -> int:
        return len(self.kernels)

    def bound(self, device: Device) -> float:
        """Seconds that these kernels take at least, one after the other."""
        return sum(seconds(kernel, device) for kernel in self.kernels)


def seconds(kernel: Kernel, device: Device, tf32: bool = False) -> float:
    """The least time of one kernel: compute or memory, whichever is longer."""
    return gpu_model.bound(kernel.flops, kernel.bytes, kernel.dtype, device, tf32)


@dataclass
class Row:
    """A block, eager and fused, and what was measured of it (seconds) if anything was."""

    block: str
    eager: Work
    fused: Work
    measured: dict[str, float] = field(default_factory=dict)


@dataclass
class Roofline:
    """The rows of a network on a device."""

    rows: list[Row]
    device: Device
    shape: tuple[int, ...]
    dtype: torch.dtype
    measured: dict[str, float] = field(default_factory=dict)  # whole network: "eager", "fused"

    def bound(self, side: str) -> float:
        """Seconds of the whole network at least; ``side`` is ``"eager"`` or ``"fused"``."""
        return sum(getattr(row, side).bound(self.device) for row in self.rows)

    def tails(self) -> list[expected.Tail]:
        """What the fused tails are expected to take here by the model of :mod:`.expected`, not measured."""
        return expected.tails([kernel for row in self.rows for kernel in row.fused.kernels], self.device)

    @property
    def speedup(self) -> float:
        """What fusion can give at most here: the eager bound over the fused one."""
        return self.bound("eager") / self.bound("fused")

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, for JSON."""
        rows = [
            {
                "block": row.block,
                **{
                    side: {
                        "flops": work.flops,
                        "bytes": work.bytes,
                        "launches": work.launches,
                        "bound_seconds": work.bound(self.device),
                        "measured_seconds": row.measured.get(side),
                    }
                    for side, work in (("eager", row.eager), ("fused", row.fused))
                },
            }
            for row in self.rows
        ]
        return {
            "device": self.device.name,
            "source": self.device.source,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "rows": rows,
            "bound_seconds": {side: self.bound(side) for side in ("eager", "fused")},
            "bound_speedup": self.speedup,
            "measured_seconds": dict(self.measured),
            "expected": expected.as_dict(self.tails()),
        }

    def table(self) -> Table:
        """A table for the terminal; bounds in microseconds."""
        from rich import box
        from rich.table import Table

        device = self.device
        rates = f"{device.flops(self.dtype) / 1e12:.0f} TFLOP/s, {device.bandwidth / 1e12:.2f} TB/s"
        title = f"Least time on {device.name}: {rates}"
        # narrow enough for 80 columns
        table = Table(
            title=title, caption=f"device figures: {device.source}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        table.add_column("block", no_wrap=True)
        names = ["GFLOP", "eager MB", "fused MB", "launches", "eager us", "fused us", "gain"]
        if self.measured:
            names += ["eager at", "fused at"]
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*self._cells(row.block, row.eager, row.fused, row.measured))
        every = [Work(tuple(k for row in self.rows for k in getattr(row, side).kernels)) for side in ("eager", "fused")]
        table.add_section()
        table.add_row(*self._cells("network", every[0], every[1], self.measured))
        return table

    def _cells(self, label: str, eager: Work, fused: Work, measured: dict[str, float]) -> list[str]:
        bounds = {"eager": eager.bound(self.device), "fused": fused.bound(self.device)}
        cells = [
            label,
            f"{eager.flops / 1e9:.2f}",
            f"{eager.bytes / 1e6:.1f}",
            f"{fused.bytes / 1e6:.1f}",
            f"{eager.launches} -> {fused.launches}",
            f"{bounds['eager'] * 1e6:.1f}",
            f"{bounds['fused'] * 1e6:.1f}",
            f"{bounds['eager'] / bounds['fused']:.2f}x" if bounds["fused"] else "-",
        ]
        if self.measured:
            for side, bound in bounds.items():
                cells.append(f"{bound / measured[side]:.0%}" if measured.get(side) else "-")
        return cells

    def plot(self, path: Path | str) -> None:
        """Draw every kernel under the roof: arithmetic intensity against attainable FLOP/s. Needs matplotlib."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        device, peak = self.device, self.device.flops(self.dtype)
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        ridge = peak / device.bandwidth
        span = [min(1.0, ridge / 100), ridge, ridge * 20]
        axes.plot(span, [min(peak, x * device.bandwidth) / 1e12 for x in span], color="black", linewidth=1.2)
        axes.axvline(ridge, color="grey", linestyle=":", linewidth=0.8)
        for side, marker, colour in (("eager", "o", "tab:blue"), ("fused", "^", "tab:orange")):
            # a block as one point: all its FLOPs over all its bytes, which is where fusion moves it to the right
            works = [(row, getattr(row, side)) for row in self.rows]
            points = [
                (work.flops / work.bytes, work.flops / (row.measured.get(side) or work.bound(device)) / 1e12)
                for row, work in works
                if work.flops and work.bytes
            ]
            how = "measured" if self.measured else "bound"
            axes.scatter(*zip(*points, strict=True), marker=marker, color=colour, alpha=0.7, label=f"{side}, {how}")
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of DRAM traffic", ylabel="TFLOP/s")
        n = self.shape[0] if self.shape else 1
        axes.set_title(f"{device.name}, batch {n}, {str(self.dtype).removeprefix('torch.')}: blocks under the roof")
        axes.legend()
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _block_names(*runs: Sequence[Kernel]) -> dict[str, str]:
    """Module -> block: ``layer1.0.conv1`` and ``layer1.0`` belong to ``layer1.0``; what comes before and after to
    ``stem`` and ``head``."""
    modules = [kernel.module for kernel in runs[0]]
    deep = [i for i, name in enumerate(modules) if name.count(".") >= 1]
    first, last = (deep[0], deep[-1]) if deep else (len(modules), -1)
    names: dict[str, str] = {}
    for i, module in enumerate(modules):
        parts = module.split(".")
        if len(parts) >= 2:
            names[module] = ".".join(parts[:2])
        else:
            names.setdefault(module, "stem" if i < first else "head" if i > last else module)
    return names


def _rows(eager: Sequence[Kernel], fused: Sequence[Kernel]) -> list[Row]:
    names = _block_names(eager)
    seen = {"eager": False}

    def block(kernel: Kernel) -> str:
        parts = kernel.module.split(".")
        if len(parts) >= 2:
            seen["eager"] = True
            return ".".join(parts[:2])
        # a fused stem runs in the network's own forward, under no module's name
        return names.get(kernel.module) or ("head" if seen["eager"] else "stem")

    rows: dict[str, Row] = {}
    for side, kernels in (("eager", eager), ("fused", fused)):
        seen["eager"] = False
        gathered: dict[str, list[Kernel]] = {}
        for kernel in kernels:
            gathered.setdefault(block(kernel), []).append(kernel)
        for name, own in gathered.items():
            row = rows.setdefault(name, Row(name, Work(), Work()))
            setattr(row, side, Work(tuple(own)))
    return list(rows.values())


def roofline(
    model: nn.Module,
    shape: Iterable[int] = (256, 3, 224, 224),
    dtype: torch.dtype = torch.float16,
    device: Device | str = "H100",
    fused: nn.Module | None = None,
) -> Roofline:
    """The roofline of ``model`` and of ``fused`` (default: ``fuse(model)``) for inputs of ``shape`` on ``device``.

    Needs no GPU: the models are run on meta tensors.
    """
    if isinstance(device, str):
        device = devices.find(device)
    if fused is None:
        from .. import surgery

        fused = surgery.fuse(model.eval())
    shape = tuple(shape)
    return Roofline(_rows(count(model, shape, dtype), count(fused, shape, dtype)), device, shape, dtype)


# ---- measuring ---------------------------------------------------------------------------------------------


def measure(
    result: Roofline,
    model: nn.Module,
    fused: nn.Module,
    x: Tensor,
    rounds: int = 30,
    block_timer: Callable[[nn.Module, Tensor, Sequence[str], int], dict[str, float]] | None = None,
) -> Roofline:
    """Fill in what ``model`` and ``fused``, both on ``x``'s device, really take: the network by the protocol of
    :mod:`fused_resnet.core.timing`, its blocks by events around their forward."""
    from ..core import timing

    comparison = timing.compare(
        [
            timing.Contender("eager", lambda: model),
            timing.Contender("eager channels_last", lambda: model, lambda t: (_channels_last(t),)),
            timing.Contender("fused", lambda: fused, lambda t: (_channels_last(t),)),
        ],
        lambda _: (x,),
        rounds=rounds,
        device=x.device,
        max_error=5e-2,
    )
    best = comparison.best(["eager", "eager channels_last"])
    result.measured = {"eager": comparison.timings[best].median, "fused": comparison.timings["fused"].median}
    block_timer = block_timer or _time_blocks
    blocks = [row.block for row in result.rows]
    own = x if best == "eager" else _channels_last(x)
    for side, network, inputs in (("eager", model, own), ("fused", fused, _channels_last(x))):
        times = block_timer(network, inputs, blocks, rounds)
        for row in result.rows:
            if row.block in times:
                row.measured[side] = times[row.block]
    return result


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _time_blocks(model: nn.Module, x: Tensor, blocks: Sequence[str], rounds: int) -> dict[str, float]:
    """Median seconds of each named block's forward on a GPU, from events before and after it."""
    marks: dict[str, list[tuple[Any, Any]]] = {}

    def enter(name: str) -> None:
        pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        pair[0].record()
        marks.setdefault(name, []).append(pair)

    handles = []
    for name, module in model.named_modules():
        if name in blocks:  # a hook on a block itself does not keep it from being fused
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
            handles.append(module.register_forward_hook(lambda *_, name=name: marks[name][-1][1].record()))
    try:
        with torch.inference_mode():
            for _ in range(rounds):
                model(x)
            torch.cuda.synchronize(x.device)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3
        for name, pairs in marks.items()
        if pairs
    }
