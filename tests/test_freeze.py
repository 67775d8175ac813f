"""Frozen models: the live model's answers, the same bits from the first call on, and nothing else of it lost."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from surgery_helpers import randomise
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fused_resnet
from fused_resnet import _extension, freeze, fuse
from fused_resnet.surgery.frozen import FrozenModel

needs_extension = pytest.mark.skipif(_extension.cpu() is None, reason=str(_extension.why_not_cpu()))


class Stages(nn.Module):
    """Hands out the value of each stage, as detectors want it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(32, 32), BasicBlock(32, 32))
        down = nn.Sequential(nn.Conv2d(32, 48, 1, 2, bias=False), nn.BatchNorm2d(48))
        self.layer2 = nn.Sequential(BasicBlock(32, 48, 2, down), nn.Identity())

    def forward(self, x: Tensor) -> Any:
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return {"1": x, "2": [self.layer2(x)]}


class Branching(nn.Module):
    """A decision by values, between what can be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(BasicBlock(32, 32)), nn.Sequential(BasicBlock(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) if float(y.mean()) > 0.1 else y


class Squeeze(BasicBlock):
    """Something that is no tail between two tails."""

    def __init__(self) -> None:
        super().__init__(32, 32)
        self.gate = nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return self.relu(y + x)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7), 3),
    "bottlenecks": (lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=7), 3),
    "resnext": (lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=7, groups=4, width_per_group=8), 3),
    "own": (lambda: fused_resnet.models.ResNet(fused_resnet.FusedBasicBlock, [1, 1, 1, 1], num_classes=7), 3),
    "own, cifar": (
        lambda: fused_resnet.models.ResNet(fused_resnet.FusedBottleneck, [1, 1, 1, 1], num_classes=7, stem="cifar"),
        3,
    ),
    "block": (lambda: fused_resnet.FusedBasicBlock(32, 32), 32),
    "sequential": (lambda: nn.Sequential(BasicBlock(32, 32), nn.Identity(), nn.Tanh(), BasicBlock(32, 32)), 32),
    "stages": (Stages, 3),
    "branching": (Branching, 32),
    "squeeze": (lambda: nn.Sequential(Squeeze(), BasicBlock(32, 32)), 32),
    "no tail": (lambda: nn.Sequential(nn.Conv2d(32, 8, 3), nn.Tanh()), 32),
    "no statistics": (
        lambda: nn.Sequential(
            BasicBlock(32, 32, norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False)), BasicBlock(32, 32)
        ),
        32,
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return randomise(MODELS[name][0](), dtype).eval()


def image(name: str, size: int = 33, batch: int = 2, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, MODELS[name][1], size, size + 2, generator=generator)


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [t for item in items for t in flat(item)]


def assert_close(got: Any, expected: Any, rtol: float = 1e-4) -> None:
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


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
    if _extension.cpu() is not None:
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


# ---- a module like others ----------------------------------------------------------------------------------


def test_names_are_the_live_models() -> None:
    model = build("resnet")
    fast = freeze(model)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in fast.named_buffers()] == [n for n, _ in model.named_buffers()]
    assert fast.fc is model.fc
    other = randomise(build("resnet"), torch.float32, seed=5)
    x = image("resnet")
    with torch.inference_mode():
        fast(x)
        fast.load_state_dict(other.state_dict())
        assert_close(fast(x), other(x))


@pytest.mark.parametrize("name", ["resnet", "own", "branching"])
def test_deepcopy_pickle_and_save(name: str) -> None:
    fast, x = freeze(fuse(build(name))), image(name)
    with torch.inference_mode():
        expected = fast(x)
        buffer = io.BytesIO()
        torch.save(fast, buffer)
        buffer.seek(0)
        for other in (
            copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(buffer, weights_only=False),
        ):  # fmt: skip
            assert isinstance(other, FrozenModel)
            assert torch.equal(other(x), expected)
            assert other.model is not fast.model


def test_threads() -> None:
    fast, images = freeze(build("resnet")), [image("resnet", 24 + i, seed=i) for i in range(12)]
    with torch.inference_mode():
        expected = [freeze(build("resnet"))(x) for x in images]
    wrong: list[int] = []

    def work(first: int) -> None:
        with torch.inference_mode():
            for i in range(len(images)):  # more kinds than are kept
                at = (first + i) % len(images)
                if not torch.equal(fast(images[at]), expected[at]):
                    wrong.append(at)

    threads = [threading.Thread(target=work, args=(3 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_extension
def test_old_kinds_of_input_go() -> None:
    fast = freeze(build("block"))
    with torch.inference_mode():
        for size in range(8, 30):
            fast(image("block", size))
    assert len(list(fast.prepared_for())) <= 8


def test_conversions_reach_the_live_model() -> None:
    model, x = build("resnet"), image("resnet")
    fast = freeze(model, x)
    assert fast.double() is fast
    assert model.fc.weight.dtype is torch.float64
    with torch.inference_mode():
        assert_close(fast(x.double()), model(x.double()), rtol=1e-9)
        fast.bfloat16()
        torch.testing.assert_close(fast(x.bfloat16()), model(x.bfloat16()), rtol=0.1, atol=0.1)


def test_compiled_it_runs_as_it_is() -> None:
    model, x = build("block"), image("block")
    fast = freeze(model)
    compiled = torch.compile(nn.Sequential(nn.Hardtanh(), fast, nn.Hardtanh()), backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(x), compiled._orig_mod(x))
    assert len(list(fast.prepared_for())) == 1
    compiled(x).sum().backward()  # gradients come from the live model, as they do outside
    assert model.conv1.weight.grad is not None


def test_a_hook_between_the_tails_sees_what_eager_has() -> None:
    model, x = build("resnet"), image("resnet")
    seen: list[Tensor] = []
    model.layer2.register_forward_hook(lambda m, a, y: seen.append(y))
    with torch.no_grad():
        model(x)
        freeze(model)(x)
    assert seen[-1].stride() == seen[0].stride()
    torch.testing.assert_close(seen[-1], seen[0], rtol=1e-4, atol=1e-4)


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


def test_as_a_part_of_another_module() -> None:
    model, x = build("resnet"), image("resnet")
    whole, plain = nn.Sequential(freeze(model), nn.Linear(7, 3)), nn.Sequential(model, nn.Linear(7, 3))
    assert list(whole.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in whole.named_parameters()] == [n for n, _ in plain.named_parameters()]
    other = nn.Sequential(randomise(build("resnet"), torch.float32, seed=5), nn.Linear(7, 3)).eval()
    whole.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert_close(whole(x), other(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        whole.load_state_dict({k: v for k, v in other.state_dict().items() if "layer3" not in k})


def test_attributes_are_set_on_the_live_model() -> None:
    model, x = build("resnet"), image("resnet")
    fast = freeze(model, x)
    fast.fc = nn.Identity()
    assert isinstance(model.fc, nn.Identity)
    with torch.inference_mode():
        assert_close(fast.refresh()(x), model(x))
        fast.model = other = build("own")
        assert_close(fast(x), other(x))


def test_tangents_go_to_the_live_model() -> None:
    model, x = build("no tail"), image("no tail")
    fast = freeze(model.requires_grad_(False), x)
    got, expected = (torch.func.jvp(m, (x,), (x,)) for m in (fast, model))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_module_in_training_mode_stays_in_it() -> None:
    model, x = build("resnet"), image("resnet")
    model.layer1[0].bn2.train()
    expected = copy.deepcopy(model)
    with torch.inference_mode():
        assert_close(freeze(model)(x), expected(x))
    assert int(model.layer1[0].bn2.num_batches_tracked) == 0
