"""The tail on modules: what one fused launch does with a convolution's and a batch norm's own modules.

``nn`` and ``surgery`` both run their blocks through :func:`conv_bn_act` and :func:`conv_bn_proj_act`. Everything
is read from the modules at each call (parameters, buffers, ``training``, geometry), so that ``load_state_dict``,
``train()``, ``bn.eval()``, an optimizer step or an EMA copy need no notice.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .parts import batch_norm_eps, is_plain_max_pool, numeric_padding, uses_batch_statistics

_BNTensors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _bn_tensors(bn: Any) -> _BNTensors:
    if bn is None:
        return None, None, None, None
    return bn.weight, bn.bias, bn.running_mean, bn.running_var


def _eps(bn: Any) -> float:
    return 1e-5 if bn is None else batch_norm_eps(bn)


def _geometry(conv: nn.Conv2d) -> dict[str, Any]:
    padding = numeric_padding(conv)[0]
    return {"stride": conv.stride, "padding": padding, "dilation": conv.dilation, "groups": conv.groups}


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply the activation called ``activation``: ``relu``, ``relu6`` or ``none``."""
    if activation == "relu":
        return F.relu(x)
    if activation == "relu6":
        return F.relu6(x)
    if activation == "none":
        return x
    raise ValueError(f"activation: expected 'relu', 'relu6' or 'none', got {activation!r}")


def conv_bn_act(
    conv: nn.Conv2d,
    bn: Any,
    x: Tensor,
    residual: Tensor | None = None,
    activation: str = "relu",
    backend: str = "auto",
    winograd: str = "auto",
) -> Tensor:
    """``act(bn(conv(x)) + residual)`` from the modules ``conv`` and ``bn`` (or None); one launch where BN is fixed."""
    if uses_batch_statistics(bn):
        return batch_statistics_tail(conv, bn, x, residual, activation, winograd)
    weight, bias, mean, var = _bn_tensors(bn)
    return functional.conv_bn_add_relu(
        x, conv.weight, conv.bias, weight, bias, mean, var,
        eps=_eps(bn), residual=residual, activation=activation, backend=backend, winograd=winograd,
        cache_weights=not conv.training, **_geometry(conv),
    )  # fmt: skip


def conv_bn_act_max_pool(
    conv: nn.Conv2d,
    bn: Any,
    pool: nn.MaxPool2d,
    x: Tensor,
    activation: str = "relu",
    backend: str = "auto",
    winograd: str = "auto",
) -> Tensor:
    """``pool(act(bn(conv(x))))``, a network's stem; one pass on the CPU where BN is fixed."""
    if uses_batch_statistics(bn) or not is_plain_max_pool(pool):
        return pool(conv_bn_act(conv, bn, x, None, activation, backend, winograd))
    weight, bias, mean, var = _bn_tensors(bn)
    return functional.conv_bn_add_relu_max_pool(
        x, conv.weight, conv.bias, weight, bias, mean, var,
        window=pool.kernel_size, pool_stride=pool.stride, pool_padding=pool.padding,
        eps=_eps(bn), activation=activation, backend=backend, winograd=winograd,
        cache_weights=not conv.training, **_geometry(conv),
    )  # fmt: skip


def conv_bn_proj_act(
    conv: nn.Conv2d,
    bn: Any,
    x: Tensor,
    proj_conv: nn.Conv2d,
    proj_bn: Any,
    proj_x: Tensor,
    activation: str = "relu",
    backend: str = "auto",
    winograd: str = "auto",
) -> Tensor:
    """``act(bn(conv(x)) + proj_bn(proj_conv(proj_x)))``, in one launch where both BNs are fixed."""
    main_batch, proj_batch = uses_batch_statistics(bn), uses_batch_statistics(proj_bn)
    if main_batch and proj_batch:
        branch = functional.conv_bn_branch(proj_x, **_training_arguments(proj_conv, proj_bn), winograd=winograd)
        return batch_statistics_tail(conv, bn, x, branch, activation, winograd)
    if main_batch or proj_batch:  # one of the two BNs is frozen: the projection by itself, then the tail
        identity = conv_bn_act(proj_conv, proj_bn, proj_x, None, "none", backend, winograd)
        return conv_bn_act(conv, bn, x, identity, activation, backend, winograd)
    weight, bias, mean, var = _bn_tensors(bn)
    p_weight, p_bias, p_mean, p_var = _bn_tensors(proj_bn)
    return functional.conv_bn_proj_add_relu(
        x, conv.weight, conv.bias, weight, bias, mean, var,
        proj_x=proj_x, proj_weight=proj_conv.weight, proj_bias=proj_conv.bias,
        proj_bn_weight=p_weight, proj_bn_bias=p_bias, proj_running_mean=p_mean, proj_running_var=p_var,
        proj_stride=_geometry(proj_conv)["stride"], eps=_eps(bn), proj_eps=_eps(proj_bn),
        activation=activation, backend=backend, winograd=winograd,
        cache_weights=not conv.training, **_geometry(conv),
    )  # fmt: skip


# ---- batch statistics: the one place where a training tail is computed -------------------------------------


def _training_arguments(conv: nn.Conv2d, bn: Any) -> dict[str, Any]:
    """A convolution and its batch norm as the training functions take them; counts the batch as ``bn`` would."""
    bn_arguments = functional.batch_norm_arguments(bn)._asdict()
    return {"weight": conv.weight, "bias": conv.bias, **bn_arguments, **_geometry(conv)}


def batch_statistics_tail(
    conv: nn.Conv2d,
    bn: Any,
    x: Tensor,
    residual: Tensor | functional.BatchNormBranch | None,
    activation: str,
    winograd: str = "auto",
) -> Tensor:
    """``act(bn(conv(x)) + residual)`` with the statistics of the batch; updates the running ones as ``bn`` would."""
    arguments = _training_arguments(conv, bn)
    return functional.conv_bn_add_relu_train(
        x, **arguments, residual=residual, activation=activation, winograd=winograd
    )


def drop_packed(*convs: nn.Conv2d) -> None:
    """Forget folded or packed copies of these convolutions' weights."""
    from .backends import packing

    for conv in convs:
        packing.drop(conv.weight)
