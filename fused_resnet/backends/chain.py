"""Several convolutions in one call of the extension, for a caller that knows that nothing else has changed.

A chain is made of what :func:`fused_resnet.backends.cpu.links` says about the calls that it stands for. It computes
what they compute, kernel by kernel; what it saves is everything between the kernels.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import ConvBN
from . import packing

#: In place of the number of a link: the chain's input, nothing, its second input. As in csrc/cpu/chain.cpp.
INPUT, NOTHING, ADDED = -1, -2, -3
#: What is kept of a weight, in the order of enum WeightKind in csrc/cpu/kernel_choice.h.
WEIGHT_KINDS = ("whole", "fresh", "split", "fresh split", "split rows")


class Link(NamedTuple):
    """One convolution: what it reads and adds (links by number), and how it is computed."""

    source: int
    residual: int
    m: int
    weights: str
    conv: ConvBN
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    activation: int
    key: Any
    """Under which :mod:`packing` keeps the copy, and what makes it."""
    pack: Callable[[Tensor, Any], Tensor]
    pool: tuple[int, ...] = (0,) * 6
    """Window, stride and padding of the max pool behind it; zeros without one."""


class Chain:
    """The convolutions of ``links`` in one call: ``chain(x)``, or None once a weight is not what it was.

    x is of any strides, as long as they are always the same.
    """

    def __init__(self, x: Tensor, links: Sequence[Link]) -> None:
        self._convert = not is_dense(x)
        self.program = program(links)
        self.versions: list[tuple[Tensor, int]] = []
        self.tensors: list[Tensor] = []
        for link in links:
            weight = link.conv.weight
            # Before the copy is looked at: a write that comes in between makes the version false, not the copy true.
            version = -1 if weight.is_inference() else weight._version
            self.tensors += operands(link.conv, link.key, link.pack)
            if version >= 0:
                self.versions.append((weight, version))
        # One attribute less on each call than OpOverload.__call__, which does nothing else.
        self._op: Any = torch.ops.fused_resnet_C.conv_chain.default._op

    def __call__(self, x: Tensor) -> Tensor | None:
        for weight, version in self.versions:
            if weight._version != version:
                return None
        if self._convert:
            x = x.contiguous(memory_format=torch.channels_last)
        y: Tensor | None = self._op(x, self.tensors, self.program)
        return y


def is_dense(t: Tensor) -> bool:
    """Whether the kernels read ``t`` as it is."""
    return t.is_contiguous(memory_format=torch.channels_last)


def operands(conv: ConvBN, key: Any, pack: Callable[[Tensor, Any], Tensor]) -> list[Tensor]:
    """What ``conv_chain`` wants of a link: its packed weight, the samples, the weight and the vectors there are."""
    weight, *vectors, _ = conv
    return [*packing.sampled(weight, key, pack), weight, *[v for v in vectors if v is not None]]


def program(links: Sequence[Link]) -> Tensor:
    """``links`` as ``conv_chain`` reads them."""
    return torch.tensor([_row(link) for link in links], dtype=torch.int64, device="cpu")


def _row(link: Link) -> list[int]:
    """``struct Link`` of csrc/cpu/chain.cpp."""
    weight, *vectors = link.conv[:6]
    assert isinstance(weight, Tensor)
    k, _, r, s = weight.shape
    present = sum((vector is not None) << place for place, vector in enumerate(vectors))
    (eps,) = struct.unpack("q", struct.pack("d", link.conv.eps))
    return [
        link.source, link.residual, link.m, WEIGHT_KINDS.index(link.weights), k, r, s, *link.stride, *link.padding,
        *link.dilation, link.activation, present, eps, *link.pool,
    ]  # fmt: skip
