"""The training ops: statistics, normalise + add + activation, and their fused backward.

Each of the four ops is functional and one pass over memory. ``functional.training`` composes them;
statistics can be all-reduced between the passes. Gradients: ``training_autograd``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.training import dispatch as training_dispatch
from ..core.layout import looks_channels_last
from ..core.reference import ACTIVATIONS
from ..core.training_call import BatchNorm, GradMeans, accumulate_dtype, is_dense_channels_last, mask_words
from .checks import check_not_empty, check_vector, check_y
from .schemas import LIBRARY, NAMESPACE

# ---------------------------------------------------------------- arguments


def _check_bn(op: str, bn: BatchNorm, prefix: str = "") -> None:
    for name, t in zip(bn._fields[1:], bn[1:], strict=True):
        check_vector(op, prefix + name, t, bn.y.shape[1])


def _check_activation(op: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _check_mask(op: str, mask: Tensor, y: Tensor) -> None:
    words = mask_words(y.numel())
    if mask.dtype != torch.int32 or mask.dim() != 1 or mask.shape[0] not in (0, words):
        raise ValueError(
            f"{op}: mask: expected int32 with {words} words, or empty where the activation is none, "
            f"got {mask.dtype} {list(mask.shape)}"
        )


# ---------------------------------------------------------------- canonical form


def _dense(t: Tensor) -> Tensor:
    """``t`` itself where it is dense in channels_last, else one conversion."""
    if is_dense_channels_last(t):
        return t
    return t.contiguous(memory_format=torch.channels_last)


def canonical_vectors(bn: BatchNorm) -> BatchNorm:
    """``bn`` with its statistics and parameters in the dtype of the arithmetic."""
    acc = accumulate_dtype(bn.y.dtype)
    vectors = (None if t is None else t.to(acc).contiguous() for t in bn[1:])
    return BatchNorm(bn.y, *vectors)  # type: ignore[arg-type]


def _canonical(bn: BatchNorm) -> BatchNorm:
    return canonical_vectors(bn)._replace(y=_dense(bn.y))


def _branch(
    y: Tensor | None, mean: Tensor | None, invstd: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> BatchNorm | None:
    if y is None:
        return None
    if mean is None or invstd is None:
        raise ValueError("proj_mean and proj_invstd: expected tensors, as proj_y is given, got None")
    return BatchNorm(y, mean, invstd, weight, bias)


def _memory_format(y: Tensor) -> torch.memory_format:
    return torch.channels_last if looks_channels_last(y.shape, y.stride()) else torch.contiguous_format


def _in_format_of(y: Tensor, dense: Tensor) -> Tensor:
    """A channels_last result in the memory format eager PyTorch would give it."""
    return dense.contiguous(memory_format=_memory_format(y))


def _empty_dense(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(like.shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def out_dtype(y: Tensor, residual: Tensor | None, proj_y: Tensor | None) -> torch.dtype:
    """The dtype of a tail's output."""
    other = residual if residual is not None else proj_y
    return y.dtype if other is None else torch.promote_types(y.dtype, other.dtype)


# ---------------------------------------------------------------- implementations


