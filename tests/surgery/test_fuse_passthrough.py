"""A module that hands its input through may do something on the way: only torch's own that do not are passed over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from fused_resnet import explain, fuse
from tests.support.surgery_helpers import randomise


class Tap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return x


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return x


class Noise(nn.Module):
    on = False

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.5 if self.on else x


class Callback(nn.Module):
    fn: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.fn is None else self.fn(x)


class ForcedDropout(nn.Dropout):
    force = False

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training or self.force)


PLACES = ("conv-bn", "bn-relu", "bn-add", "add-relu", "after")


class Block(nn.Module):
    def __init__(self, probe: nn.Module, place: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.probe, self.place = probe, place

    def at(self, place: str, x: Tensor) -> Tensor:
        return self.probe(x) if place == self.place else x

    def forward(self, x: Tensor) -> Tensor:
        y = self.at("bn-relu", self.bn1(self.at("conv-bn", self.conv1(x))))
        y = self.at("bn-add", self.bn2(self.conv2(F.relu(y))))
        return self.at("after", F.relu(self.at("add-relu", y + x)))


def pair(probe: nn.Module, place: str) -> tuple[Any, Any, Tensor]:
    block = randomise(Block(probe, place)).eval()
    return block, fuse(block), torch.randn(2, 4, 6, 5, dtype=torch.float64)


@pytest.mark.parametrize("place", PLACES)
def test_what_a_tap_stores_and_counts(place: str) -> None:
    block, fused, x = pair(Tap(), place)
    with torch.no_grad():
        block(x)
        fused(x)
    torch.testing.assert_close(fused.probe.last, block.probe.last)
    block, fused, x = pair(Counter(), place)
    fused.probe.calls[0] = 0
    with torch.no_grad():
        for _ in range(3):
            fused(x)
    assert fused.probe.calls == [3]


SWITCHES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], None]]] = {
    "noise": (Noise, lambda probe: setattr(probe, "on", True)),
    "callback": (Callback, lambda probe: setattr(probe, "fn", lambda x: x * 1.5)),
    "drop-path in training mode": (lambda: DropPath(1 - 1e-9), lambda probe: probe.train()),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SWITCHES)
def test_switched_on_later(name: str, place: str) -> None:
    make, switch = SWITCHES[name]
    block, fused, x = pair(make(), place)
    assert explain(fused)[""].launches == 2  # off, it is nothing
    with torch.no_grad():
        before = fused(x)
        torch.testing.assert_close(before, block(x))
        for b in (block, fused):
            switch(b.probe)
        torch.manual_seed(0)
        expected = block(x)
        torch.manual_seed(0)
        got = fused(x)
        assert not torch.allclose(before, expected)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("place", PLACES)
def test_dropout(place: str) -> None:
    _, fused, x = pair(nn.Dropout(0.5), place)
    assert explain(fused)[""].tails == ("conv1+bn1+relu", "conv2+bn2+add+relu")
    with torch.no_grad():
        before = fused(x)
        fused.probe.train()
        assert not torch.equal(fused(x), before)
    _, fused, x = pair(ForcedDropout(0.5), place)
    with torch.no_grad():
        before = fused(x)
        fused.probe.force = True
        assert not torch.equal(fused(x), before)
