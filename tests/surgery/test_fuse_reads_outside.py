"""What a forward reached through classes, functions, modules and the interpreter: followed, or refused with a sentence.

Each block adds its residual where its ``scale`` is positive; a change that turns the sign must show when it is fused.
"""

from __future__ import annotations

import builtins
import contextvars
import enum
import functools
import logging
import operator
import os
import random
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fused_resnet import explain, fuse
from tests.support.surgery_helpers import randomise
from tests.surgery.test_fuse_reads import Block

Case = Callable[[], tuple[type[Block], Callable[[Any], Any]]]
CASES: list[Case] = []


def case(function: Case) -> Case:
    """A block's class, made anew, and the change that is made to the block and its fused twin alike."""
    CASES.append(function)
    return function


class Held:
    """An object of a user's."""

    def __init__(self, value: Any = 1.0) -> None:
        self.value = value


def reading(read: Callable[[Any], Any], **members: Any) -> type[Block]:
    """A block's class with these members, whose scale is ``read(self)``."""

    def set_up(self: Any) -> None:
        for name, make in members.get("instance", {}).items():
            setattr(self, name, make())

    namespace = {"set_up": set_up, "scale": read, **{k: v for k, v in members.items() if k != "instance"}}
    return type("Reads", (Block,), namespace)


module = types.ModuleType("settings")
sys.modules["settings"] = module


@pytest.fixture(autouse=True)
def _settings() -> None:
    module.__dict__.update(GAIN=1.0, TABLE={"gain": [1.0]}, Sub=type("Sub", (), {"gain": 1.0}))
    module.__dict__.pop("EXTRA", None)


# ---- classes, as deep as one likes -------------------------------------------------------------------------------


@case
def nested_classes() -> Any:
    inner = type("Inner", (), {"value": 1.0})
    cls = reading(lambda self: self.Config.inner.value, Config=type("Config", (), {"inner": inner}))
    return cls, lambda block: setattr(inner, "value", -1.0)


@case
def object_of_a_class() -> Any:
    held = Held(Held())
    return reading(lambda self: type(self).cfg.value.value, cfg=held), lambda b: setattr(held.value, "value", -1.0)


@case
def object_in_a_tuple_of_a_class() -> Any:
    held = Held()
    return reading(lambda self: type(self).held[0].value, held=(held,)), lambda b: setattr(held, "value", -1.0)


@case
def class_of_a_held_object() -> Any:
    helper = type("Helper", (), {"cfg": Held(), "get": lambda self: self.cfg.value})
    cls = reading(lambda self: self.helper.get(), instance={"helper": helper})
    return cls, lambda block: setattr(helper.cfg, "value", -1.0)  # type: ignore[attr-defined]


@case
def class_held_by_the_instance() -> Any:
    inner = type("Inner", (), {"gain": 1.0})
    outer = type("Outer", (), {"inner": inner})
    return reading(lambda self: self.k.inner.gain, instance={"k": lambda: outer}), lambda b: setattr(
        inner, "gain", -1.0
    )


@case
def class_of_a_submodule() -> Any:
    child = type("Child", (nn.Module,), {"cfg": Held()})
    cls = reading(lambda self: type(self.child).cfg.value, instance={"child": child})
    return cls, lambda block: setattr(child.cfg, "value", -1.0)


@case
def metaclass() -> Any:
    meta = type("Meta", (type,), {"gain": 1.0})
    holder = meta("Holder", (), {})

    def scale(self: Any) -> Any:
        alias = holder
        return alias.gain

    return reading(scale), lambda block: setattr(meta, "gain", -1.0)


@case
def base_classes() -> Any:
    one, other = reading(lambda self: 1.0), reading(lambda self: -1.0)
    cls = type("Derived", (one,), {})
    return cls, lambda block: setattr(cls, "__bases__", (other,))


@case
def another_class_of_submodule() -> Any:
    child = type("Child", (nn.Module,), {"get": lambda self: 1.0})
    other = type("Other", (nn.Module,), {"get": lambda self: -1.0})
    cls = reading(lambda self: self.child.get(), instance={"child": child})
    return cls, lambda block: setattr(block, "child", other())


@case
def another_length_of_submodule() -> Any:
    child = type("Child", (nn.Module,), {"__len__": lambda self: 2})
    other = type("Other", (nn.Module,), {"__len__": lambda self: 0})
    cls = reading(lambda self: len(self.child) - 1, instance={"child": child})
    return cls, lambda block: setattr(block, "child", other())


@case
def a_child_that_becomes_none() -> Any:
    cls = reading(lambda self: len(list(self.all.children())) - 1.0, instance={"all": lambda: nn.Sequential(
        nn.Identity(), nn.Identity())})  # fmt: skip
    return cls, lambda block: setattr(block.all, "1", None)


