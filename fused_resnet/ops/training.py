"""The training ops: statistics, normalise + add + activation, and their fused backward.

Each of the four ops is functional and one pass over memory. ``functional.training`` composes them;
statistics can be all-reduced between the passes. Gradients: ``training_autograd``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.training import dispatch as training_dispatch
from ..core.layout import looks_channels_last
from ..core.reference import ACTIVATIONS
from ..core.training_call import (
    BackwardPass,
    BatchNorm,
    ForwardPass,
    Gradients,
    GradMeans,
    accumulate_dtype,
    is_dense_channels_last,
    mask_words,
)
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
    y: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
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


def _empty_in_format_of(y: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(y.shape, dtype=dtype, device=y.device, memory_format=_memory_format(y))


def mask_or_none(mask: Tensor) -> Tensor | None:
    """The passes know no empty mask: there is one or none."""
    return mask if mask.numel() else None


def out_dtype(y: Tensor, residual: Tensor | None, proj_y: Tensor | None) -> torch.dtype:
    """The dtype of a tail's output."""
    other = residual if residual is not None else proj_y
    return y.dtype if other is None else torch.promote_types(y.dtype, other.dtype)


# ---------------------------------------------------------------- implementations and fake kernels


class _Apply(NamedTuple):
    """The arguments of ``bn_apply_add_relu``, in the order of its schema."""

    y: Tensor
    mean: Tensor
    invstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    proj_y: Tensor | None
    proj_mean: Tensor | None
    proj_invstd: Tensor | None
    proj_weight: Tensor | None
    proj_bias: Tensor | None
    activation: str = "relu"
    with_mask: bool = True
    backend: str = "auto"

    @property
    def words(self) -> int:
        """Of the mask that is wanted."""
        return mask_words(self.y.numel()) if self.with_mask and self.activation != "none" else 0


class _Reduce(NamedTuple):
    """The arguments of ``bn_backward_reduce``."""

    grad_out: Tensor
    mask: Tensor
    y: Tensor
    mean: Tensor
    invstd: Tensor
    proj_y: Tensor | None
    proj_mean: Tensor | None
    proj_invstd: Tensor | None
    backend: str = "auto"


class _BackwardApply(NamedTuple):
    """The arguments of ``bn_backward_apply``."""

    grad_out: Tensor
    mask: Tensor
    y: Tensor
    mean: Tensor
    invstd: Tensor
    weight: Tensor | None
    mean_dz: Tensor
    mean_dz_xhat: Tensor
    proj_y: Tensor | None
    proj_mean: Tensor | None
    proj_invstd: Tensor | None
    proj_weight: Tensor | None
    proj_mean_dz: Tensor | None
    proj_mean_dz_xhat: Tensor | None
    residual_dtype: torch.dtype | None
    backend: str = "auto"

    @property
    def second_dtype(self) -> torch.dtype | None:
        """Of the gradient of what was added; None where it is not wanted."""
        return self.residual_dtype if self.proj_y is None else self.proj_y.dtype


