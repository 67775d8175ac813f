"""The copies that the comparison runs: random float64 tensors, stand-ins for submodules that are called as a whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import parts
from .narrow import Narrowing
from .trace import is_batch_norm, tensors_of, without_hooks


def randomised(module: nn.Module, replacements: dict[int, nn.Module], narrower: Narrowing | None = None) -> nn.Module:
    """A float64 CPU copy of ``module`` with random tensors and no hooks; submodules replaced as told, by id."""
    memo: dict[int, Any] = dict(replacements)
    generator = torch.Generator().manual_seed(0)
    norms = {id(t) for m in module.modules() if is_batch_norm(m) for t in m.parameters(recurse=False)}
    owners = {id(t): m for m in outside(module, replacements) for _, t in _own_tensors(m)}
    for name, tensor in tensors_of(module):
        owner = owners.get(id(tensor))
        if owner is not None:
            shape = tensor.shape if narrower is None else narrower.shape(owner, tensor)
            memo[id(tensor)] = _random_like(name, tensor, shape, id(tensor) in norms, generator)
    copied = copy.deepcopy(module, without_hooks(module, memo))
    if narrower is not None:
        for m in copied.modules():
            narrower.apply(m)
    return copied


def outside(module: nn.Module, replacements: dict[int, nn.Module]) -> Iterator[nn.Module]:
    if id(module) not in replacements:
        yield module
        for child in module.children():
            yield from outside(child, replacements)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _random_like(name: str, tensor: Tensor, shape: Any, in_norm: bool, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        value = torch.zeros(tensor.shape, dtype=tensor.dtype)
        return value if tensor.is_meta else value.copy_(tensor.detach())
    uniform = torch.rand(shape, generator=generator).double()
    if name.endswith("running_var"):
        value = 0.25 + 2 * uniform
    elif name.endswith("running_mean"):
        value = uniform - 0.5
    elif tensor.dim() <= 1 or in_norm:  # scales and shifts: of either sign, none near zero
        value = torch.where(uniform < 0.5, -0.5 - 2 * uniform, 2 * uniform - 0.5)
    else:
        value = (uniform - 0.5) * (12 / max(uniform[0].numel(), 1)) ** 0.5
    return nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value


class StandIn(nn.Module):
    """Takes the place of a submodule that both sides call as a whole: the same shapes, next to no work."""

    def __init__(self, module: nn.Module, narrower: Narrowing | None = None) -> None:
        super().__init__()
        # Not registered: its tensors are on no device and take no part in the comparison.
        self.__dict__["meta"] = on_meta(module)
        self.narrower = narrower
        self.shapes: dict[tuple[int, ...], tuple[int, ...]] = {}

    def width(self, channels: int) -> int:
        """What becomes of a number of channels of the submodule."""
        return channels if self.narrower is None else self.narrower.width(channels)

    def forward(self, x: Tensor) -> Tensor:
        key = tuple(x.shape)
        if key not in self.shapes:
            n, channels, *size = key
            channels = channels if self.narrower is None else self.narrower.whole(channels)
            with torch.no_grad():
                y = self.__dict__["meta"](torch.empty(n, channels, *size, device="meta", dtype=x.dtype))
            self.shapes[key] = tuple(y.shape)
        _, channels, height, width = self.shapes[key]
        channels = self.width(channels)
        y = F.adaptive_avg_pool2d(x, (height, width))
        # Linear and never expanding: a hundred stand-ins in a row must not magnify rounding.
        return y[:, torch.arange(channels) % x.shape[1]]

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        return self  # it holds no state that a run could change


def on_meta(module: nn.Module) -> nn.Module:
    """A copy in float64 on the meta device, where nothing is computed but shapes."""
    memo: dict[int, Any] = {}
    for _, tensor in tensors_of(module):
        dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    copied = copy.deepcopy(module, without_hooks(module, memo)).eval()
    for m in copied.modules():
        if parts.is_plain_batch_norm(m):  # torch takes it apart into twenty operators there
            m.__dict__["forward"] = _same
    return copied


def _same(x: Tensor) -> Tensor:
    return x


def channels_read(module: nn.Module) -> Iterator[int]:
    """The channels that each convolution reads, those of submodules that are called as a whole included."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            yield m.in_channels
        elif isinstance(m, StandIn):
            yield from (m.width(channels) for channels in channels_read(m.__dict__["meta"]))
