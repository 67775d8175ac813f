"""What is left as it is on the CPU because nothing is gained by fusing it, and what is fused all the same."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fused_resnet import explain, freeze, fuse, refresh, unfuse
from fused_resnet.core import extensions
from tests.support.surgery_helpers import assert_same_step, count_launches, launches, randomise

compiled = pytest.mark.skipif(extensions.cpu() is None, reason="needs the extension's own convolutions")


class Unit(nn.Module):
    def __init__(self, c: int, k: int, kernel: int = 3, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, k, kernel, padding=kernel // 2, bias=False, **options)
        self.bn = nn.BatchNorm2d(k)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class Added(nn.Module):
    """A residual block."""

    def __init__(self, c: int, groups: int = 1) -> None:
        super().__init__()
        self.first, self.second = Unit(c, c, 1), Unit(c, c, groups=groups)
        self.conv, self.bn = nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(self.second(self.first(x)))) + x)


class Joined(nn.Module):
    """A convolution that gains between others that do not."""

    def __init__(self, last: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.pool, self.narrow, self.large = (
            Unit(3, 48, stride=2),
            nn.MaxPool2d(2),
            Unit(48, 48, 1),
            Unit(48, 48),
        )
        self.last = last or Unit(48, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.large(self.narrow(self.pool(self.stem(x)))))


LEFT: dict[str, tuple[nn.Module, str]] = {
    "1x1": (Unit(64, 64, 1), "(1x1)"),
    "depthwise": (Unit(64, 64, groups=64), "(depthwise 3x3)"),
    "grouped": (Unit(64, 64, groups=4), "(grouped 3x3)"),
    "strided": (Unit(64, 64, stride=2), "(3x3 with stride 2)"),
    "few channels": (Unit(3, 64), "(3x3 of 3 to 64 channels)"),
    "5x5": (Unit(64, 64, 5), "(5x5)"),
    "depthwise block": (Added(64, groups=64), "(1x1, depthwise 3x3)"),
}


@compiled
@pytest.mark.parametrize("name", LEFT)
def test_what_gains_nothing_is_left_and_says_so(name: str) -> None:
    module, kinds = LEFT[name]
    fused = fuse(module)
    assert explain(fused).fused == ()
    assert f"left as it is: no gain is expected on the CPU {kinds}" in str(explain(fused))
    everywhere = fuse(module, everywhere=True)
    assert explain(everywhere).unfused == ()
    assert explain(everywhere)[""].launches == (3 if isinstance(module, Added) else 1)
    assert fuse(fused, everywhere=True).__class__ is everywhere.__class__  # what is new in it


@compiled
def test_one_that_gains_is_fused_by_itself() -> None:
    assert len(explain(fuse(Unit(32, 32).to(memory_format=torch.channels_last))).fused) == 1
    model = randomise(Joined()).to(memory_format=torch.channels_last)
    fused = fuse(model)
    assert {e.name: e.state for e in explain(fused)} == {
        "": "unfused", "narrow": "unfused", "large": "fused", "last": "unfused",
    }  # fmt: skip
    x = torch.randn(2, 3, 32, 24, dtype=torch.float64)
    for training in (True, False):
        for image in (x, x.to(memory_format=torch.channels_last)):
            assert_same_step(model, fused, image, training)
    assert launches(fused.eval(), x) == 1


class Chain(nn.Module):
    """Two convolutions in one forward, with a pool between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.bn1, self.bn2, self.pool = nn.BatchNorm2d(64), nn.BatchNorm2d(64), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.bn1(self.first(x))))
        return torch.relu(self.bn2(self.second(x)))


@compiled
def test_in_nchw_one_convolution_is_left_and_says_what_helps() -> None:
    for module in (Unit(64, 64), nn.Sequential(Unit(64, 64), nn.MaxPool2d(2))):
        explanation = explain(fuse(module))
        assert explanation.fused == ()
        assert "no gain is expected on the CPU in NCHW (3x3 of 64 to 64 channels)" in str(explanation)
        assert "after model.to(memory_format=torch.channels_last) it is fused" in str(explanation)
        assert explain(fuse(module.to(memory_format=torch.channels_last))).unfused == ()


