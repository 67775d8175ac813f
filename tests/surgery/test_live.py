"""A fused model leaves everything as eager has it: Parameters, strides of what the caller sees, references."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fused_resnet
from fused_resnet import fuse
from fused_resnet.nn import tail
from tests.support.surgery_helpers import randomise

LAST, FIRST = torch.channels_last, torch.contiguous_format


def network(block: Any = BasicBlock) -> Any:
    torch.manual_seed(0)
    return randomise(ResNet(block, [1, 1, 1, 1], num_classes=7), torch.float32).eval()


def layout(t: Tensor) -> tuple[int, ...]:
    """The strides that matter."""
    return tuple(stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1)


def pair(block: Any = BasicBlock) -> tuple[Any, Any]:
    model = network(block)
    return model, fuse(model)


@pytest.mark.parametrize("weights", [FIRST, LAST])
@pytest.mark.parametrize("images", [FIRST, LAST])
@pytest.mark.parametrize("training", [False, True])
def test_whoever_looks_sees_eagers_strides(
    weights: torch.memory_format, images: torch.memory_format, training: bool
) -> None:
    """At every block and stage, by hooks and by the return value; and in the gradients."""
    model, fused = (m.to(memory_format=weights).train(training) for m in pair())
    x = torch.randn(2, 3, 40, 44).contiguous(memory_format=images)
    seen: list[dict[str, tuple[int, ...]]] = []
    for m in (model, fused):
        strides: dict[str, tuple[int, ...]] = {}
        seen.append(strides)
        for name, child in m.named_modules():
            if name.startswith("layer") and name.count(".") < 2:
                child.register_forward_hook(
                    lambda _, args, y, name=name, strides=strides: strides.update(
                        {f"{name} in": layout(args[0]), f"{name} out": layout(y)}
                    )
                )
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        m(leaf).sum().backward()
        strides |= {f"gradient of {name}": layout(p.grad) for name, p in m.named_parameters()}
        strides["gradient of x"] = layout(leaf.grad)
    assert {name: (stride, seen[1][name]) for name, stride in seen[0].items() if stride != seen[1][name]} == {}


@pytest.mark.parametrize("kind", ["fused", "own"])
@pytest.mark.parametrize("images", [FIRST, LAST])
def test_a_blocks_own_output(kind: str, images: torch.memory_format) -> None:
    block = randomise(BasicBlock(32, 32), torch.float32).eval()
    ours = fuse(nn.Sequential(block)) if kind == "fused" else fused_resnet.FusedBasicBlock.from_block(block)
    x = torch.randn(2, 32, 9, 10).contiguous(memory_format=images)
    with torch.no_grad():
        assert ours(x).stride() == block(x).stride()
    assert ours(x).stride() == block(x).stride()


def test_parameters_keep_strides_and_identity() -> None:
    for module in (network(), fused_resnet.models.resnet18(), fused_resnet.FusedBottleneck(32, 8)):
        parameters = list(module.parameters())
        fuse(module, inplace=True)
        module(torch.randn(1, module.conv1.in_channels, 64, 64))
        assert all(p is q and p.is_contiguous() for p, q in zip(module.parameters(), parameters, strict=True))
        assert all(weakref.getweakrefcount(p) == 0 for p in parameters)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view(b, -1)": lambda y: y.view(y.size(0), -1),
    "view(b * c, ...)": lambda y: y.view(-1, *y.shape[2:]),
    "avg_pool2d, view": lambda y: F.avg_pool2d(y, 2).view(y.size(0), -1),
    "view_as_real of pairs": lambda y: torch.view_as_complex(y.view(*y.shape[:3], -1, 2)),
    "as_strided": lambda y: y.as_strided((2, 3), (3, 1)),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_of_features_as_in_eager(view: Callable[[Tensor], Tensor]) -> None:
    model = nn.Sequential(randomise(BasicBlock(32, 32), torch.float32)).eval()
    fused, x = fuse(model), torch.randn(2, 32, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(view(fused(x)), view(model(x)), rtol=1e-4, atol=1e-4)


def test_between_blocks_nothing_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An NCHW network converts its image and what leaves the last stage, whatever lies in between."""
    _, fused = pair(Bottleneck)
    left: list[tuple[int, ...]] = []
    leave = tail.leave

    def noting(x: Any) -> Any:
        if isinstance(x, tail.Value):
            left.append(tuple(x.tensor.shape))
        return leave(x)

    monkeypatch.setattr(tail, "leave", noting)
    for module in fused.modules():  # programs found `leave` when they were compiled
        fusion = module.__dict__.get("_fused_resnet")
        for program in () if fusion is None else fusion.plan.programs:
            program.function.__globals__.update(
                {k: noting for k, v in program.function.__globals__.items() if v is leave}
            )
    with torch.inference_mode():
        fused(torch.randn(2, 3, 64, 64))
    assert [shape for shape in left if len(shape) == 4] == [(2, 2048, 2, 2)]


