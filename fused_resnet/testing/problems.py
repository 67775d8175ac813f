"""The one list of problems, each with the reason why it is in the list.

Small on purpose: the whole list takes seconds on a CPU. ``PROBLEMS`` is in float32; :func:`in_dtype` turns one
into another dtype. The tails of the real networks, for benchmarks, are in :data:`RESNET_TAILS`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from ..core.problem import Problem, Projection


class Case(NamedTuple):
    """A problem and what only it would catch."""

    name: str
    problem: Problem
    reason: str


def _case(name: str, text: str, reason: str) -> Case:
    return Case(name, Problem.parse(text), reason)


PROBLEMS: tuple[Case, ...] = (
    _case("aligned", "n=2,h=8,w=8,c=32,k=64,padding=1,residual=1", "the easy case: every size a power of two"),
    _case("odd", "n=2,h=9,w=7,c=33,k=37,padding=1,residual=1", "no size is a multiple of any tile or vector"),
    _case("no_residual", "n=1,h=9,w=9,c=24,k=40,padding=1", "conv-BN-ReLU: the residual pointer is null"),
    _case("no_relu", "n=1,h=7,w=9,c=20,k=24,padding=1,residual=1,relu=0", "ReLU would hide negative and NaN results"),
    _case("relu6", "n=1,h=8,w=8,c=16,k=16,padding=1,residual=1,activation=relu6", "an activation with two corners"),
    _case("no_bn", "n=1,h=8,w=8,c=16,k=24,padding=1,residual=1,bn=0,bias=1", "scale is 1, shift is the bias"),
    _case("bare", "n=1,h=6,w=6,c=8,k=8,padding=1,bn=0,relu=0", "plain convolution: every epilogue option off"),
    _case("bias_bn", "n=1,h=8,w=8,c=16,k=24,padding=1,residual=1,bias=1", "bias enters shift scaled by gamma/std"),
    _case("1x1", "n=2,h=7,w=7,c=40,k=72,r=1,residual=1", "the bottleneck's tail: no halo, K-loop over channels only"),
    _case("1x1_stride2", "n=1,h=9,w=9,c=24,k=32,r=1,stride=2,residual=1", "1x1 that skips pixels"),
    _case("stride2", "n=1,h=11,w=10,c=20,k=28,stride=2,padding=1,residual=1", "rows and columns of odd and even size"),
    _case("stem", "n=1,h=21,w=19,c=3,k=16,r=7,stride=2,padding=3", "3 channels: narrower than any vector load"),
    _case("5x5", "n=1,h=9,w=9,c=12,k=20,r=5,padding=2,residual=1", "25 taps: a halo wider than one pixel"),
    _case("3x1", "n=1,h=8,w=10,c=16,k=16,r=3,s=1,padding=1:0,residual=1", "R != S and asymmetric padding"),
    _case("1x3", "n=1,h=8,w=10,c=16,k=16,r=1,s=3,padding=0:1,residual=1", "the transpose of 3x1: catches swapped axes"),
    _case("asymmetric", "n=1,h=13,w=11,c=16,k=24,stride=2:1,padding=2:1,dilation=1:2,residual=1",
          "height and width differ in stride, padding and dilation"),
    _case("dilation2", "n=1,h=12,w=12,c=16,k=24,padding=2,dilation=2,residual=1", "segmentation backbones"),
    _case("no_padding", "n=1,h=9,w=8,c=16,k=24,residual=1", "an output smaller than the input"),
    _case("wide_padding", "n=1,h=4,w=4,c=8,k=8,padding=3,residual=1", "rows whose taps are all outside the input"),
    _case("1x1_pixel", "n=3,h=1,w=1,c=48,k=32,padding=1,residual=1", "1x1 spatial: only the centre tap is valid"),
    _case("7x7_pixels", "n=1,h=7,w=7,c=96,k=128,padding=1,residual=1", "49 pixels, deep sum: split-K territory"),
    _case("one_channel", "n=2,h=6,w=6,c=1,k=1,padding=1,residual=1", "C = K = 1: NHWC and NCHW strides coincide"),
    _case("k_tail", "n=1,h=6,w=6,c=16,k=7,padding=1,residual=1", "K below the smallest tile and odd"),
    _case("c_tail", "n=1,h=6,w=6,c=10,k=16,padding=1,residual=1", "C even, yet no multiple of 8"),
    _case("many_images", "n=9,h=3,w=3,c=16,k=16,padding=1,residual=1", "a tile of pixels spans several images"),
    _case("empty_batch", "n=0,h=8,w=8,c=16,k=16,padding=1,residual=1", "nothing to do must not launch or crash"),
    _case("groups", "n=1,h=8,w=8,c=32,k=32,groups=4,padding=1,residual=1", "ResNeXt: run or refused with a sentence"),
    _case("projection", "n=2,h=9,w=9,c=24,k=32,padding=1,proj=16x17x17x2", "a downsampling block's tail"),
    _case("projection_odd", "n=1,h=7,w=5,c=17,k=19,padding=1,proj=11x14x10x2,bias=1,proj_bias=1",
          "projection with odd C, even input size and biases"),
    _case("projection_1x1", "n=1,h=7,w=7,c=32,k=48,r=1,proj=24x7x7x1", "a bottleneck's first tail: stride 1"),
    _case("projection_no_bn", "n=1,h=6,w=6,c=16,k=16,padding=1,proj=8x6x6x1,proj_bn=0,proj_bias=1",
          "Keras-style shortcut: a biased convolution without BN"),
)  # fmt: skip


#: What only kernels that load through tensor descriptors take (C is a multiple of 64): boxes of pixels that do not
#: fill the image, tails of filters, every way to build a descriptor.
DESCRIBED: tuple[Case, ...] = (
    _case("described_3x3", "n=3,h=9,w=7,c=64,k=37,padding=1,residual=1,relu=0", "boxes of pixels that overhang"),
    _case("described_1x1", "n=3,h=9,w=7,c=128,k=70,r=1,residual=1,relu=0", "boxes of one long row"),
    _case("described_1x1_stride2", "n=2,h=9,w=7,c=64,k=40,r=1,stride=2:1,residual=1,relu=0", "pixels left out"),
    _case("described_dilation", "n=2,h=9,w=11,c=64,k=40,r=3,s=5,padding=2:1,dilation=2:1,relu=0", "taps far apart"),
    _case("described_projection", "n=2,h=9,w=7,c=64,k=40,padding=1,proj=64x17x13x2,relu=0", "a strided second pair"),
    _case("described_projection_1x1", "n=2,h=5,w=7,c=64,k=40,r=1,proj=128x5x7x1,relu=0", "rows of both pairs"),
)  # fmt: skip


def in_dtype(problem: Problem, dtype: torch.dtype, residual: torch.dtype | None = None, **changes: object) -> Problem:
    """``problem`` in another dtype; ``residual`` is the residual's dtype where there is one (default: ``dtype``)."""
    new_residual = None if problem.residual is None else (residual or dtype)
    return dataclasses.replace(problem, dtype=dtype, residual=new_residual, **changes)  # type: ignore[arg-type]


