"""The differentiable op of a training tail: one fused pass forward, two backward."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.training.eager import unpack_mask
from ..core.layout import looks_channels_last
from ..core.reference import ACTIVATIONS
from .batch_norm import BatchNormBranch, statistics


class _Options(NamedTuple):
    """The constants of one call of the differentiable op; the tuples have one entry per branch."""

    activation: str
    backend: str
    with_mask: bool
    training: tuple[bool, ...]
    groups: tuple[str | None, ...]


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
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            return _differentiable_backward(ctx, grad_out)
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


def _differentiable_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """The same gradients in operators that can be differentiated again."""
    mask, *saved = ctx.saved_tensors
    options: _Options = ctx.options
    if any(group is not None for group in options.groups):
        raise RuntimeError(
            "double backward of the training tail is not supported where statistics are synchronised; "
            "unfuse(model) first"
        )
    y, weight, mean, invstd, _, *proj = saved
    dz = grad_out.to(mean.dtype)
    if mask.numel() != 0:
        dz = dz * unpack_mask(mask, grad_out.shape)
    grads: list[Tensor | None] = [None, None]
    if ctx.needs_input_grad[1]:
        grads[1] = dz.to(ctx.residual_dtype)
    branches = [(y, weight, mean, invstd)] + ([] if proj[0] is None else [tuple(proj[:4])])
    for i, (y, weight, mean, invstd) in enumerate(branches):
        d_y, d_weight = _branch_gradients(dz, y, weight, mean, invstd, options.training[i])
        bias_dtype = ctx.bias_dtypes[i]
        d_bias = None if bias_dtype is None else dz.sum((0, 2, 3)).to(bias_dtype)
        grads += [d_y, d_weight, d_bias, None, None, None]
    return tuple(grads)


def _branch_gradients(
    dz: Tensor, y: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, training: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``z = bn(y)`` for y and gamma, from ``dz``, as expressions of all three."""
    wide = y.to(mean.dtype)
    if training:
        # Eps is what the statistics used had over the variance.
        var = wide.var((0, 2, 3), unbiased=False)
        eps = (invstd.square().reciprocal() - var).detach()
        mean, invstd = wide.mean((0, 2, 3)), torch.rsqrt(var + eps)
    xhat = (wide - mean[:, None, None]) * invstd[:, None, None]
    d_xhat = dz if weight is None else dz * weight.to(mean.dtype)[:, None, None]
    d_y = d_xhat
    if training:
        means = d_xhat.mean((0, 2, 3), keepdim=True), (d_xhat * xhat).mean((0, 2, 3), keepdim=True)
        d_y = d_xhat - means[0] - xhat * means[1]
    d_weight = None if weight is None else (dz * xhat).sum((0, 2, 3)).to(weight.dtype)
    return (d_y * invstd[:, None, None]).to(y.dtype), d_weight


def training_tail(
    main: BatchNormBranch, residual: Tensor | BatchNormBranch | None, activation: str, backend: str
) -> Tensor:
    """``activation(bn(main) + residual)``: the statistics where they are missing, then the differentiable op."""
    y = main.y
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if y.dim() != 4:
        raise ValueError(f"y: expected 4 dimensions, [N, C, H, W], got {list(y.shape)}")
    if y.numel() == 0 and main.group is None:
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
        tensors += [branch.y, branch.weight, branch.bias, *statistics(branch, backend)]
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