def _bn_stats(y: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    check_y("bn_stats", "y", y)
    check_not_empty("bn_stats", "y", y)
    dense = _dense(y)
    return training_dispatch.choose(backend, dense).stats(dense)


def _fake_stats(y: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    check_y("bn_stats", "y", y)
    acc = accumulate_dtype(y.dtype)
    return y.new_empty(y.shape[1], dtype=acc), y.new_empty(y.shape[1], dtype=acc)


def _bn_apply_add_relu(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    op, a = "bn_apply_add_relu", _Apply(*args, **kwargs)
    y, residual = a.y, a.residual
    check_y(op, "y", y)
    _check_activation(op, a.activation)
    bn = BatchNorm(*a[:5])
    proj = _branch(*a[6:11])
    _check_bn(op, bn)
    if residual is not None:
        check_y(op, "residual", residual, y)
    if proj is not None:
        if residual is not None:
            raise ValueError(f"{op}: residual and proj_y: expected at most one of them, got both")
        check_y(op, "proj_y", proj.y, y)
        _check_bn(op, proj, "proj_")
    out = _empty_dense(y, out_dtype(y, residual, a.proj_y))
    mask = torch.empty(a.words, dtype=torch.int32, device=y.device)
    if y.numel() != 0:
        bn = _canonical(bn)
        dense_residual = None if residual is None else _dense(residual)
        dense_proj = None if proj is None else _canonical(proj)
        training_dispatch.choose(a.backend, bn.y, residual, a.proj_y).apply(
            ForwardPass(bn, dense_residual, dense_proj, a.activation, out, mask_or_none(mask))
        )
    return _in_format_of(y, out), mask


def _fake_apply(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    a = _Apply(*args, **kwargs)
    _check_activation("bn_apply_add_relu", a.activation)
    out = _empty_in_format_of(a.y, out_dtype(a.y, a.residual, a.proj_y))
    return out, a.y.new_empty(a.words, dtype=torch.int32)


def _check_backward(op: str, a: _Reduce | _BackwardApply, bn: BatchNorm, proj: BatchNorm | None) -> None:
    check_y(op, "y", a.y)
    check_y(op, "grad_out", a.grad_out, a.y)
    _check_mask(op, a.mask, a.y)
    _check_bn(op, bn)
    if proj is not None:
        check_y(op, "proj_y", proj.y, a.y)
        _check_bn(op, proj, "proj_")


def _backward_pass(a: _Reduce | _BackwardApply, bn: BatchNorm, proj: BatchNorm | None) -> BackwardPass:
    dense_proj = None if proj is None else _canonical(proj)
    return BackwardPass(_dense(a.grad_out), mask_or_none(a.mask), _canonical(bn), dense_proj)


def _bn_backward_reduce(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = _Reduce(*args, **kwargs)
    bn, proj = BatchNorm(a.y, a.mean, a.invstd), _branch(a.proj_y, a.proj_mean, a.proj_invstd)
    _check_backward("bn_backward_reduce", a, bn, proj)
    if a.y.numel() == 0:
        first, second, third = (empty.zero_() for empty in _fake_backward_reduce(*a))
        return first, second, third
    backward = _backward_pass(a, bn, proj)
    return training_dispatch.choose(a.backend, backward.bn.y, a.proj_y, a.grad_out).backward_reduce(backward)


def _fake_backward_reduce(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = _Reduce(*args, **kwargs)
    acc, channels = accumulate_dtype(a.y.dtype), a.y.shape[1]
    first, second, third = (
        a.y.new_empty(size, dtype=acc) for size in (channels, channels, 0 if a.proj_y is None else channels)
    )
    return first, second, third


def _bn_backward_apply(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    op, a = "bn_backward_apply", _BackwardApply(*args, **kwargs)
    y = a.y
    bn = BatchNorm(y, a.mean, a.invstd, a.weight)
    proj = _branch(a.proj_y, a.proj_mean, a.proj_invstd, a.proj_weight)
    _check_backward(op, a, bn, proj)
    for name in ("mean_dz", "mean_dz_xhat"):
        check_vector(op, name, getattr(a, name), y.shape[1])
    proj_means = None
    if proj is not None:
        if a.proj_mean_dz is None or a.proj_mean_dz_xhat is None:
            raise ValueError(
                f"{op}: proj_mean_dz and proj_mean_dz_xhat: expected tensors, as proj_y is given, got None"
            )
        proj_means = GradMeans(a.proj_mean_dz.to(proj.mean.dtype), a.proj_mean_dz_xhat.to(proj.mean.dtype))
    d_y = _empty_dense(y, y.dtype)
    d_second = None if a.second_dtype is None else _empty_dense(y, a.second_dtype)
    if y.numel() != 0:
        backward = _backward_pass(a, bn, proj)
        acc = backward.bn.mean.dtype
        means = GradMeans(a.mean_dz.to(acc), a.mean_dz_xhat.to(acc))
        training_dispatch.choose(a.backend, backward.bn.y, a.proj_y, a.grad_out, d_second).backward_apply(
            backward, Gradients(means, proj_means, d_y, d_second)
        )
    if d_second is None:
        return _in_format_of(y, d_y), y.new_empty(0)
    return _in_format_of(y, d_y), _in_format_of(y, d_second)


def _fake_backward_apply(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    a = _BackwardApply(*args, **kwargs)
    second = a.second_dtype
    d_second = a.y.new_empty(0) if second is None else _empty_in_format_of(a.y, second)
    return _empty_in_format_of(a.y, a.y.dtype), d_second


for _name, _impl, _fake in (
    ("bn_stats", _bn_stats, _fake_stats),
    ("bn_apply_add_relu", _bn_apply_add_relu, _fake_apply),
    ("bn_backward_reduce", _bn_backward_reduce, _fake_backward_reduce),
    ("bn_backward_apply", _bn_backward_apply, _fake_backward_apply),
):
    LIBRARY.impl(_name, _impl, "CPU")
    LIBRARY.impl(_name, _impl, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=LIBRARY)
