"""Training-mode (convolution +) BN + add + activation: batch statistics, one fused pass forward, two backward.

Equivalent to ``activation(batch_norm(y, training=True) + residual)`` in eager PyTorch, running statistics
included, where ``y`` is given or is the output of a convolution that takes the statistics in its epilogue.

Activation traffic of what follows the convolution, forward and backward, in units of one activation tensor (reads +
writes)::

    eager        batch_norm 2 + 1, add 2 + 1, relu 1 + 1; relu backward 2 + 1, batch_norm backward 4 + 1     16
    here         statistics 1, apply 2 + 1; reduce 2, apply 2 + 2                    10, and 3 passes of mask
    conv+stats                 apply 2 + 1; reduce 2, apply 2 + 2                     9, and 3 passes of mask
                 (the mask is 1 bit an element: 1/32 of a float32 tensor, 1/16 of a float16 one)

Saved for the backward are ``y``, ``mean``, ``invstd`` and the mask, by the convolution its input and weight; eager
keeps ``y``, the statistics and the output.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..core.convolution import trainable_conv2d
from ..core.height_width import HeightWidth, conv_geometry
from ..core.layout import output_memory_format
from ..ops import conv_stats as _conv_stats  # noqa: F401  (registers the operators)
from .batch_norm import BatchNormBranch
from .training_autograd import training_tail


def bn_add_relu_train(
    y: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | BatchNormBranch | None = None,
    activation: str = "relu",
    training: bool = True,
    group: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """``activation(batch_norm(y) + residual)`` with the statistics of the batch, differentiable.

    Args:
        y: output of the convolution, ``[N, C, H, W]``; channels_last is the fast case.
        bn_weight, bn_bias: gamma and beta, ``[C]`` or None (1 and 0).
        running_mean, running_var: updated in place with the unbiased variance when ``training``; may be None.
        momentum: weight of the new statistics in the running ones (``1 / n`` gives the cumulative average).
        residual: tensor broadcastable to ``y``'s shape; or a :class:`BatchNormBranch`, the projection
            shortcut, whose BN is applied in the same pass.
        activation: "relu", "relu6" or "none".
        training: False normalises with the running statistics and leaves them alone (frozen BN).
        group: name of the process group over which the statistics are synchronised (SyncBatchNorm).
        backend: "auto" or one of ``cpu``, ``cuda``, ``triton``, ``eager``.

    Returns:
        Tensor of ``y``'s shape and memory format; its dtype is that of ``y + residual``.

    Raises:
        ValueError: shapes, dtypes or names that do not fit; one value per channel only.
        RuntimeError: the backend asked for cannot run; a result with synchronised statistics is differentiated twice.

    Equivalent to::

        z = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, True, momentum, eps)
        out = activation(z + residual)
    """
    main = BatchNormBranch(y, bn_weight, bn_bias, running_mean, running_var, momentum, eps, training, group)
    return training_tail(main, residual, activation, backend)


# ---------------------------------------------------------------- with the convolution


def conv_bn_branch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    stride: HeightWidth = 1,
    padding: HeightWidth = 0,
    dilation: HeightWidth = 1,
    groups: int = 1,
    momentum: float = 0.1,
    eps: float = 1e-5,
    training: bool = True,
    group: str | None = None,
    backend: str = "auto",
    winograd: str = "auto",
) -> BatchNormBranch:
    """The convolution of ``x``, run now, and the BN after it: the projection of :func:`conv_bn_add_relu_train`.

    Arguments and errors are those of :func:`conv_bn_add_relu_train`.
    """
    geometry = (*conv_geometry(stride, padding, dilation), groups)
    branch = (bn_weight, bn_bias, running_mean, running_var, momentum, eps, training, group)
    # An NCHW output is converted for the passes that follow; its statistics are then taken of that copy, since the
    # convolution would have to convert it once more.
    if not training or x.numel() == 0 or output_memory_format(x, weight) is not torch.channels_last:
        return BatchNormBranch(trainable_conv2d(x, weight, bias, *geometry), *branch)
    y, mean, var = torch.ops.fused_resnet.conv_bn_stats(x, weight, bias, *geometry, backend, winograd)
    # The derivative of the statistics is part of the tail's own backward.
    return BatchNormBranch(y, *branch, (mean.detach(), var.detach()))


def conv_bn_add_relu_train(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    stride: HeightWidth = 1,
    padding: HeightWidth = 0,
    dilation: HeightWidth = 1,
    groups: int = 1,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | BatchNormBranch | None = None,
    activation: str = "relu",
    training: bool = True,
    group: str | None = None,
    backend: str = "auto",
    winograd: str = "auto",
) -> Tensor:
    """The tail ``act(BN(conv2d(x)) + residual)`` with the statistics of the batch, differentiable.

    In each channel::

        y   = conv2d(x, weight) + bias
        out = act(gamma * (y - mean(y)) / sqrt(var(y) + eps) + beta + residual)  # the biased variance

    Two steps in channels_last: the convolution, which takes the statistics of its output in its epilogue where the
    backend has such a kernel, and one pass that normalises, adds and applies the activation.

    Args:
        x: input ``[N, C, H, W]``; channels_last is the fast case.
        weight: filter ``[K, C / groups, R, S]``, dtype of ``x``.
        bias: the convolution's bias ``[K]``, or None. (It moves the running mean and nothing else.)
        bn_weight, bn_bias: gamma and beta, ``[K]`` or None (1 and 0).
        running_mean, running_var: updated in place with the unbiased variance when ``training``; may be None.
        stride, padding, dilation: as in :func:`torch.nn.functional.conv2d`, an int or a pair (height, width).
        groups: as in :func:`torch.nn.functional.conv2d`.
        momentum: weight of the new statistics in the running ones (``1 / n`` gives the cumulative average).
        residual: tensor broadcastable to the output's shape ``[N, K, P, Q]``; or a :class:`BatchNormBranch`, the
            projection shortcut (see :func:`conv_bn_branch`), whose BN is applied in the same pass. Under autocast a
            tensor is cast as ``x`` is.
        activation: "relu", "relu6" or "none".
        training: False normalises with the running statistics and leaves them alone (frozen BN).
        group: name of the process group over which the statistics are synchronised (SyncBatchNorm).
        backend: "auto" or one of ``cpu``, ``cuda``, ``triton``, ``eager``.
        winograd: CPU algorithm for 3x3 stride-1 convolutions, forward and backward: ``"auto"`` (Winograd where it is
            expected to be faster), ``"f2"`` (F(2x2) alone, as accurate as direct convolution) or ``"off"``. The
            environment variable ``FUSED_RESNET_WINOGRAD`` sets what "auto" means.

    Returns:
        Tensor ``[N, K, P, Q]`` in eager's memory format; its dtype is that of ``conv2d(x) + residual``.

    Raises:
        ValueError, TypeError: an argument does not fit (the message names it, what was expected and what was got);
            one value per channel only.
        RuntimeError: the backend asked for cannot run; a result with synchronised statistics is differentiated twice.

    Equivalent to::

        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        z = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, True, momentum, eps)
        out = activation(z + residual)
    """
    main = conv_bn_branch(
        x, weight, bias, bn_weight, bn_bias, running_mean, running_var,
        stride=stride, padding=padding, dilation=dilation, groups=groups,
        momentum=momentum, eps=eps, training=training, group=group, backend=backend, winograd=winograd,
    )  # fmt: skip
    y = main.y
    if isinstance(residual, Tensor) and residual.dtype != y.dtype and torch.is_autocast_enabled(y.device.type):
        # A block that starts in float32 under autocast: eager's `out += identity` keeps the convolution's dtype, as
        # does the operator of the eval path.
        residual = residual.to(y.dtype)
    return training_tail(main, residual, activation, backend)


# ---------------------------------------------------------------- for modules


def _sync_group(bn: nn.modules.batchnorm._BatchNorm) -> str | None:
    """The group over which ``bn`` synchronises its statistics at this forward, None where it does not."""
    if not (isinstance(bn, nn.SyncBatchNorm) and bn.training and torch.distributed.is_initialized()):
        return None
    group = bn.process_group if bn.process_group is not None else torch.distributed.group.WORLD
    if torch.distributed.get_world_size(group) == 1:
        return None
    return str(cast(Any, group).group_name)


class BatchNormArguments(NamedTuple):
    """What a batch norm module does at this forward, under the names of the functions' arguments."""

    bn_weight: Tensor | None
    bn_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float
    eps: float
    training: bool  # normalise with the statistics of the batch
    group: str | None