class RealTail(NamedTuple):
    """A tail as it stands in a torchvision ResNet at 224x224; ``blocks`` blocks have it."""

    network: str
    stage: str
    problem: Problem
    blocks: int


def _real_tails() -> tuple[RealTail, ...]:
    tails: list[RealTail] = []
    sides, basic, deep = (56, 28, 14, 7), (2, 2, 2, 2), (3, 4, 6, 3)
    for i, side in enumerate(sides):
        width = 64 * 2**i
        plain = Problem(1, side, side, width, width, 3, 3, padding=(1, 1), residual=torch.float32)
        projected = 0 if i == 0 else 1
        tails.append(RealTail("resnet18", f"layer{i + 1}", plain, basic[i] - projected))
        if projected:
            proj = Projection(width // 2, 2 * side, 2 * side, (2, 2), bias=False, bn=True)
            tails.append(RealTail("resnet18", f"layer{i + 1}.0",
                                  dataclasses.replace(plain, residual=None, projection=proj), 1))  # fmt: skip
    for i, side in enumerate(sides):
        width = 64 * 2**i
        plain = Problem(1, side, side, width, 4 * width, 1, 1, residual=torch.float32)
        tails.append(RealTail("resnet50", f"layer{i + 1}", plain, deep[i] - 1))
        stride = 1 if i == 0 else 2
        proj_c = 64 if i == 0 else 2 * width
        proj = Projection(proj_c, side * stride, side * stride, (stride, stride), bias=False, bn=True)
        tails.append(RealTail("resnet50", f"layer{i + 1}.0",
                              dataclasses.replace(plain, residual=None, projection=proj), 1))  # fmt: skip
    return tuple(tails)


#: Every residual tail of ResNet-18 and ResNet-50 at 224x224 and batch 1 (``dataclasses.replace(p, n=...)``).
RESNET_TAILS: tuple[RealTail, ...] = _real_tails()
