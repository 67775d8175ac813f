"""Launching the training convolution: tensors to kernel arguments, records and counters."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..core.layout import output_memory_format
from ..core.problem import Problem
from .arguments import StatsTensors
from .bn_launch import tickets
from .config import TailConfig, stats_candidates
from .conv_bn_stats import conv_bn_stats_kernel, conv_bn_stats_tma_kernel
from .launch import INTERPRETING, capability, channels_last, described, persistent_programs, sm_count, vector
from .plan import TailPlan, plan


@lru_cache(maxsize=1024)
def planned(
    problem: Problem, device: torch.device, arch: int, config: TailConfig | None
) -> tuple[TailConfig, TailPlan]:
    """The configuration for `problem` on `device`, of compute capability `arch`, and its launch."""
    if config is None:
        config = stats_candidates(problem, arch, sm_count(device))[0]
    return config, plan(problem, config, persistent_programs(problem, config, device), INTERPRETING)


def scratch_words(tail_plan: TailPlan, k: int) -> tuple[int, int]:
    """32-bit words of the records and of the counters."""
    columns = -(-k // tail_plan.tile.n)
    rows = tail_plan.tiles // columns
    groups = -(-rows // tail_plan.tile.stats_group)
    return columns * (rows + groups) * tail_plan.tile.record, columns * (groups + 1)


def scratch(device: torch.device, records: int, counters: int) -> tuple[Tensor, Tensor]:
    """The records, with any content, and the counters, which are zero before and after a launch."""
    return torch.empty(records, dtype=torch.float32, device=device), tickets(device, counters)


def stats_sizes(tail_plan: TailPlan) -> tuple[int, ...]:
    """The kernel's run-time numbers: the tail's without the projection's, of which it has none."""
    return tail_plan.sizes if tail_plan.descriptors else tail_plan.sizes[:5]


def conv_bn_stats(
    problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None, config: TailConfig | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``y = conv2d(x)`` in eager's memory format, mean and biased variance of every channel of it, float32."""
    device = x.device
    config, tail_plan = planned(problem, device, capability(device), config)
    memory_format = output_memory_format(x, weight)
    x, weight = channels_last(x), channels_last(weight)
    y = torch.empty(problem.output_shape, dtype=problem.dtype, device=device, memory_format=torch.channels_last)
    mean, var = (torch.empty(problem.k, dtype=torch.float32, device=device) for _ in range(2))
    stats = StatsTensors(mean, var, *scratch(device, *scratch_words(tail_plan, problem.k)))
    kernel, operands = conv_bn_stats_kernel, (x, weight)
    if config.tma:
        kernel = conv_bn_stats_tma_kernel
        operands = tuple(described(t, d) for t, d in zip(operands, tail_plan.descriptors, strict=True))
    kernel[tail_plan.grid](
        *operands, y, vector(bias), stats, *stats_sizes(tail_plan), tail_plan.conv, tail_plan.tile,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y.contiguous(memory_format=memory_format), mean, var
