"""The tail as functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops as _ops  # registers the operators
from ..core.height_width import HeightWidth, conv_geometry, height_width
from ..core.packed_weights import PackedWeights
from .training import (
    BatchNormBranch,
    batch_norm_arguments,
    bn_add_relu,
    bn_add_relu_train,
    conv_bn_add_relu_train,
    conv_bn_branch,
)

__all__ = [
    "BatchNormBranch",
    "PackedWeights",
    "batch_norm_arguments",
    "bn_add_relu",
    "bn_add_relu_train",
    "conv_bn_add_relu",
    "conv_bn_add_relu_max_pool",
    "conv_bn_add_relu_train",
    "conv_bn_branch",
    "conv_bn_proj_add_relu",
]

assert _ops.NAMESPACE == "fused_resnet"


# Bound once: a lookup through torch.ops takes half a microsecond, and several in a network, where all is cold.
_CONV_BN_ADD_RELU = torch.ops.fused_resnet.conv_bn_add_relu.default
_CONV_BN_ADD_RELU_MAX_POOL = torch.ops.fused_resnet.conv_bn_add_relu_max_pool.default
_CONV_BN_PROJ_ADD_RELU = torch.ops.fused_resnet.conv_bn_proj_add_relu.default


def conv_bn_add_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    stride: HeightWidth = 1,
    padding: HeightWidth = 0,
    dilation: HeightWidth = 1,
    groups: int = 1,
    activation: str = "relu",
    backend: str = "auto",
    packed_weights: PackedWeights | None = None,
    winograd: str = "auto",
) -> Tensor:
    """The residual tail ``act(BN(conv2d(x)) + residual)`` in one pass, BN in evaluation mode.

    In output channel k and with the index arithmetic of a convolution::

        scale[k]      = gamma[k] / sqrt(running_var[k] + eps)
        shift[k]      = beta[k] + (bias[k] - running_mean[k]) * scale[k]
        y[n, k, p, q] = act(scale[k] * conv2d(x, weight)[n, k, p, q] + shift[k] + residual[n, k, p, q])

    Equivalent to ``act(F.batch_norm(F.conv2d(x, weight, bias, stride, padding, dilation, groups), running_mean,
    running_var, bn_weight, bn_bias, training=False, eps=eps) + residual)``, but accumulated in float32 and rounded
    once, at the store (eager rounds after every step).

    Args:
        x: input ``[N, C, H, W]``; float16, bfloat16, float32 or (eager backend) float64. Fastest in channels_last.
        weight: filter ``[K, C / groups, R, S]``, dtype of ``x``.
        bias: the convolution's bias ``[K]``, or None.
        bn_weight: gamma ``[K]``; None for a BN that is not affine. May be float32 beside float16/bfloat16 ``x``.
        bn_bias: beta ``[K]``, or None.
        running_mean: ``[K]``; None means that there is no BN at all (then scale is 1 and shift the bias).
        running_var: ``[K]``, not negative; given exactly when ``running_mean`` is.
        eps: added to the variance inside the square root.
        residual: the tensor to add, of exactly the output's shape ``[N, K, P, Q]``, any strides; None adds nothing.
        stride, padding, dilation: as in :func:`torch.nn.functional.conv2d`, an int or a pair (height, width).
        groups: as in :func:`torch.nn.functional.conv2d`.
        activation: ``"relu"``, ``"relu6"`` or ``"none"``.
        backend: ``"auto"`` or a name from :func:`fused_resnet.backends.names`.
        packed_weights: an object that the caller keeps from call to call, in which packed copies of the weights wait
            for the next one (CPU). Each call compares them with the whole weight; None packs nothing.
        winograd: CPU algorithm in float32: ``"auto"``, the fastest; ``"f2"``, without Winograd F(4x4), so as accurate
            as direct convolution; ``"off"``, float32 multiply-adds alone, so that an infinity stays one.

    Returns:
        ``y`` ``[N, K, P, Q]``, dtype ``torch.result_type(x, residual)``, in the memory format that eager's
        convolution would give (channels_last if ``x`` or ``weight`` is).

    Differentiable with respect to x, weight, bias, bn_weight, bn_bias and residual.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what was expected and what was got.
        RuntimeError: the named backend cannot run this problem; the message is its one sentence.

    Source: the operator is defined in ``fused_resnet/core/reference.py``.
    """
    stride, padding, dilation = conv_geometry(stride, padding, dilation)
    result: Tensor = _CONV_BN_ADD_RELU(
        x, weight, bias, bn_weight, bn_bias, running_mean, running_var, eps, residual,
        stride, padding, dilation, groups, activation, backend, _number(packed_weights), winograd,
    )  # fmt: skip
    return result


def max_pool_numbers(
    window: HeightWidth, stride: HeightWidth, padding: HeightWidth
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Window, stride and padding of a max pool, two numbers each."""
    return height_width("window", window), height_width("pool_stride", stride), height_width("pool_padding", padding)


