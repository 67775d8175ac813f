"""What a network's tails are expected to take on a GPU: the model behind the rule of ``auto``, **not a measurement**.

Bounds say what no kernel can beat; this says what each way to run a tail is taken to need
(:mod:`fused_resnet.kernels.gpu_model`), and which family of kernels the backend ``cuda`` would launch.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..backends import cuda_launch, gpu_rule
from ..core.problem import Problem
from ..devices import Device
from ..kernels import gpu_model
from .kernel_count import Kernel

if TYPE_CHECKING:
    from rich.table import Table

#: Ways to run a tail. ``mma.sync``: the backend ``cuda`` on a GPU, or in a build, without wgmma.
SIDES = ("cuda", "mma.sync", "triton", "cudnn", "two_pass", "eager")


@dataclass(frozen=True)
class Tail:
    """The calls of a network that are alike: how many, what ``cuda`` launches for one, seconds of one by each side."""

    problem: Problem
    calls: int
    launch: gpu_model.Launch | None
    auto: str  # the backend that the rule takes
    seconds: dict[str, float]


def tails(kernels: Sequence[Kernel], device: Device) -> list[Tail]:
    """The tails among ``kernels`` in the order of their first call; host time is left out."""
    problems = Counter(kernel.problem for kernel in kernels if kernel.problem is not None)
    found = []
    for problem, calls in problems.items():
        launch = cuda_launch.expected(problem, cuda_launch.of_row(device))
        seconds = {
            side: gpu_model.device_seconds(side, problem, device, launch) for side in SIDES if side != "mma.sync"
        }
        seconds["mma.sync"] = gpu_model.device_seconds("cuda", problem, device)
        auto = gpu_rule.order(gpu_rule.PREFERENCE, problem, device)[0]
        found.append(Tail(problem, calls, launch, auto, seconds))
    return found


def total(found: Sequence[Tail], side: str) -> float:
    """Seconds of all calls, one after the other; ``"auto"``: each by what the rule takes."""
    return sum(tail.calls * tail.seconds[tail.auto if side == "auto" else side] for tail in found)


def as_dict(found: Sequence[Tail]) -> dict[str, Any]:
    """The same as plain numbers, for JSON."""
    rows = [
        {**dataclasses.asdict(tail), "problem": str(tail.problem), "launch": tail.launch and str(tail.launch),
         "family": tail.launch and tail.launch.family}
        for tail in found
    ]  # fmt: skip
    sums = {side: total(found, side) for side in ("auto", *SIDES)}
    return {"source": "model, not measured", "tails": rows, "seconds": sums}


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.{0 if seconds >= 1e-4 else 1}f}"


def _name(problem: Problem) -> str:
    added = " +proj" if problem.projection else " +res" if problem.residual else ""
    step = f"/{problem.stride[0]}" if max(problem.stride) > 1 else ""
    return f"{problem.h} {problem.r}x{problem.s}{step} {problem.c}-{problem.k}{added}"


def table(found: Sequence[Tail], device: Device) -> Table:
    """A table for the terminal, narrow enough for 80 columns; microseconds of one call, and of all in the last row."""
    from rich import box
    from rich.table import Table

    shown = [side for side in SIDES if side != "two_pass"]
    table = Table(
        title=f"Microseconds by the model, not measured: {device.name}",
        caption=f"each by what the rule takes: {total(found, 'auto') * 1e6:.0f} us in all",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for name in ("tail", "n", "cuda launches"):
        table.add_column(name, justify="right" if name == "n" else "left", no_wrap=True)
    for side in shown:
        table.add_column(side, justify="right", no_wrap=True)
    for tail in found:
        launch = tail.launch and f"{tail.launch.family} {tail.launch.m}x{tail.launch.n}"
        figures = [_microseconds(tail.seconds[side]) for side in shown]
        table.add_row(_name(tail.problem), str(tail.calls), launch or "-", *figures)
    table.add_section()
    sums = [_microseconds(total(found, side)) for side in shown]
    table.add_row("all", str(sum(tail.calls for tail in found)), "", *sums)
    return table
