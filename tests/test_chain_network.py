"""A whole network's call in one piece: the stem, the containers and the blocks that its own forward would call."""

from __future__ import annotations

import copy
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chain_helpers import Counter, assert_close, bind
from surgery_helpers import randomise
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from fused_resnet import _extension, fuse, unfuse
from fused_resnet.backends.chain import Chain
from fused_resnet.surgery.chain import Chains
from fused_resnet.surgery.plan import ATTRIBUTE

pytestmark = [
    pytest.mark.skipif(_extension.cpu() is None, reason=str(_extension.why_not_cpu())),
    pytest.mark.usefixtures("one_thread"),
]


class Network(nn.Module):
    """A ResNet's parts: a stem with its max pool, two stages, and a head that is not ours."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(32, 32), BasicBlock(32, 32))
        down = nn.Sequential(nn.Conv2d(32, 48, 1, 2, bias=False), nn.BatchNorm2d(48))
        self.layer2 = nn.Sequential(BasicBlock(32, 48, 2, down), nn.Identity())
        self.fc = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.layer2(x).mean((2, 3)))


class Backbone(Network):
    """Hands out the value of each stage, as detectors want it."""

    def forward(self, x: Tensor) -> Any:
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return {"1": x, "2": self.layer2(x)}


def network(cls: type = Network) -> Any:
    return fuse(randomise(cls().eval(), torch.float32), inplace=True, check=False)


def image(height: int = 23) -> Tensor:
    return torch.randn(2, 3, height, 21, generator=torch.Generator().manual_seed(3))


def own(model: Any, x: Tensor) -> Any:
    return unfuse(copy.deepcopy(model))(x)


def unchained(model: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What the program makes of x, every module called and looked at."""
    with monkeypatch.context() as patch:
        patch.setattr(Chains, "run", lambda *_: None)
        y: Tensor = model(x)
    return y


def links(chained: Counter, call: Callable[[], Any]) -> list[int]:
    """The number of convolutions in each chain of the call."""
    seen: list[int] = []
    counting = Chain.__call__

    def noting(chain: Chain, x: Tensor) -> Tensor | None:
        seen.append(len(chain.program))
        return counting(chain, x)

    Chain.__call__ = noting  # type: ignore[method-assign]
    try:
        call()
    finally:
        Chain.__call__ = counting  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_chain(mode: Callable[[], Any], channels_last: bool, chained: Counter) -> None:
    model, x = network(), image()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with mode():
        program = [model(x) for _ in range(3)][-1]
        bind(model, x, chained)
        assert links(chained, lambda: model(x)) == [8]  # stem, two blocks of two, one of three
        assert torch.equal(model(x), program)
        assert_close(model(x), own(model, x))


def test_the_longest_beginning_of_which_only_the_last_value_is_needed(chained: Counter) -> None:
    model, x = network(Backbone), image()
    with torch.no_grad():
        bind(model, x, chained)
        assert links(chained, lambda: model(x)) == [5, 3]  # to the end of layer1; then the block by itself
        for got, expected in zip(model(x).values(), own(model, x).values(), strict=True):
            assert_close(got, expected)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda m: m.layer2[0].conv1.register_forward_hook(lambda *_: None), [5]),
        (lambda m: m.layer2.insert(0, nn.Tanh()), [5, 3]),
        (lambda m: setattr(m.layer1[0].conv2, "weight", nn.Parameter(m.layer1[0].conv2.weight.double())), None),
        (lambda m: m.layer1.register_forward_hook(lambda *_: None), [1, 2, 2, 3]),
    ],
    ids=["hook", "a module in between", "float64", "hook on a stage"],
)
def test_it_ends_where_something_is_not_ours(spoil: Any, expected: list[int] | None, chained: Counter) -> None:
    model, x = network(), image()
    spoil(model)
    with torch.no_grad():
        if expected is None:
            with pytest.raises(Exception):  # noqa: B017 - eager's own complaint about the dtypes, whatever it is
                model(x)
            return
        for _ in range(6):
            model(x)
        assert links(chained, lambda: model(x)) == expected
        assert_close(model(x), own(model, x))


