# mypy: allow-untyped-defs
"""The pass behind an unfused convolution: live BN, addition and activation of its output in one launch.

Where a rival's convolution is the faster one, this is what is left to fuse: three or four elementwise passes become
one. Over NHWC memory, [pixels, channels]; scale and shift are formed once for a tile of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..core.reference import ConvBN
from .arguments import BatchNorm
from .epilogue import activate, round_to

#: Elements of a tile: 16 for each of 128 threads, two 16-byte loads of float16.
TILE = 2048


@dataclass(frozen=True)
class Pass:
    """What a launch fixes at compile time."""

    channels: int
    block_p: int
    block_k: int
    activation: str
    precision: str  # "upcast" in the interpreter, see round_to
    second_norm: bool  # `second` has a BN of its own; Triton 3.6 cannot compare a tuple with None


@triton.jit
def channel_scale_shift(k, bn):
    """scale and shift of the channels `k`, in fp32; an absent tensor (None) takes its neutral value."""
    scale = tl.full(k.shape, 1.0, tl.float32)
    shift = tl.zeros(k.shape, tl.float32)
    if bn.bias is not None:
        shift = tl.load(bn.bias + k).to(tl.float32)
    if bn.mean is not None:
        if bn.gamma is not None:
            scale = tl.load(bn.gamma + k).to(tl.float32)
        scale = tl.div_rn(scale, tl.sqrt_rn(tl.load(bn.var + k).to(tl.float32) + bn.eps))
        shift = (shift - tl.load(bn.mean + k).to(tl.float32)) * scale
        if bn.beta is not None:
            shift += tl.load(bn.beta + k).to(tl.float32)
    return scale, shift


@triton.jit(do_not_specialize=["pixels"])
def bn_add_act_kernel(y_ptr, second_ptr, out_ptr, bn, second_bn, pixels, spec: tl.constexpr):
    """out = act(BN(y) + second), where `second` is absent, a residual, or has a BN of its own."""
    K: tl.constexpr = spec.channels
    rows = tl.program_id(0).to(tl.int64) * spec.block_p + tl.arange(0, spec.block_p)
    columns = tl.program_id(1) * spec.block_k + tl.arange(0, spec.block_k)
    mask = (rows < pixels)[:, None] & (columns < K)[None, :]
    offsets = rows[:, None] * K + columns[None, :]
    k = tl.minimum(columns, K - 1)
    scale, shift = channel_scale_shift(k, bn)
    z = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if second_ptr is not None:
        second = tl.load(second_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if spec.second_norm:
            scale, shift = channel_scale_shift(k, second_bn)
            second = second * scale[None, :] + shift[None, :]
        z += second
    tl.store(out_ptr + offsets, round_to(activate(z, spec), out_ptr.dtype.element_ty, spec), mask=mask)


def _batch_norm(conv: ConvBN) -> BatchNorm:
    def dense(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.contiguous()

    return BatchNorm(
        dense(conv.bias), dense(conv.bn_weight), dense(conv.bn_bias),
        dense(conv.running_mean), dense(conv.running_var), conv.eps,
    )  # fmt: skip


def bn_add_act(
    y: Tensor, conv: ConvBN, second: Tensor | None, second_conv: ConvBN | None, activation: str, out: Tensor
) -> None:
    """``out = act(BN(y) + second)``, convolutions' biases included. All dense channels_last; ``out`` may be ``y``."""
    channels = y.shape[1]
    pixels = y.numel() // channels
    block_k = min(128, triton.next_power_of_2(channels))
    interpreting = not isinstance(bn_add_act_kernel, triton.JITFunction)
    spec = Pass(channels, TILE // block_k, block_k, activation, "upcast" if interpreting else "tensor",
                second_conv is not None)  # fmt: skip
    grid = (triton.cdiv(pixels, spec.block_p), triton.cdiv(channels, block_k))
    second_bn: Any = None if second_conv is None else _batch_norm(second_conv)
    bn_add_act_kernel[grid](y, second, out, _batch_norm(conv), second_bn, pixels, spec, num_warps=4)
