"""A fused module's repeated call in one piece: everything that it depends on is compared, then one operator runs.

A program reads its modules at each call, and hands each tail through :mod:`fused_resnet.functional` to its plan. In
a network that costs 80 microseconds a convolution, because the weights have pushed all of it out of the caches. So
where a program begins with tails, and calls of modules that are tails in turn, in float32 on the CPU and without
gradients, the fourth call like the last makes a :class:`_Bound` of this beginning: the same decisions, with all that
they were made from. It serves as long as that is as it was, down to the class of each module, each hook, each
Parameter and each number; otherwise the program runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .. import _extension, functional, tails
from ..backends import cpu, packing
from ..backends.chain import INPUT, NOTHING, Chain, Link
from ..ops import direct, plans
from ..reference import Tail as Call
from .facts import Reader, Unreadable

if TYPE_CHECKING:
    from .plan import Fusion, Program

# ---- programs as steps -------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One tail of a program, or the call of a child where ``conv`` is None. Values go by the number of the step."""

    node: fx.Node
    source: int
    residual: int = NOTHING
    conv: str | None = None
    bn: str | None = None
    activation: str = "none"
    projection: tuple[str, str | None] | None = None
    pool: str | None = None


class Steps:
    """The beginning of a rewritten graph as steps, and the rest of it as functions."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._rests: dict[int, Callable[..., Any] | None] = {}
        made: dict[Any, int] = {None: NOTHING, next(iter(graph.nodes)): INPUT}
        self.steps: list[Step] = []
        self.complete = False
        """Whether there is nothing else, and the last step's value is the result."""
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                continue
            step = None if node.op == "output" else _step(node, made)
            if step is None:
                self.complete = node.op == "output" and made.get(node.args[0], INPUT) == len(self.steps) - 1 >= 0
                break
            made[node] = len(self.steps)
            self.steps.append(step)

    def rest(self, count: int, compile_graph: Callable[[fx.Graph], Callable[..., Any]]) -> Callable[..., Any] | None:
        """``rest(self, y, backend, winograd)``: the program after its first ``count`` steps, of which y is the last
        value. None where it reads earlier values too."""
        if count not in self._rests:
            graph = _after(self._graph, [step.node for step in self.steps[:count]])
            self._rests[count] = None if graph is None else compile_graph(graph)
        return self._rests[count]


def _step(node: fx.Node, made: dict[Any, int]) -> Step | None:
    """What ``node`` does with values already ``made``; None where it is neither a tail nor the call of a child."""

    def path(argument: Any) -> Any:
        return None if argument is None else argument.target

    arguments: list[Any] = list(node.args)
    if node.op == "call_module" and len(arguments) == 1 and not node.kwargs and arguments[0] in made:
        return Step(node, made[arguments[0]])
    if node.op != "call_function" or node.target not in (
        tails.conv_bn_act,
        tails.conv_bn_proj_act,
        tails.conv_bn_act_max_pool,
    ):
        return None
    conv, bn, *arguments = arguments
    pool = arguments.pop(0) if node.target is tails.conv_bn_act_max_pool else None
    x = arguments.pop(0)
    proj = (arguments.pop(0), arguments.pop(0)) if node.target is tails.conv_bn_proj_act else None
    residual = None if pool is not None else arguments.pop(0)
    if x not in made or residual not in made:
        return None
    projection = None if proj is None else (path(proj[0]), path(proj[1]))
    return Step(node, made[x], made[residual], path(conv), path(bn), arguments[0], projection, path(pool))


def _after(graph: fx.Graph, done: list[fx.Node]) -> fx.Graph | None:
    """What ``graph`` does after the nodes ``done``, with the value of the last of them for its input."""
    rest, copies = fx.Graph(), {}
    for node in graph.nodes:
        if node.op == "placeholder":
            copies[node] = rest.placeholder(node.name)
    x = next(iter(copies))
    copies[done[-1]] = copies.pop(x)
    for node in graph.nodes:
        if node.op == "placeholder" or node in done:
            continue
        if any(argument not in copies for argument in node.all_input_nodes):
            return None
        if node.op == "get_attr" and all(user in done for user in node.users):
            continue
        copies[node] = rest.node_copy(node, lambda argument: copies[argument])
    return rest


# ---- binding -----------------------------------------------------------------------------------------------


class _Value(NamedTuple):
    tensor: Tensor
    link: int


