"""What a module's forward computes, as a graph: ``torch.fx`` on a structural copy, with everything a plan must know.

Tracing bakes Python's decisions into the graph. So that a plan made from it stays right, the trace notes what the
forward read (see ``reads``), and refuses what cannot be baked: random draws, attributes assigned in the forward,
modules made in the forward.
"""

from __future__ import annotations

import copy
import functools
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn import parts
from .reads import Reads, Refused
from .trace_reads import Recorder

_HOOK_FIELDS = (
    *parts.HOOKS,
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Untraceable(Exception):
    """A forward that cannot be planned; the message is a clause that follows the module's name."""


class SeveralInputs(Untraceable):
    """A forward that takes more than one argument; whoever calls it may be traced through it."""


@dataclass
class Traced:
    """A module's forward in one mode."""

    graph: fx.Graph
    modules: dict[str, nn.Module]
    """The copy's modules by path; ``""`` is the module itself."""
    inlined: list[str]
    """Paths of the modules whose own forward was traced through."""
    reads: Reads
    """What the graph depends on."""
    aliases: dict[int, list[str]] = field(default_factory=dict)
    """id of a module -> its paths, where it has several."""
    unreadable: set[int] = field(default_factory=set)
    """Batch norms of a user's whose forward depends on what cannot be compared."""
    one_input: set[str] = field(default_factory=set)
    """Of the inlined, those that are called with one value of the graph and nothing else."""

    @property
    def called(self) -> set[str]:
        """Paths of the modules that the graph calls as they are."""
        return {str(node.target) for node in self.graph.nodes if node.op == "call_module"}

    @property
    def given_more(self) -> set[str]:
        """Those of them that are given anything but one value of the graph."""
        calls = [node for node in self.graph.nodes if node.op == "call_module"]
        return {
            str(node.target)
            for node in calls
            if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node)
        }


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
    memo.update({id(t): t for m in module.modules() for t in m.__dict__.values() if isinstance(t, Tensor)})
    memo.update(opaque)
    try:
        copied = copy.deepcopy(module, without_hooks(module, memo))
    except Exception as error:
        raise Untraceable(f"cannot be copied ({_first_line(error)})") from error
    if isinstance(copied, fx.GraphModule):
        _set_mode_of_graph(copied, training)
    stand_ins = {id(m): m for m in opaque.values()}
    recorder = Recorder(copied)
    tracer = _Tracer(copied, stand_ins, recorder)
    for m in list(inside(copied, stand_ins)):
        m.__dict__["training"] = training  # not by train(): a model's own train() may keep parts frozen
    torch.overrides.is_tensor_method_or_property(torch.flatten)  # makes its list once, which would be watched
    before = _random_states()
    problem: Exception | None = None
    try:
        with recorder.watch():
            graph = tracer.trace(copied)
    except Exception as error:
        problem = error
    finally:
        drew = _random_states_changed(before)
        _restore_random_states(before)
    why_not = recorder.why_not()
    if isinstance(problem, (Untraceable, Refused)):
        raise Untraceable(str(problem)) from problem
    if drew:
        raise Untraceable("draws random numbers in its forward, which a plan made once would freeze")
    if isinstance(problem, TypeError) and "required positional argument" in str(problem):
        raise SeveralInputs("takes more than one argument") from problem
    if problem is not None:
        raise Untraceable(_why_untraceable(problem)) from problem
    if why_not is not None:
        raise Untraceable(why_not)
    aliases: dict[int, list[str]] = {}
    for name, m in copied.named_modules(remove_duplicate=False):
        aliases.setdefault(id(m), []).append(name)
    names = recorder.paths
    recorder.close()
    if isinstance(copied, fx.GraphModule):
        recorder.reads.values["", "training"] = training  # which graph it has may depend on that
    return Traced(
        graph,
        dict(recorder.modules),
        [names[id(m)] for m in tracer.inlined],
        recorder.reads,
        {key: paths for key, paths in aliases.items() if len(paths) > 1},
        tracer.unreadable,
        {path for path, one in tracer.one_input.items() if one},
    )


def _set_mode_of_graph(module: fx.GraphModule, training: bool) -> None:
    """Have a graph module exchange its graph, if it has one for each mode; its submodules' modes stay."""
    modes = [(m, m.training) for m in module.modules()]
    module.train(training)
    for m, mode in modes:
        m.training = mode


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__


def _why_untraceable(error: Exception) -> str:
    if isinstance(error, fx.proxy.TraceError):
        return f"decides by the data it is given ({_first_line(error)})"
    return f"cannot be traced ({type(error).__name__}: {_first_line(error)})"


# ---- random states -----------------------------------------------------------------------------------------


def _random_states() -> tuple[Tensor, Any]:
    return torch.get_rng_state(), random.getstate()


def _random_states_changed(before: tuple[Tensor, Any]) -> bool:
    return not torch.equal(before[0], torch.get_rng_state()) or before[1] != random.getstate()


def _restore_random_states(states: tuple[Tensor, Any]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])


_PLAIN_ARGUMENTS = (fx.Proxy, fx.Node, int, float, bool, str, type(None), torch.dtype, type(...))


def _is_plain(value: Any) -> bool:
    cls = type(value)
    if cls in (tuple, list):
        return all(map(_is_plain, value))
    if cls is dict:
        return all(map(_is_plain, value.values()))
    return cls in _PLAIN_ARGUMENTS


