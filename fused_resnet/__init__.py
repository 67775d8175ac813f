"""fused_resnet: the residual tail of a ResNet, conv -> BN -> add -> ReLU, in one pass.

Importing this package never needs a GPU, nvcc, Triton or a built extension, and prints nothing;
``fused-resnet doctor`` says in one sentence each what is there and what is not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. Loaded on first use, so that `import fused_resnet` stays quick.
_LAZY: dict[str, str] = {
    "FusedBasicBlock": "nn",
    "FusedBottleneck": "nn",
    "FusedConvBNReLU": "nn",
    "explain": "surgery",
    "fuse": "surgery",
    "refresh": "surgery",
    "unfuse": "surgery",
    "backends": "",
    "functional": "",
    "models": "",
    "nn": "",
    "ops": "",
    "testing": "",
}

__all__ = ["__version__", *sorted(_LAZY)]

if TYPE_CHECKING:
    from . import backends, functional, models, nn, ops, testing
    from .surgery import explain, fuse, refresh, unfuse
    from .nn import FusedBasicBlock, FusedBottleneck, FusedConvBNReLU


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_LAZY[name] or name}", __name__)
    value = getattr(module, name) if _LAZY[name] else module
    # A function may share its module's name (fuse); the attribute always ends as the function.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
