"""Launching the training kernels: tensors in canonical form (see ``backends.training.base``) to kernel arguments."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..core.training_call import BackwardPass, ForwardPass, Gradients, first_fields
from .bn_apply import bn_apply_add_relu_kernel, bn_backward_apply_kernel
from .bn_reduce import bn_backward_reduce_kernel, bn_stats_kernel
from .workspace import workspace

#: Elements a program of an elementwise pass handles: 128 words of the mask, 8 KiB of float16.
WORDS = 128
#: Programs of a reduction, over all columns; enough to fill the largest GPU several times over. A constant, so that
#: the order of the sums is a function of the shape alone.
PROGRAMS = 512
BLOCK_C = 64
BLOCK_M = 32


def tickets(device: torch.device, columns: int) -> Tensor:
    """Counters that are zero, and left zero by the kernels."""
    if device.type != "cuda":
        return torch.zeros(columns, dtype=torch.int32, device=device)
    return workspace("tickets", columns, columns, device, torch.cuda.current_stream(device).cuda_stream)


class _Reduction:
    """How a reduction over the pixels of ``y`` is cut into programs."""

    def __init__(self, y: Tensor, sums: int) -> None:
        self.channels = y.shape[1]
        self.rows = y.numel() // self.channels
        columns = triton.cdiv(self.channels, BLOCK_C)
        parts = max(1, min(PROGRAMS // columns, triton.cdiv(self.rows, BLOCK_M)))
        self.rows_per_part = triton.cdiv(triton.cdiv(self.rows, parts), BLOCK_M) * BLOCK_M
        self.grid = (columns, triton.cdiv(self.rows, self.rows_per_part))
        self.tickets = tickets(y.device, columns)
        partial = self.grid[0] * self.grid[1] * sums * BLOCK_C
        self.partial = torch.empty(partial, dtype=torch.float32, device=y.device)
        self.blocks: dict[str, Any] = {"BLOCK_M": BLOCK_M, "BLOCK_C": BLOCK_C, "WIDE": _wide(y), "num_warps": 4}


def _wide(y: Tensor) -> bool:
    # with room for the elements that a last tile addresses beyond the end
    return y.numel() + WORDS * 32 + BLOCK_M * y.shape[1] >= 2**31


def _kind(residual: Any, proj: Any) -> str:
    return "projection" if proj is not None else "none" if residual is None else "residual"


def bn_stats(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, float32."""
    mean, var = (torch.empty(y.shape[1], dtype=torch.float32, device=y.device) for _ in range(2))
    r = _Reduction(y, 2)
    bn_stats_kernel[r.grid](y, mean, var, r.tickets, r.partial, r.rows, r.rows_per_part, C=r.channels, **r.blocks)
    return mean, var


def bn_apply_add_relu(forward: ForwardPass) -> None:
    """See :class:`ForwardPass`."""
    bn, residual, proj, activation, out, mask = forward
    y = bn.y
    second = residual if proj is None else proj.y
    bn_apply_add_relu_kernel[(triton.cdiv(y.numel(), 32 * WORDS),)](
        *bn, second, *first_fields(proj, 5)[1:], out, mask, y.numel(), C=y.shape[1], SECOND=_kind(residual, proj),
        ACTIVATION=activation, WORDS=WORDS, WIDE=_wide(y), num_warps=4,
    )  # fmt: skip


def bn_backward_reduce(backward: BackwardPass) -> tuple[Tensor, Tensor, Tensor]:
    """``sum(dz)``, ``sum(dz * xhat)`` and the projection's (empty without one)."""
    grad_out, mask, bn, proj = backward
    sum_dz, sum_dz_xhat = torch.empty_like(bn.mean), torch.empty_like(bn.mean)
    proj_sum = sum_dz.new_empty(0 if proj is None else sum_dz.shape[0])
    r = _Reduction(bn.y, 2 if proj is None else 3)
    bn_backward_reduce_kernel[r.grid](
        grad_out, mask, *bn[:3], *first_fields(proj, 3), sum_dz, sum_dz_xhat,
        None if proj is None else proj_sum, r.tickets, r.partial, r.rows, r.rows_per_part,
        C=r.channels, MASKED=mask is not None, PROJ=proj is not None, **r.blocks,
    )  # fmt: skip
    return sum_dz, sum_dz_xhat, proj_sum


def bn_backward_apply(backward: BackwardPass, gradients: Gradients) -> None:
    """See :class:`Gradients`."""
    grad_out, mask, bn, proj = backward
    means, proj_means, d_y, d_second = gradients
    y = bn.y
    branch = (*first_fields(proj, 4), *(proj_means or (None, None)))
    bn_backward_apply_kernel[(triton.cdiv(y.numel(), 32 * WORDS),)](
        grad_out, mask, *bn[:4], *means, *branch, d_y, d_second, y.numel(), C=y.shape[1],
        SECOND=_kind(d_second, proj), MASKED=mask is not None, WORDS=WORDS, WIDE=_wide(y), num_warps=4,
    )  # fmt: skip
