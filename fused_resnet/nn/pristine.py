"""Whether the functions of torch that a program replaces are still torch's own.

People replace ``nn.Conv2d.forward``, ``F.conv2d`` and their like, to tile, to count or to inject faults. A program
that replaces the call of a convolution is right only while the call would do what torch wrote. A TorchFunctionMode of
the user's replaces them too, for as long as it is active.
"""

from __future__ import annotations

import os
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import has_torch_function

TORCH = os.path.dirname(torch.__file__) + os.sep

#: Modules that hand their input through in evaluation mode, by torch's own code.
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

_HELD: tuple[tuple[Any, str], ...] = (
    *((nn.Module, name) for name in ("__call__", "_call_impl", "_wrapped_call_impl")),
    *((cls, "forward") for cls in (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.ReLU6, nn.MaxPool2d)),
    *((cls, "forward") for cls in (nn.Identity, nn.Sequential, *DROPOUTS)),
    *((nn.Sequential, "__iter__"), (nn.ModuleList, "__iter__"), (nn.Conv2d, "_conv_forward")),
    *((F, name) for name in ("conv2d", "batch_norm", "relu", "hardtanh", "max_pool2d")),
    *((torch, name) for name in ("relu", "relu_", "batch_norm")),
    *(
        (cls, name)
        for cls in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.MaxPool2d, nn.Identity, nn.Sequential, *DROPOUTS)
        for name in ("__call__", "_call_impl")
    ),
    *((F, name) for name in ("dropout", "relu6")),
    *((torch.Tensor, name) for name in ("__add__", "__iadd__", "add", "add_", "relu", "relu_")),
    (nn.BatchNorm2d, "_check_input_dim"),
)
_OWNERS = tuple(owner for owner, _ in _HELD)
_NAMES = tuple(name for _, name in _HELD)


def is_torchs_own(function: Any) -> bool:
    """Whether ``function`` is written in torch's own files, or in C."""
    code = getattr(function, "__code__", None)
    if code is not None:
        return bool(code.co_filename.startswith(TORCH))
    return isinstance(function, (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType))


# What was replaced before this file was imported is not torch's own either.
_OWN = tuple(f if is_torchs_own(f) else None for f in map(getattr, _OWNERS, _NAMES))


def why_not() -> str | None:
    """None while torch's functions are its own, else a clause that names the one that is not."""
    return _why_not_while_compiling() if torch.compiler.is_compiling() else _why_not() or why_not_mode()


# Without any mode, no function of torch's is overridden for a plain tensor.
_PLAIN = (torch.empty(0, device="cpu"),)


def why_not_mode() -> str | None:
    """None, or a clause that names the TorchFunctionMode under which torch's functions may be others.

    Torch's own modes (``torch.device`` as a context, ``torch.set_default_device``) leave convolutions alone.
    """
    if not has_torch_function(_PLAIN):
        return None
    stack = getattr(torch.overrides, "_get_current_function_mode_stack", None)
    for mode in () if stack is None else stack():
        if type(mode).__module__.split(".")[0] != "torch":
            return f"a TorchFunctionMode is active, {type(mode).__name__}"
    return "a TorchFunctionMode is active" if stack is None else None


def constant(function: Any) -> Any:
    """Have torch.compile call ``function`` when it makes a graph, and take the result as it is.

    As ``torch.compiler.assume_constant_result``, without its import of the whole compiler.
    """
    function._dynamo_marked_constant = True
    return function


@constant
def _why_not_while_compiling() -> str | None:
    return _why_not()


def _why_not() -> str | None:
    now = tuple(map(getattr, _OWNERS, _NAMES))
    if now == _OWN:
        return None
    for owner, name, value, own in zip(_OWNERS, _NAMES, now, _OWN, strict=True):
        # torch.fx and torch.export put functions of theirs in the place of Module.__call__ while they trace.
        tracing = name == "__call__" and is_torchs_own(value)
        if value is not own and not tracing:
            return f"{owner.__name__}.{name} is not torch's own"
    return None
