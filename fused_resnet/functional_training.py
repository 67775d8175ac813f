"""Training-mode BN + add + activation: batch statistics, one fused pass forward, two backward.

Equivalent to ``activation(batch_norm(y, training=True) + residual)`` in eager PyTorch, running statistics
included.

Activation traffic, forward and backward, in units of one activation tensor (reads + writes)::

    eager   batch_norm 2 + 1, add 2 + 1, relu 1 + 1; relu backward 2 + 1, batch_norm backward 4 + 1    16
    here    statistics 1, apply 2 + 1; reduce 2, apply 2 + 2                   10, and 3 passes of mask
            (the mask is 1 bit an element: 1/32 of a float32 tensor, 1/16 of a float16 one)

Saved for the backward are ``y``, ``mean``, ``invstd`` and the mask; eager keeps ``y``, the statistics and the
output.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends.training_base import accumulate_dtype
from .layout import looks_channels_last
from .ops import training as _training  # noqa: F401  (registers the operators)
from .reference import ACTIVATIONS


class BatchNormBranch(NamedTuple):
    """A convolution's output and the BN after it.

    ``momentum`` is the weight of the new statistics in the running ones. With ``training=False`` the running
    statistics normalise (frozen BN) and no gradient flows through them. ``group`` is the name of the process
    group over which the batch statistics are synchronised, None for local statistics.
    """

    y: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    momentum: float = 0.1
    eps: float = 1e-5
    training: bool = True
    group: str | None = None


class _Statistics(NamedTuple):
    """What normalises one branch."""

    mean: Tensor  # [C]
    invstd: Tensor  # [C]
    total: Tensor | None = None  # elements per channel over all ranks, where the statistics are synchronised


class _Options(NamedTuple):
    """The constants of one call of the differentiable op; the tuples have one entry per branch."""

    activation: str
    backend: str
    with_mask: bool
    training: tuple[bool, ...]
    groups: tuple[str | None, ...]


# ---------------------------------------------------------------- statistics


def _merge_over_group(mean: Tensor, var: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count over all ranks, merged in rank order in float64.

    Ranks may hold batches of different sizes, so the counts travel with the statistics.
    """
    from torch.distributed import _functional_collectives as funcol

    packed = torch.cat([mean.double(), var.double(), mean.new_full((1,), count, dtype=torch.float64)])
    # torch 2.14 renamed all_gather_tensor and warns about the old name
    all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
    gathered = funcol.wait_tensor(all_gather(packed.unsqueeze(0), 0, cast(Any, group)))
    channels = mean.shape[0]
    means, variances, counts = gathered[:, :channels], gathered[:, channels:-1], gathered[:, -1:]
    total = counts.sum()
    merged_mean = (counts * means).sum(0) / total
    merged_m2 = (counts * (variances + (means - merged_mean) ** 2)).sum(0)
    return merged_mean.to(mean.dtype), (merged_m2 / total).to(var.dtype), total


def _update_running(branch: BatchNormBranch, mean: Tensor, var: Tensor, count: Tensor | int) -> None:
    """``running = (1 - momentum) * running + momentum * new``, the variance unbiased, as nn.BatchNorm2d."""
    if branch.running_mean is None or branch.running_var is None:
        return
    for running, new in ((branch.running_mean, mean), (branch.running_var, var * (count / (count - 1)))):
        running.mul_(1 - branch.momentum).add_(new.to(running.dtype), alpha=branch.momentum)


def _statistics(branch: BatchNormBranch, backend: str) -> _Statistics:
    y = branch.y.detach()
    acc = accumulate_dtype(y.dtype)
    if not branch.training:
        if branch.running_mean is None or branch.running_var is None:
            raise ValueError("running_mean and running_var: expected tensors where training is False, got None")
        # Copies: the running statistics may be written to before the backward runs.
        mean, var = branch.running_mean.detach().to(acc, copy=True), branch.running_var.detach().to(acc)
        return _Statistics(mean, torch.rsqrt(var + branch.eps))
    count = y.shape[0] * y.shape[2] * y.shape[3]
    if count == 1 and branch.group is None:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.shape}")
    mean, var = torch.ops.fused_resnet.bn_stats(y, backend)
    if branch.group is None:
        _update_running(branch, mean, var, count)
        return _Statistics(mean, torch.rsqrt(var + branch.eps))
    mean, var, total = _merge_over_group(mean, var, count, branch.group)
    _update_running(branch, mean, var, total)
    return _Statistics(mean, torch.rsqrt(var + branch.eps), total)