@case
def torchs_class() -> Any:
    cls = reading(lambda self: -1.0 if hasattr(self.conv1, "gain") else 1.0)
    return cls, lambda block: setattr(nn.Conv2d, "gain", 1.0)


@case
def modules_that_become_one() -> Any:
    cls = reading(lambda self: -1.0 if self.conv1 is self.conv2 else 1.0)
    return cls, lambda block: setattr(block, "conv2", block.conv1)


# ---- singletons ----------------------------------------------------------------------------------------------------


@case
def singleton_by_classmethod() -> Any:
    single = type("Single", (), {"made": Held(), "get": classmethod(lambda cls: cls.made)})
    return reading(lambda self: single.get().value), lambda b: setattr(single.made, "value", -1.0)  # type: ignore


@case
def singleton_by_new() -> Any:
    single = type("Single", (), {"__new__": lambda cls: cls.made})
    made = object.__new__(single)
    made.value = 1.0  # type: ignore[attr-defined]
    single.made = made  # type: ignore[attr-defined]
    return reading(lambda self: single().value), lambda block: setattr(made, "value", -1.0)


# ---- functions, enumerations, modules, builtins ----------------------------------------------------------------------


@case
def attribute_of_a_function() -> Any:
    def helper() -> None:
        pass

    helper.gain = {"a": 1.0}  # type: ignore[attr-defined]

    def scale(self: Any) -> Any:
        alias = helper
        return alias.gain["a"]  # type: ignore[attr-defined]

    return reading(scale), lambda block: helper.gain.update(a=-1.0)  # type: ignore[attr-defined]


@case
def attribute_that_a_function_gets() -> Any:
    def helper() -> None:
        pass

    return reading(lambda self: getattr(helper, "gain", 1.0)), lambda block: setattr(helper, "gain", -1.0)


@case
def attribute_of_a_method() -> Any:
    def method(self: Any) -> None:
        pass

    method.gain = 1.0  # type: ignore[attr-defined]
    return reading(lambda self: self.method.gain, method=method), lambda block: setattr(method, "gain", -1.0)


@case
def attribute_of_a_member() -> Any:
    colour = enum.Enum("colour", ["RED", "BLUE"])
    colour.RED.gain = 1.0
    return reading(lambda self: colour["RED"].gain), lambda block: setattr(colour.RED, "gain", -1.0)


@case
def attribute_of_a_held_member() -> Any:
    colour = enum.Enum("colour", ["RED", "BLUE"])
    colour.RED.gain = 1.0
    cls = reading(lambda self: self.colour.gain, instance={"colour": lambda: colour.RED})
    return cls, lambda block: setattr(colour.RED, "gain", -1.0)


@case
def global_of_a_module() -> Any:
    return reading(lambda self: module.TABLE["gain"][0]), lambda b: module.TABLE["gain"].__setitem__(0, -1.0)


@case
def class_of_a_module() -> Any:
    return reading(lambda self: module.Sub.gain), lambda b: setattr(module.Sub, "gain", -1.0)


@case
def builtin_that_is_exchanged() -> Any:
    return reading(lambda self: round(1.2)), lambda block: setattr(builtins, "round", lambda value: -1.0)


@case
def builtin_that_is_hidden() -> Any:
    return reading(lambda self: max(1.0, -1.0)), lambda block: globals().update(max=min)


@case
def global_that_appears() -> Any:
    def scale(self: Any) -> Any:
        try:
            return appears  # type: ignore[name-defined]
        except NameError:
            return 1.0

    return reading(scale), lambda block: globals().update(appears=-1.0)


@case
def getter_with_a_path() -> Any:
    held = Held()
    cls = reading(lambda self: operator.attrgetter("cfg.value")(self), cfg=held)
    return cls, lambda block: setattr(held, "value", -1.0)


@case
def name_that_is_made() -> Any:
    held = Held()
    cls = reading(lambda self: getattr(type(self), "c" + "fg"[: len("ab")]).value, cfg=held)
    return cls, lambda block: setattr(held, "value", -1.0)


