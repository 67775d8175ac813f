"""The residual blocks that people write by hand: fused as far as they are equal, and trained to equal losses."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet import explain, fuse
from tests.support.surgery_helpers import assert_same_step, count_launches, randomise


class ShortcutBlock(nn.Module):
    """`shortcut` Sequential, empty where the shapes agree, and F.relu."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut = nn.Sequential()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class DownsampleBlock(nn.Module):
    """torchvision's way: `downsample` or None, one ReLU module used twice."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(cin, cout, 3, stride, 1)
        self.norm_a = nn.BatchNorm2d(cout)
        self.act = nn.ReLU(inplace=True)
        self.conv_b = nn.Conv2d(cout, cout, 3, 1, 1)
        self.norm_b = nn.BatchNorm2d(cout)
        self.downsample = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.act(self.norm_a(self.conv_a(x)))
        return self.act(identity + self.norm_b(self.conv_b(out)))


class KerasStyleBlock(nn.Module):
    """Biased convolutions, BN with Keras's epsilon and momentum, a projection without BN, Identity otherwise."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(cin, cout, 3, stride, 1)
        self.batch_normalization = nn.BatchNorm2d(cout, eps=1e-3, momentum=0.01)
        self.conv2d_1 = nn.Conv2d(cout, cout, 3, padding="same")
        self.batch_normalization_1 = nn.BatchNorm2d(cout, eps=1e-3, momentum=0.01)
        same = stride == 1 and cin == cout
        self.projection: nn.Module = nn.Identity() if same else nn.Conv2d(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.batch_normalization(self.conv2d(x)))
        y = self.batch_normalization_1(self.conv2d_1(y))
        return torch.add(y, self.projection(x)).relu()


class NormFirstBlock(nn.Module):
    """BN placed before the second convolution."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1)
        self.bn = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1)
        same = stride == 1 and cin == cout
        self.skip: nn.Module = nn.Identity() if same else nn.Conv2d(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.bn(F.relu(self.conv1(x))))
        return F.relu(y + self.skip(x))


class PreActivationBlock(nn.Module):
    """BN and ReLU in front of each convolution; nothing after the addition."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + shortcut


class NestedBottleneck(nn.Module):
    """Helper modules of one's own (conv + BN + ReLU), ReLU6 and a Sequential body."""

    class ConvNorm(nn.Module):
        def __init__(self, cin: int, cout: int, k: int, stride: int = 1, relu: bool = True) -> None:
            super().__init__()
            self.c = nn.Conv2d(cin, cout, k, stride, k // 2, bias=False)
            self.n = nn.BatchNorm2d(cout)
            self.relu = relu

        def forward(self, x: Tensor) -> Tensor:
            x = self.n(self.c(x))
            return F.relu6(x) if self.relu else x

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        conv = self.ConvNorm
        self.body = nn.Sequential(conv(cin, 4, 1), conv(4, 4, 3, stride), conv(4, cout, 1, relu=False))
        self.side = conv(cin, cout, 1, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.side(x).add_(self.body(x)).relu_()


# Per block: launches without and with a projection, and what is left over of the tail's parts (names of functions).
BLOCKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, int], list[str]]] = {
    "shortcut": (ShortcutBlock, (2, 2), []),
    "downsample": (DownsampleBlock, (2, 2), []),
    "keras": (KerasStyleBlock, (2, 2), []),
    "norm-first": (NormFirstBlock, (2, 2), ["batch_norm"]),
    "pre-activation": (PreActivationBlock, (2, 2), ["batch_norm", "relu"]),
    "nested": (NestedBottleneck, (3, 3), []),
}


@pytest.mark.parametrize("projected", [False, True], ids=["identity", "projection"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_fused_and_equal(name: str, projected: bool) -> None:
    make, launches, left = BLOCKS[name]
    block = randomise(make(6, 10, 2) if projected else make(10, 10))
    fused = fuse(block)
    assert list(fused.state_dict()) == list(block.state_dict())
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in block.named_modules()]
    x = torch.randn(2, 6 if projected else 10, 9, 7, dtype=torch.float64)
    for training in (True, False):
        assert_same_step(block, fused, x, training)
    with torch.no_grad(), count_launches() as count:
        fused.eval()(x)
    assert count.fused == launches[projected], explain(fused)
    assert [n for n in count.others if n != "conv2d"] == left
    assert explain(fused)[""].launches == launches[projected]


@pytest.mark.parametrize("name", BLOCKS)
def test_training_gives_equal_losses(name: str) -> None:
    make = BLOCKS[name][0]
    torch.manual_seed(0)
    model = nn.Sequential(make(3, 8, 2), make(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).double()
    fused = fuse(copy.deepcopy(model), inplace=True)
    x, target = torch.randn(8, 3, 10, 10, dtype=torch.float64), torch.randint(4, (8,))
    losses: list[list[float]] = []
    for m in (model, fused):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        losses.append([])
        for _ in range(5):
            loss = F.cross_entropy(m(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]
    model.eval()
    fused.eval()
    torch.testing.assert_close(fused(x), model(x), rtol=1e-8, atol=1e-8)


class ProjectionInForward(nn.Module):
    """The bug: each call projects with new random weights that no optimizer ever sees."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.cin, self.cout, self.stride = cin, cout, stride
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(cout)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1 or self.cin != self.cout:
            x = nn.Conv2d(self.cin, self.cout, 1, self.stride)(x)
        return F.relu(out + x)


def test_a_projection_made_in_forward_is_called_a_bug_and_left_alone() -> None:
    model = nn.Sequential(ProjectionInForward(3, 8, 2), ProjectionInForward(8, 8))
    state = torch.get_rng_state()
    fused = fuse(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(fused[0]) is ProjectionInForward
    entry = explain(fused)["0"]
    assert entry.state == "unfused"
    assert "calls a Conv2d that is not one of its registered submodules" in entry.sentence
    assert "which is a bug" in entry.sentence
    # The same class where the projection is not needed is sound, and fused.
    assert explain(fused)["1"].launches == 2
    x = torch.randn(2, 3, 8, 8)
    torch.manual_seed(1)
    expected = model.eval()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(fused.eval()(x), expected)
