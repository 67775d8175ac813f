"""Autocast for the operators that convolve, written by hand.

``torch.library.register_autocast`` would cast every tensor, running_var included, and to one fixed dtype. Here
x, weight, bias, residual and the projection's follow the *active* autocast dtype, as eager's convolution does,
and the BN vectors are left alone, as eager's batch_norm does.

On the CPU the weights' casts are kept with their packed copies, and made again when a weight has changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import extensions
from ..core.packed_weights import by_number
from .schemas import LIBRARY

_CAST = frozenset({"x", "weight", "bias", "residual", "proj_x", "proj_weight", "proj_bias"})


def _cast(value: Any, device_type: str, dtype: torch.dtype) -> Any:
    # float64 and tensors of other devices stay: that is eager autocast's own rule
    if (
        isinstance(value, Tensor)
        and value.device.type == device_type
        and value.is_floating_point()
        and value.dtype not in (torch.float64, dtype)
    ):
        return value.to(dtype)
    return value


def _may_keep(weight: Tensor) -> bool:
    """Whether a cast of ``weight`` may serve again: nobody differentiates it, and its bytes can be compared."""
    return (
        weight.dtype is torch.float32
        and weight.device.type == "cpu"
        and type(weight) in (Tensor, torch.nn.Parameter)
        and not torch.is_grad_enabled()
        and type(torch.empty(0)) is Tensor  # no fake tensors here, whose bytes nobody has
        and extensions.cpu() is not None
    )


def _register(name: str, device_type: str, key: str) -> None:
    op = getattr(torch.ops.fused_resnet, name).default
    arguments = op._schema.arguments
    positions = [i for i, argument in enumerate(arguments) if argument.name in _CAST]
    weights = [i for i, argument in enumerate(arguments) if argument.name in ("weight", "proj_weight")]
    kept_position = next((i for i, argument in enumerate(arguments) if argument.name == "packed_weights"), None)

    def autocast_kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        full = list(args) + [kwargs.get(argument.name, argument.default_value) for argument in arguments[len(args) :]]
        # The weights first: among fake ones the number of what keeps them may be symbolic.
        if kept_position is not None and all(_may_keep(full[position]) for position in weights):
            kept = by_number(full[kept_position])
            if kept is not None and kept.checked:
                for position in weights:
                    full[position] = kept.cast(full[position], dtype)
                full[kept_position] = kept.casts.number
        weight = full[1]
        for position in positions:
            full[position] = _cast(full[position], device_type, dtype)
        if kept_position is not None and full[1] is not weight:
            # A cast weight is a new tensor on every call; a packed copy of it could never be found again.
            full[kept_position] = 0
        with torch.autocast(device_type, enabled=False):
            return op(*full)

    LIBRARY.impl(name, autocast_kernel, key)


for _name in ("conv_bn_add_relu", "conv_bn_proj_add_relu", "conv_bn_add_relu_max_pool", "conv_bn_stats"):
    _register(_name, "cuda", "AutocastCUDA")
    _register(_name, "cpu", "AutocastCPU")