@pytest.mark.parametrize("make", CASES, ids=lambda f: f.__name__)
def test_what_is_reached_is_followed(make: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((builtins, "round"), (nn.Conv2d, "__doc__")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back whatever the case does to it
    cls, change = make()
    block = randomise(cls()).eval()
    fused = fuse(block)
    assert explain(fused)[""].state == "fused", explain(fused)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    try:
        with torch.no_grad():
            before = block(x)
            torch.testing.assert_close(fused(x), before)
            change(block)
            change(fused)
            after = block(x)
            assert not torch.allclose(before, after)
            torch.testing.assert_close(fused(x), after)
    finally:
        for name in ("max", "appears"):
            globals().pop(name, None)
        if hasattr(nn.Conv2d, "gain"):
            del nn.Conv2d.gain


# ---- what cannot be compared ----------------------------------------------------------------------------------


@functools.lru_cache(None)
def cached() -> Held:
    return Held()


LOCAL = threading.local()
LOCAL.value = 1.0
VARIABLE = contextvars.ContextVar("VARIABLE", default=1.0)
TARGET = Held()
WEAK = weakref.ref(TARGET)
GETTER = operator.attrgetter("cfg.value")
MODULES = {"settings": module}
GENERATOR = np.random.default_rng(0)


def _absent(self: Any) -> Any:
    try:
        return module.EXTRA
    except AttributeError:
        return 1.0


# How the forward reads it, and words of the reason.
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "cache": (lambda self: cached().value, "lru_cache_wrapper"),
    "cached method": (lambda self: self.cached().value, "lru_cache_wrapper"),
    "thread local": (lambda self: LOCAL.value, "_thread._local"),
    "context variable": (lambda self: VARIABLE.get(), "ContextVar"),
    "weak reference": (lambda self: WEAK().value, "weakref"),  # type: ignore[union-attr]
    "getter": (lambda self: GETTER(type(self)), "attrgetter"),
    "module in a dict": (lambda self: MODULES["settings"].GAIN, "the module settings"),
    "module of a class": (lambda self: self.settings.GAIN, "the module settings"),
    "absent from a module": (_absent, "which the module settings does not simply hold"),
    "the object's way": (lambda self: object.__getattribute__(self, "training") + 1, "reads __getattribute__"),
    "torch's way": (lambda self: len(self.__getattr__("conv1").kernel_size), "reads __getattr__"),
    "dict of the class": (lambda self: type(self).__dict__["number"], "reads __dict__"),
    "dict of an object": (lambda self: TARGET.__dict__["value"], "reads __dict__"),
    "vars": (lambda self: vars(self)["training"] + 1, "calls vars()"),
    "globals of a function": (lambda self: len(fuse.__globals__["__name__"]), "__globals__"),
    "name of the class": (lambda self: len(type(self).__name__), "reads __name__"),
    "name by torch": (lambda self: len(self._get_name()), "name of its class"),
    "name of a child": (lambda self: len(str(self.bn1)), "reads self.__dict__"),
    "hooks": (lambda self: 1.0 - len(self._forward_hooks), "reads self._forward_hooks"),
    "identity number": (lambda self: id(self) % 2 + 1.0, "calls id()"),
    "exact class": (lambda self: 1.0 if type(self.number) is int else -1.0, "compares classes"),
    "environment": (lambda self: len(os.environ["PATH"]), "os"),
    "environment by get": (lambda self: len(os.environ.get("PATH", "")) + 1, "os"),
    "environment by getenv": (lambda self: len(os.getenv("PATH", "")) + 1, "calls os's getenv"),
    "file": (lambda self: 1.0 + os.path.exists("/nowhere"), "genericpath"),
    "directory": (lambda self: len(os.getcwd()), "getcwd"),
    "time": (lambda self: time.time(), "calls time.time"),
    "random": (lambda self: random.random() + 1, "random"),
    "numpy's random": (lambda self: np.random.rand() + 1, "numpy.random"),  # noqa: NPY002
    "numpy's generator": (lambda self: GENERATOR.random() + 1, "Generator"),
    "logging": (lambda self: logging.root.level + 1, "cannot be compared"),
    "gradient mode": (lambda self: 1.0 + torch.is_grad_enabled(), "torch.is_grad_enabled"),
    "inference mode": (lambda self: 1.0 + torch.is_inference_mode_enabled(), "torch.is_inference_mode_enabled"),
    "default dtype": (lambda self: torch.get_default_dtype().itemsize, "torch.get_default_dtype"),
    "dtype of a new tensor": (lambda self: torch.ones(()).dtype.itemsize, "makes a tensor by torch.ones"),
    "autocast": (lambda self: 1.0 + torch.is_autocast_enabled("cpu"), "torch.is_autocast_enabled"),
    "threads": (lambda self: torch.get_num_threads(), "torch.get_num_threads"),
    "cudnn": (lambda self: 1.0 + torch.backends.cudnn.benchmark, "torch.backends.cudnn.benchmark"),
    "oneDNN": (lambda self: 1.0 + torch.backends.mkldnn.enabled, "torch.backends.mkldnn.enabled"),
    "tf32": (lambda self: 1.0 + torch.backends.cuda.matmul.allow_tf32, "cuBLASModule"),
    "deterministic": (lambda self: 1.0 + torch.are_deterministic_algorithms_enabled(), "deterministic"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_sentence(name: str) -> None:
    read, words = REFUSED[name]
    cls = reading(read, cached=functools.lru_cache(lambda self: Held()), settings=module, cfg=TARGET, number=1)
    fused = fuse(cls())
    reason = explain(fused)[""].reason
    assert type(fused) is cls
    assert words in str(reason)
