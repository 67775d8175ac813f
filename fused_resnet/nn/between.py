"""What lies between tails and is the same in any layout: activations, pools, concatenation.

Where eager's activations are NCHW, a tail's are channels_last all the same: these go on with them as they are, instead
of through two copies, and come out strided as eager's wherever something else reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.layout import looks_channels_last, looks_contiguous
from .parts import uses_batch_statistics, why_not_bypassed
from .value import MODULE_CALL, Recorded, Value, apply, enter, leave

_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid),
    *(nn.Tanh, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Softplus, nn.LogSigmoid),
)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d)
_FORWARDS: dict[Any, Any] = {cls: cls.forward for cls in (*_ACTIVATIONS, *_POOLS, nn.BatchNorm2d)}


def is_free(module: Any) -> bool:
    """Whether ``module`` is of a class of torch's of which the layout changes nothing but the strides."""
    return type(module) in _FORWARDS and not getattr(module, "return_indices", False)


def run(module: nn.Module, x: Any) -> Any:
    """``module(x)``, in the layout that the value has where ``module`` is free (:func:`is_free`) and nobody looks."""
    plain = is_free(module) and why_not_bypassed(module) is None and not uses_batch_statistics(module)
    if not plain or type(module).forward is not _FORWARDS[type(module)] or type(module).__call__ is not MODULE_CALL:
        return apply(module, x)
    if getattr(module, "inplace", False) and not x.fresh:
        return apply(module, x)  # somebody may hold what is written to
    return in_any_layout(module, x)


def in_any_layout(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """``function`` of the value as it is, where eager's would be NCHW or channels_last."""
    if isinstance(x, Recorded):
        return x.in_any_layout(function)
    value = enter(x)
    if not _is_dense(value):
        return apply(function, x)
    y = function(value.tensor)
    return Value(y, value.channels_last) if is_image(y) else apply(function, x)


def cat(values: Any, dim: int = 0) -> Any:
    """``torch.cat(values, dim)``, along the channels of images in the layout that they have."""
    recorded = next((x for x in values if isinstance(x, Recorded)), None)
    if recorded is not None:
        return recorded.joined(list(values), dim)
    entered = [enter(x) for x in values]
    if dim != 1 or not all(map(_is_dense, entered)):
        return enter(torch.cat([leave(x) for x in values], dim))
    y = torch.cat([x.tensor for x in entered], 1)
    return Value(y.contiguous(memory_format=torch.channels_last), all(x.channels_last for x in entered))


def is_image(y: Tensor) -> bool:
    """Whether the strides of ``y`` can say which layout it has."""
    return y.dim() == 4 and y.numel() > 0 and y.shape[1] > 1 and (y.shape[2] > 1 or y.shape[3] > 1)


def _is_dense(x: Any) -> bool:
    if not isinstance(x, Value) or not is_image(x.tensor):
        return False
    was = x.original
    return was is None or looks_contiguous(was.shape, was.stride()) or looks_channels_last(was.shape, was.stride())
