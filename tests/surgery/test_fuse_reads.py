"""Everything that a forward read while it was traced is looked at again in each call, or the block is left alone."""

from __future__ import annotations

import copy
import enum
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet import explain, fuse
from tests.support.surgery_helpers import randomise


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.set_up()

    def set_up(self) -> None:
        pass

    def body(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def scale(self) -> float:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x) if self.scale() > 0 else F.relu(self.body(x))


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Options:
    def __init__(self) -> None:
        self.inner = {"scale": 1.0}


SETTINGS = {"scale": 1.0}
FACTOR = 1.0


def _kept_in_a_closure() -> tuple[type[Block], Callable[[float], None]]:
    factor = 1.0

    class Closed(Block):
        def scale(self) -> float:
            return factor

    def change(value: float) -> None:
        nonlocal factor
        factor = value

    return Closed, change


def _block(value: Any, read: Callable[[Any], float]) -> type[Block]:
    class Reads(Block):
        def set_up(self) -> None:
            self.option = copy.deepcopy(value)

        def scale(self) -> float:
            return read(self.option)

    return Reads


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda block: setattr(block, name, value)


# What the block holds, how its forward reads it, and how it is changed after fusing.
HELD: dict[str, tuple[Any, Callable[[Any], float], Callable[[Any], Any]]] = {
    "number": (1.0, lambda v: v, _set("option", -1.0)),
    "numpy number": (np.float32(1), float, _set("option", np.float32(-1))),
    "list": ([1.0], lambda v: v[0], lambda b: b.option.__setitem__(0, -1.0)),
    "longer list": ([1.0], lambda v: 3 - 2 * len(v), lambda b: b.option.append(2.0)),
    "dict": ({"scale": 1.0}, lambda v: v["scale"], lambda b: b.option.update(scale=-1.0)),
    "dict with a default": ({}, lambda v: v.get("scale", 1.0), lambda b: b.option.update(scale=-1.0)),
    "set": ({"residual"}, lambda v: 1.0 if "residual" in v else -1.0, lambda b: b.option.clear()),
    "namespace": (types.SimpleNamespace(scale=1.0), lambda v: v.scale, lambda b: setattr(b.option, "scale", -1.0)),
    "object": (Options(), lambda v: v.inner["scale"], lambda b: b.option.inner.update(scale=-1.0)),
    "enumeration": (Colour.RED, lambda v: 1.0 if v is Colour.RED else -1.0, _set("option", Colour.BLUE)),
    "function": (max, lambda v: v(1.0, -1.0), _set("option", min)),
    "dtype": (torch.float32, lambda v: v.itemsize - 3.0, _set("option", torch.int8)),
}


def assert_followed(original: nn.Module, change: Callable[[Any], Any]) -> None:
    """``change`` shows in the fused block as in the original, and it matters."""
    randomise(original).eval()
    fused = fuse(original)
    assert explain(fused)[""].state == "fused", explain(fused)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        before = original(x)
        torch.testing.assert_close(fused(x), before)
        change(original)
        change(fused)
        after = original(x)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(fused(x), after)


@pytest.mark.parametrize("name", HELD)
def test_an_attribute_of_any_kind(name: str) -> None:
    value, read, change = HELD[name]
    assert_followed(_block(value, read)(), change)


class FromClass(Block):
    factor = 1.0

    def scale(self) -> float:
        return type(self).factor


class FromClassContainer(Block):
    options = {"scale": 1.0}  # noqa: RUF012 - that it is shared is what is tested

    def scale(self) -> float:
        return type(self).options["scale"]


class FromProperty(Block):
    def set_up(self) -> None:
        self.held = [1.0]

    @property
    def factor(self) -> float:
        return self.held[0]

    def scale(self) -> float:
        return self.factor


class FromGlobal(Block):
    def scale(self) -> float:
        return FACTOR


class FromGlobalDict(Block):
    def scale(self) -> float:
        return SETTINGS["scale"]


class Absent(Block):
    def scale(self) -> float:
        return -1.0 if hasattr(self, "switched") else 1.0


class Defaulted(Block):
    def scale(self, value: float = 1.0) -> float:
        return value


class OfAConvolution(Block):
    def scale(self) -> float:
        return 1.0 if self.conv1.in_channels == 4 else -1.0


def test_what_belongs_to_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_followed(
        FromClass(), lambda b: monkeypatch.setattr(FromClass, "factor", -1.0) if type(b) is FromClass else 0
    )
    assert_followed(FromClassContainer(), lambda b: monkeypatch.setitem(FromClassContainer.options, "scale", -1.0))
    assert_followed(FromProperty(), lambda b: b.held.__setitem__(0, -1.0))
    assert_followed(Defaulted(), lambda b: monkeypatch.setattr(Defaulted.scale, "__defaults__", (-1.0,)))
    code = FromGlobal.scale.__code__
    other = (lambda self: -1.0).__code__
    monkeypatch.setattr(FromGlobal.scale, "__code__", code)
    assert_followed(FromGlobal(), lambda b: setattr(FromGlobal.scale, "__code__", other))


