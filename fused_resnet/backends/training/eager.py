"""The training passes in eager PyTorch: the definition the kernels are tested against, and the fallback."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.training_call import (
    MASK_BITS,
    BackwardPass,
    BatchNorm,
    ForwardPass,
    Gradients,
    GradMeans,
    accumulate_dtype,
    mask_words,
)
from .base import TrainingBackend


def _per_channel(t: Tensor) -> Tensor:
    return t.view(1, -1, 1, 1)


def _xhat(bn: BatchNorm) -> Tensor:
    # Subtracting the mean first is what keeps |mean| >> std accurate; y * scale + shift would cancel.
    return (bn.y.to(bn.mean.dtype) - _per_channel(bn.mean)) * _per_channel(bn.invstd)


def _normalised(bn: BatchNorm) -> Tensor:
    z = _xhat(bn)
    if bn.weight is not None:
        z = z * _per_channel(bn.weight)
    if bn.bias is not None:
        z = z + _per_channel(bn.bias)
    return z


# What ``ops.decomposed`` calls as well writes to no tensor: it is traced after functionalization.


def normalised_sum(bn: BatchNorm, residual: Tensor | None, proj: BatchNorm | None) -> Tensor:
    """``bn + (residual or proj)``, what the activation is applied to, in the dtype of the statistics."""
    z = _normalised(bn)
    if residual is not None:
        z = z + residual.to(z.dtype)
    return z if proj is None else z + _normalised(proj)


def activated(z: Tensor, activation: str) -> Tensor:
    """The activation of ``z``."""
    return z if activation == "none" else z.clamp(0.0, _upper(activation))


def passed(z: Tensor, activation: str) -> Tensor:
    """The mask of where the activation of ``z`` passes a gradient."""
    # Written so that NaN passes it, as threshold_backward and hardtanh_backward do.
    drop = z <= 0 if activation == "relu" else (z <= 0) | (z >= _upper(activation))
    return pack_mask(~drop)


def _upper(activation: str) -> float:
    return 6.0 if activation == "relu6" else float("inf")


def pack_mask(keep: Tensor) -> Tensor:
    """Boolean [N, C, H, W] to int32 words over the NHWC order, tail bits zero."""
    flat = keep.permute(0, 2, 3, 1).reshape(-1)
    words = mask_words(flat.numel())
    bits = F.pad(flat.to(torch.int64), (0, words * MASK_BITS - flat.numel()))
    return _as_int32((bits.view(words, MASK_BITS) * _weights(keep.device)).sum(dim=1))


def unpack_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`pack_mask`."""
    n, c, h, w = shape
    bits = (mask.unsqueeze(1) & _as_int32(_weights(mask.device))) != 0
    return bits.reshape(-1)[: n * c * h * w].view(n, h, w, c).permute(0, 3, 1, 2)


def _weights(device: torch.device) -> Tensor:
    return 2 ** torch.arange(MASK_BITS, dtype=torch.int64, device=device)


def _as_int32(words: Tensor) -> Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def dz_of(backward: BackwardPass) -> Tensor:
    """The gradient where the activation passes it, else 0, in the dtype of the statistics."""
    dz = backward.grad_out.to(backward.bn.mean.dtype)
    if backward.mask is None:
        return dz
    return torch.where(unpack_mask(backward.mask, dz.shape), dz, torch.zeros((), dtype=dz.dtype, device=dz.device))


def through_bn(bn: BatchNorm, dz: Tensor, means: GradMeans) -> Tensor:
    """What ``dz`` hands on to ``bn.y``, in the dtype of the statistics."""
    scale = bn.invstd if bn.weight is None else bn.invstd * bn.weight
    centred = dz - _per_channel(means.dz) - _xhat(bn) * _per_channel(means.dz_xhat)
    return centred * _per_channel(scale)


class EagerTraining(TrainingBackend):
    name = "eager"

    def can_run(self, y: Tensor, *others: Tensor | None) -> str | None:
        return None

    def stats(self, y: Tensor) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(y.to(accumulate_dtype(y.dtype)), dim=(0, 2, 3), correction=0)
        return mean, var

    def apply(self, forward: ForwardPass) -> None:
        bn, residual, proj, activation, out, mask = forward
        z = normalised_sum(bn, residual, proj)
        out.copy_(activated(z, activation))
        if mask is not None:
            mask.copy_(passed(z, activation))

    def backward_reduce(self, backward: BackwardPass) -> tuple[Tensor, Tensor, Tensor]:
        dz, bn, proj = dz_of(backward), backward.bn, backward.proj
        sum_dz = dz.sum(dim=(0, 2, 3))
        sum_dz_xhat = (dz * _xhat(bn)).sum(dim=(0, 2, 3))
        if proj is None:
            return sum_dz, sum_dz_xhat, sum_dz.new_empty(0)
        return sum_dz, sum_dz_xhat, (dz * _xhat(proj)).sum(dim=(0, 2, 3))

    def backward_apply(self, backward: BackwardPass, gradients: Gradients) -> None:
        dz, proj = dz_of(backward), backward.proj
        means, proj_means, d_y, d_second = gradients
        d_y.copy_(through_bn(backward.bn, dz, means))
        if d_second is not None:
            d_second.copy_(dz if proj is None or proj_means is None else through_bn(proj, dz, proj_means))


BACKEND = EagerTraining()
