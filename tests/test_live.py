"""A fused model leaves everything as eager has it: Parameters, strides of what the caller sees, references."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from surgery_helpers import randomise
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fused_resnet
from fused_resnet import fuse, tails

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
    leave = tails.leave

    def noting(x: Any) -> Any:
        if isinstance(x, tails.Value):
            left.append(tuple(x.tensor.shape))
        return leave(x)

    monkeypatch.setattr(tails, "leave", noting)
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
