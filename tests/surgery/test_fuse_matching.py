"""What fuse() must refuse: each block here would be silently wrong, or is not what it seems."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet import explain, fuse
from fused_resnet.surgery import check, discovery
from fused_resnet.surgery.program import make_plan
from tests.support.surgery_helpers import assert_same_step, randomise


class Block(nn.Module):
    """The plain block; each test below bends its forward or one of its parts."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, channels: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)

    def body(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x)


class OtherEps(nn.BatchNorm2d):
    """Looks like a batch norm, and differs from one only where gamma is not zero."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum or 0.0, 0.1
        )


class HiddenScale(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-3 * super().forward(x)


@pytest.mark.parametrize("norm", [OtherEps, HiddenScale])
def test_a_difference_behind_a_zero_gamma_is_seen(norm: type[nn.Module]) -> None:
    block = Block(norm)
    nn.init.zeros_(block.bn1.weight)
    nn.init.zeros_(block.bn2.weight)
    nn.init.zeros_(block.bn2.bias)
    fused = fuse(block)
    assert type(fused) is Block
    sentence = explain(fused)[""].sentence
    assert sentence.startswith("left as it is: differs from its fused form: in training mode, at 9x7, ")


def test_without_the_check_the_same_block_would_be_wrong() -> None:
    """The comparison is what protects: the plan by itself looks right."""
    block = randomise(Block(OtherEps)).eval()
    trusted = fuse(block, check=False)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    assert not torch.allclose(trusted(x), block(x))


@pytest.mark.parametrize("what", ["residual", "activation", "bn", "order"])
def test_the_comparison_catches_a_wrong_plan(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans spoilt on purpose: a mutant of the matcher must not pass, whatever the model's own gammas are."""
    from fused_resnet.surgery import match

    find = match.Matcher.tails

    def spoilt(self: match.Matcher, residual: bool = True) -> list[match.MatchedTail]:
        found = find(self, residual)
        tail = found[-1]
        if what == "residual":
            tail.residual = None
        elif what == "activation":
            tail.activation = "none"
        elif what == "bn":
            tail.bn = found[0].bn
        else:
            tail.residual, tail.source = tail.source, tail.residual
        return found

    monkeypatch.setattr(match.Matcher, "tails", spoilt)
    block = Block()
    nn.init.zeros_(block.bn2.weight)
    plan = make_plan(block, {})
    assert plan is not None
    difference = check.difference(block, plan, {})
    assert difference is not None
    assert difference.startswith("differs from its fused form")


# ---- forwards that cannot be planned --------------------------------------------------------------------------


class DataDependent(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x) if x.mean() > 0 else x


class DrawsInPython(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x if random.random() < 0.5 else F.relu(self.body(x) + x)


class DrawsInTorch(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x if torch.rand(1).item() < 0.5 else F.relu(self.body(x) + x)


class Counts(Block):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu(self.body(x) + x)


class KeepsItsOutput(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.last = F.relu(self.body(x) + x)
        return self.last


class MakesItsProjection(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.projection = nn.Conv2d(6, 6, 1)
        return F.relu(self.body(x) + self.projection(x))


class TwoInputs(Block):
    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return F.relu(self.body(x) + skip)


class InAPlainList(Block):
    def __init__(self) -> None:
        super().__init__()
        self.convs = [nn.Conv2d(6, 6, 1)]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(self.convs[0](x)) + x)


REFUSED: dict[type[nn.Module], str] = {
    DataDependent: "decides by the data it is given",
    DrawsInPython: "draws random numbers in its forward",
    DrawsInTorch: "draws random numbers in its forward",
    Counts: "assigns self.calls in its forward",
    KeepsItsOutput: "assigns self.last in its forward",
    MakesItsProjection: "assigns self.projection, a Conv2d made at each call, in its forward",
    TwoInputs: "takes more than one argument",
    InAPlainList: "in a plain list it is missing from parameters() and state_dict()",
}


@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_refused_with_the_reason(cls: type[nn.Module]) -> None:
    model = nn.Sequential(cls(), Block())
    before, states = dict(model[0].__dict__), (torch.get_rng_state(), random.getstate())
    fused = fuse(model, inplace=True)
    assert type(fused[0]) is cls
    assert explain(fused)["0"].sentence.startswith(f"left as it is: {REFUSED[cls]}") or (
        cls is InAPlainList and REFUSED[cls] in explain(fused)["0"].sentence
    )
    assert explain(fused)["1"].launches == 2  # a neighbour is not held back
    assert fused[0].__dict__ == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


# ---- forwards that are planned in part, or only under conditions -------------------------------------------------


class Broadcasts(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x.mean((2, 3), keepdim=True))


class ScaledAdd(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.add(self.body(x), x, alpha=0.5))


class UsedTwice(Block):
    def forward(self, x: Tensor) -> Any:
        out = self.body(x)
        return F.relu(out + x), out


class WritesToItsInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(x)
        return F.relu(self.body(x) + x)


class WritesBetween(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.conv1(x)
        x.mul_(2)  # after the convolution has read it
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(y)))) + x)