def hook(m: Any, args: Any, y: Tensor) -> Tensor:
    return y * 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "stem weight": lambda m: m.conv1.weight.data.mul_(2),
    "stem statistics": lambda m: m.bn1.running_var.mul_(4),
    "pool replaced": lambda m: setattr(m, "maxpool", nn.AvgPool2d(3, 2, 1)),
    "pool numbers": lambda m: setattr(m.maxpool, "stride", 3),
    "pool ceil mode": lambda m: setattr(m.maxpool, "ceil_mode", True),
    "pool dilation": lambda m: setattr(m.maxpool, "dilation", 2),
    "pool hook": lambda m: m.maxpool.register_forward_hook(hook),
    "stage hook": lambda m: m.layer1.register_forward_hook(hook),
    "stage replaced": lambda m: setattr(m, "layer1", nn.Sequential(m.layer1[1])),
    "stage longer": lambda m: m.layer1.append(nn.Tanh()),
    "stage shorter": lambda m: m.layer1.pop(1),
    "stage forward": lambda m: setattr(m.layer1, "forward", lambda x: x * 2),
    "block hook": lambda m: m.layer1[1].register_forward_hook(hook),
    "block pre-hook": lambda m: m.layer1[1].register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "block replaced": lambda m: m.layer1.__setitem__(1, nn.Tanh()),
    "block forward": lambda m: setattr(m.layer1[1], "forward", lambda x: x * 2),
    "block compiled": lambda m: setattr(m.layer1[1], "_compiled_call_impl", lambda x: x * 2),
    "block's conv weight": lambda m: m.layer2[0].conv2.weight.data.mul_(2),
    "block's conv hook": lambda m: m.layer2[0].downsample[0].register_forward_hook(hook),
    "block's bn": lambda m: setattr(m.layer2[0].downsample[1], "eps", 1.0),
    "block's projection goes": lambda m: setattr(
        m.layer2[0], "downsample", nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(32, 48, 1))
    ),
    "identity hook": lambda m: m.layer2[1].register_forward_hook(hook),
    "identity replaced": lambda m: m.layer2.__setitem__(1, nn.Tanh()),
    "head": lambda m: m.fc.weight.mul_(2),
    "head hook": lambda m: m.fc.register_forward_hook(hook),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_noticed(change: Callable[[Any], Any], chained: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    # 27 rows, 14 after the stem: ceil_mode, dilation and stride of the pool all make something else of them
    model, x = network(), image(27)
    with torch.no_grad():
        bind(model, x, chained)
        old = model(x)
        change(model)
        for _ in range(8):  # also once it is bound again
            expected = unchained(model, x, monkeypatch)
            assert not torch.allclose(expected, old, rtol=1e-3, atol=1e-3), "the change changes nothing"
            assert_close(model(x), expected)


@pytest.mark.parametrize("part", ["root", "block"])
def test_the_backend_asked_for_is_looked_at(part: str, chained: Counter) -> None:
    model, x = network(), image()
    with torch.no_grad():
        bind(model, x, chained)
        module = model if part == "root" else model.layer1[0]
        module.__dict__[ATTRIBUTE].backend = "eager"
        for _ in range(6):
            model(x)
        assert max(links(chained, lambda: model(x)), default=0) <= 4
        assert_close(model(x), own(model, x))


def test_training_a_block_and_back(chained: Counter) -> None:
    model, x = network(), image()
    with torch.no_grad():
        bind(model, x, chained)
        model.layer1[0].train()
        twin = copy.deepcopy(model)
        assert_close(model(x), own(twin, x))
        model.layer1[0].eval()
        assert_close(model(x), own(model, x))


def resident() -> int:
    """MiB of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_inside_a_chain() -> None:
    """Outputs die with their last use, and of what they lay in no more than 128 MiB stay."""
    weight = torch.zeros(32, 32, 1, 1)
    packed = torch.ops.fused_resnet_C.conv_pack(weight, 0, "")
    samples = torch.ops.fused_resnet_C.samples(weight)

    def run(count: int, side: int) -> int:
        x = torch.zeros(1, 32, side, side).contiguous(memory_format=torch.channels_last)
        rows = [[i - 1, -2, 0, 0, 32, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, *[0] * 6] for i in range(count)]
        before = resident()
        torch.ops.fused_resnet_C.conv_chain(x, [packed, samples, weight] * count, torch.tensor(rows))
        return resident() - before

    assert run(40, 512) < 128 + 64  # MiB; each output takes 32
    assert run(4, 1024) < 64  # each takes 128


def test_values_that_live_long_are_not_overwritten() -> None:
    """Each link reads the one before it, and every second one adds the first link's output."""
    x = image().new_ones(1, 32, 3, 3).contiguous(memory_format=torch.channels_last)
    weight = torch.eye(32)[:, :, None, None]
    packed = torch.ops.fused_resnet_C.conv_pack(weight, 0, "")
    samples = torch.ops.fused_resnet_C.samples(weight)
    rows = [[i - 1, 0 if i % 2 else -2, 0, 0, 32, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, *[0] * 6] for i in range(12)]
    y = torch.ops.fused_resnet_C.conv_chain(x, [packed, samples, weight] * 12, torch.tensor(rows))
    assert torch.equal(y, x * 7)
