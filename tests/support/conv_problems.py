"""Problems for the CPU convolution kernels, as text, and what all of those kernels are held to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Every remainder of lanes (4, 8, 16), panels (8, 16, 32) and tiles (2, 4) in C, K, P and Q; more tiles than a register
# block has rows; several blocks; padding that reaches beyond the filter; one pixel.
WINOGRAD_PROBLEMS = [
    "n=1,h=1,w=1,c=1,k=1,padding=1,residual=1",
    "n=2,h=5,w=6,c=3,k=5,padding=1,residual=1",
    "n=1,h=7,w=7,c=17,k=33,padding=1,residual=1",
    "n=3,h=9,w=4,c=20,k=12,padding=0,residual=1",
    "n=1,h=3,w=8,c=15,k=31,padding=2,residual=1",
    "n=1,h=6,w=5,c=8,k=16,padding=3:0,residual=1",
    "n=2,h=30,w=29,c=16,k=32,padding=1,residual=1",
    "n=1,h=12,w=13,c=70,k=100,padding=1,residual=0",
    "n=1,h=8,w=8,c=33,k=40,padding=1,residual=1,activation=relu6",
    "n=1,h=8,w=8,c=33,k=40,padding=1,residual=1,activation=none,bn=0,bias=1",
    "n=1,h=8,w=8,c=33,k=40,padding=1,residual=0,activation=none,bn=1,bias=1",
    "n=1,h=9,w=11,c=200,k=70,padding=1,residual=1",  # several slabs of fresh weights, the last one short
]
DIRECT_PROBLEMS = [
    *WINOGRAD_PROBLEMS,
    "n=2,h=9,w=7,c=19,k=37,r=1,residual=1",
    "n=2,h=9,w=7,c=32,k=64,r=1,stride=2,residual=1",
    "n=1,h=21,w=19,c=3,k=16,r=7,stride=2,padding=3",
    "n=1,h=13,w=11,c=16,k=24,stride=2:1,padding=2:1,dilation=1:2,residual=1",
    "n=1,h=9,w=10,c=48,k=24,r=3,s=1,padding=1:0,residual=1",
    "n=1,h=9,w=10,c=12,k=20,r=5,s=2,stride=3,padding=4,residual=1",
    # 33 to 64 positions, which fresh bf16x3 weights pass once: many steps, one step, a last panel of few channels
    "n=1,h=7,w=7,c=600,k=40,r=1,residual=1",
    "n=1,h=6,w=8,c=8,k=20,r=1,residual=1",
    "n=1,h=5,w=9,c=40,k=81,r=3,padding=1,activation=relu6",
    # images side by side in strips, where that throws fewer positions away: one strip, a strip that is not full, with
    # a stride, with a dilation, with a filter that needs no zeros
    "n=9,h=7,w=7,c=40,k=33,padding=1,residual=1",
    "n=11,h=6,w=14,c=8,k=20,padding=1,residual=1",
    "n=5,h=9,w=8,c=8,k=20,stride=2,padding=1,residual=1",
    "n=4,h=9,w=9,c=4,k=8,padding=2:1,dilation=2:1,residual=1",
    "n=3,h=6,w=7,c=8,k=20,padding=0,residual=1",
    # weights beyond the second-level cache, in slabs: sums of all panels wait; a last panel of two channels
    "n=3,h=9,w=9,c=320,k=130,padding=1,residual=1",
]
#: Of real networks.
REAL = ["n=1,h=28,w=28,c=128,k=128,padding=1,residual=1", "n=2,h=14,w=14,c=256,k=256,padding=1,residual=1",
        "n=1,h=56,w=56,c=64,k=64,padding=1,residual=1", "n=1,h=7,w=7,c=512,k=512,padding=1,residual=1"]  # fmt: skip


def assert_threads_change_nothing(compute: Callable[[], list[Tensor]]) -> None:
    """``compute`` must give the same bits with any number of threads."""
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(compute())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