def conv_bn_add_relu_max_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    window: HeightWidth,
    pool_stride: HeightWidth,
    pool_padding: HeightWidth = 0,
    eps: float = 1e-5,
    stride: HeightWidth = 1,
    padding: HeightWidth = 0,
    dilation: HeightWidth = 1,
    groups: int = 1,
    activation: str = "relu",
    backend: str = "auto",
    packed_weights: PackedWeights | None = None,
    winograd: str = "auto",
) -> Tensor:
    """``max_pool2d(conv_bn_add_relu(x, ...), window, pool_stride, pool_padding)``: the stem of a network.

    On the CPU, in float32, without gradients and with ``packed_weights``, one pass: the convolution's output, the
    largest tensor of a ResNet, never goes to memory. Elsewhere it is the two functions one after the
    other, with the same result up to rounding.

    Args:
        window, pool_stride, pool_padding: of the max pool, as in :func:`torch.nn.functional.max_pool2d`.

    All other arguments, gradients and errors are those of :func:`conv_bn_add_relu`; the result has shape
    ``[N, K, P', Q']`` with the pool's ``P' x Q'``.
    """
    pool = max_pool_numbers(window, pool_stride, pool_padding)
    if not x.is_cpu or _wants_gradients(x, weight, bias, bn_weight, bn_bias):
        y = conv_bn_add_relu(
            x, weight, bias, bn_weight, bn_bias, running_mean, running_var,
            eps=eps, stride=stride, padding=padding, dilation=dilation, groups=groups, activation=activation,
            backend=backend, packed_weights=packed_weights, winograd=winograd,
        )  # fmt: skip
        return F.max_pool2d(y, *pool)
    result: Tensor = _CONV_BN_ADD_RELU_MAX_POOL(
        x, weight, bias, bn_weight, bn_bias, running_mean, running_var, eps,
        *conv_geometry(stride, padding, dilation), groups, *pool,
        activation, backend, _number(packed_weights), winograd,
    )  # fmt: skip
    return result


def _wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _number(packed_weights: PackedWeights | None) -> int:
    return 0 if packed_weights is None else packed_weights.number


def conv_bn_proj_add_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    proj_x: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None = None,
    proj_bn_weight: Tensor | None = None,
    proj_bn_bias: Tensor | None = None,
    proj_running_mean: Tensor | None = None,
    proj_running_var: Tensor | None = None,
    eps: float = 1e-5,
    proj_eps: float = 1e-5,
    stride: HeightWidth = 1,
    padding: HeightWidth = 0,
    dilation: HeightWidth = 1,
    groups: int = 1,
    proj_stride: HeightWidth = 1,
    activation: str = "relu",
    backend: str = "auto",
    packed_weights: PackedWeights | None = None,
    winograd: str = "auto",
) -> Tensor:
    """The tail of a downsampling block: ``act(BN(conv2d(x)) + BN_proj(conv2d_1x1(proj_x)))`` in one pass.

    With scale and shift of each BN as in :func:`conv_bn_add_relu`::

        y = act(scale * conv2d(x, weight) + shift + scale_proj * conv2d_1x1(proj_x, proj_weight) + shift_proj)

    Args:
        proj_x: ``[N, C_proj, H_proj, W_proj]``, the block's input.
        proj_weight: ``[K, C_proj, 1, 1]``; its convolution has stride ``proj_stride``, padding 0, one group.
        proj_bias, proj_bn_weight, proj_bn_bias, proj_running_mean, proj_running_var, proj_eps: the projection's
            bias and BN, as for :func:`conv_bn_add_relu`.

    All other arguments, the returned tensor, gradients and errors are those of :func:`conv_bn_add_relu`.
    """
    stride, padding, dilation = conv_geometry(stride, padding, dilation)
    proj_stride = height_width("proj_stride", proj_stride)
    result: Tensor = _CONV_BN_PROJ_ADD_RELU(
        x, weight, bias, bn_weight, bn_bias, running_mean, running_var, eps, stride, padding, dilation, groups,
        proj_x, proj_weight, proj_bias, proj_bn_weight, proj_bn_bias, proj_running_mean, proj_running_var, proj_eps,
        proj_stride, activation, backend, _number(packed_weights), winograd,
    )  # fmt: skip
    return result
