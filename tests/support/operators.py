"""Which operators a piece of code runs: what launches a kernel, and what would wait for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_resnet.core.reference import ConvBN, TailArguments

#: They need a value on the host. (A copy to the host shows by its device.)
SYNCHRONISING = {"_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2"}

#: Without a kernel: memory, and views of it.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "lift_fresh"}


class Operators(TorchDispatchMode):
    """Notes the operators that run inside, and the devices of all their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.kernels: list[str] = []
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        self.names.append(name)
        if namespace != "prim" and name not in _FREE and not func.is_view:
            self.kernels.append(name)
        leaves = tree_leaves((args, kwargs, result))
        self.devices |= {t.device.type for t in leaves if isinstance(t, Tensor)}
        self.devices |= {d.type for d in leaves if isinstance(d, torch.device)}
        return result


def on_fake_device(tail: TailArguments, mode: FakeTensorMode, device: str) -> TailArguments:
    """The same call on tensors without values, of a device that need not be there."""

    def move(t: Any) -> Any:
        if isinstance(t, ConvBN):
            return ConvBN(*map(move, t))
        return mode.from_tensor(t).to(device) if isinstance(t, Tensor) else t

    return TailArguments(*map(move, tail))
