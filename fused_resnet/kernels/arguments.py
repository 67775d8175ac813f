"""The kernels' arguments: what a launch fixes at compile time (Conv, Tile), and the tensors that travel together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Conv:
    """A convolution as the compiler sees it: everything but the image size, which stays a run-time number."""

    c: int
    k: int
    r: int = 1
    s: int = 1
    stride_h: int = 1
    stride_w: int = 1
    pad_h: int = 0
    pad_w: int = 0
    dil_h: int = 1
    dil_w: int = 1
    halo: str = "none"  # out-of-image taps: "none" there are, "bits" (one per pixel and tap), "compare" (in the loop)
    fuse_s: bool = False  # read the S taps of a filter row as one run of S*C channels: in NHWC memory they are one
    wide: bool = False  # pixel offsets inside a tile need 64 bits

    @property
    def run(self) -> int:
        """Contiguous channels behind one address of the K-loop."""
        return self.s * self.c if self.fuse_s else self.c

    @property
    def taps(self) -> int:
        """Such runs in one filter row."""
        return 1 if self.fuse_s else self.s

    def steps(self, block_k: int) -> int:
        """Length of the K-loop."""
        return self.r * self.taps * -(-self.run // block_k)


#: Tiles that split-K can count. Fixed, so that problems which share a workspace never write into each other's counters.
COUNTERS = 1024


#: Tiles of a column whose statistics are merged together before the groups are. Large batches have thousands of tiles:
#: with one merge, the last program would be alone on the device for as long as the convolution takes.
STATS_GROUP = 64


@dataclass(frozen=True)
class Tile:
    """One program's share of the output, and how it computes it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    precision: str  # of the dot: "tensor" (fp16, bf16), "tf32_rna", "ieee", or "upcast" (interpreter)
    activation: str = "relu"
    group_m: int = 8
    split_k: int = 1
    ordered: bool = True
    persistent: bool = False
    box: tuple[int, int, int] = (1, 1, 1)  # TMA: images, rows and columns of a tile's pixels, m in all

    @property
    def counters(self) -> int:
        """32-bit words at the start of the workspace that are counters."""
        return COUNTERS

    @property
    def lanes(self) -> int:
        """Length of the vectors in which scale and shift are computed: one filter a thread."""
        return max(self.n, 32 * self.warps)

    @property
    def lane_halvings(self) -> int:
        return (self.lanes // self.n).bit_length() - 1

    @property
    def halve_epilogue(self) -> bool:
        """From 128 accumulators a thread on, the whole tile's residual, scale and shift beside them would spill."""
        return self.m * self.n >= 128 * 32 * self.warps

    @property
    def record(self) -> int:
        """32-bit words of a tile's statistics: pivot, mean and M2 of n channels, and the count, in whole 16 bytes."""
        return 3 * self.n + 4

    @property
    def stats_group(self) -> int:
        return STATS_GROUP

    @property
    def stats_chunk(self) -> int:
        """Records merged at once: a field of them takes 32 registers of a thread at 4 warps."""
        return min(STATS_GROUP, 4096 // self.n)


class StatsTensors(NamedTuple):
    """Where a convolution with statistics leaves them, and what its programs share while they run."""

    mean: Any
    var: Any
    records: Any  # for each column of tiles the tiles' records, then the groups'; float32, any content
    counters: Any  # for each column of tiles one for its groups, then one for every group; zero, and left zero


class BatchNorm(NamedTuple):
    """The convolution's bias and the live BN behind it; None where a tensor is absent."""

    bias: Any
    gamma: Any
    beta: Any
    mean: Any
    var: Any
    eps: float
