"""A fused block's repeated call in one piece: everything that it depends on is compared, then one operator runs.

A block's program reads its modules at each call, and hands each tail through :mod:`fused_resnet.functional` to its
plan. In a network that costs 80 microseconds a convolution, because the weights have pushed all of it out of the
caches. Where a program is nothing but tails, in float32 on the CPU and without gradients, the third call like the
last makes a :class:`_Bound`: the same decisions, with what they were made from. It holds as long as all of that is
as it was, down to the class of each module, each hook, each Parameter and each number; otherwise the program runs.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from .. import _extension, tails
from ..backends import cpu, packing
from ..backends.chain import INPUT, NOTHING, Chain, Link
from ..ops import direct, plans
from ..reference import ConvBN
from ..reference import Tail as Call

if TYPE_CHECKING:
    from .plan import Fusion, Program


class Step(NamedTuple):
    """One tail of a program, by module path and by the number of the step (or INPUT, NOTHING) that it reads."""

    conv: str
    bn: str | None
    source: int
    residual: int
    activation: str
    projection: tuple[str, str | None] | None = None


def steps(graph: fx.Graph) -> tuple[Step, ...]:
    """The rewritten graph as steps, the last of which makes the result; none where it holds anything but tails."""
    made: dict[Any, int] = {None: NOTHING}
    found: list[Step] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            if not made.keys() - {None}:
                made[node] = INPUT
        elif node.op == "call_function" and node.target is tails.conv_bn_act:
            conv, bn, x, residual, activation, *_ = node.args
            found.append(Step(_path(conv), _path(bn), made[x], made[residual], activation))
            made[node] = len(found) - 1
        elif node.op == "call_function" and node.target is tails.conv_bn_proj_act:
            conv, bn, x, proj_conv, proj_bn, proj_x, activation, *_ = node.args
            projection = (_path(proj_conv), _path(proj_bn))
            found.append(Step(_path(conv), _path(bn), made[x], made[proj_x], activation, projection))
            made[node] = len(found) - 1
        elif node.op == "output":
            return tuple(found) if found and made.get(node.args[0]) == len(found) - 1 else ()
        elif node.op != "get_attr":
            return ()
    return ()


def _path(node: Any) -> Any:
    return None if node is None else node.target


# ---- what a bound call depends on --------------------------------------------------------------------------


class _Unbindable(Exception):
    """Something about a module that cannot be compared by looking into dictionaries."""


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(name for name in vars(torch_module) if name.startswith("_global_") and name.endswith("_hooks"))


class _Reader:
    """Reads from modules, and remembers what it saw in a ``Facts``."""

    def __init__(self, root: nn.Module) -> None:
        module: Any = _extension.cpu()
        self.facts = module.Facts()
        self._root = root
        self._seen: set[int] = set()

    def attribute(self, module: nn.Module, name: str) -> Any:
        """``getattr(module, name)``, remembered in each dictionary that the lookup goes through."""
        own = vars(module)
        # The root's __dict__ holds the bound call in turn: it is looked up anew each time.
        where = None if module is self._root else own
        static = inspect.getattr_static(type(module), name, None)
        if hasattr(type(static), "__get__") or type(module).__getattribute__ is not object.__getattribute__:
            raise _Unbindable
        if name in own:
            self.facts.item(where, name, own[name])
            return own[name]
        self.facts.absent(where, name)
        if hasattr(type(module), name):
            return static
        if type(module).__getattr__ is not nn.Module.__getattr__:
            raise _Unbindable
        for store_name in ("_parameters", "_buffers", "_modules"):
            store = own[store_name]
            self._dictionary(where, store_name, store)
            if name in store:
                self.facts.item(store, name, store[name])
                return store[name]
            self.facts.absent(store, name)
        raise _Unbindable

    def _dictionary(self, where: Any, name: str, value: Any) -> None:
        if type(value) not in (dict, OrderedDict):
            raise _Unbindable
        self.facts.item(where, name, value)

    def bypassed(self, path: tuple[str, ...], length: int | None) -> nn.Module:
        """The module at ``path``, whose call is replaced: its class, hooks and forward stay what they are."""
        module = self._root
        for name in path:
            module = self.descend(module, name)
        if length is not None:
            self.facts.size(vars(module)["_modules"], length)
        if id(module) not in self._seen:
            self._seen.add(id(module))
            own = vars(module)
            for hooks in _HOOKS:
                self._dictionary(own, hooks, own[hooks])
                self.facts.size(own[hooks], 0)
            self.facts.absent(own, "forward")
        return module

    def descend(self, module: nn.Module, name: str) -> nn.Module:
        """The child of ``module`` called ``name``."""
        own = vars(module)
        children = own["_modules"]
        self._dictionary(None if module is self._root else own, "_modules", children)
        child = children.get(name)
        if not isinstance(child, nn.Module):
            raise _Unbindable
        self.facts.item(children, name, child)
        self.facts.object(child)
        return child

    def globals(self) -> None:
        """No hook for all modules, and the same choice of the backend."""
        for name in _GLOBAL_HOOKS:
            hooks = vars(torch_module)[name]
            self._dictionary(vars(torch_module), name, hooks)
            self.facts.size(hooks, 0)
        environment, key = plans._environment, plans._BACKEND_VARIABLE
        if key in environment:
            self.facts.item(environment, key, environment[key])
        else:
            self.facts.absent(environment, key)

    def conv_bn(self, conv_path: str, bn_path: str | None) -> tuple[ConvBN, dict[str, Any]]:
        """What ``tails`` would read of a convolution and its batch norm with known statistics."""
        conv = self._root.get_submodule(conv_path)
        bn = None if bn_path is None else self._root.get_submodule(bn_path)
        if not isinstance(conv, nn.Conv2d) or self.attribute(conv, "training"):
            raise _Unbindable
        names = ("stride", "padding", "dilation", "groups", "kernel_size", "padding_mode")
        geometry = {name: self.attribute(conv, name) for name in names}
        geometry["padding"] = tails._same_padding(conv)[0]
        found = ConvBN(self.attribute(conv, "weight"), self.attribute(conv, "bias"))
        if bn is None:
            return found, geometry
        read = ("training", "eps", "weight", "bias", "running_mean", "running_var")
        _, _, gamma, beta, mean, var = (self.attribute(bn, name) for name in read)
        if tails.uses_batch_statistics(bn):
            raise _Unbindable
        eps = tails.batch_norm_eps(bn)
        return found._replace(bn_weight=gamma, bn_bias=beta, running_mean=mean, running_var=var, eps=eps), geometry


# ---- binding -----------------------------------------------------------------------------------------------


class _Bound:
    """The call of one program for inputs of one kind, and everything it depends on."""

    def __init__(self, root: nn.Module, fusion: Fusion, program: Program, x: Tensor) -> None:
        self.plan, self.backend, self.winograd = fusion.plan, fusion.backend, fusion.winograd
        self.drops, self.clears = packing.drops, plans.clears
        reader = _Reader(root)
        reader.globals()
        reader.attribute(root, "training")
        for bypassed in program.bypassed:
            reader.bypassed(bypassed.names, bypassed.length)
        for names, attribute, _ in program.reads:
            module = root
            for name in names:
                module = reader.descend(module, name)
            reader.attribute(module, attribute)
        tensors: list[Tensor] = []
        self.chain = Chain(_links(reader, program, fusion, x, tensors))
        self.facts = reader.facts.hold
        self.tensors = tuple({id(t): t for t in tensors}.values())
        guard = direct.guard((x, *self.tensors))
        if guard is None or not self.facts(root) or program.why_not(root) is not None:
            raise _Unbindable
        self.guard = guard

    def run(self, root: nn.Module, fusion: Fusion, x: Tensor) -> Tensor | None:
        if (
            self.drops != packing.drops
            or self.clears != plans.clears
            or self.plan is not fusion.plan
            or self.backend != fusion.backend
            or self.winograd != fusion.winograd
            or not self.facts(root)
            or not self.guard(x, *self.tensors)
        ):
            return None
        return self.chain(x)


def _links(reader: _Reader, program: Program, fusion: Fusion, x: Tensor, tensors: list[Tensor]) -> list[Link]:
    """The program's links, found by running it step by step; the tensors of its modules are added to ``tensors``."""
    outputs, last = [x], [INPUT]  # of each step, the input before them: value, number of the link that makes it
    links: list[Link] = []
    for step in program.steps:
        conv, geometry = reader.conv_bn(step.conv, step.bn)
        residual = None if step.residual == NOTHING else outputs[step.residual + 1]
        proj = None
        proj_stride = (1, 1)
        if step.projection is not None:
            proj, proj_geometry = reader.conv_bn(*step.projection)
            proj_stride = proj_geometry["stride"]
        call = Call(
            outputs[step.source + 1], conv, None if proj is not None else residual, geometry["stride"],
            geometry["padding"], geometry["dilation"], geometry["groups"], step.activation,
            None if proj is None else residual, proj, proj_stride, True, fusion.winograd,
        )  # fmt: skip
        plan = plans.known(call, fusion.backend)
        number = NOTHING if step.residual == NOTHING else last[step.residual + 1]
        found = None if plan is None else cpu.links(plan.run, call, last[step.source + 1], number, len(links))
        if plan is None or found is None:
            raise _Unbindable
        links += found
        outputs.append(plan.run(call))
        last.append(len(links) - 1)
        for part in (conv, proj):
            if part is not None:
                tensors += [t for t in part[:6] if isinstance(t, Tensor)]
    return links


