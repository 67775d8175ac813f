"""The fused blocks against torchvision's: same names, same results, same gradients, same statistics."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from fused_resnet import FusedBasicBlock, FusedBottleneck, FusedConvBNReLU
from tests.support.surgery_helpers import assert_same_step, count_launches, randomise

PAIRS = {"basic": (BasicBlock, FusedBasicBlock), "bottleneck": (Bottleneck, FusedBottleneck)}


def downsample(cin: int, cout: int, stride: int, norm: Callable[..., nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), norm(cout))


def pair(kind: str, stride: int = 1, norm: Callable[..., nn.Module] = nn.BatchNorm2d, **kwargs: Any) -> Any:
    """torchvision's block and ours with the same weights, in float64, on 8-channel planes."""
    theirs, ours = PAIRS[kind]
    planes, cout = 8, 8 * ours.expansion
    cin = cout if stride == 1 and kwargs.pop("plain", True) else 12
    down = downsample(cin, cout, stride, norm) if cin != cout or stride != 1 else None
    block = randomise(theirs(cin, planes, stride, down, norm_layer=norm, **kwargs))
    fused = ours(cin, planes, stride, copy.deepcopy(down), norm_layer=norm, **kwargs).double()
    assert list(fused.state_dict()) == list(block.state_dict())
    fused.load_state_dict(block.state_dict(), strict=True)
    return block, fused, cin


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "basic": ("basic", {}),
    "basic-stride": ("basic", {"stride": 2}),
    "basic-projection": ("basic", {"plain": False}),
    "basic-frozen": ("basic", {"stride": 2, "norm": FrozenBatchNorm2d}),
    "bottleneck": ("bottleneck", {}),
    "bottleneck-stride": ("bottleneck", {"stride": 2}),
    "bottleneck-groups": ("bottleneck", {"groups": 4, "base_width": 32}),
    "bottleneck-wide": ("bottleneck", {"base_width": 128, "stride": 2}),
    "bottleneck-dilated": ("bottleneck", {"dilation": 2}),
    "bottleneck-frozen": ("bottleneck", {"norm": FrozenBatchNorm2d}),
    "no-affine": ("basic", {"norm": lambda c: nn.BatchNorm2d(c, affine=False)}),
    "no-running-statistics": ("basic", {"norm": lambda c: nn.BatchNorm2d(c, track_running_stats=False)}),
    "cumulative-momentum": ("bottleneck", {"norm": lambda c: nn.BatchNorm2d(c, momentum=None), "stride": 2}),
    "large-eps": ("basic", {"norm": lambda c: nn.BatchNorm2d(c, eps=0.5, momentum=0.3)}),
    "group-norm": ("basic", {"norm": lambda c: nn.GroupNorm(2, c), "stride": 2}),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_blocks_equal_torchvisions(case: str, training: bool) -> None:
    kind, kwargs = CASES[case]
    block, fused, cin = pair(kind, **kwargs)
    for step in range(3):  # three: a cumulative average shows only from the second batch on
        assert_same_step(block, fused, torch.randn(3, cin, 9, 7, dtype=torch.float64), training, seed=step)


@pytest.mark.parametrize(
    ("kind", "stride", "launches"),
    [("basic", 1, 2), ("basic", 2, 2), ("bottleneck", 1, 3), ("bottleneck", 2, 3)],
)
def test_launches_of_a_block(kind: str, stride: int, launches: int) -> None:
    _, fused, cin = pair(kind, stride)
    x = torch.randn(2, cin, 8, 8, dtype=torch.float64)
    with torch.no_grad(), count_launches() as count:
        fused.eval()(x)
    assert count.fused == launches
    assert count.others == []


def test_a_group_norm_runs_unfused_and_says_so() -> None:
    _, fused, _ = pair("basic", norm=lambda c: nn.GroupNorm(2, c))
    assert fused.why_not_fused() == "bn1 is a GroupNorm, not a batch norm"


@pytest.mark.parametrize("frozen", ["main", "projection"])
def test_one_of_the_two_batch_norms_frozen(frozen: str) -> None:
    block, fused, cin = pair("basic", stride=2)
    for m in (block, fused):
        m.train()
        (m.bn2 if frozen == "main" else m.downsample[1]).eval()
    assert_same_step(block, fused, torch.randn(2, cin, 9, 7, dtype=torch.float64), training=None)


