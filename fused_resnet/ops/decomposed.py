"""Every operator in those of torch: what an exported program becomes for whoever does not know ours.

They are in no registry of torch's: where the variable ``CI`` is set, Inductor refuses to run an operator that has a
decomposition there, and ``torch.compile`` is to run ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.training import eager
from ..core.convolution import convolution, convolution_backward
from ..core.reference import reference
from ..core.training_call import BackwardPass, BatchNorm, GradMeans, accumulate_dtype
from .tail import POOL, call_arguments
from .training import canonical_vectors, mask_or_none, out_dtype

# Called after functionalization: nothing here writes to a tensor.


def _tail(name: str) -> Callable[..., Tensor]:
    def decomposed(*args: Any, **kwargs: Any) -> Tensor:
        y = reference(call_arguments(name, *args, **kwargs)[0], _batch_norm)
        return F.max_pool2d(y, *args[POOL : POOL + 3]) if name.endswith("max_pool") else y

    return decomposed


def _batch_norm(
    y: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, *, training: bool, eps: float
) -> Tensor:
    """``F.batch_norm``, which at this stage would be an operator that depends on the device."""
    result: Tensor = torch.ops.aten._native_batch_norm_legit_no_training(y, weight, bias, mean, var, 0.1, eps)[0]
    return result


def _conv_bn_stats(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int, *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y = convolution(x, weight, bias, stride, padding, dilation, groups)
    return y, *_bn_stats(y)


def _conv_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, has_bias: bool, stride: Any, padding: Any, dilation: Any, groups: int,
    output_mask: Any, *_: Any, **__: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    wanted = (output_mask[0], output_mask[1], output_mask[2] and has_bias)
    gradients = convolution_backward(grad_y, x, weight, has_bias, stride, padding, dilation, groups, wanted)
    return tuple(x.new_empty(0) if g is None or not want else g for g, want in zip(gradients, wanted, strict=True))


def _bn_stats(y: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    wide = y.to(accumulate_dtype(y.dtype))
    return wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)


def _bn_apply_add_relu(
    y: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    proj_y: Tensor | None, proj_mean: Tensor | None, proj_invstd: Tensor | None, proj_weight: Tensor | None,
    proj_bias: Tensor | None, activation: str = "relu", with_mask: bool = True, *_: Any, **__: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    proj = _branch(proj_y, proj_mean, proj_invstd, proj_weight, proj_bias)
    z = eager.normalised_sum(canonical_vectors(BatchNorm(y, mean, invstd, weight, bias)), residual, proj)
    out = eager.activated(z, activation).to(out_dtype(y, residual, proj_y))
    masked = with_mask and activation != "none"
    return out, eager.passed(z, activation) if masked else y.new_empty(0, dtype=torch.int32)


def _bn_backward_reduce(
    grad_out: Tensor, mask: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, proj_y: Tensor | None,
    proj_mean: Tensor | None, proj_invstd: Tensor | None, *_: Any, **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    proj = _branch(proj_y, proj_mean, proj_invstd)
    bn = canonical_vectors(BatchNorm(y, mean, invstd))
    return eager.BACKEND.backward_reduce(BackwardPass(grad_out, mask_or_none(mask), bn, proj))


def _bn_backward_apply(
    grad_out: Tensor, mask: Tensor, y: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, mean_dz: Tensor,
    mean_dz_xhat: Tensor, proj_y: Tensor | None, proj_mean: Tensor | None, proj_invstd: Tensor | None,
    proj_weight: Tensor | None, proj_mean_dz: Tensor | None, proj_mean_dz_xhat: Tensor | None,
    residual_dtype: torch.dtype | None, *_: Any, **__: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    bn = canonical_vectors(BatchNorm(y, mean, invstd, weight))
    proj = _branch(proj_y, proj_mean, proj_invstd, proj_weight)
    dz = eager.dz_of(BackwardPass(grad_out, mask_or_none(mask), bn, proj))
    d_y = eager.through_bn(bn, dz, _means(bn, mean_dz, mean_dz_xhat)).to(y.dtype)
    if proj is not None:
        means = _means(proj, proj_mean_dz, proj_mean_dz_xhat)
        return d_y, eager.through_bn(proj, dz, means).to(proj.y.dtype)
    return d_y, y.new_empty(0) if residual_dtype is None else dz.to(residual_dtype)


def _branch(y: Tensor | None, *vectors: Any) -> BatchNorm | None:
    return None if y is None else canonical_vectors(BatchNorm(y, *vectors))


def _means(bn: BatchNorm, *means: Any) -> GradMeans:
    return GradMeans(*(mean.to(bn.mean.dtype) for mean in means))


_BY_NAME: dict[str, Callable[..., Any]] = {
    **{name: _tail(name) for name in ("conv_bn_add_relu", "conv_bn_proj_add_relu", "conv_bn_add_relu_max_pool")},
    "conv_bn_stats": _conv_bn_stats,
    "conv_backward": _conv_backward,
    "bn_stats": _bn_stats,
    "bn_apply_add_relu": _bn_apply_add_relu,
    "bn_backward_reduce": _bn_backward_reduce,
    "bn_backward_apply": _bn_backward_apply,
}
_DECOMPOSITIONS = {getattr(torch.ops.fused_resnet, name).default: run for name, run in _BY_NAME.items()}


def decompositions() -> dict[torch._ops.OperatorBase, Callable[..., Any]]:
    """A table that turns a program with our operators into one of core ATen: ``program.run_decompositions(table)``.

    It is torch's default table (``torch.export.default_decompositions()``) with our operators in it: to keep one of
    them, or of torch's, take it out. The results are eager's, rounded after every step as eager does; dynamic shapes
    stay dynamic.
    """
    table = torch.export.default_decompositions()
    table.update(_DECOMPOSITIONS)
    return table
