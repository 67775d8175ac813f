"""The training passes in eager PyTorch: the definition the kernels are tested against, and the fallback."""

from __future__ import annotations

import torch
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


def pack_mask(keep: Tensor) -> Tensor:
    """Boolean [N, C, H, W] to int32 words over the NHWC order, tail bits zero."""
    flat = keep.permute(0, 2, 3, 1).reshape(-1)
    words = mask_words(flat.numel())
    bits = torch.zeros(words * MASK_BITS, dtype=torch.int64, device=keep.device)
    bits[: flat.numel()] = flat
    weights = 2 ** torch.arange(MASK_BITS, dtype=torch.int64, device=keep.device)
    packed = (bits.view(words, MASK_BITS) * weights).sum(dim=1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`pack_mask`."""
    n, c, h, w = shape
    shifts = torch.arange(MASK_BITS, dtype=torch.int32, device=mask.device)
    bits = (mask.unsqueeze(1) >> shifts) & 1
    return bits.reshape(-1)[: n * c * h * w].view(n, h, w, c).permute(0, 3, 1, 2).bool()


def _dz(backward: BackwardPass) -> Tensor:
    dz = backward.grad_out.to(backward.bn.mean.dtype)
    if backward.mask is None:
        return dz
    return torch.where(unpack_mask(backward.mask, dz.shape), dz, torch.zeros((), dtype=dz.dtype, device=dz.device))


def _through_bn(bn: BatchNorm, dz: Tensor, means: GradMeans) -> Tensor:
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
        z = _normalised(bn)
        if residual is not None:
            z = z + residual.to(z.dtype)
        if proj is not None:
            z = z + _normalised(proj)
        if activation == "none":
            out.copy_(z)
            return
        upper = 6.0 if activation == "relu6" else float("inf")
        out.copy_(z.clamp(0.0, upper))
        if mask is not None:
            # Written so that NaN passes the gradient, as threshold_backward and hardtanh_backward do.
            drop = z <= 0 if activation == "relu" else (z <= 0) | (z >= upper)
            mask.copy_(pack_mask(~drop))

    def backward_reduce(self, backward: BackwardPass) -> tuple[Tensor, Tensor, Tensor]:
        dz, bn, proj = _dz(backward), backward.bn, backward.proj
        sum_dz = dz.sum(dim=(0, 2, 3))
        sum_dz_xhat = (dz * _xhat(bn)).sum(dim=(0, 2, 3))
        if proj is None:
            return sum_dz, sum_dz_xhat, sum_dz.new_empty(0)
        return sum_dz, sum_dz_xhat, (dz * _xhat(proj)).sum(dim=(0, 2, 3))

    def backward_apply(self, backward: BackwardPass, gradients: Gradients) -> None:
        dz, proj = _dz(backward), backward.proj
        means, proj_means, d_y, d_second = gradients
        d_y.copy_(_through_bn(backward.bn, dz, means))
        if d_second is not None:
            d_second.copy_(dz if proj is None or proj_means is None else _through_bn(proj, dz, proj_means))


BACKEND = EagerTraining()
