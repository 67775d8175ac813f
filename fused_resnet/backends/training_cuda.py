"""The training passes by the CUDA extension: float16, bfloat16 and float32 in any mix, no JIT, one launch a pass."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from .cuda import why_not_device
from .training_base import BatchNorm, GradMeans, TrainingBackend

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@lru_cache
def _activation(name: str) -> int:
    extension = _extension.cuda()
    assert extension is not None, "can_run has been asked"
    code: int = extension.ACTIVATIONS[name]
    return code


class CudaTraining(TrainingBackend):
    name = "cuda"

    def can_run(self, y: Tensor, *others: Tensor | None) -> str | None:
        if y.device.type != "cuda":
            return f"cuda: y must be on a CUDA device, got {y.device}"
        for t in (y, *others):
            if t is not None and t.dtype not in _DTYPES:
                return f"cuda: activations must be float16, bfloat16 or float32, got {t.dtype}"
        return why_not_device(y.device)

    @property
    def _ops(self) -> Any:
        return torch.ops.fused_resnet_C

    def stats(self, y: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = (torch.empty(y.shape[1], dtype=torch.float32, device=y.device) for _ in range(2))
        self._ops.cuda_bn_stats(y, mean, var)
        return mean, var

    def apply(
        self,
        bn: BatchNorm,
        residual: Tensor | None,
        proj: BatchNorm | None,
        activation: str,
        with_mask: bool,
        out: Tensor,
        mask: Tensor,
    ) -> None:
        branch = (None,) * 5 if proj is None else tuple(proj)
        self._ops.cuda_bn_apply(*bn, residual, *branch, _activation(activation), out, mask if with_mask else None)

    def backward_reduce(
        self, grad_out: Tensor, mask: Tensor, bn: BatchNorm, proj: BatchNorm | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        sum_dz, sum_dz_xhat = torch.empty_like(bn.mean), torch.empty_like(bn.mean)
        proj_sum = sum_dz.new_empty(0 if proj is None else sum_dz.shape[0])
        branch = (None,) * 3 if proj is None else tuple(proj)[:3]
        self._ops.cuda_bn_backward_reduce(
            grad_out, mask if mask.numel() else None, *bn[:3], *branch, sum_dz, sum_dz_xhat,
            None if proj is None else proj_sum,
        )  # fmt: skip
        return sum_dz, sum_dz_xhat, proj_sum

    def backward_apply(
        self,
        grad_out: Tensor,
        mask: Tensor,
        bn: BatchNorm,
        means: GradMeans,
        proj: BatchNorm | None,
        proj_means: GradMeans | None,
        d_y: Tensor,
        d_second: Tensor | None,
    ) -> None:
        branch: tuple[Tensor | None, ...] = (None,) * 6
        if proj is not None and proj_means is not None:
            branch = (*proj[:4], *proj_means)
        self._ops.cuda_bn_backward_apply(
            grad_out, mask if mask.numel() else None, *bn[:4], *means, *branch, d_y, d_second
        )


BACKEND = CudaTraining()
