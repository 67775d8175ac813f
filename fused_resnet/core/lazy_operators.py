"""``torch.ops.fused_resnet`` from ``import fused_resnet`` on, its operators registered when one is looked up.

A saved program names operators, and whoever loads it has imported no more than the package.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

_NAMESPACE = "fused_resnet"


def announce(register: Callable[[], object]) -> None:
    """Make the namespace known to torch, now or as soon as somebody imports torch; ``register`` fills it."""
    if "torch" in sys.modules:
        _announce(register)
    else:  # the command line answers without torch
        sys.meta_path.insert(0, _WhenTorchComes(register))


def _announce(register: Callable[[], object]) -> None:
    import torch
    from torch._ops import _OpNamespace

    class Operators(_OpNamespace):
        __module__ = _OpNamespace.__module__  # part of the operators' names in a saved program

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            register()  # whose own look-ups come here as well, and find it begun
            return super().__getattr__(name)

    setattr(torch.ops, _NAMESPACE, Operators(_NAMESPACE))


class _WhenTorchComes(importlib.abc.MetaPathFinder):
    def __init__(self, register: Callable[[], object]) -> None:
        self._register = register

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            load = loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                _announce(self._register)

            loader.exec_module = exec_module
        return spec
