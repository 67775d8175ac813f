"""What this machine can do at most, measured: the roof that fractions in the tables refer to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fused_resnet.core.timing import stopwatch, threads


@dataclass(frozen=True)
class Peaks:
    """FLOP/s of a large matrix product and bytes/s of a large copy (read + write)."""

    flops: float
    bandwidth: float

    def bound(self, flops: float, moved_bytes: float) -> float:
        """The least seconds that work of this size takes without fewer multiplications than direct convolution's."""
        return max(flops / self.flops, moved_bytes / self.bandwidth)


#: Side of the matrices, and bytes of the copy: each some milliseconds, and far more than any cache.
MATRIX = {"cpu": 2048, "cuda": 8192}
COPY = {"cpu": 256 << 20, "cuda": 2 << 30}


@functools.cache
def measured(device: torch.device, dtype: torch.dtype, num_threads: int) -> Peaks:
    """Best of ten runs each, with the threads of the comparison."""
    n, size = MATRIX[device.type], COPY[device.type]
    timer = stopwatch(device)

    def best(run: Callable[[], object]) -> float:
        return min(timer(run, ())[0] for _ in range(10))

    with threads(None if device.type == "cuda" else num_threads), torch.inference_mode():
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        product = torch.empty(n, n, device=device, dtype=dtype)
        flops = 2 * n**3 / best(lambda: torch.mm(a, b, out=product))
        source = torch.empty(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        bandwidth = 2 * size / best(lambda: target.copy_(source))
    return Peaks(flops, bandwidth)
