"""A fused block's repeated call in one piece: as right as the program, and gone as soon as anything is different."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chain_helpers import Counter, assert_close, bind, block, image, own
from surgery_helpers import randomise
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from fused_resnet import _extension, refresh
from fused_resnet.backends import packing
from fused_resnet.surgery.plan import ATTRIBUTE

pytestmark = [
    pytest.mark.skipif(_extension.cpu() is None, reason=str(_extension.why_not_cpu())),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("kind", ["basic", "projection", "bottleneck", "plain"])
def test_the_same_bits_as_the_program(kind: str, mode: Callable[[], Any], chained: Counter) -> None:
    module, x = block(kind), image(kind)
    with mode():
        program = module(x)
        assert chained.made == 0
        bind(module, x, chained)
        before = chained.made
        assert torch.equal(module(x), program)
        assert module(x).stride() == program.stride()
        assert chained.made == before + 2
        assert_close(program, own(module, x))


# ---- everything that must be noticed -----------------------------------------------------------------------


def no_grad_write(module: Any) -> None:
    with torch.no_grad():
        module.conv2.weight.mul_(2)


def new_strides(module: Any) -> None:
    weight = module.conv1.weight  # square: the same memory, version and shape, other values
    weight.data = weight.data.transpose(0, 1)


def remove_bias_and_affine(module: Any) -> None:
    module.bn2.weight = None


def batch_statistics(module: Any) -> None:
    module.bn1.train()


def shadow(module: Any) -> None:
    module.conv1.__dict__["weight"] = module.conv1.weight.detach() * 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "weight in place": no_grad_write,
    "weight .data": lambda b: b.conv2.weight.data.mul_(2),
    "weight through numpy": lambda b: b.conv1.weight.detach().numpy().__imul__(2),
    "weight other memory": lambda b: setattr(b.conv1.weight, "data", b.conv1.weight.data * 2),
    "weight other strides": new_strides,
    "weight replaced": lambda b: setattr(b.conv1, "weight", nn.Parameter(b.conv1.weight * 2)),
    "weight shadowed": shadow,
    "weight parametrized": lambda b: parametrize.register_parametrization(b.conv1, "weight", nn.Softplus()),
    "bias appears": lambda b: setattr(b.conv1, "bias", nn.Parameter(torch.ones(32))),
    "gamma .data": lambda b: b.bn1.weight.data.mul_(2),
    "gamma goes": remove_bias_and_affine,
    "mean replaced": lambda b: setattr(b.bn2, "running_mean", b.bn2.running_mean + 1),
    "variance in place": lambda b: b.bn2.running_var.mul_(4),
    "eps": lambda b: setattr(b.bn1, "eps", 1.0),
    "load_state_dict": lambda b: b.load_state_dict({k: v * 0.5 for k, v in b.state_dict().items()}),
    "load_state_dict assign": lambda b: b.load_state_dict({k: v * 0.5 for k, v in b.state_dict().items()}, assign=True),
    "dilation": lambda b: (setattr(b.conv1, "dilation", (2, 2)), setattr(b.conv1, "padding", (2, 2))),
    "padding mode": lambda b: (
        setattr(b.conv1, "padding_mode", "circular"),
        setattr(b.conv1, "_reversed_padding_repeated_twice", [1, 1, 1, 1]),
    ),
    "conv replaced": lambda b: setattr(b, "conv2", randomise(nn.Conv2d(32, 32, 3, padding=1), torch.float32, 5)),
    "bn replaced": lambda b: setattr(b, "bn1", randomise(nn.BatchNorm2d(32), torch.float32, 5).eval()),
    "bn replaced by a norm": lambda b: setattr(b, "bn1", nn.GroupNorm(4, 32)),
    "activation replaced": lambda b: setattr(b, "relu", nn.Tanh()),
    "class of a child": lambda b: setattr(b.relu, "__class__", nn.Tanh),
    "downsample appears": lambda b: setattr(b, "downsample", nn.Tanh()),
    "forward on a child": lambda b: setattr(b.relu, "forward", lambda t: t * 3),
    "forward hook": lambda b: b.bn1.register_forward_hook(lambda m, a, y: y * 2),
    "forward pre-hook": lambda b: b.conv2.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "global hook": lambda b: torch_module.register_module_forward_hook(
        lambda m, a, y: y * 2 if type(m) is nn.Conv2d else None
    ),
    "half the block in batch statistics": batch_statistics,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_noticed(change: Callable[[Any], Any], chained: Counter) -> None:
    module, x = block(), image()
    with torch.no_grad():
        bind(module, x, chained)
        old = module(x)
        handle = change(module)
        try:
            for _ in range(8):  # also once it is bound again
                twin = copy.deepcopy(module)  # batch statistics move on with each call
                expected = own(twin, x)
                assert not torch.allclose(expected, old, rtol=1e-2, atol=1e-2), "the change changes nothing"
                assert_close(module(x), expected)
        finally:
            if hasattr(handle, "remove"):
                handle.remove()


def test_a_projection_is_looked_at_too(chained: Counter) -> None:
    module, x = block("projection"), image()
    with torch.no_grad():
        for change in (
            lambda: module.downsample[0].weight.data.mul_(2),
            lambda: module.downsample[1].register_forward_hook(lambda m, a, y: y * 2),
            lambda: module.downsample.append(nn.Tanh()),
        ):
            bind(module, x, chained)
            handle = change()
            assert_close(module(x), own(module, x))
            if hasattr(handle, "remove"):
                handle.remove()


def write_between_samples(weight: Tensor) -> None:
    """32 x 32 x 3 x 3 elements: every 146th is a sample, the second is number 146."""
    weight[0, 1:15] += 3


FORGETS: dict[str, Callable[[Any], Any]] = {
    "train": lambda b: b.train().eval(),
    "refresh": refresh,
    "drop": lambda b: packing.drop(b.conv1.weight),
    "clear": lambda b: packing.clear(),
}


@pytest.mark.parametrize("forget", FORGETS.values(), ids=FORGETS.keys())
def test_what_the_samples_miss_is_for_train_refresh_and_drop(forget: Callable[[Any], Any], chained: Counter) -> None:
    module, x = block(), image()
    with torch.no_grad():
        bind(module, x, chained)
        old = module(x)
        write_between_samples(module.conv1.weight.data)  # no version tells
        assert torch.equal(module(x), old)
        forget(module)
        assert_close(module(x), own(module, x))


def test_the_version_tells_what_the_samples_miss(chained: Counter) -> None:
    module, x = block(), image()
    with torch.no_grad():
        bind(module, x, chained)
        write_between_samples(module.conv1.weight)
        assert_close(module(x), own(module, x))


def test_each_sample_is_compared(chained: Counter) -> None:
    """The operator itself: nothing comes back once any of the 64 is different, and bits count, not numbers."""
    x = image()
    weight = torch.randn(32, 32, 1, 1)
    packed = torch.ops.fused_resnet_C.conv_pack(weight, 0, "")
    samples = torch.ops.fused_resnet_C.samples(weight)
    program = torch.tensor([[-1, -2, 0, 0, 32, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, *[0] * 6]])
    flat = weight.view(-1)

    def call() -> Tensor | None:
        return torch.ops.fused_resnet_C.conv_chain(x, [packed, samples, weight], program)

    expected = torch.nn.functional.conv2d(x, weight)
    assert_close(call(), expected)  # type: ignore[arg-type]
    for sample in range(64):
        place = sample * (weight.numel() - 1) // 63
        kept = flat[place].clone()
        flat[place] = torch.nan
        assert call() is None, f"sample {sample}"
        flat[place] = kept
        assert call() is not None
    flat[0] = torch.nan
    samples = torch.ops.fused_resnet_C.samples(weight)
    assert call() is not None
    zero = torch.zeros(32, 32, 1, 1)
    samples = torch.ops.fused_resnet_C.samples(zero)
    zero.neg_()
    weight = zero
    assert call() is None


@pytest.mark.parametrize(
    ("program", "tensors", "message"),
    [
        ([[0] * 15], 3, "program: expected a row of numbers"),
        ([[-1, 0, 0, 0, 32, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0]], 3, "program: expected the number of an earlier link"),
        ([[-2, -2, 0, 0, 32, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0]], 3, "program: expected the number of an earlier link"),
        ([], 3, "program: expected"),
        ([[-1, -2, 0, 0, 32, 1, 1, 1, 1, 0, 0, 1, 1, 0, 1, 0]], 3, "tensors: expected all that the program names"),
        ([[-1, -2, 0, 0, 32, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0]], 2, "tensors: expected all that the program names"),
        ([[-1, -3, 0, 0, 32, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0]], 3, "added: expected a tensor"),
        ([[-3, -2, 0, 0, 32, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0]], 3, "added: expected a tensor"),
        ([[-1, -4, 0, 0, 32, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0]], 3, "program: expected the number of an earlier link"),
    ],
)
def test_a_wrong_program_is_refused(program: list[list[int]], tensors: int, message: str) -> None:
    weight = torch.randn(32, 32, 1, 1)
    packed = torch.ops.fused_resnet_C.conv_pack(weight, 0, "")
    given = [packed, torch.ops.fused_resnet_C.samples(weight), weight][:tensors]
    with pytest.raises(ValueError, match=message):
        torch.ops.fused_resnet_C.conv_chain(image(), given, torch.tensor([[*row, *[0] * 6] for row in program]))


# ---- when the program has to run ---------------------------------------------------------------------------


class _Function(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


STATES: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "function_mode": _Function,
    "profiler": lambda: torch.autograd.profiler.profile(),
    "grad": torch.enable_grad,
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
def test_not_in(state: Callable[[], Any], chained: Counter) -> None:
    module, x = block(), image()
    with torch.no_grad():
        bind(module, x, chained)
        with state():
            assert chained.during(lambda: [module(x) for _ in range(6)]) == 0


def test_not_under_transforms_and_traces(chained: Counter) -> None:
    module, x = block(), image()
    with torch.no_grad():
        bind(module, x, chained)
        assert chained.during(lambda: torch.jit.trace(module, x, check_trace=False)) == 0
        bind(module, x, chained)
        compiled = torch.compile(module, backend="eager")
        assert chained.during(lambda: compiled(x)) == 0
        assert_close(compiled(x), own(module, x))


def test_gradients_are_those_of_the_program(chained: Counter) -> None:
    module, x = block(), image()
    with torch.no_grad():
        bind(module, x, chained)
    module(x).square().sum().backward()
    assert module.conv1.weight.grad is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double().float().contiguous(),
        lambda x: x.repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last),
        lambda x: x[:, :, 1:],
        lambda x: torch._neg_view(-x),
        lambda x: nn.Parameter(x, requires_grad=False),
    ],
    ids=["NCHW", "batch", "view", "negative", "Parameter"],
)
def test_another_input(change: Callable[[Tensor], Tensor], chained: Counter) -> None:
    module, x = block(), image()
    with torch.no_grad():
        bind(module, x, chained)
        other = change(x)
        for _ in range(8):
            assert_close(module(other), own(module, other))
            assert_close(module(x), own(module, x))


def test_the_environment_is_read_on_each_call(chained: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = block(), image()
    with torch.no_grad():
        bind(module, x, chained)
        monkeypatch.setenv("FUSED_RESNET_BACKEND", "abacus")
        with pytest.raises(ValueError, match="abacus"):
            module(x)


@pytest.mark.parametrize(("name", "value"), [("backend", "eager"), ("winograd", "off"), ("plan", None)])
def test_options_are_read_on_each_call(name: str, value: Any, chained: Counter) -> None:
    module, x = block(), image()
    with torch.no_grad():
        bind(module, x, chained)
        setattr(module.__dict__[ATTRIBUTE], name, value)
        assert chained.during(lambda: module(x)) == 0
