"""Frozen models: the live model's answers, the same bits from the first call on, and nothing else of it lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import fused_resnet
from fused_resnet import freeze, fuse
from fused_resnet.core import extensions
from fused_resnet.surgery.frozen import FrozenModel
from tests.support.frozen_models import MODELS, assert_close, build, flat, image, needs_extension
from tests.support.surgery_helpers import randomise


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_live_models_answers_with_the_same_bits_in_every_call(
    name: str, mode: Callable[[], Any], layout: torch.memory_format
) -> None:
    model, x = build(name), image(name).contiguous(memory_format=layout)
    fast = freeze(model)
    with mode():
        expected = model(x)
        calls = [fast(x) for _ in range(4)]
        assert_close(calls[0], expected)
        assert type(calls[0]) is type(expected)
        for again in calls[1:]:
            assert all(torch.equal(a, b) for a, b in zip(flat(again), flat(calls[0]), strict=True))
        other = image(name, 20, 1, 5)
        assert_close(fast(other), model(other))
        assert all(torch.equal(a, b) for a, b in zip(flat(fast(x)), flat(calls[0]), strict=True))


def test_outputs_are_the_callers_own() -> None:
    model, x = build("stages"), image("stages")
    fast = freeze(model)
    with torch.inference_mode():
        first = fast(x)
        kept = [t.clone() for t in flat(first)]
        fast(image("stages", seed=9))
        assert all(torch.equal(a, b) for a, b in zip(flat(first), kept, strict=True))
        for t in flat(first):
            t.zero_()
        assert_close(fast(x), model(x))


@needs_extension
def test_a_network_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, convolutions in (("resnet", 12), ("bottlenecks", 17), ("own", 12)):
        fast = freeze(build(name), image(name))
        (line,) = fast.prepared_for()
        assert f"{convolutions} convolutions in one call" in line, line


def test_explain_says_what_is_in_the_program_and_what_is_outside() -> None:
    fast = freeze(fuse(build("resnet")))
    assert "frozen, prepared at the first call" in str(fused_resnet.explain(fast))
    with torch.no_grad():
        fast(image("resnet"))
    text = str(fused_resnet.explain(fast))
    assert "frozen ResNet" in text
    if extensions.cpu() is not None:
        assert "the model for [2, 3, 33, 35]: 12 convolutions in one call; avgpool; flatten; fc" in text


# ---- the promise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "own", "branching", "no tail"])
def test_changes_show_after_refresh(name: str) -> None:
    model, x = build(name), image(name)
    fast = freeze(model, x)
    assert fast.model is model
    with torch.inference_mode():
        before = fast(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.1)
    other = image(name, 20)
    with torch.inference_mode():
        assert torch.equal(fast(x), before)
        fresh = fast(other)  # a kind of input that comes later is of the same copy
        assert fast.refresh() is fast
        assert_close(fast(x), model(x))
        assert not torch.allclose(fast(other), fresh)


def test_the_model_itself_is_left_alone() -> None:
    model = build("resnet")
    state = {name: t.clone() for name, t in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    freeze(model, image("resnet"))
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad and p.is_contiguous() for p in model.parameters())


def test_it_is_not_trained() -> None:
    fast = freeze(build("resnet"))
    with pytest.raises(RuntimeError, match=r"train: a frozen model cannot be trained; train its live model"):
        fast.train()
    assert fast.eval() is fast
    assert fast.train(False) is fast
    assert not fast.training


def test_what_cannot_be_frozen_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model: expected evaluation mode \(model.eval\(\)\), got training mode"):
        freeze(build("resnet").train())
    with pytest.raises(TypeError, match=r"freeze: model: expected a torch\.nn\.Module, got a int"):
        freeze(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="example: expected a tensor or a tuple of tensors"):
        freeze(build("resnet"), (3,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="winograd: expected"):
        freeze(build("resnet"), winograd="f8")
    with pytest.raises(TypeError, match="fuse: model: expected a live model, got a frozen one"):
        fuse(freeze(build("resnet")))


# ---- calls that ask for more than the answer ---------------------------------------------------------------


def runs_live(fast: FrozenModel, call: Callable[[], Any]) -> bool:
    seen: list[int] = []
    handle = fast.model.register_forward_hook(lambda *_: seen.append(1))
    try:
        call()
    finally:
        handle.remove()
    return bool(seen)


def test_gradients_autocast_and_subclasses_run_live() -> None:
    model, x = build("resnet"), image("resnet")
    fast = freeze(model, x)
    with torch.no_grad():
        assert not runs_live(fast, lambda: fast(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert runs_live(fast, lambda: fast(x))
        assert runs_live(fast, lambda: fast(nn.Buffer(x).as_subclass(_Subclass)))
    assert runs_live(fast, lambda: fast(x))
    fast(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.requires_grad_(False)
    assert not runs_live(fast, lambda: fast(x))
    assert runs_live(fast, lambda: fast(x.clone().requires_grad_()))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(fast(leaf).sum(), leaf)
    (expected,) = torch.autograd.grad(model(leaf).sum(), leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


class _Subclass(Tensor):
    pass


def test_odd_inputs_are_the_models_own_business() -> None:
    fast, model = freeze(build("block")), build("block")
    with torch.no_grad():
        empty = torch.randn(0, 32, 8, 8)
        assert fast(empty).shape == model(empty).shape
        with pytest.raises(Exception, match="expected"):
            fast(torch.randn(2, 3, 8, 8))
        x = image("block")
        assert_close(fast(x), model(x))


def test_a_pool_behind_a_tail_that_has_no_kernel_for_it() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.block = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), BasicBlock(32, 32)
            self.pool = nn.MaxPool2d(9, 1, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.pool(F.relu(self.bn(self.conv(x)))))

    model, x = randomise(Pooled(), torch.float32).eval(), torch.randn(1, 3, 20, 20)
    with torch.inference_mode():
        assert_close(freeze(model)(x), model(x))


def test_a_functional_call_uses_what_it_is_given() -> None:
    model, x = build("resnet"), image("resnet")
    fast = freeze(model, x)
    others = {name: t * 1.2 if t.is_floating_point() else t for name, t in model.state_dict().items()}
    one = {"layer1.0.conv1.weight": others["layer1.0.conv1.weight"]}
    with torch.inference_mode():
        before = fast(x)
        for given in (others, one):
            expected = torch.func.functional_call(model, given, (x,))
            assert not torch.allclose(expected, before)
            assert_close(torch.func.functional_call(fast, given, (x,)), expected)
        assert torch.equal(fast(x), before)
        stacked = torch.stack([others["conv1.weight"], 2 * others["conv1.weight"]])
        call = lambda m: torch.vmap(lambda w: torch.func.functional_call(m, {"conv1.weight": w}, (x,)))(stacked)  # noqa: E731
        assert_close(call(fast), call(model))


def test_the_copy_is_made_at_once() -> None:
    model, x = build("resnet"), image("resnet")
    with torch.inference_mode():
        before = model(x)
        fast = freeze(model)
        for parameter in model.parameters():
            parameter.mul_(-1.3)
        assert_close(fast(x), before)


def test_preparing_is_not_noticed() -> None:
    """Hooks are called once a call, the caller's input is left alone, and no random numbers are drawn."""
    model, x = nn.Sequential(build("branching"), build("block")).eval(), image("branching")
    calls: list[int] = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    given, state = x.clone(), torch.get_rng_state()
    fast = freeze(model)
    with torch.no_grad():
        for count in range(1, 4):
            fast(x)
            assert len(calls) == count
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), state)


class Filtering(nn.Module):
    """How many images come out depends on their values."""

    def __init__(self) -> None:
        super().__init__()
        self.block = BasicBlock(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x[x.mean((1, 2, 3)) > 0])


def test_a_module_that_filters_its_batch() -> None:
    model = nn.Sequential(BasicBlock(32, 32), Filtering()).eval()
    fast = freeze(model)
    with torch.inference_mode():
        for seed in range(4):
            x = image("block", batch=5, seed=seed) - 0.01
            assert_close(fast(x), model(x))
