"""fused_resnet: the residual tail of a ResNet, conv -> BN -> add -> ReLU, in one pass.

Importing this package never needs a GPU, nvcc, Triton or a built extension, and prints nothing;
``fused-resnet doctor`` says in one sentence each what is there and what is not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .core import lazy_operators
from .core.version import __version__

# Where each public name lives. Loaded on first use, so that `import fused_resnet` stays quick.
_LAZY: dict[str, str] = {
    "FusedBasicBlock": "nn",
    "FusedBottleneck": "nn",
    "FusedConvBNReLU": "nn",
    "decompositions": "ops",
    "explain": "surgery",
    "export": "surgery",
    "freeze": "surgery",
    "fuse": "surgery",
    "refresh": "surgery",
    "selftest": "tuning",
    "tune": "tuning",
    "unfuse": "surgery",
}
_MODULES = frozenset(
    {"backends", "devices", "functional", "models", "nn", "ops", "roofline", "surgery", "testing", "tuning"}
)

__all__ = [
    "FusedBasicBlock",
    "FusedBottleneck",
    "FusedConvBNReLU",
    "__version__",
    "backends",
    "decompositions",
    "devices",
    "explain",
    "export",
    "freeze",
    "functional",
    "fuse",
    "models",
    "nn",
    "ops",
    "refresh",
    "roofline",
    "selftest",
    "surgery",
    "testing",
    "tune",
    "tuning",
    "unfuse",
]

if TYPE_CHECKING:
    from . import backends, devices, functional, models, nn, ops, roofline, surgery, testing, tuning
    from .nn import FusedBasicBlock, FusedBottleneck, FusedConvBNReLU
    from .ops import decompositions
    from .surgery import explain, export, freeze, fuse, refresh, unfuse
    from .tuning import selftest, tune


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


lazy_operators.announce(lambda: importlib.import_module(".ops", __name__))
