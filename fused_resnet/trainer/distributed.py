"""The few things training needs to know about its process group; one process without torchrun is a group of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Group:
    """This process among those that torchrun started."""

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.world > 1

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every process, in rank order, on every process."""
        if not self.distributed:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes."""
        if self.distributed:
            torch.distributed.all_reduce(values)
        return values

    def wrap(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        """``model`` with synchronised BN, and what to call: the same with averaged gradients.

        Both are ``model`` itself where there is one process.
        """
        if not self.distributed:
            return model, model
        ids = [self.device.index] if self.device.type == "cuda" else None
        parallel = nn.parallel.DistributedDataParallel(model, device_ids=ids)
        # Converted after wrapping, which keeps parameters and buffers: DistributedDataParallel refuses
        # SyncBatchNorm on CPUs, where nn.SyncBatchNorm itself cannot run but the fused passes can.
        return nn.SyncBatchNorm.convert_sync_batchnorm(model), parallel


@contextmanager
def process_group(device: str) -> Iterator[Group]:
    """Join the group that torchrun describes in the environment (nccl on GPUs, gloo on CPUs), and leave it."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if where.type == "cuda":
        torch.cuda.set_device(where)
    joined = world > 1 and not torch.distributed.is_initialized()
    if joined:
        torch.distributed.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield Group(rank, world, where)
    finally:
        if joined:
            torch.distributed.destroy_process_group()
