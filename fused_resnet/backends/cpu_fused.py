"""Our own convolutions on the CPU: float32, one group, BN live, direct or Winograd.

Weights are packed, taken apart or transformed for them. Where the caller keeps such copies (``packed_weights``),
each call compares a checksum over the whole weight, on the way and at the speed of memory; a caller that keeps none
gets oneDNN's convolution and our pass over its output, since packing for one call costs more than it saves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.layout import output_memory_format
from ..core.packed_weights import PackedWeights
from ..core.reference import ConvBN, TailArguments
from .cpu_program import NOTHING, Link, Pool, input_number, pack_checked, program
from .cpu_rule import DIRECT, Algorithm

ACTIVATION_CODES = {"none": 0, "relu": 1, "relu6": 2}  # enum Activation in csrc/cpu/activation.h

_LARGEST_WINDOW = 8  # kMaxWindow in csrc/cpu/conv.h

#: How often copies of the weights are made before a call goes without: another thread may be writing to them.
_ATTEMPTS = 3

Runner = Callable[[TailArguments], Tensor]


class FusedConvolution:
    """Runs the calls of one signature, each as one ``conv_program``: two links where there is a projection.

    Args:
        otherwise: runs a call whose caller keeps no packed weights.
        algorithm, projection: the kernels of the convolution and of its projection.
        pool: the max pool of the result, in the same pass.
    """

    def __init__(
        self, otherwise: Runner, algorithm: Algorithm, projection: Algorithm = DIRECT, pool: Pool | None = None
    ) -> None:
        self.otherwise, self.algorithm, self.projection, self.pool = otherwise, algorithm, projection, pool
        self._program: Tensor | None = None
        self._pooled: dict[Pool, FusedConvolution] = {}

    def with_max_pool(self, pool: Pool) -> FusedConvolution | None:
        """The same with the max pool of its result in one pass; None where there is no kernel for that."""
        if self.algorithm.m != 0 or not can_pool(pool):
            return None
        if pool not in self._pooled:
            self._pooled[pool] = FusedConvolution(self.otherwise, DIRECT, pool=pool)
        return self._pooled[pool]

    def __call__(self, tail: TailArguments) -> Tensor:
        kept = tail.packed_weights
        if kept is None:
            return self._unfused(tail)
        inputs = [tail.x.contiguous(memory_format=torch.channels_last)]
        added = tail.residual if tail.proj_x is None else tail.proj_x
        if added is not None:
            inputs.append(added.to(torch.float32).contiguous(memory_format=torch.channels_last))
        if self._program is None:
            *others, last = self.links(tail, input_number(0), input_number(1), 0)
            self._program = program([*others, last._replace(returned=True)])
        for _ in range(_ATTEMPTS):
            operands = [] if tail.proj is None else _operands(tail.proj, self.projection, kept)
            operands += _operands(tail.conv, self.algorithm, kept)
            outputs = torch.ops.fused_resnet_C.conv_program.default(inputs, operands, self._program, kept.checked)
            if outputs:
                y: Tensor = outputs[0]
                return y.contiguous(memory_format=output_memory_format(tail.x, tail.conv.weight))
            kept.drop(tail.conv.weight, self.algorithm)
            if tail.proj is not None:
                kept.drop(tail.proj.weight, self.projection)
        return self._unfused(tail)

    def _unfused(self, tail: TailArguments) -> Tensor:
        y = self.otherwise(tail)
        return y if self.pool is None else F.max_pool2d(y, *self.pool)

    def links(self, tail: TailArguments, source: int, residual: int, number: int) -> list[Link]:
        """The convolutions of ``tail``, the first of them link ``number``.

        ``source`` and ``residual`` say where x and what is added come from (with a projection: its input).
        """
        found = []
        if tail.proj is not None:
            found.append(Link(residual, NOTHING, self.projection, tail.proj, tail.proj_stride, (0, 0), (1, 1), 0))
            residual = number
        elif tail.residual is None:
            residual = NOTHING
        geometry = (tail.stride, tail.padding, tail.dilation)
        code = ACTIVATION_CODES[tail.activation]
        return [*found, Link(source, residual, self.algorithm, tail.conv, *geometry, code, self.pool)]


class FewChannels:
    """A convolution that has a kernel of ours only together with its max pool: the stem of a network."""

    def __init__(self, otherwise: Runner, algorithm: Algorithm) -> None:
        self._otherwise, self._algorithm = otherwise, algorithm
        self._pooled: dict[Pool, FusedConvolution] = {}

    def __call__(self, tail: TailArguments) -> Tensor:
        return self._otherwise(tail)

    def with_max_pool(self, pool: Pool) -> FusedConvolution | None:
        """As :meth:`FusedConvolution.with_max_pool`."""
        if can_pool(pool) and pool not in self._pooled:
            self._pooled[pool] = FusedConvolution(self._otherwise, self._algorithm, pool=pool)
        return self._pooled.get(pool)


def can_pool(pool: Pool) -> bool:
    """Whether the kernels have this max pool."""
    (height, width), _, padding = pool
    return height <= _LARGEST_WINDOW and 2 * padding[0] <= height and 2 * padding[1] <= width


def with_max_pool(run: Runner, pool: Pool) -> Runner:
    """``run``, then the max pool of its result: one pass where there is a kernel for both."""
    pooled = run.with_max_pool(pool) if isinstance(run, (FusedConvolution, FewChannels)) else None
    return pooled or (lambda tail: F.max_pool2d(run(tail), *pool))


def _operands(conv: ConvBN, algorithm: Algorithm, kept: PackedWeights) -> list[Tensor]:
    """What ``conv_program`` wants of one convolution, its packed weight first."""
    weight = conv.weight
    packed = kept.find(weight, algorithm, lambda: pack_checked(weight, algorithm))
    vectors = [vector for vector in conv[1:6] if isinstance(vector, Tensor)]
    return [packed.value, packed.checksum, weight, *vectors] if kept.checked else [packed.value, *vectors]
