"""What this machine can do at most, measured: the roof that fractions in the tables refer to."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fused_resnet.timing import threads


@dataclass(frozen=True)
class Peaks:
    """FLOP/s of a large matrix product and bytes/s of a large copy (read + write)."""

    flops: float
    bandwidth: float

    def bound(self, flops: float, moved_bytes: float) -> float:
        """The least seconds that work of this size takes without fewer multiplications than direct convolution's."""
        return max(flops / self.flops, moved_bytes / self.bandwidth)


@functools.cache
def measured(device: torch.device, dtype: torch.dtype, num_threads: int) -> Peaks:
    """Best of ten runs each, with the threads of the comparison."""
    on_gpu = device.type == "cuda"
    n = 8192 if on_gpu else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(run: Callable[[], object]) -> float:
        times = []
        for _ in range(10):
            if on_gpu:
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times)

    with threads(None if on_gpu else num_threads), torch.inference_mode():
        product = torch.empty(n, n, device=device, dtype=dtype)
        flops = 2 * n**3 / best(lambda: torch.mm(a, b, out=product))
        bandwidth = 2 * source.numel() / best(lambda: target.copy_(source))
    return Peaks(flops, bandwidth)