@compiled
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_chain_is_fused_in_either_layout(layout: torch.memory_format) -> None:
    """Two tails share what the copies of one would cost: VGG's."""
    model = randomise(Chain()).to(memory_format=layout)
    fused = fuse(model)
    assert explain(fused).unfused == ()
    x = torch.randn(2, 64, 8, 8, dtype=torch.float64)
    for training in (True, False):
        assert_same_step(model, fused, x, training)
    assert launches(fused.eval(), x) == 2


@compiled
@pytest.mark.parametrize("name", ["googlenet", "densenet121", "vgg11_bn"])
def test_what_the_default_makes_of_models_without_residuals(name: str) -> None:
    with torch.device("meta"):
        options = {"init_weights": False} if name == "googlenet" else {}
        model: Any = getattr(torchvision.models, name)(weights=None, **options)
    model = model.to_empty(device="cpu")
    counts = []
    for layout in (torch.contiguous_format, torch.channels_last):
        fused = fuse(model.to(memory_format=layout), check=False)
        counts.append(sum(entry.launches for entry in explain(fused)))
    assert counts == {"googlenet": [0, 17], "densenet121": [0, 0], "vgg11_bn": [8, 8]}[name]


@compiled
def test_neighbours_of_what_is_fused_are_fused() -> None:
    """A stem before residual blocks, and blocks that gain nothing by themselves beside one that does."""
    model = randomise(nn.Sequential(Added(16), Added(16, groups=16)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.blocks = nn.Conv2d(3, 16, 7, 2, 3), nn.BatchNorm2d(16), model

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(torch.relu(self.bn(self.conv(x))))

    net = randomise(Net())
    fused = fuse(net)
    assert explain(fused).unfused == ()
    assert launches(fused.eval(), torch.randn(1, 3, 24, 24).double()) == 7


@compiled
@pytest.mark.parametrize("again", ["deepcopy", "pickle", "refresh", "fuse"])
def test_what_was_left_stays_left(again: str) -> None:
    """The plan of a module around it is made anew: it goes on calling what it called."""
    model = randomise(Joined(nn.Sequential(Unit(48, 48), Unit(48, 8, 1)))).to(memory_format=torch.channels_last).eval()
    fused = fuse(model)
    states = {e.name: e.state for e in explain(fused)}
    assert states == {
        "": "fused", "narrow": "unfused", "large": "fused", "last.0": "fused", "last.1": "unfused",
    }  # fmt: skip
    if again == "deepcopy":
        fused = copy.deepcopy(fused)
    elif again == "pickle":
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        fused = torch.load(file, weights_only=False)
    else:
        fused = refresh(fused) if again == "refresh" else fuse(fused)
    assert {e.name: e.state for e in explain(fused)} == states
    x = torch.randn(2, 3, 32, 24, dtype=torch.float64)
    assert launches(fused, x) == 3
    for training in (True, False):
        assert_same_step(model, fused, x, training)
    for whole in (fuse(fused, everywhere=True), fuse(unfuse(fused), everywhere=True)):
        assert {e.state for e in explain(whole)} == {"fused"}
        assert launches(whole.eval(), x) == 5


@compiled
def test_a_frozen_model_leaves_nothing() -> None:
    model = randomise(Joined(nn.Sequential(Unit(48, 48), Unit(48, 8, 1))), torch.float32).eval()
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 32, 24)
    with torch.inference_mode():
        for frozen in (freeze(model), freeze(fuse(model)), freeze(fuse(model, everywhere=True))):
            torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-4)
            with count_launches() as count:
                frozen(x)
            assert count.others == []


def test_a_container_hands_values_through_a_pool() -> None:
    """Inception's fourth branch: eager's max pool is several times slower in NCHW."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Unit(3, 8)
            self.branch = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.ReLU(inplace=True), Unit(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.branch(y) + y

    model = randomise(Net()).eval()
    fused = fuse(model, everywhere=True)
    seen: list[bool] = []
    x = torch.randn(2, 3, 10, 8, dtype=torch.float64)
    assert_same_step(model, fused, x, False)
    assert_same_step(model, fused, x, True)
    fused.branch[0].register_forward_hook(lambda module, args, out: seen.append(out.is_contiguous()))
    assert_same_step(model, fused, x, False)
    assert seen == [True]  # who looks sees eager's strides
