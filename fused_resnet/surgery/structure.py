"""What a module is made of, as a key: modules with equal keys share a plan whose guards hold, and a verdict.

Classes, functions and code are in a key as the objects that they are, never by name.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .plan import ATTRIBUTE, original_class
from .snapshot import Snapshot, Unknown

_REGISTRIES = frozenset(nn.Module().__dict__) - {"training"}


def structure(module: nn.Module, opaque: dict[int, nn.Module]) -> Any:
    """Everything that a plan of ``module``, and its comparison, depend on beside its code; None: cannot be said.

    Of submodules that are called as a whole only the class is in it.
    """
    parts: list[Any] = []
    try:
        _take(module, "", opaque, _Widths(), {}, parts)
    except Unknown:
        return None
    return tuple(parts)


def _take(
    module: nn.Module,
    path: str,
    opaque: dict[int, nn.Module],
    width: _Widths,
    places: dict[int, int],
    parts: list[Any],
) -> None:
    if id(module) in places:  # a module under several names
        parts.append((path, places[id(module)]))
        return
    places[id(module)] = len(places)
    if path and id(module) in opaque:
        parts.append((path, original_class(module)))
        return
    own = {k: v for k, v in module.__dict__.items() if k not in _REGISTRIES and k != ATTRIBUTE}
    if isinstance(module, nn.Conv2d) and module.groups in (1, module.in_channels):
        own.update(in_channels=width(module.in_channels), out_channels=width(module.out_channels))
        own["groups"] = width(module.groups)
    elif isinstance(module, nn.BatchNorm2d):
        own["num_features"] = width(module.num_features)
    tensors = tuple((name, *_form(t, width)) for name, t in (*module._parameters.items(), *module._buffers.items()))
    hooked = bool(module._forward_hooks or module._forward_pre_hooks)
    parts.append((path, original_class(module), Snapshot(own).key, tensors, hooked))
    for name, child in module._modules.items():
        if child is None:
            parts.append((f"{path}.{name}", None))
        else:
            _take(child, f"{path}.{name}", opaque, width, places, parts)


class _Widths:
    """Numbers of channels by their first appearance, as far as only their being equal, or one, can matter.

    A tail is the same of 512 channels as of 64. Code that was traced and asks for the number has it in its guards; what
    was not traced is called by the plan as it was by the forward.
    """

    def __init__(self) -> None:
        self._known: dict[int, int] = {1: -1}

    def __call__(self, number: int) -> int:
        return self._known.setdefault(number, -1 - len(self._known))


def _form(tensor: Any, width: _Widths) -> tuple[Any, ...]:
    if tensor is None:
        return (None,)
    return (*map(width, tensor.shape[:2]), *tensor.shape[2:], tensor.requires_grad)