class _Binder:
    """Runs programs step by step, and notes the links that they are made of and everything that was read."""

    def __init__(self, root: nn.Module) -> None:
        self.reader = Reader(root)
        self.reader.surroundings()
        self.links: list[Link] = []
        self.tensors: dict[int, Tensor] = {}

    def program(self, owner: nn.Module, fusion: Fusion, program: Program, x: _Value) -> Iterator[_Value]:
        """The value of each step of the program of ``owner``."""
        reader = self.reader
        for bypassed in program.bypassed:
            module = reader.descendant(owner, bypassed.names)
            reader.bypassed(module)
            if bypassed.length is not None:
                reader.length(module, bypassed.length)
        for names, attribute, _ in program.reads:
            reader.attribute(reader.descendant(owner, names), attribute)
        values = {INPUT: x}
        for number, step in enumerate(program.steps.steps):
            if step.conv is None:
                module = reader.descendant(owner, tuple(str(step.node.target).split(".")))
                values[number] = self._call(module, values[step.source])
            else:
                values[number] = self._tail(owner, fusion, step, values)
            yield values[number]

    def _call(self, module: nn.Module, x: _Value) -> _Value:
        """A child called as a whole."""
        from .plan import ATTRIBUTE, Fusion, fused_class, is_fused, original_class

        reader = self.reader
        reader.bypassed(module)
        if reader.attribute(module, "_compiled_call_impl") is not None:
            raise Unreadable
        if type(module) is nn.Identity:  # timm's blocks keep the place of what they do without
            return x
        if type(module) is nn.Sequential:
            for child in reader.children(module):
                x = self._call(child, x)
            return x
        cls: Any = type(module)
        ours = is_fused(module) and cls is fused_class(original_class(module)) and cls.__call__ is nn.Module.__call__
        fusion = reader.attribute(module, ATTRIBUTE) if ours else None
        if not isinstance(fusion, Fusion):
            raise Unreadable
        for name in ("plan", "backend", "winograd"):
            reader.item(vars(fusion), name, vars(fusion)[name])
        program = None if fusion.plan is None else fusion.plan.choose(module)[0]
        if program is None or not program.is_steps:
            raise Unreadable
        for value in self.program(module, fusion, program, x):
            last = value
        return last

    def _tail(self, owner: nn.Module, fusion: Fusion, step: Step, values: dict[int, _Value]) -> _Value:
        assert step.conv is not None
        conv, geometry = self.reader.conv_bn(owner, step.conv, step.bn)
        x, added = values[step.source], values.get(step.residual, _Value(torch.empty(0), NOTHING))
        call = Call(
            x.tensor, conv, None, geometry["stride"], geometry["padding"], geometry["dilation"], geometry["groups"],
            step.activation, cache_weights=True, winograd=fusion.winograd,
        )  # fmt: skip
        if step.projection is not None:
            proj, proj_geometry = self.reader.conv_bn(owner, *step.projection)
            call = call._replace(proj_x=added.tensor, proj=proj, proj_stride=proj_geometry["stride"])
        elif step.residual != NOTHING:
            call = call._replace(residual=added.tensor)
        pool = None if step.pool is None else self._pool(owner, step.pool)
        plan = plans.known(call, fusion.backend)
        made = None
        if plan is not None:
            made = cpu.links(plan.run, call, x.link, added.link, len(self.links), pool)
        if plan is None or made is None:
            raise Unreadable
        self.links += made
        for link in made:
            self.tensors.update((id(t), t) for t in link.conv[:6] if isinstance(t, Tensor))
        y = plan.run(call)
        if pool is not None:
            y = torch.nn.functional.max_pool2d(y, *pool)
        return _Value(y, len(self.links) - 1)

    def _pool(self, owner: nn.Module, path: str) -> cpu.Pool:
        pool = self.reader.descendant(owner, tuple(path.split(".")))
        names = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")
        window, stride, padding, *_ = (self.reader.attribute(pool, name) for name in names)
        if not tails.is_plain_max_pool(pool):
            raise Unreadable
        return functional.max_pool_numbers(window, stride, padding)


class _Bound:
    """The call of one program for inputs of one kind, and everything it depends on."""

    def __init__(self, root: nn.Module, fusion: Fusion, program: Program, x: Tensor) -> None:
        self.plan, self.backend, self.winograd = fusion.plan, fusion.backend, fusion.winograd
        self.drops, self.clears = packing.drops, plans.clears
        binder = _Binder(root)
        # As many steps as can be bound, and leave the rest of the program only the last of their values.
        count, links = 0, 0
        try:
            for number, value in enumerate(binder.program(root, fusion, program, _Value(x, INPUT)), 1):
                if program.rest(number) is not None:
                    count, links = number, value.link + 1
        except Unreadable:
            pass
        if links == 0:
            raise Unreadable
        self.rest = None if program.is_steps and count == len(program.steps.steps) else program.rest(count)
        self.chain = Chain(x, binder.links[:links])
        self.facts = binder.reader.hold
        self.tensors = tuple(binder.tensors.values())
        guard = direct.guard((x, *self.tensors))
        if guard is None or not self.facts(root) or program.why_not(root) is not None:
            raise Unreadable
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


class Chains:
    """The bound calls of one fused module, by the input's shape."""

    _CALLS = 3
    _KEPT = 16
    _AFTER_A_FAILURE = -1000

    def __init__(self) -> None:
        self._bound: dict[Any, _Bound] = {}
        self._calls: dict[Any, int] = {}

    def run(self, root: nn.Module, fusion: Fusion, x: Tensor) -> Any:
        """What ``root`` makes of ``x``, or None where its program has to run."""
        if type(x) is not Tensor or not x.is_cpu or not direct.quiet():
            return None
        key = (x.shape, torch.is_inference_mode_enabled())
        bound = self._bound.get(key)
        if bound is not None:
            y = bound.run(root, fusion, x)
            if y is not None:
                return y if bound.rest is None else bound.rest(root, y, fusion.backend, fusion.winograd)
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
        if program is None or _extension.cpu() is None:
            return self._AFTER_A_FAILURE
        try:
            self._bound[key] = _Bound(root, fusion, program, x)
        except Unreadable:
            return self._AFTER_A_FAILURE
        return 0
