"""The calls of a network: what its fused blocks ask of the operators for an example input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.problem import Problem
from ..selection.calls import Call


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Call] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name.startswith("fused_resnet::conv_bn"):
            from ..ops.tail import to_tail

            tail, _ = to_tail(name.removeprefix("fused_resnet::"), *args, **kwargs)
            call = Call.of(Problem.from_tail(tail), tail)
            self.calls.setdefault(call.key, call)
        return func(*args, **kwargs)


def calls_of(model: nn.Module, example: Tensor | tuple[Any, ...]) -> list[Call]:
    """The distinct calls of ``model(*example)`` without gradients, in the order in which they come.

    ``model`` is fused, or a fused copy of it is used. It runs as it is: in training mode its BNs count the batch.
    """
    from ..surgery import fuse

    inputs = example if isinstance(example, tuple) else (example,)
    calls = _recorded(model, inputs)
    return calls or _recorded(fuse(model), inputs)


def _recorded(model: nn.Module, inputs: tuple[Any, ...]) -> list[Call]:
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        model(*inputs)
    return list(recorder.calls.values())
