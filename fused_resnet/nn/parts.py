"""Which convolutions, batch norms and max pools the operator can stand for, and why not others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.height_width import height_width

#: Where a module keeps its hooks, and what each is called.
HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward hook",
}


def is_plain_conv(module: Any) -> bool:
    """Whether ``module`` computes what ``nn.Conv2d`` computes: that class, or a subclass with the same forward.

    (That this forward is still torch's is for :mod:`fused_resnet.nn.pristine` to say.)
    """
    cls = type(module)
    return (
        isinstance(module, nn.Conv2d)
        and cls.forward is nn.Conv2d.forward
        and cls._conv_forward is nn.Conv2d._conv_forward
        and cls.__call__ is nn.Module.__call__
        and cls._call_impl is nn.Module._call_impl
    )


def is_plain_relu(module: Any) -> bool:
    """Whether ``module`` computes what ``nn.ReLU`` computes."""
    return isinstance(module, nn.ReLU) and type(module).forward is nn.ReLU.forward


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


def is_torchvisions_frozen_batch_norm(module: Any) -> bool:
    """Whether ``module`` is a frozen batch norm that needs no comparison: torchvision's own forward."""
    written = next((base for base in type(module).__mro__ if "forward" in vars(base)), object)
    return written.__module__ == "torchvision.ops.misc" and is_frozen_batch_norm(module)


def uses_batch_statistics(bn: nn.Module | None) -> bool:
    """Whether ``bn`` would normalise with the statistics of the batch now; the rule of ``nn.BatchNorm2d``."""
    if not isinstance(bn, _BatchNorm):
        return False
    return bn.training or (bn.running_mean is None and bn.running_var is None)


_measured: dict[Any, float] = {}
_MOST_MEASURED = 1024
_PLAIN = (bool, int, float, str, type(None))


def batch_norm_eps(bn: nn.Module) -> float:
    """``bn.eps``; measured on a probe for frozen batch norms that have it under another name, or in their code."""
    eps = getattr(bn, "eps", None)
    if eps is not None:
        return float(eps)
    key = _what_eps_depends_on(bn)
    if key is None:
        return _measure_eps(bn)
    if key not in _measured:
        if len(_measured) >= _MOST_MEASURED:
            _measured.clear()
        _measured[key] = _measure_eps(bn)
    return _measured[key]


def _what_eps_depends_on(bn: Any) -> Any:
    """The code of ``bn`` and every plain value that it can see, or None where it sees others as well."""
    cls = type(bn)
    code = cls.forward.__code__
    seen = cls.forward.__globals__
    values: list[Any] = [(name, seen[name]) for name in code.co_names if name in seen and type(seen[name]) in _PLAIN]
    for scope in (bn.__dict__, *(c.__dict__ for c in cls.__mro__ if c not in nn.Module.__mro__)):
        values += [(name, type(v), v) for name, v in scope.items() if type(v) in _PLAIN]
    if len(bn._parameters) + len(bn._buffers) != 4 or bn._modules:
        return None
    if any(type(v) not in _PLAIN for name, v in bn.__dict__.items() if not name.startswith("_")):
        return None
    return cls, code, tuple(values)


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
    for name, kind in HOOKS.items():
        if getattr(module, name):
            return f"has a {kind}"
    if "forward" in module.__dict__ or "_conv_forward" in module.__dict__:
        return "has a forward of its own (set on the instance)"
    return None


def numeric_padding(conv: nn.Conv2d) -> tuple[tuple[int, int], bool]:
    """The numeric padding of ``conv`` and whether one number per side says it all (``"same"`` may be uneven)."""
    padding: Any = conv.padding
    if not isinstance(padding, str):
        return height_width("padding", padding), True
    if padding == "valid":
        return (0, 0), True
    total = [d * (k - 1) for d, k in zip(height_width("dilation", conv.dilation), conv.kernel_size, strict=True)]
    return (total[0] // 2, total[1] // 2), not (total[0] % 2 or total[1] % 2)


def why_not_fusable(conv: nn.Conv2d) -> str | None:
    """None, or the sentence fragment why this convolution is not one the operator computes."""
    if conv.padding_mode != "zeros":
        return f"pads with {conv.padding_mode!r}, only zeros can be fused"
    if isinstance(conv.padding, str) and not numeric_padding(conv)[1]:
        return f"has padding 'same' for an even kernel {tuple(conv.kernel_size)}, which pads unevenly"
    return None


def is_projection(conv: nn.Conv2d) -> bool:
    """Whether ``conv`` can be the second accumulator of a tail: 1x1, padding 0, one group."""
    return tuple(conv.weight.shape[2:]) == (1, 1) and conv.groups == 1 and numeric_padding(conv)[0] == (0, 0)


def is_plain_max_pool(module: Any) -> bool:
    """Whether ``module`` is an ``nn.MaxPool2d`` of which a window, a stride and a padding say it all."""
    return (
        type(module) is nn.MaxPool2d and not module.return_indices and not module.ceil_mode and _is_one(module.dilation)
    )


def _is_one(value: Any) -> bool:
    return value in (1, (1, 1))


def geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """Stride, padding, dilation and groups of ``conv`` as they are now, two numbers each."""
    return {
        "stride": height_width("stride", conv.stride),
        "padding": numeric_padding(conv)[0],
        "dilation": height_width("dilation", conv.dilation),
        "groups": conv.groups,
    }
