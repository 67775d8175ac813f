"""A verdict of the comparison belongs to what was compared: a block that only looks equal gets one of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models.resnet import BasicBlock

from fused_resnet import explain, fuse
from fused_resnet.surgery import discovery
from tests.support.surgery_helpers import assert_same, count_launches, randomise


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 8, 9, 7, dtype=torch.float64)


def test_a_convolution_patched_in_an_equal_block(x: Tensor) -> None:
    model = randomise(BasicBlock(8, 8)).eval()
    fuse(model)  # an equal block, seen before in this process
    patched = copy.deepcopy(model)

    def circular(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    for conv in (patched.conv1, patched.conv2):
        conv._conv_forward = circular.__get__(conv)
    assert_same(fuse(patched), patched, x)


class Frozen(nn.Module):
    """A frozen batch norm whose epsilon has another name."""

    def __init__(self, channels: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 0.05)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + self.epsilon).rsqrt())[:, None, None]
        return x * scale + self.bias[:, None, None] - self.running_mean[:, None, None] * scale


def test_two_epsilons_of_one_class(x: Tensor) -> None:
    blocks = [BasicBlock(8, 8, norm_layer=lambda c, e=e: Frozen(c, e)) for e in (1e-5, 0.1)]
    model = nn.Sequential(*blocks).double().eval()
    fused = fuse(model)
    assert [e.state for e in explain(fused)] == ["fused", "fused"]
    assert_same(fused, model, x)
    for m in (model, fused):
        m[0].bn1.epsilon = 0.5
    assert_same(fused, model, x)


def test_the_limits_of_a_relu6(x: Tensor) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.bn(self.conv(x)) + x)

    model = randomise(Block()).eval()
    fused = fuse(model)
    other = copy.deepcopy(model)
    other.act.max_val = fused.act.max_val = 0.25
    assert_same(fused, other, x)
    assert_same(fuse(other), other, x)


def test_blocks_of_several_widths_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[nn.Module] = []
    difference = discovery.difference
    monkeypatch.setattr(discovery, "_verdicts", {})
    monkeypatch.setattr(discovery, "difference", lambda m, p, o: compared.append(m) or difference(m, p, o))
    model = nn.Sequential(BasicBlock(4, 4), BasicBlock(8, 8), BasicBlock(8, 8))
    assert len(explain(fuse(model)).fused) == 3
    assert len(compared) == 1


def test_graph_modules_are_fused_as_what_they_came_from(x: Tensor) -> None:
    model = nn.Sequential(randomise(BasicBlock(8, 8)), randomise(BasicBlock(8, 8), seed=1)).eval()
    traced = torch.fx.symbolic_trace(model)
    fused = fuse(traced)
    for candidate in (fused, copy.deepcopy(fused), fuse(copy.deepcopy(traced).train()).eval()):
        with torch.no_grad(), count_launches() as count:
            torch.testing.assert_close(candidate(x), model(x))
        assert count.fused == 4
    fused.recompile()
    assert_same(fused, model, x)
    for node in fused.graph.nodes:
        if node.op == "output":
            with fused.graph.inserting_before(node):
                node.args = (fused.graph.call_function(torch.mul, (node.args[0], 2.0)),)
    fused.recompile()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), 2 * model(x))


def test_modes_are_carried_over_module_by_module() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model = nn.Sequential(randomise(BasicBlock(8, 8))).eval()
    model[0].bn2.train()
    extractor = create_feature_extractor(model, {"0.add": "out"})
    extractor.eval()
    fused = fuse(extractor)
    assert {n: m.training for n, m in fused.named_modules()} == {n: m.training for n, m in extractor.named_modules()}


def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Sequential(BasicBlock(8, 8))
    prune.l1_unstructured(model[0].conv1, "weight", 0.5)
    model(torch.randn(1, 8, 5, 5))
    with pytest.raises(RuntimeError, match=r"0\.conv1\.weight is computed from other tensors .* \(inplace=True\)"):
        fuse(model)
    fuse(model, inplace=True)
