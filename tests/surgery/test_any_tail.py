"""Convolutions with a batch norm outside of residual blocks: fused wherever they are, equal in every mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_resnet import explain, freeze, fuse
from fused_resnet.surgery import discovery
from tests.support.surgery_helpers import assert_same_step, launches, outputs, randomise


def conv_bn(c: int, k: int, *more: nn.Module, kernel: int = 3, **options: Any) -> list[nn.Module]:
    return [nn.Conv2d(c, k, kernel, padding=kernel // 2, bias=False, **options), nn.BatchNorm2d(k), *more]


class Plain(nn.Module):
    """VGG's layout."""

    def __init__(self) -> None:
        super().__init__()
        pool = nn.MaxPool2d(2)
        self.features = nn.Sequential(*conv_bn(3, 8, nn.ReLU(True)), pool, *conv_bn(8, 12, nn.ReLU(True)), pool)
        self.classifier = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class Unit(nn.Module):
    def __init__(self, c: int, k: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv, self.bn = conv_bn(c, k, kernel=kernel)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class Branches(nn.Module):
    """Inception's layout."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.one, self.three = Unit(c, 4, 1), nn.Sequential(Unit(c, 4, 1), Unit(4, 8))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), Unit(c, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.pool(x)], 1)


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = Unit(3, 8), Branches(8), Branches(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.stem(x))).mean((2, 3))


class Dense(nn.Module):
    """DenseNet's layer: the batch norm comes first, and layers take lists."""

    def __init__(self, c: int, k: int = 4) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(c), nn.Conv2d(c, 4 * k, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * k), nn.Conv2d(4 * k, k, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(torch.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(torch.relu(self.norm2(x)))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = Unit(3, 8), nn.ModuleList([Dense(8), Dense(12)])
        self.last = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        return torch.relu(self.last(torch.cat(features, 1)))


class Append(nn.Sequential):
    """VoVNet's: a forward with two arguments."""

    def forward(self, x: Tensor, found: list[Tensor]) -> Tensor:  # type: ignore[override]
        for module in self:
            x = module(x)
            found.append(x)
        return torch.cat(found, 1)


class Aggregation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.middle, self.last = Append(Unit(3, 8), Unit(8, 8)), Unit(19, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(x, [x]))


class Levels(nn.Module):
    """A detector's head: its forward takes a list, of which nothing is known beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList([nn.Sequential(Unit(3, 8), *conv_bn(8, 8)) for _ in range(2)])

    def forward(self, x: Any) -> list[Tensor]:
        levels = [x, x[:, :, ::2]] if isinstance(x, Tensor) else list(x)
        return [tower(level) for tower, level in zip(self.towers, levels, strict=True)]


class Taps(nn.Module):
    """A convolution's output read twice, and one batch norm used for two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.bn, self.c, self.bn_c = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        y = torch.relu(self.bn(a)) * a.sigmoid() + self.bn(self.b(x)).tanh()
        return self.bn_c(self.c(y))


class Grouped(nn.Module):
    """ShuffleNet's and MobileNet's: depthwise, grouped, split in two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Unit(3, 16)
        depthwise, grouped = conv_bn(8, 8, groups=8, stride=2), conv_bn(8, 8, groups=2, stride=2)
        self.left = nn.Sequential(*depthwise, *conv_bn(8, 8, nn.ReLU(), kernel=1))
        self.right = nn.Sequential(*grouped, nn.ReLU6())

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        return torch.cat((self.left(left), self.right(right)), 1)


MODELS: dict[type[nn.Module], int] = {
    Plain: 2, Inception: 9, DenseNet: 3, Aggregation: 3, Levels: 4, Taps: 1, Grouped: 4,
}  # fmt: skip


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_every_pair_is_fused_and_equal(cls: type[nn.Module]) -> None:
    model = randomise(cls())
    x = torch.randn(2, 3, 18, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fused = fuse(model, everywhere=True)
    for training in (True, False, None):
        if training is None:  # some batch norms in the other mode
            for m in (model, fused):
                for bn in [b for b in m.modules() if isinstance(b, nn.BatchNorm2d)][::2]:
                    bn.train()
        for image in (x, x.to(memory_format=torch.channels_last)):
            assert_same_step(model, fused, image, training)
    assert launches(fused.eval(), x) == MODELS[cls]
    assert sum(e.launches for e in explain(fused)) == MODELS[cls]
    frozen = freeze(fused.float())
    with torch.no_grad():
        for _ in range(2):
            for got, expected in zip(outputs(frozen(x.float())), outputs(model.eval()(x)), strict=True):
                torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
                assert got.stride() == expected.stride()


def test_a_hook_inside_is_honoured() -> None:
    model = randomise(Inception()).eval()
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    fused, seen = fuse(model, everywhere=True), []
    fused.a.three[0].conv.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    for m in (model, fused):
        m.b.register_forward_hook(lambda module, args, out: out * 2)
    assert_same_step(model, fused, x, None)
    assert seen == [(2, 4, 9, 7)]
    assert launches(fused, x) == MODELS[Inception] - 1


def test_a_block_whose_callers_give_it_more_joins_them() -> None:
    class Block(nn.Module):
        def __init__(self, stride: int) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(8, 8, 3, stride, 1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
            return torch.relu(self.bn(self.conv(x)) + (x if shortcut is None else shortcut))

    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.first, self.second, self.third = nn.MaxPool2d(2), Block(2), Block(1), Block(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x, self.pool(x)), None))

    model = randomise(nn.Sequential(Tree(), Tree())).eval()
    fused = fuse(model, everywhere=True)
    x = torch.randn(2, 8, 16, 12, dtype=torch.float64)
    assert launches(fused, x) == 6
    for training in (True, False):
        assert_same_step(model, fused, x, training)
    assert [e.state for e in explain(fused)] == ["fused"] * len(explain(fused))


def test_the_comparison_stands_ill_conditioned_networks() -> None:
    """Batch statistics over two values, again and again: the original itself moves with every rounding."""
    stages = [nn.Sequential(*conv_bn(c, k, nn.ReLU(), stride=2)) for c, k in ((3, 8), *[(8, 8)] * 7)]
    model = nn.Sequential(*stages)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages, self.conv, self.bn = model, *conv_bn(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(self.stages(x)))

    assert explain(fuse(Whole(), everywhere=True)).unfused == ()


def test_widths_make_no_new_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[nn.Module] = []
    difference = discovery.difference
    monkeypatch.setattr(discovery, "_verdicts", {})
    monkeypatch.setattr(discovery, "difference", lambda m, p, o: compared.append(m) or difference(m, p, o))
    model = nn.ModuleList([Unit(c, k) for c, k in ((4, 8), (8, 16), (16, 64), (64, 512))])
    assert len(explain(fuse(model, everywhere=True)).fused) == 4
    assert len(compared) == 1


def test_a_width_that_the_code_asks_for_is_no_other() -> None:
    class Asks(nn.Module):
        def __init__(self, c: int, k: int) -> None:
            super().__init__()
            self.conv, self.bn = conv_bn(c, k)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            return torch.relu(y) if self.conv.out_channels == 16 else y * 2

    model = randomise(nn.Sequential(Asks(4, 16), Asks(16, 32), Asks(32, 16), Asks(16, 32))).eval()
    fused = fuse(copy.deepcopy(model), everywhere=True)
    assert [e.tails for e in explain(fused)] == [("conv+bn+relu",), ("conv+bn",)] * 2
    assert_same_step(model, fused, torch.randn(2, 4, 9, 7, dtype=torch.float64), False)


class Activated(nn.BatchNorm2d):
    """timm's: a batch norm that holds an activation."""

    def __init__(self, c: int, act: nn.Module) -> None:
        super().__init__(c)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * 2


ACTIVATIONS = (nn.SiLU(True), nn.Hardswish(), nn.LeakyReLU(0.1, True), nn.GELU(), nn.Hardtanh(-0.5, 2.0), Custom())


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda act: type(act).__name__)
@pytest.mark.parametrize("own", [False, True], ids=["after it", "in the batch norm"])
def test_an_activation_that_no_tail_has(act: nn.Module, own: bool) -> None:
    def pair(c: int, k: int, **options: Any) -> list[nn.Module]:
        conv = nn.Conv2d(c, k, 3, padding=1, **options)
        return [conv, Activated(k, copy.deepcopy(act))] if own else [conv, nn.BatchNorm2d(k), copy.deepcopy(act)]

    model = randomise(nn.Sequential(*pair(3, 8), *pair(8, 8, groups=8), nn.AvgPool2d(2), *pair(8, 8)))
    fused = fuse(model, everywhere=True)
    x = torch.randn(2, 3, 10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        for image in (x, x.to(memory_format=torch.channels_last)):
            assert_same_step(model, fused, image, training)
    assert launches(fused.eval(), x) == 3
    frozen = freeze(fused)
    with torch.no_grad():
        for image in (x, x.to(memory_format=torch.channels_last)):
            got, expected = frozen(image), model.eval()(image)
            torch.testing.assert_close(got, expected)
            assert got.stride() == expected.stride() == fused(image).stride()
    seen = []
    hooked = next(m for m in fused.modules() if type(m) is type(act))
    hooked.register_forward_hook(lambda module, args, out: seen.append(out.stride()))
    assert_same_step(model, fused, x, False)
    assert seen == [(8 * 80, 80, 8, 1)]