# ---------------------------------------------------------------- the differentiable op

#: Tensors of one branch as the autograd function takes them: y, weight, bias, mean, invstd, total.
_PER_BRANCH = 6


def _grad_means(sums: list[Tensor], y: Tensor, total: Tensor | None, training: bool, group: str | None) -> list[Tensor]:
    """Sums over this rank to means over all elements that shared the statistics; 0 where frozen."""
    if not training:
        return [torch.zeros_like(s) for s in sums]
    if group is None or total is None:
        return [s / (y.numel() // y.shape[1]) for s in sums]
    from torch.distributed import _functional_collectives as funcol

    reduced = funcol.wait_tensor(funcol.all_reduce(torch.stack(sums), "sum", cast(Any, group)))
    return list((reduced / total.to(reduced.dtype)).unbind(0))


class _ApplyAddRelu(torch.autograd.Function):
    """``act(bn(y) + residual)`` or ``act(bn(y) + bn(proj_y))`` with the statistics given.

    The derivative of the statistics is part of the backward, so ``mean``, ``invstd`` and ``total`` get none.
    """

    @staticmethod
    def forward(ctx: Any, options: _Options, residual: Tensor | None, *branches: Tensor | None) -> Tensor:
        y, weight, bias, mean, invstd, total = branches[:_PER_BRANCH]
        padded = branches[_PER_BRANCH:] or (None,) * _PER_BRANCH
        proj_y, proj_weight, proj_bias, proj_mean, proj_invstd, proj_total = padded
        out, mask = torch.ops.fused_resnet.bn_apply_add_relu(
            y, mean, invstd, weight, bias, residual, proj_y, proj_mean, proj_invstd, proj_weight, proj_bias,
            options.activation, options.with_mask, options.backend,
        )  # fmt: skip
        ctx.save_for_backward(
            mask, y, weight, mean, invstd, total, proj_y, proj_weight, proj_mean, proj_invstd, proj_total
        )
        ctx.options = options
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.bias_dtypes = [None if t is None else t.dtype for t in (bias, proj_bias)]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        mask, y, weight, mean, invstd, total, proj_y, proj_weight, proj_mean, proj_invstd, proj_total = (
            ctx.saved_tensors
        )
        options: _Options = ctx.options
        ops = torch.ops.fused_resnet
        sum_dz, sum_dz_xhat, proj_sum = ops.bn_backward_reduce(
            grad_out, mask, y, mean, invstd, proj_y, proj_mean, proj_invstd, options.backend
        )
        means = _grad_means([sum_dz, sum_dz_xhat], y, total, options.training[0], options.groups[0])
        proj_means: list[Tensor | None] = [None, None]
        if proj_y is not None:
            proj_means = [*_grad_means([sum_dz, proj_sum], proj_y, proj_total, options.training[1], options.groups[1])]
        # Without an activation the residual's gradient is grad_out itself: nothing to compute.
        passes_through = mask.numel() == 0 and ctx.residual_dtype == grad_out.dtype
        wanted = ctx.residual_dtype if ctx.needs_input_grad[1] and not passes_through else None
        d_y, d_second = ops.bn_backward_apply(
            grad_out, mask, y, mean, invstd, weight, means[0], means[1], proj_y, proj_mean, proj_invstd,
            proj_weight, proj_means[0], proj_means[1], wanted, options.backend,
        )  # fmt: skip
        d_residual = None
        if ctx.needs_input_grad[1]:
            d_residual = grad_out if passes_through else d_second

        def parameters(weight: Tensor | None, bias_dtype: torch.dtype | None, dz_xhat: Tensor) -> list[Tensor | None]:
            d_weight = None if weight is None else dz_xhat.to(weight.dtype)
            return [d_weight, None if bias_dtype is None else sum_dz.to(bias_dtype)]

        grads = [
            None,
            d_residual,
            d_y,
            *parameters(weight, ctx.bias_dtypes[0], sum_dz_xhat),
            None,
            None,
            None,
        ]
        if proj_y is not None:
            grads += [d_second, *parameters(proj_weight, ctx.bias_dtypes[1], proj_sum), None, None, None]
        return tuple(grads)


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
    r"""``activation(batch_norm(y) + residual)`` with the statistics of the batch, differentiable.

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
        RuntimeError: the backend asked for cannot run; the result is differentiated twice.

    Equivalent to::

        z = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, True, momentum, eps)
        out = activation(z + residual)
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    main = BatchNormBranch(y, bn_weight, bn_bias, running_mean, running_var, momentum, eps, training, group)
    if y.dim() != 4:
        raise ValueError(f"y: expected 4 dimensions, [N, C, H, W], got {list(y.shape)}")
    if y.numel() == 0 and group is None:
        return _empty_batch(main, residual, activation)
    branches = [main]
    if isinstance(residual, BatchNormBranch):
        branches.append(residual)
        residual = None
    elif residual is not None and residual.shape != y.shape:
        residual = residual.expand_as(y)
    tensors: list[Tensor | None] = []
    for branch in branches:
        # Converted before the autograd function, so that the tensor saved is dense.
        branch = branch._replace(y=branch.y.contiguous(memory_format=torch.channels_last))
        tensors += [branch.y, branch.weight, branch.bias, *_statistics(branch, backend)]
    options = _Options(
        activation,
        backend,
        torch.is_grad_enabled(),
        tuple(b.training for b in branches),
        tuple(b.group for b in branches),
    )
    out: Tensor = _ApplyAddRelu.apply(options, residual, *tensors)
    return out if looks_channels_last(y.shape, y.stride()) else out.contiguous()


def _empty_batch(main: BatchNormBranch, residual: Tensor | BatchNormBranch | None, activation: str) -> Tensor:
    """Eager PyTorch's own answer for no elements: running statistics untouched, gradients zero."""

    def bn(b: BatchNormBranch) -> Tensor:
        return F.batch_norm(b.y, b.running_mean, b.running_var, b.weight, b.bias, b.training, b.momentum, b.eps)

    z = bn(main)
    if residual is not None:
        z = z + (bn(residual) if isinstance(residual, BatchNormBranch) else residual)
    return ACTIVATIONS[activation](z)


# ---------------------------------------------------------------- for modules


def _sync_group(bn: nn.modules.batchnorm._BatchNorm) -> str | None:
    """The group over which ``bn`` synchronises its statistics at this forward, None where it does not."""
    if not (isinstance(bn, nn.SyncBatchNorm) and bn.training and torch.distributed.is_initialized()):
        return None
    group = bn.process_group if bn.process_group is not None else torch.distributed.group.WORLD
    if torch.distributed.get_world_size(group) == 1:
        return None
    return str(cast(Any, group).group_name)


def branch_of(bn: nn.modules.batchnorm._BatchNorm, y: Tensor) -> BatchNormBranch:
    """``bn`` applied to ``y``; counts the batch in ``num_batches_tracked`` as ``bn.forward`` does."""
    momentum = 0.0 if bn.momentum is None else bn.momentum
    track = bn.training and bn.track_running_stats
    if track and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    batch_statistics = bn.training or (bn.running_mean is None and bn.running_var is None)
    update = not bn.training or bn.track_running_stats
    return BatchNormBranch(
        y,
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
    main = branch_of(bn, y)
    shortcut = branch_of(residual[1], residual[0]) if isinstance(residual, tuple) else residual
    return bn_add_relu_train(
        *main[:5],
        momentum=main.momentum,
        eps=main.eps,
        residual=shortcut,
        activation=activation,
        training=main.training,
        group=main.group,
        backend=backend,
    )