def batch_norm_arguments(bn: nn.modules.batchnorm._BatchNorm) -> BatchNormArguments:
    """Read ``bn``; counts the batch in ``num_batches_tracked`` as ``bn.forward`` does."""
    momentum = 0.0 if bn.momentum is None else bn.momentum
    track = bn.training and bn.track_running_stats
    if track and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    batch_statistics = bn.training or (bn.running_mean is None and bn.running_var is None)
    update = not bn.training or bn.track_running_stats
    return BatchNormArguments(
        bn.weight,
        bn.bias,
        bn.running_mean if update else None,
        bn.running_var if update else None,
        momentum,
        bn.eps,
        batch_statistics,
        _sync_group(bn),
    )


def bn_add_relu(
    y: Tensor,
    bn: nn.modules.batchnorm._BatchNorm,
    *,
    residual: Tensor | tuple[Tensor, nn.modules.batchnorm._BatchNorm] | None = None,
    activation: str = "relu",
    backend: str = "auto",
) -> Tensor:
    """``activation(bn(y) + residual)`` for a BatchNorm2d or SyncBatchNorm module, whatever its mode.

    ``residual`` is a tensor, or ``(y2, bn2)``: the projection's convolution output and its BN. Batch or
    running statistics, momentum=None, ``num_batches_tracked`` and synchronisation are decided by each module
    as its own forward would.
    """
    main = BatchNormBranch(y, *batch_norm_arguments(bn))
    shortcut = (
        BatchNormBranch(residual[0], *batch_norm_arguments(residual[1])) if isinstance(residual, tuple) else residual
    )
    return training_tail(main, shortcut, activation, backend)
