"""Gradients of the training ops where they are called by themselves.

``mean`` and ``invstd`` are inputs like any other here, so a composition of the ops differentiates correctly.
``functional.training`` uses the fused backward instead, which needs one pass over memory less.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .schemas import LIBRARY, NAMESPACE


def _per_channel(t: Tensor) -> Tensor:
    return t.view(1, -1, 1, 1)


# ---------------------------------------------------------------- bn_stats


def stats_gradient(y: Tensor, mean: Tensor, d_mean: Tensor, d_var: Tensor) -> Tensor:
    """What the mean and the biased variance of ``y`` hand back to it, in their dtype."""
    count = y.numel() // y.shape[1]
    centred = y.to(mean.dtype) - _per_channel(mean)
    return (_per_channel(d_mean) + 2 * centred * _per_channel(d_var)) / count


def _stats_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0])


def _stats_backward(ctx: Any, d_mean: Tensor, d_var: Tensor) -> tuple[Tensor, None]:
    y, mean = ctx.saved_tensors
    return stats_gradient(y, mean, d_mean, d_var).to(y.dtype), None


# ---------------------------------------------------------------- bn_apply_add_relu


def _apply_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, mean, invstd, weight, bias, residual, proj_y, proj_mean, proj_invstd, proj_weight, proj_bias = inputs[:11]
    activation, with_mask, backend = inputs[11:]
    if activation != "none" and not with_mask:
        ctx.refusal = "bn_apply_add_relu: with_mask: expected True where a gradient is wanted, got False"
        return
    ctx.refusal = None
    ctx.backend = backend
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.vector_dtypes = [None if t is None else t.dtype for t in (mean, invstd, weight, bias)]
    ctx.proj_vector_dtypes = [None if t is None else t.dtype for t in (proj_mean, proj_invstd, proj_weight, proj_bias)]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(
        output[1], y, mean, invstd, weight, proj_y, proj_mean, proj_invstd, proj_weight
    )  # fmt: skip


def _vector_gradients(
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    dtypes: list[torch.dtype | None],
) -> list[Tensor | None]:
    """Gradients of mean, invstd, weight and bias of ``weight * (y - mean) * invstd + bias``."""
    gamma = torch.ones_like(invstd) if weight is None else weight
    full = [-gamma * invstd * sum_dz, gamma * sum_dz_xhat / invstd, sum_dz_xhat, sum_dz]
    return [None if dtype is None else grad.to(dtype) for grad, dtype in zip(full, dtypes, strict=True)]


def _apply_backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    if ctx.refusal is not None:
        raise RuntimeError(ctx.refusal)
    mask, y, mean, invstd, weight, proj_y, proj_mean, proj_invstd, proj_weight = ctx.saved_tensors
    ops = torch.ops.fused_resnet
    sum_dz, sum_dz_xhat, proj_sum = ops.bn_backward_reduce(
        grad_out, mask, y, mean, invstd, proj_y, proj_mean, proj_invstd, ctx.backend
    )
    zero = torch.zeros_like(sum_dz)
    proj_zero = None if proj_y is None else zero
    d_y, d_second = ops.bn_backward_apply(
        grad_out, mask, y, mean, invstd, weight, zero, zero,
        proj_y, proj_mean, proj_invstd, proj_weight, proj_zero, proj_zero, ctx.residual_dtype, ctx.backend,
    )  # fmt: skip
    vectors = _vector_gradients(sum_dz, sum_dz_xhat, invstd, weight, ctx.vector_dtypes)
    d_residual = None if ctx.residual_dtype is None else d_second
    if proj_y is None:
        return d_y, *vectors, d_residual, *([None] * 8)
    proj_vectors = _vector_gradients(sum_dz, proj_sum, proj_invstd, proj_weight, ctx.proj_vector_dtypes)
    return d_y, *vectors, d_residual, d_second, *proj_vectors, None, None, None


# ---------------------------------------------------------------- the backward ops


def no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Nothing is saved: the backward only raises."""


def refuse(name: str) -> Any:
    """The backward of an op that is a gradient itself."""

    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"{name} cannot be differentiated: double backward of it is not supported; unfuse(model)")

    return backward


def _register() -> None:
    for name, backward, context in (
        ("bn_stats", _stats_backward, _stats_context),
        ("bn_apply_add_relu", _apply_backward, _apply_context),
        ("bn_backward_reduce", refuse("bn_backward_reduce"), no_context),
        ("bn_backward_apply", refuse("bn_backward_apply"), no_context),
    ):
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", backward, setup_context=context, lib=LIBRARY
        )  # fmt: skip


_register()
