"""Autocast for the operators that convolve, written by hand.

``torch.library.register_autocast`` would cast every tensor, running_var included, and to one fixed dtype. Here
x, weight, bias, residual and the projection's follow the *active* autocast dtype, as eager's convolution does,
and the BN vectors are left alone, as eager's batch_norm does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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


def _register(name: str, device_type: str, key: str) -> None:
    op = getattr(torch.ops.fused_resnet, name).default
    arguments = op._schema.arguments
    positions = [i for i, argument in enumerate(arguments) if argument.name in _CAST]
    kept_position = next((i for i, argument in enumerate(arguments) if argument.name == "packed_weights"), None)

    def autocast_kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        full = list(args) + [kwargs.get(argument.name, argument.default_value) for argument in arguments[len(args) :]]
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