class ActivationFirst(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x)) + x


class Circular(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv2.padding_mode = "circular"
        self.conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]


class Squeezed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return F.relu(out * self.gate(out) + x)


class Dropped(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.dropout(self.body(x), 0.3, self.training) + x)


PARTLY: dict[type[nn.Module], tuple[str, ...]] = {
    Broadcasts: ("conv1+bn1+relu", "conv2+bn2"),
    ScaledAdd: ("conv1+bn1+relu", "conv2+bn2"),
    UsedTwice: ("conv1+bn1+relu", "conv2+bn2"),
    WritesToItsInput: ("conv1+bn1+relu", "conv2+bn2+add+relu"),
    ActivationFirst: ("conv1+bn1+relu", "conv2+bn2+relu"),
    Circular: ("conv1+bn1+relu",),
    Squeezed: ("conv1+bn1+relu", "conv2+bn2"),
    Dropped: ("conv1+bn1+relu", "conv2+bn2"),
}


@pytest.mark.parametrize("cls", PARTLY, ids=lambda cls: cls.__name__)
def test_fused_as_far_as_it_is_equal(cls: type[nn.Module]) -> None:
    # before a plain block, because a model without any residual tail is left alone as a whole
    first = cls()
    model = randomise(nn.Sequential(first, Block()) if cls is not UsedTwice else nn.ModuleList([first, Block()]))
    fused = fuse(model, everywhere=True)
    assert explain(fused)["0"].tails == PARTLY[cls], explain(fused)
    x = torch.randn(2, 6, 8, 7, dtype=torch.float64)
    pair = (model[0], fused[0]) if cls is UsedTwice else (model, fused)
    # dropout draws its mask in the order of memory, which channels_last weights change: no equal masks in training
    for training in (True, False) if cls is not Dropped else (False,):
        assert_same_step(*pair, x, training)


def test_a_write_between_reading_and_adding_is_never_moved() -> None:
    model = randomise(WritesBetween()).eval()
    fused = fuse(model)
    x = torch.randn(2, 6, 8, 7, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))
    assert "its own backward fails" in explain(fused)[""].sentence


class Switchable(Block):
    """A plain attribute decides; the plan holds for the value it was made with."""

    def __init__(self) -> None:
        super().__init__()
        self.residual = True

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if self.residual:
            out = out + x
        return F.relu(out)


def test_an_attribute_that_the_forward_reads_is_watched() -> None:
    model = randomise(Switchable())
    fused = fuse(model)
    x = torch.randn(2, 6, 8, 7, dtype=torch.float64)
    assert_same_step(model, fused, x, training=False)
    model.residual = fused.residual = False
    assert_same_step(model, fused, x, training=False)
    assert explain(fused)[""].reason == "residual is False, the plan was made for True"
    model.residual = fused.residual = True
    assert explain(fused)[""].reason is None


def test_equal_blocks_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[nn.Module] = []
    original = discovery.difference
    monkeypatch.setattr(discovery, "_verdicts", {})
    monkeypatch.setattr(discovery, "difference", lambda m, p, o: calls.append(m) or original(m, p, o))
    other = Block()
    other.conv2.bias = nn.Parameter(torch.zeros(6))
    fuse(nn.Sequential(*(Block() for _ in range(6)), Block(channels=8), other))
    assert len(calls) == 2, "blocks that differ in width alone are equal, a bias makes another"


def test_a_module_in_several_places_has_one_entry() -> None:
    block = Block()
    fused = fuse(nn.Sequential(block, block))
    assert fused[0] is fused[1]
    assert [e.name for e in explain(fused)] == ["0"]