def test_from_block_shares_everything() -> None:
    block, _, cin = pair("bottleneck", stride=2)
    block.eval()
    fused = FusedBottleneck.from_block(block)
    assert fused.training is False
    assert fused.stride == 2
    assert list(fused.state_dict()) == list(block.state_dict())
    assert all(p is q for p, q in zip(fused.parameters(), block.parameters(), strict=True))
    assert_same_step(block, fused, torch.randn(2, cin, 9, 7, dtype=torch.float64), training=False)


def test_from_block_wants_torchvisions_block() -> None:
    with pytest.raises(TypeError, match=r"got a Bottleneck with none missing and bn3, conv3 extra"):
        FusedBasicBlock.from_block(Bottleneck(32, 8))
    with pytest.raises(TypeError, match=r"got a Sequential with conv1, bn1, .* missing"):
        FusedBasicBlock.from_block(nn.Sequential())


def test_hooks_and_parametrizations_of_a_submodule_are_honoured() -> None:
    block, fused, cin = pair("basic")
    x = torch.randn(2, cin, 9, 7, dtype=torch.float64)
    expected = fused.eval()(x)
    seen: list[torch.Size] = []
    handle = fused.bn1.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(fused(x), expected)
    assert len(seen) == 1
    assert fused.why_not_fused() == "bn1 has a forward hook"
    handle.remove()
    assert fused.why_not_fused() is None

    class Double(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    for m in (block, fused):
        torch.nn.utils.parametrize.register_parametrization(m.conv2, "weight", Double())
    assert_same_step(block, fused, x, training=False)


def test_batch_norms_synchronised_later_are_seen() -> None:
    _, fused, cin = pair("basic", stride=2)
    fused.eval()
    x = torch.randn(2, cin, 9, 7, dtype=torch.float64)
    expected = fused(x)
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert type(fused.bn1) is nn.SyncBatchNorm
    with count_launches() as count:
        torch.testing.assert_close(fused(x), expected, rtol=0, atol=0)
    assert count.fused == 2


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast_gives_eagers_dtype(training: bool) -> None:
    torch.manual_seed(0)
    block = BasicBlock(8, 8).train(training)
    fused = FusedBasicBlock.from_block(copy.deepcopy(block))
    x = torch.randn(2, 8, 9, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = block(x), fused(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got.float(), expected.float(), rtol=2e-2, atol=6e-2)


def test_copies_and_pickles() -> None:
    _, fused, cin = pair("bottleneck", stride=2)
    x = torch.randn(2, cin, 9, 7, dtype=torch.float64)
    fused.eval()
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(fused), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(other(x), fused(x), rtol=0, atol=0)


def test_constructor_errors_are_torchvisions_kinds() -> None:
    with pytest.raises(ValueError, match="got groups=2 and base_width=64"):
        FusedBasicBlock(8, 8, groups=2)
    with pytest.raises(NotImplementedError, match="expected dilation=1, got 2"):
        FusedBasicBlock(8, 8, dilation=2)
    with pytest.raises(ValueError, match="expected 'relu', 'relu6' or 'none', got 'gelu'"):
        FusedConvBNReLU(8, 8, activation="gelu")


def test_torchvision_resnet_of_fused_blocks() -> None:
    torch.manual_seed(0)
    fused = torchvision.models.ResNet(FusedBottleneck, [1, 1, 1, 1], num_classes=5)
    plain = torchvision.models.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5)
    plain.load_state_dict(fused.state_dict(), strict=True)
    x = torch.randn(1, 3, 33, 47)
    with torch.inference_mode():
        torch.testing.assert_close(fused.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "relu6", "none"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_conv_bn_relu(activation: str, training: bool) -> None:
    module = randomise(FusedConvBNReLU(6, 8, 3, stride=2, bias=True, groups=2, activation=activation))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = copy.deepcopy(module.conv), copy.deepcopy(module.bn)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            acts: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
                "relu": torch.relu,
                "relu6": nn.functional.relu6,
                "none": lambda t: t,
            }
            return acts[activation](self.bn(self.conv(x)))

    assert_same_step(Plain(), module, torch.randn(2, 6, 9, 7, dtype=torch.float64), training)


def test_conv_bn_relu_adds_a_residual() -> None:
    module = randomise(FusedConvBNReLU(4, 8)).eval()
    x, residual = torch.randn(2, 4, 5, 5).double(), torch.randn(2, 8, 5, 5).double()
    torch.testing.assert_close(module(x, residual), torch.relu(module.bn(module.conv(x)) + residual))
    module.bn.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(module(x, residual), torch.relu(module.bn(module.conv(x)) + residual))
