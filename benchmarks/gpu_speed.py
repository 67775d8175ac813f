"""How fast on a GPU: the tails of ResNet-18 and ResNet-50 and the whole networks, each way to run them, in the order
of worth and within a time budget.

    python -m benchmarks.gpu_speed tails --out tails.json --seconds 150
    python -m benchmarks.gpu_speed networks --out networks.json --seconds 150
    python -m benchmarks.gpu_speed warm --workers 12 --seconds 60    # compile what both will need, in parallel
    python -m benchmarks.gpu_speed profile --problem n=256,... --side "fused, triton"    # one call, for ncu

Each side is timed as a call (the device's own time; what the host takes stands beside it) and as a CUDA graph. The
file is written after each comparison, so whatever ends the process leaves what was done. ``--small`` shrinks every
size: the dry run.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import functools
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet.cli.inspect import environment
from fused_resnet.core.problem import Problem, Projection
from fused_resnet.core.timing import Contender, graphed
from fused_resnet.testing import RESNET_TAILS, RealTail, in_dtype

from . import peaks
from .baselines import EAGER_LAYOUTS, FOLDED, FREEZING, model_contenders, reference_of, tail_contenders, tail_inputs
from .comparison import Work, measure

DEVICE = torch.device("cuda")
DTYPES = (torch.float16, torch.bfloat16)
BATCHES = (256, 32, 1)


class Cell(NamedTuple):
    """One comparison: what ``measure`` takes."""

    name: str
    title: dict[str, Any]
    sides: list[Contender]
    inputs: Callable[[int], tuple[Tensor, ...]]
    work: Work
    dtype: torch.dtype
    expected: Callable[..., Tensor]


def small(problem: Problem) -> Problem:
    """The same kind of tail, a few hundred times smaller."""
    side, c, k = max(2, problem.h // 8), max(64, problem.c // 8), max(8, problem.k // 8)
    proj = problem.projection
    if proj is not None:
        step = proj.stride[0]
        proj = Projection(max(64, proj.c // 8), side * step, side * step, proj.stride, proj.bias, proj.bn)
    return dataclasses.replace(problem, h=side, w=side, c=c, k=k, projection=proj)


def with_graphs(sides: Sequence[Contender], left_out: Sequence[str]) -> list[Contender]:
    """``sides`` but for some, each as a call and as a graph; none but eager can cost the others their time."""
    kept = [side for side in sides if side.name not in left_out]
    kept = [side if side.name in EAGER_LAYOUTS else dataclasses.replace(side, optional=True) for side in kept]
    return [*kept, *map(graphed, kept)]


#: Of a dry run: a 3x3 tail with its projection, a 1x1 tail with its residual.
TINY = {("resnet18", "layer2.0"), ("resnet50", "layer1")}


def tail_cells(tiny: bool) -> Iterator[Callable[[], Cell]]:
    for dtype in DTYPES:
        for batch in (3,) if tiny else BATCHES:
            for tail in RESNET_TAILS:
                if not tiny or (tail.network, tail.stage) in TINY:
                    yield lambda dtype=dtype, batch=batch, tail=tail: _tail_cell(tail, batch, dtype, tiny)


def _tail_cell(tail: RealTail, batch: int, dtype: torch.dtype, tiny: bool) -> Cell:
    problem = small(tail.problem) if tiny else tail.problem
    problem = in_dtype(dataclasses.replace(problem, n=batch, device_type="cuda"), dtype)
    # weights are drawn for each side, and a tail folded in eager is eager's own convolution without BN's pass
    sides = with_graphs(tail_contenders(problem, DEVICE, compiled=True), (FOLDED, FREEZING))
    title = {"kind": "tail", "network": tail.network, "stage": tail.stage, "batch": batch, "problem": str(problem)}
    return Cell(
        f"{tail.network} {tail.stage} {dtype} batch {batch}", title, sides, tail_inputs(problem, DEVICE),
        Work(problem.flops, problem.compulsory_bytes), dtype, reference_of(problem, DEVICE),
    )  # fmt: skip


def network_cells(tiny: bool) -> Iterator[Callable[[], Cell]]:
    for dtype in DTYPES[:1] if tiny else DTYPES:
        for name in ("resnet18",) if tiny else ("resnet50", "resnet18"):
            for batch in (1,) if tiny else BATCHES:
                yield lambda name=name, batch=batch, dtype=dtype: _network_cell(name, batch, dtype, tiny)


def _network_cell(name: str, batch: int, dtype: torch.dtype, tiny: bool) -> Cell:
    size = 32 if tiny else 224
    model = _network(name, tiny).to(DEVICE)
    expected = _expected(model)
    model = model.to(dtype)

    def inputs(round_number: int) -> tuple[Tensor]:
        g = torch.Generator(DEVICE).manual_seed(round_number)
        return (torch.randn(batch, 3, size, size, generator=g, device=DEVICE).to(dtype),)

    return Cell(
        f"{name} {dtype} batch {batch}",
        {"kind": "model", "network": name, "stage": "", "batch": batch, "problem": f"{batch}x3x{size}x{size}"},
        with_graphs(model_contenders(model, inputs(0)[0], 1), (FREEZING,)),
        inputs,
        _work(name, batch, tiny),
        dtype,
        expected,
    )


def _network(name: str, tiny: bool) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    if tiny:  # its first two stages
        model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 10)
    return model


@functools.cache
def _work(name: str, batch: int, tiny: bool) -> Work:
    """FLOPs and bytes of the fused network, the same in both 16-bit types."""
    from fused_resnet.roofline import roofline

    size = 32 if tiny else 224
    rows = roofline(_network(name, tiny), (batch, 3, size, size), torch.float16).rows
    return Work(sum(row.fused.flops for row in rows), sum(row.fused.bytes for row in rows))


def _expected(model: nn.Module) -> Callable[..., Tensor]:
    """The answer in float32 without tf32: float64 takes a GPU seconds for a batch, and 16 bits are far coarser."""
    single = copy.deepcopy(model).float()

    def answer(x: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            out: Tensor = single(x.float())
            return out

    return answer


CELLS = {"tails": tail_cells, "networks": network_cells}


def run(kind: str, out: Path, seconds: float, tiny: bool, rounds: int) -> None:
    """Compare cell after cell while there is time for one more of the longest seen."""
    if tiny:
        peaks.MATRIX["cuda"], peaks.COPY["cuda"] = 64, 1 << 16
    torch.backends.cudnn.benchmark = True  # eager and cuDNN at their best
    document: dict[str, Any] = {
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "machine_info": {"fused_resnet": environment()}, "benchmarks": [], "failed": {}, "left": 0,
    }  # fmt: skip
    start, longest = time.monotonic(), 0.0
    for make in CELLS[kind](tiny):
        began = time.monotonic()
        if began + longest - start > seconds:
            document["left"] += 1
            continue
        name = "?"
        try:
            cell = make()
            name = cell.name
            _, info = measure(
                cell.sides, cell.inputs, title=cell.title, work=cell.work, images=cell.title["batch"], device=DEVICE,
                dtype=cell.dtype, rounds=rounds, expected=cell.expected,
            )  # fmt: skip
            document["benchmarks"].append({"extra_info": info})
        except Exception as error:  # the other cells are worth having
            document["failed"][name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        cell = None  # type: ignore[assignment]  # its weights, graphs and their pools
        gc.collect()
        torch.cuda.empty_cache()
        longest = max(longest, time.monotonic() - began)
        write(out, document)
        print(f"{time.monotonic() - start:6.1f} s  {name}  {document['failed'].get(name, '')}", flush=True)
    write(out, document)
    print(
        f"{len(document['benchmarks'])} compared, {len(document['failed'])} failed, {document['left']} left", flush=True
    )


def write(path: Path, document: dict[str, Any]) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(document, indent=1))
    os.replace(beside, path)


def warm(workers: int, seconds: float, tiny: bool) -> None:
    """Build every side once in ``workers`` processes: Triton's and Inductor's caches have it then."""
    entry = [sys.executable, *(("-m", "benchmarks.gpu_stand_in") if "benchmarks.gpu_stand_in" in sys.modules else ())]
    command = [*entry, "-m", "benchmarks.gpu_speed", "warm", "--seconds", str(seconds), *(["--small"] if tiny else [])]
    children = [subprocess.Popen([*command, "--share", f"{i}/{workers}"]) for i in range(workers)]
    statuses = [child.wait() for child in children]
    if any(statuses):
        sys.exit("warm: a process built nothing")


def warm_share(share: str, seconds: float, tiny: bool) -> None:
    index, workers = map(int, share.split("/"))
    start, built = time.monotonic(), 0
    for kind in CELLS:
        for i, make in enumerate(CELLS[kind](tiny)):
            if i % workers != index or time.monotonic() - start > seconds:
                continue
            try:
                cell = make()
                measure(
                    [side for side in cell.sides if not side.name.endswith("graph")], cell.inputs, title={},
                    work=cell.work, images=1, device=DEVICE, dtype=cell.dtype, rounds=0,
                )  # fmt: skip
                built += 1
            except Exception as error:
                print(f"warm: {type(error).__name__}: {error}", flush=True)
            torch.cuda.empty_cache()
    print(f"warm {share}: {built} comparisons built in {time.monotonic() - start:.0f} s", flush=True)
    if not built:
        sys.exit(1)


def profile(problem: Problem, side: str) -> None:
    """One call after its warm-up, between the profiler's marks."""
    inputs = tail_inputs(problem, DEVICE)
    chosen = next(s for s in tail_contenders(problem, DEVICE, compiled=False) if s.name == side)
    with torch.inference_mode():
        fn = chosen.build()
        for i in range(3):
            fn(*chosen.inputs(*inputs(i)))
        own = chosen.inputs(*inputs(3))
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        fn(*own)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_speed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=[*CELLS, "warm", "profile"])
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--seconds", type=float, default=150, help="no comparison is begun that would not fit")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a dry run")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--share", help="I/N: this process's part of warming up")
    parser.add_argument("--problem", type=Problem.parse)
    parser.add_argument("--side")
    options = parser.parse_args(arguments)
    os.environ["FUSED_RESNET_VERIFY"] = "0"  # every output is checked here
    if options.what == "warm" and options.share is None:
        warm(options.workers, options.seconds, options.small)
    elif options.what == "warm":
        warm_share(options.share, options.seconds, options.small)
    elif options.what == "profile":
        profile(options.problem, options.side)
    else:
        run(options.what, options.out, options.seconds, options.small, options.rounds)


if __name__ == "__main__":
    main()