# ---- the tracer --------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    # A buffer read in the forward becomes a read in the plan too, never a constant.
    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, opaque: dict[int, nn.Module], recorder: Recorder) -> None:
        super().__init__()
        self.opaque = opaque
        self.recorder = recorder
        self.inlined: list[nn.Module] = [root]
        self.names = recorder.paths
        self.tensors = {id(t): name for name, t in tensors_of(root)}
        self.unreadable: set[int] = set()
        self.one_input: dict[str, bool] = {}
        self._stack: list[str] = [""]
        # Before the trace: in it, the buffers of a frozen batch norm are no tensors.
        self._leaves = {id(m): is_leaf(m, opaque) for m in root.modules()}
        self._running = False

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        # One input; other parameters keep their defaults, and a call that gives them runs unfused.
        @functools.wraps(root_fn)
        def forward(*args: Any) -> Any:
            with self.recorder.resumed():
                return root_fn(*args)

        return forward, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._leaves[id(m)]

    def path_of_module(self, mod: nn.Module) -> str:
        return self.names[id(mod)]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        name = self.tensors.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._running:
            return forward(*args, **kwargs)
        with self.recorder.paused():
            return self._call_module(m, forward, args, kwargs)

    def _call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if id(m) not in self.names:
            raise Untraceable(
                f"calls a {type(m).__name__} that is not one of its registered submodules: made inside forward it "
                "starts from new random weights at each call and is never trained, which is a bug; in a plain list "
                "it is missing from parameters() and state_dict()"
            )

        def traced(*args: Any, **kwargs: Any) -> Any:
            with self.recorder.resumed():
                return forward(*args, **kwargs)

        leaf = self.is_leaf_module(m, self.names[id(m)])
        if leaf and id(m) not in self.opaque and isinstance(m, _BatchNorm) and not parts.is_plain_batch_norm(m):
            self._read_batch_norm(m)
        if leaf and self._may_hand_through(m) and self._hands_through(m, traced, args, kwargs):
            return args[0]
        if leaf:
            return super().call_module(m, forward, args, kwargs)
        if not any(m is other for other in self.inlined):
            self.inlined.append(m)
        path = self.names[id(m)]
        one = len(args) == 1 and not kwargs and isinstance(args[0], fx.Proxy)
        self.one_input[path] = one and self.one_input.get(path, True)
        self._stack.append(path)
        try:
            return super().call_module(m, traced, args, kwargs)
        finally:
            self._stack.pop()

    def _may_hand_through(self, m: nn.Module) -> bool:
        """Whether ``m``, a leaf of a user's class without tensors, may turn out to return its argument."""
        return (
            id(m) not in self.opaque
            and not type(m).__module__.startswith("torch.")
            and not is_container(m)
            and next(m.parameters(), None) is None
            and next(m.buffers(), None) is None
        )

    def _hands_through(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> bool:
        """Trace through ``m``: True where its code does nothing but return its argument (drop-path in eval mode).

        What the code read to decide so is recorded. Else the trace is as if nothing had happened, and ``m`` is
        called by the plan: it may store, count, print, draw or compute.
        """
        if len(args) != 1 or kwargs:
            return False
        recorder, mark, states = self.recorder, self.recorder.mark(), _random_states()
        nodes, inlined = set(self.graph.nodes), list(self.inlined)
        self.inlined.append(m)
        try:
            handed = forward(*args) is args[0]
        except Exception:
            handed = False
        handed = recorder.why_not() is None and handed and not _random_states_changed(states)
        made = [node for node in self.graph.nodes if node not in nodes]
        if handed and not made:
            return True
        for node in reversed(made):
            self.graph.erase_node(node)
        _restore_random_states(states)
        self.inlined = inlined
        recorder.rollback(mark)
        return False

    def _read_batch_norm(self, m: nn.Module) -> None:
        """Run a user's batch norm in each mode, on a copy, to record what its forward reads."""
        recorder, mark = self.recorder, self.recorder.mark()
        paths = dict(recorder.paths)
        self._running = True
        try:
            twin = copy.deepcopy(m)
            for (_, theirs), (_, ours) in zip(m.named_modules(), twin.named_modules(), strict=True):
                recorder.paths[id(ours)] = recorder.paths[id(theirs)]
            vector = next(iter((*m.parameters(), *m.buffers())))
            for training, grad in ((False, False), (False, True), (True, True)):
                for part in twin.modules():
                    part.training = training
                x = torch.ones(2, len(vector), 2, 2, dtype=vector.dtype, device=vector.device, requires_grad=grad)
                with recorder.resumed():
                    type(twin).forward(twin, x * 1)
            recorder.forget_modes(mark, [recorder.paths[id(part)] for part in twin.modules()])
            readable = recorder.why_not() is None
        except Exception:
            readable = False
        finally:
            self._running = False
            recorder.paths = paths
        if not readable:
            recorder.rollback(mark)
            self.unreadable.add(id(m))

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> fx.Proxy:
        if _is_plain(args) and _is_plain(kwargs):  # no code of the model's runs to take them apart
            with self.recorder.paused():
                proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        else:
            proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        proxy.node.meta["stack"] = tuple(self._stack)
        return proxy

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, OrderedDict):  # kept an OrderedDict: what torchvision's backbones return
            items = [(key, value) for key, value in a.items()]
            return self.create_proxy("call_function", OrderedDict, (items,), {}).node
        return super().create_arg(a)
