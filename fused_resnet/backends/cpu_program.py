"""Convolutions as the extension's ``conv_program`` reads them: rows of numbers, and the tensors they name."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.packed_weights import Packed
from ..core.reference import ConvBN
from .cpu_rule import Algorithm

#: In place of the number of a link, as in csrc/cpu/conv_program.cpp.
NOTHING = -1
#: What is kept of a weight, in the order of enum WeightKind in csrc/cpu/kernel_choice.h.
WEIGHT_KINDS = ("whole", "fresh", "bf16x3", "fresh bf16x3", "bf16x3 stem", "bf16")

#: Window, stride and padding of a max pool, two numbers each.
Pool = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def input_number(place: int) -> int:
    """What stands for an input of the program in place of the number of a link."""
    return -2 - place


class Link(NamedTuple):
    """One convolution: what it reads and adds (links by number), and how it is computed."""

    source: int
    residual: int
    algorithm: Algorithm
    conv: ConvBN
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    activation: int
    pool: Pool | None = None
    returned: bool = False

    def row(self) -> list[int]:
        """``struct Link`` of csrc/cpu/conv_program.cpp."""
        k, _, r, s = self.conv.weight.shape
        present = sum((vector is not None) << place for place, vector in enumerate(self.conv[1:6]))
        (eps,) = struct.unpack("q", struct.pack("d", self.conv.eps))
        pool = (0,) * 6 if self.pool is None else sum(self.pool, ())
        return [
            self.source, self.residual, self.algorithm.m, WEIGHT_KINDS.index(self.algorithm.weights), k, r, s,
            *self.stride, *self.padding, *self.dilation, self.activation, present, eps, *pool, int(self.returned),
        ]  # fmt: skip


def program(links: Sequence[Link]) -> Tensor:
    """``links`` as ``conv_program`` reads them."""
    return torch.tensor([link.row() for link in links], dtype=torch.int64, device="cpu")


def pack(weight: Tensor, algorithm: Algorithm) -> Tensor:
    """The copy of ``weight`` in the order in which ``algorithm`` reads it."""
    values = weight.detach().float()  # of bfloat16: "bf16" rounds them back to what they were
    packed: Tensor = torch.ops.fused_resnet_C.conv_pack.default(values, algorithm.m, "", algorithm.weights)
    return packed


def pack_checked(weight: Tensor, algorithm: Algorithm) -> Packed:
    """The same with the checksum of the weight."""
    # The checksum first: a write that comes in between must make the copy stale, not true.
    checksum = torch.ops.fused_resnet_C.checksum.default([weight.detach()])
    return Packed(pack(weight, algorithm), checksum)
