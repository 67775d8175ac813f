"""oneDNN's convolutions on the CPU, with BN, residual and activation as near to them as it allows.

``run_pass``: eager's convolution, then one pass of our own over its output. BN is live.
``run_folded``: the scale is folded into the weights; oneDNN adds bias and residual before its only rounding, and the
activation follows in place. It is never oneDNN's own: its ReLU turns NaN into 0, and a model that has diverged would
look healthy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import extensions
from ..core.convolution import conv2d, pad_width
from ..core.layout import output_memory_format
from ..core.packed_weights import Packed, PackedWeights
from ..core.reference import ConvBN, TailArguments, scale_shift
from .cpu_fused import ACTIVATION_CODES


def run_pass(tail: TailArguments) -> Tensor:
    """oneDNN's convolution, then scale, shift, residual and activation in one pass."""
    memory_format = output_memory_format(tail.x, tail.conv.weight)
    conv = tail.conv
    x = tail.x.contiguous(memory_format=memory_format)
    y = conv2d(x, conv.weight, None, tail.stride, tail.padding, tail.dilation, tail.groups)
    y = y.contiguous(memory_format=memory_format)
    torch.ops.fused_resnet_C.scale_shift_add_act_.default(
        y, *conv[1:], _residual(tail, memory_format), ACTIVATION_CODES[tail.activation]
    )
    return y


def run_folded(tail: TailArguments) -> Tensor:
    """One oneDNN convolution with folded weights, then the activation."""
    memory_format = output_memory_format(tail.x, tail.conv.weight)
    residual = _residual(tail, torch.channels_last)
    y = _folded_conv(tail, tail.x, tail.conv, tail.stride, tail.padding, tail.dilation, tail.groups, residual)
    if tail.activation == "relu":
        y = y.relu_()
    elif tail.activation == "relu6":
        y = y.clamp_(0, 6)
    return y.contiguous(memory_format=memory_format)


def fold(conv: ConvBN) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the one convolution that does the work of ``conv`` and its BN.

    Scaled in float64 and rounded once. The bias has the dtype of the weight, as oneDNN wants it.
    """
    scale, shift = scale_shift(conv, torch.float64)
    weight = conv.weight.detach()
    if scale is not None:
        weight = (weight * scale.detach()[:, None, None, None]).to(weight.dtype)
    return weight, None if shift is None else shift.detach().to(weight.dtype)


def _folded_conv(
    tail: TailArguments,
    x: Tensor,
    conv: ConvBN,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    residual: Tensor | None,
) -> Tensor:
    """``BN(conv2d(x)) + residual`` by one oneDNN primitive, channels_last, rounded once.

    Always in channels_last, and grouped convolutions with oneDNN's in-place sum on a copy of the residual: its other
    combinations round bfloat16 before they add (seen in oneDNN 3.12 with plain NCHW, and with groups of 16 channels).
    Torch 2.11 knows no other sum either ("could not create a memory") of a residual whose strides fit both formats:
    one of a single channel or pixel.
    """
    x, padding = pad_width(x, conv.weight.shape[3], padding, dilation)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = _folded_weight(conv, (stride, padding, dilation, groups), x, tail.packed_weights)
    arguments = (weight, bias, padding, stride, dilation, groups)
    if residual is None:
        y = torch.ops.mkldnn._convolution_pointwise.default(x, *arguments, "none", [], None)
    elif groups == 1 and not residual.is_contiguous():
        y = torch.ops.mkldnn._convolution_pointwise.binary(x, residual, *arguments, "add", 1.0, None, [], None)
    else:
        y = torch.ops.mkldnn._convolution_pointwise_.binary(residual.clone(), x, *arguments, "add", 1.0, None, [], None)
    return y.contiguous(memory_format=torch.channels_last)


def _folded_weight(conv: ConvBN, geometry: Any, x: Tensor, kept: PackedWeights | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, folded: kept in oneDNN's own order where what they were made from can be compared."""
    if kept is None or (kept.checked and extensions.cpu() is None):
        weight, bias = fold(conv)
        return weight.contiguous(memory_format=torch.channels_last), bias
    tensors = [t.detach() for t in conv[:6] if isinstance(t, Tensor)]
    key = ("folded", conv.eps, geometry, *(None if t is None else t.data_ptr() for t in conv[1:6]))

    def make() -> Packed:
        # The checksum first: a write that comes in between must make the copy stale, not true.
        checksum = _checksum(tensors, kept)
        weight, bias = fold(conv)
        stride, padding, dilation, groups = geometry
        arguments = (padding, stride, dilation, groups, list(x.shape))
        return Packed((torch.ops.mkldnn._reorder_convolution_weight(weight, *arguments), bias), checksum)

    with torch.no_grad():
        packed = kept.find(conv.weight, key, make)
        if kept.checked and not torch.equal(packed.checksum, _checksum(tensors, kept)):
            kept.drop(conv.weight, key)
            packed = kept.find(conv.weight, key, make)
    weight, bias = packed.value
    return weight, bias


def _checksum(tensors: list[Tensor], kept: PackedWeights) -> Tensor:
    if not kept.checked:
        return torch.empty(0)
    checksum: Tensor = torch.ops.fused_resnet_C.checksum.default(tensors)
    return checksum


def _residual(tail: TailArguments, memory_format: torch.memory_format) -> Tensor | None:
    """What is added, dense in ``memory_format`` and of x's dtype: the residual or the projection's output."""
    if tail.proj is not None and tail.proj_x is not None:
        y = _folded_conv(tail, tail.proj_x, tail.proj, tail.proj_stride, (0, 0), (1, 1), 1, None)
        return y.contiguous(memory_format=memory_format)
    if tail.residual is None:
        return None
    return tail.residual.to(tail.x.dtype).contiguous(memory_format=memory_format)
