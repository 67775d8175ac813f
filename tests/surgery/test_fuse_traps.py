"""Known ways for a swapped model to be silently wrong; each one on a small ResNet of torchvision's blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from fused_resnet import explain, fuse, refresh, unfuse
from tests.support.surgery_helpers import (
    LAUNCHES,
    SmallResNet,
    assert_same,
    assert_same_step,
    count_launches,
    launches,
    randomise,
)


@pytest.fixture
def model() -> SmallResNet:
    return randomise(SmallResNet())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# ---- the swap itself ---------------------------------------------------------------------------------------


def test_nothing_but_the_forward_changes(model: SmallResNet) -> None:
    fused = fuse(model)
    assert [(n, type(m).__name__) for n, m in fused.named_modules()] == [
        (n, type(m).__name__) for n, m in model.named_modules()
    ]
    assert all(isinstance(f, type(m)) for f, m in zip(fused.modules(), model.modules(), strict=True))
    assert list(fused.state_dict()) == list(model.state_dict())
    assert type(model.layer1[0]) is BasicBlock  # fuse without inplace leaves its argument alone
    assert repr(fused) == repr(model)
    assert fused.layer1[0].conv1 is fused.get_submodule("layer1.0.conv1")


def test_in_place_keeps_the_very_parameters(model: SmallResNet, x: Tensor) -> None:
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = copy.deepcopy(model)
    assert fuse(model, inplace=True) is model
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[n] is p for n, p in before.items())
    reference_optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for m, o in ((model, optimizer), (reference, reference_optimizer)):
        m.train()
        m(x).square().sum().backward()
        o.step()
    assert_same_step(reference, model, x, training=False)


def test_round_trip_is_exact(model: SmallResNet, x: Tensor) -> None:
    strides = {n: p.stride() for n, p in model.named_parameters()}
    attributes = {n: set(m.__dict__) for n, m in model.named_modules()}
    expected = model.eval()(x)
    fuse(model, inplace=True)
    assert {n: p.stride() for n, p in model.named_parameters()} == strides
    assert unfuse(model) is model
    assert type(model) is SmallResNet
    assert type(model.layer1[0]) is BasicBlock
    assert {n: p.stride() for n, p in model.named_parameters()} == strides
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == attributes
    assert torch.equal(model(x), expected)
    assert explain(model)["layer1.0"].state == "fusable"


def test_channels_last_weights_keep_their_strides(model: SmallResNet) -> None:
    model.to(memory_format=torch.channels_last)
    strides = {n: p.stride() for n, p in model.named_parameters()}
    unfused = unfuse(fuse(model))
    assert {n: p.stride() for n, p in unfused.named_parameters()} == strides


def test_weights_that_share_memory_go_on_sharing_it(model: SmallResNet, x: Tensor) -> None:
    block = model.layer1[0]
    flat = torch.cat([block.conv1.weight.data.flatten(), block.conv2.weight.data.flatten()])
    n = block.conv1.weight.numel()
    block.conv1.weight.data = flat[:n].view_as(block.conv1.weight)
    block.conv2.weight.data = flat[n:].view_as(block.conv2.weight)
    reference = copy.deepcopy(model)
    fuse(model, inplace=True)
    flat.mul_(2)  # an optimizer over the flat buffer still reaches both weights
    with torch.no_grad():
        reference.layer1[0].conv1.weight.mul_(2)
        reference.layer1[0].conv2.weight.mul_(2)
    assert_same(model.eval(), reference.eval(), x)


def test_fusing_twice_is_fusing_once(model: SmallResNet, x: Tensor) -> None:
    once = fuse(model)
    twice = fuse(once, backend="eager")
    assert type(twice.layer1[0]) is type(once.layer1[0])
    assert type(unfuse(twice).layer1[0]) is BasicBlock
    again = fuse(once, inplace=True)
    assert again is once
    assert launches(again.eval(), x) == LAUNCHES
    assert_same(again, model.eval(), x)


def test_launches(model: SmallResNet, x: Tensor) -> None:
    fused = fuse(model).eval()
    with torch.no_grad(), count_launches() as count:
        fused(x)
    assert count.fused == LAUNCHES
    assert count.others == []
    assert sum(entry.launches for entry in explain(fused)) == LAUNCHES


def test_the_comparison_leaves_no_trace(model: SmallResNet) -> None:
    calls: list[int] = []
    model.layer1[0].conv1.register_forward_hook(lambda *args: calls.append(1))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng, threads, mode = torch.get_rng_state(), torch.get_num_threads(), model.training
    grads = [p.grad for p in model.parameters()]
    fuse(model, inplace=True)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_num_threads() == threads
    assert model.training is mode
    assert calls == []
    assert [p.grad for p in model.parameters()] == grads
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# ---- modes, statistics, weights ----------------------------------------------------------------------------


def test_modes_toggled_after_fuse(model: SmallResNet, x: Tensor) -> None:
    fused = fuse(model)
    for i, training in enumerate((False, True, True, False, True, False)):
        assert_same_step(model, fused, x + i, training)


def test_batch_norms_frozen_in_training(model: SmallResNet, x: Tensor) -> None:
    fused = fuse(model)
    for m in (model, fused):
        m.train()
        for bn in m.modules():
            if isinstance(bn, nn.BatchNorm2d):
                bn.eval()
        m.layer1[1].bn2.train()
    assert_same_step(model, fused, x, training=None)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_after_fuse(model: SmallResNet, x: Tensor, assign: bool) -> None:
    fused = fuse(model).eval()
    fused(x)  # whatever a backend keeps of the old weights, it keeps now
    other = randomise(SmallResNet(), seed=1).eval()
    fused.load_state_dict(other.state_dict(), assign=assign)
    assert_same(fused, other, x)
    assert launches(fused, x) == LAUNCHES


@pytest.mark.parametrize("how", ["data", "no_grad", "copy_", "refresh", "fused-optimizer"])
def test_weights_written_after_fuse(how: str) -> None:
    model = randomise(SmallResNet(), torch.float32).eval()
    fused = fuse(model)
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        fused(x)
    with torch.no_grad():
        for m in (model, fused):
            weight = m.layer1[0].conv2.weight
            if how == "data":
                weight.data.mul_(-1.5)
            elif how == "no_grad":
                weight.mul_(-1.5)
                m.bn1.running_var.mul_(2)
            elif how == "copy_":  # an exponential moving average written into the model
                for p in m.parameters():
                    p.copy_(0.9 * p + 0.1)
            elif how == "refresh":
                weight.data[1, 2, 1, 0] += 1
            else:
                weight.grad = torch.ones_like(weight)
                torch.optim.SGD([weight], lr=0.1, fused=True).step()
    if how == "refresh":
        assert refresh(fused) is fused
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_inference_tensors(x: Tensor) -> None:
    with torch.inference_mode():
        model = randomise(SmallResNet()).eval()
        fused = fuse(model)
        torch.testing.assert_close(fused(x), model(x))
        fused.conv1.weight.mul_(2)
        model.conv1.weight.mul_(2)
        torch.testing.assert_close(fused(x), model(x))


NORMS = {
    "no-affine": lambda c: nn.BatchNorm2d(c, affine=False),
    "no-statistics": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "cumulative": lambda c: nn.BatchNorm2d(c, momentum=None),
    "no-affine-no-statistics": lambda c: nn.BatchNorm2d(c, affine=False, track_running_stats=False),
}


@pytest.mark.parametrize("norm", NORMS)
def test_unusual_batch_norms(norm: str, x: Tensor) -> None:
    model = randomise(SmallResNet(NORMS[norm]))
    fused = fuse(model)
    assert explain(fused)["layer1.1"].launches == 2
    for i, training in enumerate((True, True, False)):
        assert_same_step(model, fused, x + i, training)


def test_zero_variance_and_zero_and_negative_gamma(model: SmallResNet, x: Tensor) -> None:
    with torch.no_grad():
        model.layer1[0].bn1.running_var.zero_()
        model.layer1[0].bn2.weight.zero_()
        model.layer1[1].bn2.weight.neg_()
        model.bn1.weight.fill_(-1)
    fused = fuse(model)
    for training in (False, True):
        # 1 / sqrt(eps) magnifies rounding by 300
        assert_same_step(model, fused, x, training, tolerance=1e-8)


def test_no_projection_instead_of_one(model: SmallResNet, x: Tensor) -> None:
    """Structure changed after fuse: the plan no longer fits, and the module's own forward runs."""
    fused = fuse(model).eval()
    for m in (model.eval(), fused):
        m.layer1[1].downsample.append(nn.Tanh())
    assert_same(fused, model, x)
    assert explain(fused)["layer1.1"].sentence == "runs unfused now: downsample has 3 submodules, it had 2"
    for m in (model, fused):
        m.layer1[0].downsample = nn.Identity()
    assert_same(fused, model, x)
    assert "downsample" in explain(fused)["layer1.0"].sentence
    refresh(fused)
    assert explain(fused)["layer1.0"].state == "fused"
    assert_same(fused, model, x)


# ---- sharing -------------------------------------------------------------------------------------------------


def test_a_shared_block(x: Tensor) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.block = BasicBlock(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(self.stem(x)))

    model = randomise(Recurrent())
    fused = fuse(model)
    assert launches(copy.deepcopy(fused).eval(), x) == 4
    for training in (True, False):
        assert_same_step(model, fused, x, training)


def test_a_shared_batch_norm_and_a_shared_convolution(x: Tensor) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            out = torch.relu(self.bn(self.conv(x)))
            return torch.relu(self.bn(self.conv(out)) + x)

    model = randomise(Shared())
    fused = fuse(model)
    assert explain(fused)[""].launches == 2
    for training in (True, True, False):
        assert_same_step(model, fused, x, training)
