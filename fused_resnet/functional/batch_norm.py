"""The statistics that normalise a training tail: of the batch, of all ranks' batches, or the running ones."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..core.training_call import accumulate_dtype
from ..ops import training as _training  # noqa: F401  (registers the operators)


class BatchNormBranch(NamedTuple):
    """A convolution's output and the BN after it.

    ``momentum`` is the weight of the new statistics in the running ones. With ``training=False`` the running
    statistics normalise (frozen BN) and no gradient flows through them. ``group`` is the name of the process
    group over which the batch statistics are synchronised, None for local statistics. ``batch`` holds the local
    statistics where the convolution has left them behind; they are taken of ``y`` otherwise.
    """

    y: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    momentum: float = 0.1
    eps: float = 1e-5
    training: bool = True
    group: str | None = None
    batch: tuple[Tensor, Tensor] | None = None  # mean and biased variance of y


class Statistics(NamedTuple):
    """What normalises one branch."""

    mean: Tensor  # [C]
    invstd: Tensor  # [C]
    total: Tensor | None = None  # elements per channel over all ranks, where the statistics are synchronised


def _merge_over_group(mean: Tensor, var: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count over all ranks, merged in rank order in float64.

    Ranks may hold batches of different sizes, so the counts travel with the statistics.
    """
    from torch.distributed import _functional_collectives as funcol

    packed = torch.cat([mean.double(), var.double(), mean.new_full((1,), count, dtype=torch.float64)])
    # torch 2.14 renamed all_gather_tensor and warns about the old name
    all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
    gathered = funcol.wait_tensor(all_gather(packed.unsqueeze(0), 0, cast(Any, group)))
    channels = mean.shape[0]
    means, variances, counts = gathered[:, :channels], gathered[:, channels:-1], gathered[:, -1:]
    total = counts.sum()
    merged_mean = (counts * means).sum(0) / total
    merged_m2 = (counts * (variances + (means - merged_mean) ** 2)).sum(0)
    return merged_mean.to(mean.dtype), (merged_m2 / total).to(var.dtype), total


def _update_running(branch: BatchNormBranch, mean: Tensor, var: Tensor, count: Tensor | int) -> None:
    """``running = (1 - momentum) * running + momentum * new``, the variance unbiased, as nn.BatchNorm2d."""
    if branch.running_mean is None or branch.running_var is None:
        return
    for running, new in ((branch.running_mean, mean), (branch.running_var, var * (count / (count - 1)))):
        running.mul_(1 - branch.momentum).add_(new.to(running.dtype), alpha=branch.momentum)


def statistics(branch: BatchNormBranch, backend: str) -> Statistics:
    """What normalises ``branch``; updates its running statistics where it trains."""
    y = branch.y.detach()
    acc = accumulate_dtype(y.dtype)
    if not branch.training:
        if branch.running_mean is None or branch.running_var is None:
            raise ValueError("running_mean and running_var: expected tensors where training is False, got None")
        # Copies: the running statistics may be written to before the backward runs.
        mean, var = branch.running_mean.detach().to(acc, copy=True), branch.running_var.detach().to(acc)
        return Statistics(mean, torch.rsqrt(var + branch.eps))
    count = y.shape[0] * y.shape[2] * y.shape[3]
    if count == 1 and branch.group is None:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.shape}")
    mean, var = torch.ops.fused_resnet.bn_stats(y, backend) if branch.batch is None else branch.batch
    if branch.group is None:
        _update_running(branch, mean, var, count)
        return Statistics(mean, torch.rsqrt(var + branch.eps))
    mean, var, total = _merge_over_group(mean, var, count, branch.group)
    _update_running(branch, mean, var, total)
    return Statistics(mean, torch.rsqrt(var + branch.eps), total)