class Chains:
    """The bound calls of one fused module, by the input's shape, made at the third call of a kind."""

    _CALLS = 3
    _KEPT = 16
    _AFTER_A_FAILURE = -1000

    def __init__(self) -> None:
        self._bound: dict[Any, _Bound] = {}
        self._calls: dict[Any, int] = {}

    def run(self, root: nn.Module, fusion: Fusion, x: Tensor) -> Tensor | None:
        """What ``root`` makes of ``x``, or None where its program has to run."""
        if not direct.quiet():
            return None
        key = (x.shape, torch.is_inference_mode_enabled())
        bound = self._bound.get(key)
        if bound is not None:
            y = bound.run(root, fusion, x)
            if y is not None:
                return y
            self._bound.pop(key, None)
            self._calls.pop(key, None)
        calls = self._calls.get(key, 0) + 1
        if calls > self._CALLS:
            calls = self._bind(key, root, fusion, x)
        if len(self._calls) >= self._KEPT:  # shapes without end: start afresh
            self._calls.clear()
            self._bound.clear()
        self._calls[key] = calls
        return None

    def _bind(self, key: Any, root: nn.Module, fusion: Fusion, x: Tensor) -> int:
        program = None if fusion.plan is None else fusion.plan.choose(root)[0]
        if program is None or not program.steps or _extension.cpu() is None:
            return self._AFTER_A_FAILURE
        try:
            self._bound[key] = _Bound(root, fusion, program, x)
        except _Unbindable:
            return self._AFTER_A_FAILURE
        return 0
