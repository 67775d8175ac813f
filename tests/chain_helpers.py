"""What the tests of chained calls share: fused blocks, inputs, and whether a call was made in one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from surgery_helpers import randomise
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fused_resnet import fuse
from fused_resnet.backends.chain import Chain
from fused_resnet.surgery.plan import original_class


class Plain(nn.Module):
    """One convolution; a bias, a batch norm without affine, another activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32, affine=False), nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)) + x)


def block(kind: str = "basic") -> Any:
    if kind == "basic":
        made: nn.Module = BasicBlock(32, 32)
    elif kind == "projection":
        made = BasicBlock(32, 64, 2, nn.Sequential(nn.Conv2d(32, 64, 1, 2, bias=False), nn.BatchNorm2d(64)))
    elif kind == "bottleneck":
        made = Bottleneck(64, 16)
    else:
        made = Plain()
    return fuse(randomise(made, torch.float32).eval(), inplace=True, check=False)


def image(kind: str = "basic", height: int = 9, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 64 if kind == "bottleneck" else 32, height, 7, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def own(module: Any, x: Tensor) -> Tensor:
    """What the module's own forward makes of x."""
    return original_class(module).forward(module, x)


class Counter:
    """How many calls were made in one piece."""

    def __init__(self, monkeypatch: Any) -> None:
        self.made = 0
        call = Chain.__call__

        def counting(chain: Chain, x: Tensor) -> Tensor | None:
            y = call(chain, x)
            self.made += y is not None
            return y

        monkeypatch.setattr(Chain, "__call__", counting)

    def during(self, function: Callable[[], Any]) -> int:
        before = self.made
        function()
        return self.made - before


def bind(module: Any, x: Tensor, chained: Counter) -> None:
    """Call until the call is made in one piece."""
    assert chained.during(lambda: [module(x) for _ in range(6)]), "was not bound"


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
