"""The tail on modules: what one fused launch does with a convolution's and a batch norm's own modules.

``nn`` and ``surgery`` both run their blocks through :func:`conv_bn_act` and :func:`conv_bn_proj_act`. Everything
is read from the modules at each call (parameters, buffers, ``training``, geometry), so that ``load_state_dict``,
``train()``, ``bn.eval()``, an optimizer step or an EMA copy need no notice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import functional

# ---- reading the modules ---------------------------------------------------------------------------------


def is_plain_conv(module: Any) -> bool:
    """Whether ``module`` computes what ``nn.Conv2d`` computes: that class, or a subclass with the same forward."""
    cls = type(module)
    return (
        isinstance(module, nn.Conv2d)
        and cls.forward is nn.Conv2d.forward
        and cls._conv_forward is nn.Conv2d._conv_forward
    )


def is_plain_batch_norm(module: Any) -> bool:
    """Whether ``module`` is ``nn.BatchNorm2d`` or ``nn.SyncBatchNorm`` (as left by convert_sync_batchnorm)."""
    return isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and type(module).forward in (
        nn.BatchNorm2d.forward,
        nn.SyncBatchNorm.forward,
    )


def is_frozen_batch_norm(module: Any) -> bool:
    """Whether ``module`` has the four tensors of a frozen batch norm (torchvision's, detectron's, one's own).

    Only the structure is looked at here; that its forward is the affine map of those four is for the
    surgery's comparison to say.
    """
    if not isinstance(module, nn.Module) or type(module).__module__.startswith("torch.nn."):
        return False
    if isinstance(module, _BatchNorm):
        return False
    vectors = [getattr(module, name, None) for name in ("weight", "bias", "running_mean", "running_var")]
    first = vectors[0]
    return isinstance(first, Tensor) and all(
        isinstance(v, Tensor) and v.dim() == 1 and v.shape == first.shape for v in vectors
    )


def uses_batch_statistics(bn: nn.Module | None) -> bool:
    """Whether ``bn`` would normalise with the statistics of the batch now; the rule of ``nn.BatchNorm2d``."""
    if not isinstance(bn, _BatchNorm):
        return False
    return bn.training or (bn.running_mean is None and bn.running_var is None)


_eps_of_type: dict[type, float] = {}


def batch_norm_eps(bn: nn.Module) -> float:
    """``bn.eps``; measured on a one-channel probe for frozen batch norms that write their eps in their forward."""
    eps = getattr(bn, "eps", None)
    if eps is not None:
        return float(eps)
    cls = type(bn)
    if cls not in _eps_of_type:
        _eps_of_type[cls] = _measure_eps(bn)
    return _eps_of_type[cls]


def _measure_eps(bn: nn.Module) -> float:
    # With gamma = 1, beta = 0, mean = 0, the output for an input of 1 is 1 / sqrt(var + eps). The variance is
    # taken tiny so that eps is what remains.
    variance = 2.0**-40
    channels = bn.get_buffer("running_var").shape[0]
    probe = object.__new__(type(bn))
    nn.Module.__init__(probe)
    probe.__dict__.update({k: v for k, v in bn.__dict__.items() if not k.startswith("_")})
    for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", variance)):
        probe.register_buffer(name, torch.full((channels,), value, dtype=torch.float64))
    probe.eval()
    with torch.no_grad():
        y = float(probe(torch.ones(1, channels, 1, 1, dtype=torch.float64)).flatten()[0])
    eps = 1.0 / (y * y) - variance
    return float(f"{eps:.6g}") if eps > variance else 0.0


def why_not_bypassed(module: nn.Module) -> str | None:
    """None, or why calling ``module`` cannot be replaced by reading its tensors: it has hooks or its own forward."""
    if module._forward_pre_hooks:
        return "has a forward pre-hook"
    if module._forward_hooks:
        return "has a forward hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has a backward hook"
    if "forward" in module.__dict__:
        return "has a forward of its own (set on the instance)"
    return None


def _same_padding(conv: nn.Conv2d) -> tuple[tuple[int, int], bool]:
    """The numeric padding of ``conv`` and whether one number per side says it all (``"same"`` may be uneven)."""
    padding: Any = conv.padding
    if not isinstance(padding, str):
        return tuple(padding), True
    if padding == "valid":
        return (0, 0), True
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return (total[0] // 2, total[1] // 2), not (total[0] % 2 or total[1] % 2)


def why_not_fusable(conv: nn.Conv2d) -> str | None:
    """None, or the sentence fragment why this convolution is not one the operator computes."""
    if conv.padding_mode != "zeros":
        return f"pads with {conv.padding_mode!r}, only zeros can be fused"
    if isinstance(conv.padding, str) and not _same_padding(conv)[1]:
        return f"has padding 'same' for an even kernel {tuple(conv.kernel_size)}, which pads unevenly"
    return None


def is_projection(conv: nn.Conv2d) -> bool:
    """Whether ``conv`` can be the second accumulator of a tail: 1x1, padding 0, one group."""
    return conv.kernel_size == (1, 1) and conv.groups == 1 and _same_padding(conv)[0] == (0, 0)


# ---- running the tail ------------------------------------------------------------------------------------

_BNTensors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _bn_tensors(bn: Any) -> _BNTensors:
    if bn is None:
        return None, None, None, None
    return bn.weight, bn.bias, bn.running_mean, bn.running_var


def _eps(bn: Any) -> float:
    return 1e-5 if bn is None else batch_norm_eps(bn)


def _geometry(conv: nn.Conv2d) -> dict[str, Any]:
    padding = _same_padding(conv)[0]
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


def is_plain_max_pool(module: Any) -> bool:
    """Whether ``module`` is an ``nn.MaxPool2d`` of which a window, a stride and a padding say it all."""
    return (
        type(module) is nn.MaxPool2d and not module.return_indices and not module.ceil_mode and _is_one(module.dilation)
    )


def _is_one(value: Any) -> bool:
    return value in (1, (1, 1))


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
