"""Sums of mixed layouts: what comes out of a fused block has the strides, and the shape, of eager's."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet import explain, freeze, fuse
from fused_resnet.nn import FusedConvBNReLU
from tests.support.surgery_helpers import randomise

SUMS = {
    "body + x": lambda y, x: y + x,
    "x + body": lambda y, x: x + y,
    "torch.add": lambda y, x: torch.add(x, y),
    "x.add": lambda y, x: x.add(y),
}
LAYOUTS = {
    "NCHW": lambda x: x.contiguous(),
    "NHWC": lambda x: x.contiguous(memory_format=torch.channels_last),
    "WHCN": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "HNWC": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "every other channel of NCHW": lambda x: torch.cat((x, x), 1).view(-1, 2, *x.shape[1:]).transpose(1, 2)[:, :, 0],
    "every other channel of NHWC": lambda x: torch.cat((x, x), 1).contiguous(memory_format=torch.channels_last)[:, ::2],
    "expanded": lambda x: x[:, :, :1].expand(x.shape),
    "one image for all": lambda x: x[:1].expand(x.shape),
}


class Block(nn.Module):
    def __init__(self, width: int, add: Any, projection: bool, activation: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, width, 3, padding=1), nn.BatchNorm2d(width)
        self.short = nn.Conv2d(width, width, 1) if projection else None
        self.add, self.activation = add, activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y = self.add(y, x if self.short is None else self.short(x))
        return y if self.activation is None else self.activation(y)


def steps(x: Tensor) -> list[int]:
    """The strides that matter: of dimensions with more than one entry."""
    return [step for size, step in zip(x.shape, x.stride(), strict=True) if size > 1]


def assert_as_eager(got: Tensor, expected: Tensor, what: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
    assert steps(got) == steps(expected), f"{what}: {got.stride()} instead of {expected.stride()}"


@pytest.mark.parametrize("seed", range(4))
def test_the_layout_of_a_sum(seed: int) -> None:
    choose = random.Random(seed)
    for _ in range(12):
        width, layout = choose.choice((1, 4)), choose.choice(list(LAYOUTS))
        sizes = (choose.choice((1, 2)), width, choose.choice((1, 5)), choose.choice((1, 4)))
        name, projection = choose.choice(list(SUMS)), choose.random() < 0.4
        model = randomise(Block(width, SUMS[name], projection, choose.choice((None, F.relu))))
        model.train(choose.random() < 0.3)
        for module in model.children():
            if choose.random() < 0.4:
                module.to(memory_format=torch.channels_last)
        x = LAYOUTS[layout](torch.randn(sizes, dtype=torch.float64))
        if model.training and sizes[0] * sizes[2] * sizes[3] == 1:
            continue
        fused = fuse(model)
        assert explain(fused)[""].state == "fused"
        what = (name, layout, sizes, projection, model.training)
        with torch.no_grad():
            assert_as_eager(fused(x), model(x), what)
            if not model.training:
                model.float()
                x = LAYOUTS[layout](x.float())
                expected, got = model(x), freeze(model)(x)
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
                assert steps(got) == steps(expected), what


SHAPES = [(1, 4, 1, 1), (2, 1, 5, 4), (2, 4, 1, 4), (1, 1, 1, 1), (5, 4), (4,), (3, 2, 4, 5, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_a_residual_is_expanded_as_in_eager(shape: tuple[int, ...], training: bool) -> None:
    block = randomise(FusedConvBNReLU(3, 4)).train(training)
    eager = copy.deepcopy(block)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected, got = F.relu(eager.bn(eager.conv(x)) + residual), block(x, residual)
    assert_as_eager(got, expected, shape)
    wanted = torch.autograd.grad(expected.square().sum(), (x, residual, *eager.parameters()))
    grads = torch.autograd.grad(got.square().sum(), (x, residual, *block.parameters()))
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_a_residual_that_does_not_fit_raises() -> None:
    block = randomise(FusedConvBNReLU(3, 4)).eval()
    x, residual = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="must match the size"):
        block(x, residual)


def test_a_sum_that_expands_with_the_size_of_the_input() -> None:
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1, stride=2), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn(self.conv(x)) + x[:, :, ::2, ::2].mean((2, 3), keepdim=True))

    model = randomise(Grows()).eval()
    fused = fuse(model)
    with torch.no_grad():
        for size in (1, 2, 3, 5):
            x = torch.randn(2, 4, size, size, dtype=torch.float64)
            assert_as_eager(fused(x), model(x), size)