def test_a_hook_on_a_container_is_called_and_its_value_counts() -> None:
    model, fused = pair()
    x = torch.randn(2, 3, 40, 40)
    for m in (model, fused):
        m.layer2.register_forward_hook(lambda _, args, y: y * 2)
        m.layer3[0].register_forward_pre_hook(lambda _, args: (args[0] - 1,))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_containers_may_change_between_calls() -> None:
    model, fused = pair()
    x, extra = torch.randn(2, 3, 40, 40), randomise(BasicBlock(128, 128), torch.float32, 5).eval()
    with torch.no_grad():
        fused(x)
        for m in (model, fused):
            m.layer2.append(extra)
            m.layer3[0].conv1.stride = 2
            m.layer3[0].downsample[0].stride = [2, 2]
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
        for m in (model, fused):
            m.layer2 = nn.Sequential(nn.Identity(), m.layer2[0], nn.Tanh())
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_an_input_that_is_no_image_is_refused_as_by_eager() -> None:
    _, fused = pair()
    for module in (fused, fused_resnet.FusedBasicBlock(32, 32), fused_resnet.models.resnet18()):
        with pytest.raises((ValueError, RuntimeError), match=r"[Ee]xpected"):
            module(torch.randn(3, 40))


@pytest.mark.parametrize("shape", [(2, 32, 0, 8), (0, 32, 8, 8), (2, 32, 8, 0)])
def test_a_batch_that_eager_refuses_is_refused_and_counted_as_by_eager(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(BasicBlock(32, 32)).train()
    for fused in (fuse(model), nn.Sequential(fused_resnet.FusedBasicBlock(32, 32)).train()):
        outcomes = []
        for m in (model, fused):
            for child in m.modules():
                if isinstance(child, nn.BatchNorm2d):
                    child.reset_running_stats()
            try:
                m(torch.zeros(shape))
                raised = False
            except Exception:
                raised = True
            outcomes.append((raised, [int(b) for n, b in m.named_buffers() if n.endswith("num_batches_tracked")]))
        assert outcomes[0] == outcomes[1]


class OwnCall(BasicBlock):
    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args) * 2


class OwnForward(fused_resnet.FusedBasicBlock):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(x) * 2


def patched(block: Any) -> None:
    own = type(block).forward
    type(block).forward = lambda self, *args: own(self, *args) * 2


def another_class(block: Any) -> None:
    own = type(block).forward
    block.__class__ = type("Other", (type(block),), {"forward": lambda self, *args: own(self, *args) * 2})


@pytest.mark.parametrize("cls", [OwnCall, OwnForward])
def test_a_call_or_forward_of_its_own_is_called(cls: Any) -> None:
    model = randomise(nn.Sequential(nn.Sequential(BasicBlock(32, 32), cls(32, 32))), torch.float32).eval()
    x = torch.randn(2, 32, 9, 9)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(fuse(model)(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fused_resnet.freeze(model)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [patched, another_class])
def test_another_forward_after_fuse_is_called(change: Callable[[Any], None]) -> None:
    class Block(BasicBlock):  # a class of its own, since it is patched
        pass

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.layer = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Sequential(Block(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(F.relu(self.bn(self.conv(x))))

    model = randomise(Net(), torch.float32).eval()
    fused, x = fuse(model), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        expected = model(x) * 2
        change(fused.layer[0])
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)


class Shared(nn.Module):
    """A value with two readers, of which one writes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.pre, self.act = nn.Sequential(nn.ReLU(inplace=True), BasicBlock(32, 32)), nn.ELU()

    def forward(self, x: Tensor) -> Any:
        h = self.bn(self.conv(x))
        return self.act(h) + self.pre(h), h


@pytest.mark.parametrize("images", [FIRST, LAST])
@pytest.mark.parametrize("change", [lambda m: None, lambda m: setattr(m.act, "inplace", True)])
def test_a_reader_that_writes_is_seen_by_the_others(change: Callable[[Any], None], images: torch.memory_format) -> None:
    model = randomise(Shared(), torch.float32).eval()
    fused, x = fuse(model), torch.randn(2, 3, 9, 9).contiguous(memory_format=images)
    with torch.no_grad():
        for m in (model, fused):
            change(m)
        for got, expected in zip(fused(x), model(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_hooks_for_all_modules_reach_blocks_that_are_built_fused() -> None:
    block, x = fused_resnet.FusedBasicBlock(32, 32).eval(), torch.randn(1, 32, 8, 8)
    seen: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(type(m).__name__))
    try:
        block(x)
    finally:
        handle.remove()
    assert "Conv2d" in seen


def test_a_norm_that_only_looks_frozen_is_called() -> None:
    class Centred(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.eps = 1e-5
            for name, value in (("weight", 0.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                self.register_buffer(name, torch.full((channels,), value))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.running_mean, self.running_var, 1 + self.weight, self.bias, False, 0, self.eps)

    ours = fused_resnet.FusedBasicBlock(32, 32, norm_layer=Centred).eval()
    assert ours.why_not_fused() == "bn1 is a Centred, not a batch norm"
