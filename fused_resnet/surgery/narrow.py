"""A narrower form of a module: the same code and structure on a fraction of the channels.

Torch's convolutions, batch norms and linear layers do with 512 channels what they do with 8. All widths are divided by
one number, so that what is concatenated, split or grouped still fits; a module that does not run in this form, or
whose code asks for a width, is compared as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .trace import is_batch_norm

_LEAST = 4  # channels that are left; fewer (an image's 3) are not divided, so that the division has an inverse


class Narrowing:
    """The division of all widths of some modules by one number."""

    def __init__(self, divisor: int) -> None:
        self.divisor = divisor

    def width(self, channels: int) -> int:
        """What becomes of ``channels``."""
        return channels // self.divisor if channels >= _LEAST and channels % self.divisor == 0 else channels

    def whole(self, channels: int) -> int:
        """What has become ``channels``."""
        return channels * self.divisor if channels >= _LEAST else channels

    def shape(self, module: nn.Module, tensor: Tensor) -> tuple[int, ...]:
        """The shape of ``tensor``, which belongs to ``module``, in the narrower form."""
        if isinstance(module, nn.Conv2d) and tensor.dim() == 4:
            groups = self.groups(module)
            return self.width(module.out_channels), self.width(module.in_channels) // groups, *tensor.shape[2:]
        return tuple(map(self.width, tensor.shape))

    def groups(self, conv: nn.Conv2d) -> int:
        return self.width(conv.groups) if conv.groups == conv.in_channels else conv.groups

    def apply(self, module: nn.Module) -> None:
        """Have the attributes of ``module``, whose tensors have been replaced, say the same."""
        if isinstance(module, nn.Conv2d):
            groups = self.groups(module)
            module.in_channels, module.out_channels = self.width(module.in_channels), self.width(module.out_channels)
            module.groups = groups
        elif isinstance(module, _BatchNorm):
            module.num_features = self.width(module.num_features)
        elif isinstance(module, nn.Linear):
            module.in_features, module.out_features = self.width(module.in_features), self.width(module.out_features)


def narrowing(module: nn.Module, inside: list[nn.Module]) -> Narrowing | None:
    """How ``module`` can be made narrower, with those of its modules that are ``inside``; None where it cannot."""
    if any(not _is_known(m) and next(_tensors(m), None) is not None for m in inside):
        return None  # of what it computes nothing is known
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    # Not what a last convolution makes: numbers of classes are divisible by nothing.
    widths = {m.in_channels for m in convs}
    widths |= {len(t) for m in module.modules() if is_batch_norm(m) for t in _tensors(m) if t.dim() == 1}
    widths = {w for w in widths if w >= _LEAST}
    grouped = [m for m in convs if m.groups not in (1, m.in_channels)]
    whole = math.gcd(*widths) if widths else 1
    for divisor in range(whole, 1, -1):
        if whole % divisor or any(w // divisor < _LEAST for w in widths):
            continue
        if all(w // divisor % m.groups == 0 for m in grouped for w in (m.in_channels, m.out_channels)):
            return Narrowing(divisor)
    return None


def _is_known(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.Linear)) or is_batch_norm(module)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
