"""The tail as a textbook computes it in float32: BN folded into the weights, all products added up one after another.

It is the yardstick beside eager for implementations that leave the order of their sums to a library. Eager alone will
not do for them: it calls the same library, which takes other kernels for other shapes, layouts and processors, and
some of those sum in blocks. Its error on one processor can then be a fraction of its error on the next.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.reference import ACTIVATIONS, ConvBN, TailArguments, scale_shift


def in_one_accumulator(tail: TailArguments) -> Tensor:
    """``tail`` with one rounding to float32 per folded weight and per multiply-add: the same bits on every processor.

    With u = 2^-24, an output's products a_1 .. a_n and S_j, what the accumulator holds after j of them, the error is

        sum_j a_j eta_j + sum_j S_j delta_j,    |eta_j|, |delta_j| <= u,

    the eta_j from the weights, rounded once more when BN's scale is folded into them, the delta_j from the
    multiply-adds (Higham, Accuracy and Stability of Numerical Algorithms, chapters 2 and 4). For products of both signs
    S_j grows as sqrt(j): the first sum is about u sqrt(sum a^2), the second sqrt(n / 2) times as large. Partial sums
    over parts of the products are shorter runs with smaller S_j, so no other way to add them up has a larger error to
    be expected; shift and residual come first, where all later roundings carry them. How far the largest error of two
    samples of one distribution may differ is what the bar's factor of two is for.
    """
    residual = tail.residual
    if tail.proj is not None and tail.proj_x is not None:
        shortcut = TailArguments(tail.proj_x, tail.proj, stride=tail.proj_stride, activation="none")
        residual = in_one_accumulator(shortcut)
    y = _sum(tail, tail.conv, residual)
    return ACTIVATIONS[tail.activation](y)


def _sum(tail: TailArguments, conv: ConvBN, residual: Tensor | None) -> Tensor:
    scale, shift = scale_shift(conv, torch.float64)
    weight = conv.weight.double() if scale is None else conv.weight.double() * scale[:, None, None, None]
    k, c, r, s = weight.shape
    n, groups = tail.x.shape[0], tail.groups
    factors = weight.float().double().reshape(groups, k // groups, c * r * s, 1)
    p, q = (
        (size + 2 * pad - step * (window - 1) - 1) // stride + 1
        for size, pad, step, window, stride in zip(
            tail.x.shape[2:], tail.padding, tail.dilation, (r, s), tail.stride, strict=True
        )
    )
    if n == 0:
        return tail.x.new_empty((0, k, p, q))
    inputs = F.unfold(tail.x.double(), (r, s), tail.dilation, tail.padding, tail.stride)
    inputs = inputs.reshape(n, groups, 1, c * r * s, p * q)
    total = torch.zeros(n, k, p, q)
    if shift is not None:
        total += shift.float().reshape(1, k, 1, 1)
    if residual is not None:
        total += residual
    total = total.reshape(n, groups, k // groups, p * q)
    for j in range(c * r * s):
        # a product of two float32 is exact in float64, so that float32 is rounded to once, as by a fused multiply-add
        total = (total + inputs[:, :, :, j] * factors[:, :, j]).float()
    return total.reshape(n, k, p, q)