def test_globals_and_closures(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_followed(FromGlobal(), lambda b: monkeypatch.setitem(globals(), "FACTOR", -1.0))
    assert_followed(FromGlobalDict(), lambda b: monkeypatch.setitem(SETTINGS, "scale", -1.0))
    closed, change = _kept_in_a_closure()
    assert_followed(closed(), lambda b: change(-1.0))


def test_what_was_not_there() -> None:
    assert_followed(Absent(), _set("switched", True))
    assert_followed(OfAConvolution(), lambda b: setattr(b.conv1, "in_channels", 5))


@pytest.mark.parametrize("where", ["instance", "class"])
def test_methods_exchanged(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Helper(Block):
        def scale(self) -> float:
            return 1.0

    def change(block: Any) -> None:
        if where == "instance":
            block.scale = lambda: -1.0
        else:
            monkeypatch.setattr(Helper, "scale", lambda self: -1.0)

    assert_followed(Helper(), change)


def test_torchs_own_functions_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(Block):
        def scale(self) -> float:
            return 1.0

    forward = nn.Conv2d.forward
    assert_followed(Plain(), lambda b: monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: 2 * forward(self, x)))
    monkeypatch.undo()
    relu = F.relu
    assert_followed(Plain(), lambda b: monkeypatch.setattr(F, "relu", lambda x, inplace=False: 2 * relu(x)))
    monkeypatch.undo()
    inner = nn.Conv2d._conv_forward
    patched = lambda self, x, w, b: 2 * inner(self, x, w, b)  # noqa: E731
    assert_followed(Plain(), lambda b: setattr(b.conv2, "_conv_forward", patched.__get__(b.conv2)))


# ---- what is refused -------------------------------------------------------------------------------------------


class Appends(Block):
    def set_up(self) -> None:
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        return F.relu(self.body(x) + x)


RECORD: list[Any] = []


class AppendsToGlobal(Block):
    def forward(self, x: Tensor) -> Tensor:
        RECORD.append(x)
        return F.relu(self.body(x) + x)


class Prints(Block):
    def forward(self, x: Tensor) -> Tensor:
        print("called")
        return F.relu(self.body(x) + x)


class Autocasts(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.relu(self.body(x) + x)


class UnderNoGrad(Block):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x)


class AsksForGradients(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x) if torch.is_grad_enabled() else F.relu(self.body(x))


class HoldsAnArray(Block):
    def set_up(self) -> None:
        self.scales = np.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) * float(self.scales[0]) + x)


class ReadsAllParameters(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x.to(next(self.parameters()).dtype))


REFUSED: dict[type[Block], str] = {
    Appends: "changes self.seen in its forward",
    AppendsToGlobal: "changes RECORD.append in its forward",
    Prints: "calls print() in its forward",
    Autocasts: "enters autocast in its forward",
    UnderNoGrad: "runs its forward in a context (no_grad, autocast or the like)",
    AsksForGradients: "calls torch.is_grad_enabled, which may read or change a state outside the model",
    HoldsAnArray: "reads self.scales, a numpy.ndarray, which cannot be compared at each call",
    ReadsAllParameters: "goes through its parameters or buffers as a collection",
}


@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_refused_with_a_sentence(cls: type[Block]) -> None:
    RECORD.clear()
    block = cls()
    fused = fuse(block)
    assert type(fused) is cls
    assert explain(fused)[""].reason == REFUSED[cls]
    assert RECORD == []
    assert getattr(fused, "seen", []) == []


# ---- containers ------------------------------------------------------------------------------------------------


def test_the_length_of_a_sequential_is_part_of_the_plan() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Plain())
    randomise(model).eval()
    fused = fuse(model)
    assert explain(fused)[""].state == "fused"
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for m in (model, fused):
            m.append(nn.AdaptiveAvgPool2d(1))
        torch.testing.assert_close(fused(x), model(x))


class Plain(Block):
    def scale(self) -> float:
        return 1.0


def test_a_module_list_that_grows() -> None:
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.blocks = nn.ModuleList([Plain(), Plain()])

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn1(self.conv1(x)))
            for block in self.blocks:
                x = block(x)
            return x

    model = randomise(Stages()).eval()
    fused = fuse(model)
    assert explain(fused)[""].state == "fused"
    x, extra = torch.randn(2, 3, 8, 8, dtype=torch.float64), randomise(Plain(), seed=3).eval()
    with torch.no_grad():
        for m in (model, fused):
            m.blocks.append(copy.deepcopy(extra))
        torch.testing.assert_close(fused(x), model(x))
        for m in (model, fused):
            del m.blocks[0]
        torch.testing.assert_close(fused(x), model(x))


def test_an_alias_that_becomes_another_module() -> None:
    class Tied(Plain):
        def set_up(self) -> None:
            self.conv2 = self.conv1

    assert_followed(Tied(), lambda b: setattr(b, "conv2", randomise(nn.Conv2d(4, 4, 3, padding=1, bias=False), seed=5)))