def _bn_stats(y: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    check_y("bn_stats", "y", y)
    check_not_empty("bn_stats", "y", y)
    dense = _dense(y)
    return training_dispatch.choose(backend, dense).stats(dense)


def _bn_apply_add_relu(
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    proj_y: Tensor | None,
    proj_mean: Tensor | None,
    proj_invstd: Tensor | None,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    activation: str = "relu",
    with_mask: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    op = "bn_apply_add_relu"
    check_y(op, "y", y)
    _check_activation(op, activation)
    bn = BatchNorm(y, mean, invstd, weight, bias)
    proj = _branch(proj_y, proj_mean, proj_invstd, proj_weight, proj_bias)
    _check_bn(op, bn)
    if residual is not None:
        check_y(op, "residual", residual, y)
    if proj is not None:
        if residual is not None:
            raise ValueError(f"{op}: residual and proj_y: expected at most one of them, got both")
        check_y(op, "proj_y", proj.y, y)
        _check_bn(op, proj, "proj_")
    out = _empty_dense(y, out_dtype(y, residual, proj_y))
    with_mask = with_mask and activation != "none"
    mask = torch.empty(mask_words(y.numel()) if with_mask else 0, dtype=torch.int32, device=y.device)
    if y.numel() != 0:
        bn = _canonical(bn)
        training_dispatch.choose(backend, bn.y, residual, proj_y).apply(
            bn,
            None if residual is None else _dense(residual),
            None if proj is None else _canonical(proj),
            activation,
            with_mask,
            out,
            mask,
        )
    return _in_format_of(y, out), mask


def _bn_backward_reduce(
    grad_out: Tensor,
    mask: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    proj_y: Tensor | None,
    proj_mean: Tensor | None,
    proj_invstd: Tensor | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    op = "bn_backward_reduce"
    check_y(op, "y", y)
    check_y(op, "grad_out", grad_out, y)
    _check_mask(op, mask, y)
    bn = BatchNorm(y, mean, invstd)
    proj = _branch(proj_y, proj_mean, proj_invstd, None, None)
    _check_bn(op, bn)
    if proj is not None:
        check_y(op, "proj_y", proj.y, y)
        _check_bn(op, proj, "proj_")
    if y.numel() == 0:
        zeros = [torch.zeros(y.shape[1], dtype=accumulate_dtype(y.dtype), device=y.device) for _ in range(3)]
        return zeros[0], zeros[1], zeros[2] if proj is not None else zeros[2][:0].clone()
    bn = _canonical(bn)
    return training_dispatch.choose(backend, bn.y, proj_y, grad_out).backward_reduce(
        _dense(grad_out), mask, bn, None if proj is None else _canonical(proj)
    )


def _bn_backward_apply(
    grad_out: Tensor,
    mask: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    mean_dz: Tensor,
    mean_dz_xhat: Tensor,
    proj_y: Tensor | None,
    proj_mean: Tensor | None,
    proj_invstd: Tensor | None,
    proj_weight: Tensor | None,
    proj_mean_dz: Tensor | None,
    proj_mean_dz_xhat: Tensor | None,
    residual_dtype: torch.dtype | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    op = "bn_backward_apply"
    check_y(op, "y", y)
    check_y(op, "grad_out", grad_out, y)
    _check_mask(op, mask, y)
    bn = BatchNorm(y, mean, invstd, weight)
    proj = _branch(proj_y, proj_mean, proj_invstd, proj_weight, None)
    _check_bn(op, bn)
    for name, t in (("mean_dz", mean_dz), ("mean_dz_xhat", mean_dz_xhat)):
        check_vector(op, name, t, y.shape[1])
    proj_means = None
    if proj is not None:
        check_y(op, "proj_y", proj.y, y)
        _check_bn(op, proj, "proj_")
        if proj_mean_dz is None or proj_mean_dz_xhat is None:
            raise ValueError(
                f"{op}: proj_mean_dz and proj_mean_dz_xhat: expected tensors, as proj_y is given, got None"
            )
        proj_means = GradMeans(proj_mean_dz.to(proj.mean.dtype), proj_mean_dz_xhat.to(proj.mean.dtype))
    d_y = _empty_dense(y, y.dtype)
    second = proj.y.dtype if proj is not None else residual_dtype
    d_second = None if second is None else _empty_dense(y, second)
    if y.numel() != 0:
        bn = _canonical(bn)
        means = GradMeans(mean_dz.to(bn.mean.dtype), mean_dz_xhat.to(bn.mean.dtype))
        training_dispatch.choose(backend, bn.y, proj_y, grad_out, d_second).backward_apply(
            _dense(grad_out),
            mask,
            bn,
            means,
            None if proj is None else _canonical(proj),
            proj_means,
            d_y,
            d_second,
        )
    if d_second is None:
        return _in_format_of(y, d_y), y.new_empty(0)
    return _in_format_of(y, d_y), _in_format_of(y, d_second)


# ---------------------------------------------------------------- fake kernels


def _empty_in_format_of(y: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(y.shape, dtype=dtype, device=y.device, memory_format=_memory_format(y))


def _fake_stats(y: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    check_y("bn_stats", "y", y)
    acc = accumulate_dtype(y.dtype)
    return y.new_empty(y.shape[1], dtype=acc), y.new_empty(y.shape[1], dtype=acc)


def _fake_apply(
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    proj_y: Tensor | None,
    proj_mean: Tensor | None,
    proj_invstd: Tensor | None,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    activation: str = "relu",
    with_mask: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    _check_activation("bn_apply_add_relu", activation)
    words = mask_words(y.numel()) if with_mask and activation != "none" else 0
    out = _empty_in_format_of(y, out_dtype(y, residual, proj_y))
    return out, y.new_empty(words, dtype=torch.int32)


def _fake_backward_reduce(
    grad_out: Tensor,
    mask: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    proj_y: Tensor | None,
    proj_mean: Tensor | None,
    proj_invstd: Tensor | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    acc, channels = accumulate_dtype(y.dtype), y.shape[1]
    sizes = (channels, channels, 0 if proj_y is None else channels)
    first, second, third = (y.new_empty(size, dtype=acc) for size in sizes)
    return first, second, third


def _fake_backward_apply(
    grad_out: Tensor,
    mask: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    mean_dz: Tensor,
    mean_dz_xhat: Tensor,
    proj_y: Tensor | None,
    proj_mean: Tensor | None,
    proj_invstd: Tensor | None,
    proj_weight: Tensor | None,
    proj_mean_dz: Tensor | None,
    proj_mean_dz_xhat: Tensor | None,
    residual_dtype: torch.dtype | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    second = proj_y.dtype if proj_y is not None else residual_dtype
    d_second = y.new_empty(0) if second is None else _empty_in_format_of(y, second)
    return _empty_in_format_of(y, y.dtype), d_second


for _name, _impl, _fake in (
    ("bn_stats", _bn_stats, _fake_stats),
    ("bn_apply_add_relu", _bn_apply_add_relu, _fake_apply),
    ("bn_backward_reduce", _bn_backward_reduce, _fake_backward_reduce),
    ("bn_backward_apply", _bn_backward_apply, _fake_backward_apply),
):
    LIBRARY.impl(_name, _impl, "CPU")
    LIBRARY.impl(_name, _impl, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=LIBRARY)
