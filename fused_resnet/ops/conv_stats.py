"""The training tail's convolution: ``conv_bn_stats`` leaves the batch statistics of its output behind.

A backend may take them in the convolution's own epilogue, while the output is still in registers or cache: one pass
over the activation less than a convolution followed by ``bn_stats``. Saved for the backward are x and the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.training import dispatch as training_dispatch
from ..backends.training.base import TrainingBackend
from ..core.convolution import convolution_backward
from ..core.layout import empty_output, output_memory_format
from ..core.training_call import ConvGeometry, accumulate_dtype, conv_problem
from .checks import check_not_empty, refuse_forward_mode
from .schemas import LIBRARY, NAMESPACE
from .tail import fake_output_shape
from .training_autograd import no_context, refuse, stats_gradient


def _geometry(stride: Any, padding: Any, dilation: Any, groups: int) -> ConvGeometry:
    return ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)


# ---------------------------------------------------------------- implementations


def _conv_bn_stats(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int,
    backend: str = "auto", winograd: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    refuse_forward_mode(x)
    geometry = _geometry(stride, padding, dilation, groups)
    conv_problem(x, weight, bias, geometry)
    check_not_empty("conv_bn_stats", "x", x)
    chosen = training_dispatch.choose(backend, x).with_winograd(winograd)
    if chosen.why_not_conv_stats(x, weight, geometry) is None:
        return chosen.conv_stats(x, weight, bias, geometry)
    return TrainingBackend.conv_stats(chosen, x, weight, bias, geometry)


def _conv_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, has_bias: bool, stride: Any, padding: Any, dilation: Any, groups: int,
    output_mask: Any, backend: str = "auto", winograd: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    geometry = _geometry(stride, padding, dilation, groups)
    shape = conv_problem(x, weight, None, geometry).output_shape
    if tuple(grad_y.shape) != shape or grad_y.dtype != x.dtype:
        raise ValueError(
            f"conv_backward: grad_y: expected the convolution's output, {x.dtype} {list(shape)}, "
            f"got {grad_y.dtype} {list(grad_y.shape)}"
        )
    wanted = _wanted(output_mask, has_bias)
    chosen = training_dispatch.choose(backend, x, grad_y).with_winograd(winograd)
    gradients = chosen.conv_backward(grad_y, x, weight, has_bias, geometry, wanted)
    memory_format = output_memory_format(x, weight)  # eager's rule for the gradients as well
    formats = (memory_format, memory_format, torch.contiguous_format)
    d_x, d_weight, d_bias = (
        # aten computes the bias's together with the weight's, asked or not
        g.contiguous(memory_format=f) if want and g is not None else x.new_empty(0)
        for g, want, f in zip(gradients, wanted, formats, strict=True)
    )
    return d_x, d_weight, d_bias


def _wanted(output_mask: Any, has_bias: bool) -> tuple[bool, bool, bool]:
    return bool(output_mask[0]), bool(output_mask[1]), bool(output_mask[2]) and has_bias


# ---------------------------------------------------------------- fake kernels


def _fake_conv_bn_stats(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int,
    backend: str = "auto", winograd: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    geometry = _geometry(stride, padding, dilation, groups)
    shape, acc = fake_output_shape(x, weight, geometry), accumulate_dtype(x.dtype)
    y = empty_output(shape, x.dtype, x.device, output_memory_format(x, weight))
    return y, x.new_empty(shape[1], dtype=acc), x.new_empty(shape[1], dtype=acc)


def _fake_conv_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, has_bias: bool, stride: Any, padding: Any, dilation: Any, groups: int,
    output_mask: Any, backend: str = "auto", winograd: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    memory_format = output_memory_format(x, weight)
    need_x, need_weight, need_bias = _wanted(output_mask, has_bias)

    def gradient(t: Tensor, needed: bool) -> Tensor:
        return torch.empty_like(t, memory_format=memory_format) if needed else t.new_empty(0)

    return gradient(x, need_x), gradient(weight, need_weight), weight.new_empty(weight.shape[0] if need_bias else 0)


# ---------------------------------------------------------------- gradients


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, *geometry, backend, winograd = inputs
    ctx.save_for_backward(x, weight)
    ctx.options = (backend, winograd)
    ctx.has_bias, ctx.geometry = bias is not None, _geometry(*geometry)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_y: Tensor | None, d_mean: Tensor | None, d_var: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    ops = torch.ops.fused_resnet
    if d_mean is not None or d_var is not None:
        # Only where the op is used by itself: the training tail's own backward covers the statistics. y is computed
        # again rather than saved, and without the bias, since y - mean does not contain it.
        y, mean, _ = ops.conv_bn_stats(x, weight, None, *ctx.geometry, *ctx.options)
        zero = torch.zeros_like(mean)
        through_stats = stats_gradient(y, mean, zero if d_mean is None else d_mean, zero if d_var is None else d_var)
        d_y = (through_stats if d_y is None else d_y + through_stats).to(x.dtype)
    needs = ctx.needs_input_grad
    if d_y is None:
        return (None,) * len(needs)
    mask = [needs[0], needs[1], needs[2] and ctx.has_bias]
    gradients: Any
    if torch.is_grad_enabled():  # create_graph=True: aten's can be differentiated again
        stride, padding, dilation, groups = ctx.geometry
        gradients = convolution_backward(d_y, x, weight, ctx.has_bias, stride, padding, dilation, groups, mask)
    else:
        gradients = ops.conv_backward(d_y, x, weight, ctx.has_bias, *ctx.geometry, mask, *ctx.options)
    return *(g if need else None for g, need in zip(gradients, needs, strict=False)), *([None] * (len(needs) - 3))


for _name, _impl, _fake, _gradient, _setup in (
    ("conv_bn_stats", _conv_bn_stats, _fake_conv_bn_stats, _backward, _context),
    ("conv_backward", _conv_backward, _fake_conv_backward, refuse("conv_backward"), no_context),
):
    LIBRARY.impl(_name, _impl, "CPU")
    LIBRARY.impl(_name, _impl, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=LIBRARY)
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _gradient, setup_context=_setup, lib=LIBRARY)
