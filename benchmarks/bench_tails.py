"""Operator level: the tails of ResNet-18 and ResNet-50 at 224x224, by stage and batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_resnet import backends
from fused_resnet.comparison.sides import FUSED, channels_last_inputs
from fused_resnet.core.problem import Problem
from fused_resnet.core.timing import Contender
from fused_resnet.testing import RESNET_TAILS, RealTail, in_dtype, make_tail

from . import onednn
from .baselines import ONEDNN, reference_of, tail_contenders, tail_inputs
from .comparison import Work
from .conftest import Record

IDS = [f"{tail.network}-{tail.stage}" for tail in RESNET_TAILS]


def run(
    record: Record, tail: RealTail, batch: int, device: torch.device, dtype: torch.dtype, threads: int | None,
    compiled: bool,
) -> None:  # fmt: skip
    problem = in_dtype(dataclasses.replace(tail.problem, n=batch, device_type=device.type), dtype)
    time(
        record, "tail", tail, problem, tail_contenders(problem, device, compiled), tail_inputs(problem, device), threads
    )


def time(
    record: Record, kind: str, tail: RealTail, problem: Problem, sides: list[Contender],
    inputs: Callable[[int], tuple[Tensor, ...]], threads: int | None,
) -> None:  # fmt: skip
    device = torch.device(problem.device_type)
    record(
        sides,
        inputs,
        title={
            "kind": kind, "network": tail.network, "stage": tail.stage, "batch": problem.n, "problem": str(problem)
        },
        work=Work(problem.flops, problem.compulsory_bytes),
        images=problem.n,
        device=device,
        dtype=problem.dtype,
        num_threads=threads,
        expected=reference_of(problem, device),
        pause=0.0,  # all sides share torch's one thread pool
    )  # fmt: skip


@pytest.mark.benchmark(group="tails, CPU, float32")
@pytest.mark.parametrize("batch", [1, 8], ids=["b1", "b8"])
@pytest.mark.parametrize("tail", RESNET_TAILS, ids=IDS)
def test_cpu_tail(record: Record, tail: RealTail, batch: int, num_threads: int, request: pytest.FixtureRequest) -> None:
    compiled = bool(request.config.getoption("--full"))  # two compilations for each tail
    run(record, tail, batch, torch.device("cpu"), torch.float32, num_threads, compiled)


#: The 3x3 stride-1 tails of ResNet-18, one of each stage.
LOOP_TAILS = [tail for tail in RESNET_TAILS if tail.network == "resnet18" and tail.stage[-1] != "0"]


@pytest.mark.benchmark(group="tails in a loop, CPU, float32")
@pytest.mark.parametrize("kept", [False, True], ids=["in-place", "kept"])
@pytest.mark.parametrize("batch", [1, 8], ids=["b1", "b8"])
@pytest.mark.parametrize("tail", LOOP_TAILS, ids=[tail.stage for tail in LOOP_TAILS])
def test_cpu_loop(record: Record, tail: RealTail, batch: int, kept: bool, num_threads: int) -> None:
    """Ours and oneDNN's in turn on the same tensors: how fast the kernels are, rather than how fast memory is.

    oneDNN in two forms: adding in place, on a copy of the residual, or with an output of its own like ours.
    """
    problem = dataclasses.replace(tail.problem, n=batch)
    cpu = torch.device("cpu")
    activations = channels_last_inputs(*tail_inputs(problem, cpu)(0))

    def in_place(x: Tensor, *added: Tensor) -> tuple[Tensor, ...]:
        return (x, *channels_last_inputs(*added))

    def same(*inputs: Tensor) -> tuple[Tensor, ...]:
        return inputs

    sides = {side.name: side for side in tail_contenders(problem, cpu, False)}
    if kept:
        rival = Contender(f"{ONEDNN}, residual kept", lambda: onednn.tail(make_tail(problem), keep=True), same)
    else:
        rival = dataclasses.replace(sides[ONEDNN], inputs=in_place)
    both = [rival, dataclasses.replace(sides[FUSED], inputs=same)]
    time(record, "loop", tail, problem, both, lambda round_number: activations, num_threads)


@pytest.mark.full
@pytest.mark.benchmark(group="tails, CPU, bfloat16")
@pytest.mark.parametrize("tail", RESNET_TAILS, ids=IDS)
def test_cpu_bfloat16_tail(record: Record, tail: RealTail, num_threads: int) -> None:
    why_not = backends.get("cpu").can_run(in_dtype(tail.problem, torch.bfloat16))
    if why_not is not None:
        pytest.skip(why_not)
    run(record, tail, 8, torch.device("cpu"), torch.bfloat16, num_threads, compiled=False)


@pytest.mark.gpu
@pytest.mark.benchmark(group="tails, GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("batch", [1, 8, 256], ids=["b1", "b8", "b256"])
@pytest.mark.parametrize("tail", RESNET_TAILS, ids=IDS)
def test_gpu_tail(record: Record, tail: RealTail, batch: int, dtype: torch.dtype) -> None:
    run(record, tail, batch, torch.device("cuda"), dtype, None, compiled=True)
