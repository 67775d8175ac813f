"""What a module's forward computes, as a graph: ``torch.fx`` on a structural copy, with everything a plan must know.

Tracing bakes Python's decisions into the graph. So that a plan made from it stays right, the trace notes each
plain attribute that the forward read (``self.downsample is None``, ``self.training``, ...), and refuses what
cannot be baked: random draws, attributes assigned in the forward, modules made in the forward.
"""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import parts

_SIMPLE = (bool, int, float, str, type(None), torch.dtype)
_MODULE_FIELDS = frozenset(nn.Module().__dict__) - {"training"}
_HOOK_FIELDS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Untraceable(Exception):
    """A forward that cannot be planned; the message is a clause that follows the module's name."""


@dataclass
class Traced:
    """A module's forward in one mode."""

    graph: fx.Graph
    modules: dict[str, nn.Module]
    """The copy's modules by path; ``""`` is the module itself."""
    inlined: list[str]
    """Paths of the modules whose own forward was traced through."""
    reads: dict[tuple[str, str], Any] = field(default_factory=dict)
    """(path, attribute) -> the plain value on which the graph may depend."""


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` may be the BN of a tail: live, synchronised or frozen, with or without its own activation."""
    return isinstance(module, _BatchNorm) or parts.is_frozen_batch_norm(module)


def inside(module: nn.Module, opaque: dict[int, Any]) -> Iterator[nn.Module]:
    """``module`` and its descendants, without looking into opaque ones and batch norms."""
    if id(module) in opaque:
        return
    yield module
    if not is_batch_norm(module):
        for child in module.children():
            yield from inside(child, opaque)


def is_container(module: nn.Module) -> bool:
    """Whether ``module`` is one of torch's containers with nothing of its own in its forward."""
    return any(isinstance(module, c) and type(module).forward is c.forward for c in _CONTAINERS)


def is_leaf(module: nn.Module, opaque: dict[int, Any]) -> bool:
    """Whether the trace calls ``module`` as it is. Inlined are the modules that hold parts of a tail."""
    if id(module) in opaque or is_batch_norm(module) or isinstance(module, nn.Conv2d):
        return True
    parts = list(inside(module, opaque))
    if is_container(module):
        empty = len(module._modules) == 0  # `shortcut = nn.Sequential()`
        return not empty and not any(is_batch_norm(m) or isinstance(m, nn.Conv2d) for m in parts)
    if type(module).__module__.startswith(("torch.nn.modules", "torch.ao.nn")):
        return True
    return not any(is_batch_norm(m) for m in parts)


def without_hooks(module: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """Extend a deepcopy memo so that no hook (nor the object it is bound to) is copied."""
    for m in module.modules():
        for name in _HOOK_FIELDS:
            hooks = m.__dict__.get(name)
            if hooks:
                memo[id(hooks)] = OrderedDict()
    return memo


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers by name, each tensor once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def trace(module: nn.Module, opaque: dict[int, nn.Module], training: bool) -> Traced:
    """Trace ``module.forward(x)`` for one image tensor ``x`` in the given mode.

    ``opaque`` maps ``id(submodule)`` to what stands for that submodule in the copy; it is called as a whole.
    Raises Untraceable. The module itself, its tensors and the random states are left as they were.
    """
    if "forward" in module.__dict__:
        raise Untraceable("has a forward of its own (set on the instance)")
    memo: dict[int, Any] = {id(t): t for _, t in tensors_of(module)}
    memo.update(opaque)
    try:
        copied = copy.deepcopy(module, without_hooks(module, memo))
    except Exception as error:
        raise Untraceable(f"cannot be copied ({_first_line(error)})") from error
    stand_ins = {id(m): m for m in opaque.values()}
    tracer = _Tracer(copied, stand_ins)
    for m in list(inside(copied, stand_ins)):
        m.__dict__["training"] = training  # not by train(): a model's own train() may keep parts frozen
        if m is copied or not is_leaf(m, stand_ins):
            _record(m, tracer)
    before = _random_states()
    try:
        graph = tracer.trace(copied)
    except Untraceable:
        raise
    except Exception as error:
        raise Untraceable(_why_untraceable(error)) from error
    finally:
        drew = _random_states_changed(before)
        _restore_random_states(before)
    if drew:
        raise Untraceable("draws random numbers in its forward, which a plan made once would freeze")
    names = {id(m): name for name, m in copied.named_modules()}
    return Traced(graph, dict(copied.named_modules()), [names[id(m)] for m in tracer.inlined], tracer.reads)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__


def _why_untraceable(error: Exception) -> str:
    if isinstance(error, fx.proxy.TraceError):
        return f"decides by the data it is given ({_first_line(error)})"
    if isinstance(error, TypeError) and "required positional argument" in str(error):
        return "takes more than one argument"
    return f"cannot be traced ({type(error).__name__}: {_first_line(error)})"


# ---- random states -----------------------------------------------------------------------------------------


def _random_states() -> tuple[Tensor, Any]:
    return torch.get_rng_state(), random.getstate()


def _random_states_changed(before: tuple[Tensor, Any]) -> bool:
    return not torch.equal(before[0], torch.get_rng_state()) or before[1] != random.getstate()


def _restore_random_states(states: tuple[Tensor, Any]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])


# ---- the tracer --------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    # A buffer read in the forward becomes a read in the plan too, never a constant.
    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, opaque: dict[int, nn.Module]) -> None:
        super().__init__()
        self.opaque = opaque
        self.inlined: list[nn.Module] = [root]
        self.reads: dict[tuple[str, str], Any] = {}
        self.names = {id(m): name for name, m in root.named_modules()}
        self._stack: list[str] = [""]

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        # One input; other parameters keep their defaults, and a call that gives them runs unfused.
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m, self.opaque)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if id(m) not in self.names:
            raise Untraceable(
                f"calls a {type(m).__name__} that is not one of its registered submodules: made inside forward it "
                "starts from new random weights at each call and is never trained, which is a bug; in a plain list "
                "it is missing from parameters() and state_dict()"
            )
        if is_leaf(m, self.opaque):
            return super().call_module(m, forward, args, kwargs)
        if m not in self.inlined:
            self.inlined.append(m)
        self._stack.append(self.names[id(m)])
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._stack.pop()

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(*args, **kwargs)
        proxy.node.meta["stack"] = tuple(self._stack)
        return proxy

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, OrderedDict):  # kept an OrderedDict: what torchvision's backbones return
            items = [(key, value) for key, value in a.items()]
            return self.create_proxy("call_function", OrderedDict, (items,), {}).node
        return super().create_arg(a)


def _record(module: nn.Module, tracer: _Tracer) -> None:
    """Make ``module`` (of a copy) report the plain attributes that are read of it, and refuse assignments."""
    cls = type(module)
    path = tracer.names[id(module)]

    def note(name: str, value: Any) -> None:
        if name in _MODULE_FIELDS or name.startswith("__"):
            return
        if isinstance(value, _SIMPLE) or (isinstance(value, tuple) and all(isinstance(v, _SIMPLE) for v in value)):
            tracer.reads[path, name] = value

    class Recording(cls):  # type: ignore[valid-type, misc]
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if not callable(value):
                note(name, value)
            return value

        def __getattr__(self, name: str) -> Any:
            value = super().__getattr__(name)
            if value is None:
                note(name, None)
            return value

        def __setattr__(self, name: str, value: Any) -> None:
            if name.startswith("_tensor_constant"):
                raise Untraceable("computes with a tensor that is neither its parameter nor its buffer")
            made = f", a {type(value).__name__} made at each call," if isinstance(value, nn.Module) else ""
            raise Untraceable(f"assigns self.{name}{made} in its forward")

    Recording.__name__, Recording.__qualname__, Recording.__module__ = (
        cls.__name__,
        cls.__qualname__,
        cls.__module__,
    )
    try:
        module.__class__ = Recording
    except TypeError as error:
        raise Untraceable(f"cannot be traced ({_first_line(error)})") from error
