"""A network for inputs of one kind as a list of steps: runs of convolutions in one call each, and what lies between.

Recording interprets the programs of fused modules on stand-ins (:class:`Symbol`) for activations: a tail becomes links
of a ``conv_program``, anything else a call that is made again in each run. Nothing is computed on the way but what
lies between the tails, on zeros, to learn its shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import nn as fused_nn
from ..backends.cpu_fused import FusedConvolution, with_max_pool
from ..backends.cpu_program import NOTHING, Pool
from ..core.layout import looks_channels_last, looks_contiguous
from ..core.packed_weights import PackedWeights
from ..core.reference import ConvBN, TailArguments
from ..nn import tail
from ..nn.between import is_free, is_image, run
from ..nn.parts import geometry, uses_batch_statistics, why_not_bypassed
from ..nn.tail import Options
from ..selection import plans
from .plan import ATTRIBUTE, Fusion, is_fused
from .recording import Call, Convolutions, Recording, Slot, map_values
from .rewrite import is_value


class NotRecordable(Exception):
    """A module that is not made of tails."""


class Symbol(tail.Recorded):
    """An activation between tails: a slot's, or the output of a link."""

    def __init__(self, recorder: Recorder, tensor: Tensor, channels_last: bool, slot: Slot | None = None) -> None:
        self.recorder, self.tensor, self.channels_last, self.slot = recorder, tensor, channels_last, slot
        self.segment: Convolutions | None = None
        self.link = NOTHING
        self.fresh = False

    @property
    def is_dense(self) -> bool:
        """Whether eager's tensor would be NCHW or channels_last."""
        shape, stride = self.tensor.shape, self.tensor.stride()
        return is_image(self.tensor) and (looks_contiguous(shape, stride) or looks_channels_last(shape, stride))

    def tail(
        self, conv: nn.Conv2d, bn: Any, residual: Any, projection: Any, pool: Any, activation: str,
        options: Options, residual_first: bool = False,
    ) -> Any:  # fmt: skip
        return self.recorder.tail(self, conv, bn, residual, projection, pool, activation, options, residual_first)

    def call(self, module: nn.Module) -> Any:
        return self.recorder.call(module, self)

    def apply(self, function: Callable[[Tensor], Any]) -> Any:
        return self.recorder.apply(function, self)

    def in_any_layout(self, function: Callable[..., Any]) -> Any:
        return self.recorder.in_any_layout(function, [self], (), lambda slots: slots)

    @staticmethod
    def joined(values: list[Any], dim: int) -> Any:
        recorder = next(x.recorder for x in values if isinstance(x, Symbol))
        return recorder.in_any_layout(torch.cat, values, (dim,), lambda slots: [slots])


# ---- recording ---------------------------------------------------------------------------------------------


class Recorder:
    """Records one module. ``kept`` holds its packed weights; nothing of them is compared later."""

    def __init__(self, kept: PackedWeights) -> None:
        self._kept = kept
        self._steps: list[Convolutions | Call] = []
        self._slots = 0
        self._open: Convolutions | None = None

    def record(self, module: nn.Module, x: Tensor) -> Recording:
        """The steps of ``module(x)``, whatever forward has been set on the module itself."""
        held = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
        example = torch.zeros(held, dtype=x.dtype, device=x.device).as_strided(x.shape, x.stride())
        output = self._inside(module, self._enter(self._slot(example)))
        if output is NotImplemented:
            raise NotRecordable
        output = map_values(output, lambda v: self._leave(v) if isinstance(v, Symbol) else v)
        for step in self._steps:
            if isinstance(step, Convolutions):
                step.finish(self._kept)
        return Recording(self._steps, self._slots, output)

    # -- values --

    def _slot(self, example: Any) -> Slot:
        self._slots += 1
        return Slot(self._slots - 1, example)

    def _enter(self, value: Any) -> Any:
        if not isinstance(value, Slot) or not isinstance(value.example, Tensor) or value.example.dim() != 4:
            return value
        example = value.example
        return Symbol(self, example, looks_channels_last(example.shape, example.stride()), value)

    def _leave(self, symbol: Symbol) -> Slot:
        """The slot of the tensor that eager would have in place of ``symbol``."""
        if symbol.slot is None or not looks_channels_last_as(symbol):
            dense = self._kept_slot(symbol)
            wanted = torch.channels_last if symbol.channels_last else torch.contiguous_format
            tensor = symbol.tensor.contiguous(memory_format=wanted)
            symbol.tensor, symbol.slot = tensor, self._slot(tensor)
            symbol.segment = None
            self._steps.append(Call("", Tensor.contiguous, (dense,), {"memory_format": wanted}, symbol.slot.number))
        return symbol.slot

    def _kept_slot(self, symbol: Symbol) -> Slot:
        """A slot for ``symbol`` as it is, the output of a link included: whoever reads it comes in a later call."""
        if symbol.slot is None:
            assert symbol.segment is not None
            symbol.slot = self._slot(symbol.tensor)
            symbol.segment.outputs.append((symbol.link, symbol.slot.number))
        if symbol.segment is self._open:
            self._open = None
        return symbol.slot

    # -- tails --

    def tail(
        self, x: Symbol, conv: nn.Conv2d, bn: Any, residual: Any, projection: Any, pool: Any, activation: str,
        options: Options, residual_first: bool = False,
    ) -> Any:  # fmt: skip
        """See :meth:`fused_resnet.nn.tail.Recorded.tail`."""
        if uses_batch_statistics(bn):  # a batch norm without running statistics
            return self._live_tail(x, conv, bn, residual, projection, activation, options, residual_first)
        call = TailArguments(
            x.tensor, _conv_bn(conv, bn), **geometry(conv), activation=activation, winograd=options.winograd
        )
        if projection is not None:
            proj_conv, proj_bn = projection
            stride = geometry(proj_conv)["stride"]
            call = call._replace(proj_x=residual.tensor, proj=_conv_bn(proj_conv, proj_bn), proj_stride=stride)
        elif residual is not None:
            if tail.broadcasts(conv, geometry(conv), x.tensor, residual.tensor):
                raise NotRecordable
            call = call._replace(residual=residual.tensor)
        run = plans.find(_dense(call), options.backend)
        pool_sizes = None if pool is None else tail.pool_sizes(pool)
        if pool_sizes is not None:
            run = with_max_pool(run, pool_sizes)
        channels_last = _sum_is_channels_last(x, conv, residual, projection, residual_first)
        if isinstance(run, FusedConvolution):
            return self._links(run, call, x, residual, pool_sizes, channels_last)
        inputs = [self._kept_slot(x)] + ([] if residual is None else [self._kept_slot(residual)])
        slot = self._emit(str(conv), _runner(run, call, self._kept), tuple(inputs), {})
        y = Symbol(self, slot.example, channels_last, slot)
        y.fresh = True
        return y

    def _links(
        self, run: FusedConvolution, call: TailArguments, x: Symbol, residual: Symbol | None, pool: Pool | None,
        channels_last: bool,
    ) -> Symbol:  # fmt: skip
        # Slots first: they may end the run of convolutions that is open.
        for symbol in (x, residual):
            if symbol is not None and symbol.slot is None and symbol.segment is not self._open:
                self._kept_slot(symbol)
        if self._open is None:
            self._open = Convolutions()
            self._steps.append(self._open)
        segment = self._open

        def place(symbol: Symbol | None) -> int:
            if symbol is None:
                return NOTHING
            if symbol.segment is segment:
                return symbol.link
            assert symbol.slot is not None
            return segment.place(symbol.slot.number)

        segment.links += run.links(call, place(x), place(residual), len(segment.links))
        y = Symbol(self, _output_like(call, pool), channels_last)
        y.segment, y.link, y.fresh = segment, len(segment.links) - 1, True
        return y

    def _live_tail(
        self, x: Symbol, conv: nn.Conv2d, bn: Any, residual: Any, projection: Any, activation: str,
        options: Options, residual_first: bool,
    ) -> Any:  # fmt: skip
        def run(image: Tensor, added: Tensor | None = None) -> Any:
            if projection is None:
                y = tail.conv_bn_act(conv, bn, image, added, activation, options, residual_first=residual_first)
            else:
                proj_conv, proj_bn = projection
                y = tail.conv_bn_proj_act(
                    conv, bn, image, proj_conv, proj_bn, added, activation, options, residual_first=residual_first
                )
            return tail.leave(y)

        inputs = [self._leave(x)] + ([] if residual is None else [self._leave(residual)])
        return self._enter(self._emit(str(conv), run, tuple(inputs), {}))

    # -- everything else --

    def _emit(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Slot:
        """A call in each run; what it makes of the examples stands for its value."""
        self._open = None
        example_of = lambda v: v.example if isinstance(v, Slot) else v  # noqa: E731
        hooked = isinstance(function, nn.Module) and any(map(why_not_bypassed, function.modules()))
        if hooked:
            raise NotRecordable  # a hook is called once for each call of the model
        example = function(*map_values(args, example_of), **map_values(kwargs, example_of))
        if isinstance(example, Tensor) and example.numel() == 0:
            raise NotRecordable  # its size depends on the values
        slot = self._slot(example)
        self._steps.append(Call(name, function, args, kwargs, slot.number))
        return slot

    def call(self, module: nn.Module, x: Any) -> Any:
        """See :func:`fused_resnet.nn.tail.call`."""
        if isinstance(x, Symbol) and is_free(module):
            return run(module, x)
        if isinstance(x, Symbol) and tail.may_go_inside(module):
            if type(module) is nn.Identity:
                return x
            y = self._inside(module, x)
            if y is not NotImplemented:
                return y
        argument = self._leave(x) if isinstance(x, Symbol) else x
        return self._enter(self._emit(_name(module), module, (argument,), {}))

    def _inside(self, module: nn.Module, x: Symbol) -> Any:
        """What the forward of ``module`` makes of ``x``; NotImplemented where it is not made of tails."""
        if type(module) is nn.Sequential:
            y: Any = x
            for child in module:
                y = self.call(child, y)
            return y
        if is_fused(module):
            fusion: Fusion = module.__dict__[ATTRIBUTE]
            found = None if fusion.plan is None else fusion.plan.choose(module)[0]
            return NotImplemented if found is None else self._interpret(found.graph, module, x, fusion.options)
        if isinstance(module, fused_nn.FusedModule):
            return self._run_block(module, x)
        return NotImplemented

    def _run_block(self, module: Any, x: Symbol) -> Any:
        head = getattr(module, "head", None)
        if head is None and module.why_not_fused() is not None:
            return NotImplemented
        y = module._run(x)
        return y if head is None else self._enter(self._emit("head", head, (self._leave(y),), {}))

    def apply(self, function: Callable[[Tensor], Any], x: Symbol) -> Any:
        """See :func:`fused_resnet.nn.tail.apply`."""
        return self._enter(self._emit(getattr(function, "__name__", "function"), function, (self._leave(x),), {}))

    def in_any_layout(self, function: Callable[..., Any], values: list[Any], rest: Any, arguments: Any) -> Any:
        """See :mod:`fused_resnet.nn.between`."""
        free = all(isinstance(x, Symbol) and x.is_dense for x in values) and rest in ((), (1,))
        slots = [(self._kept_slot(x) if free else self._leave(x)) if isinstance(x, Symbol) else x for x in values]
        name = _name(function) if isinstance(function, nn.Module) else function.__name__
        slot = self._emit(name, function, (*arguments(slots), *rest), {})
        if not free:
            return self._enter(slot)
        if not is_image(slot.example):  # eager's strides are not those of a layout
            self._steps.pop()
            left = [self._leave(x) for x in values]
            return self._enter(self._emit(name, function, (*arguments(left), *rest), {}))
        y = Symbol(self, slot.example, all(x.channels_last for x in values), slot)
        y.fresh = True
        return y

    def _interpret(self, graph: fx.Graph, module: nn.Module, x: Symbol, options: Options) -> Any:
        values: dict[fx.Node, Any] = {}
        inputs = iter((x, options))
        for node in graph.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "get_attr":
                values[node] = _attribute(module, str(node.target))
            elif node.op == "output":
                return args[0]
            elif is_value(node):
                entered = map_values(args, self._enter)
                flat = [v for value in entered for v in (value if isinstance(value, list) else [value])]
                if any(isinstance(argument, Slot) for argument in flat):
                    raise NotRecordable  # no image, the operator's own error says so
                values[node] = node.target(*entered, **kwargs)
            elif node.target is tail.enter:
                values[node] = self._enter(args[0])
            elif node.target is tail.leave:
                values[node] = self._leave(args[0]) if isinstance(args[0], Symbol) else args[0]
            else:
                values[node] = self._emit(*_function(node, module), args, kwargs)
        raise AssertionError("a graph without an output")


def looks_channels_last_as(symbol: Symbol) -> bool:
    """Whether the slot of ``symbol`` holds a tensor strided as eager's is."""
    return looks_channels_last(symbol.tensor.shape, symbol.tensor.stride()) == symbol.channels_last


def _sum_is_channels_last(
    x: Symbol, conv: nn.Conv2d, residual: Symbol | None, projection: Any, residual_first: bool
) -> bool:
    """Whether eager has the sum in channels_last, by its first operand, as ``nn.tail`` says it for a live call."""
    if residual_first and residual is not None:
        if projection is None:
            tensor = residual.tensor
            if residual.slot is not None and not (
                residual.channels_last or looks_contiguous(tensor.shape, tensor.stride())
            ):
                raise NotRecordable  # neither NCHW nor NHWC
            return residual.channels_last
        x, conv = residual, projection[0]
    return x.channels_last or looks_channels_last(conv.weight.shape, conv.weight.stride())


def _conv_bn(conv: nn.Conv2d, bn: Any) -> ConvBN:
    return ConvBN(conv.weight, conv.bias, *tail.bn_tensors(bn), tail.bn_eps(bn))


def _dense(call: TailArguments) -> TailArguments:
    """``call`` with its images in channels_last, as they are inside of a network."""

    def dense(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.contiguous(memory_format=torch.channels_last)

    x = dense(call.x)
    assert x is not None
    return call._replace(x=x, residual=dense(call.residual), proj_x=dense(call.proj_x))


def _runner(run: Callable[[TailArguments], Tensor], call: TailArguments, kept: PackedWeights) -> Callable[..., Tensor]:
    """A function of x, and of the residual or the projection's input where ``call`` has one."""
    call = call._replace(packed_weights=kept)

    def function(x: Tensor, added: Tensor | None = None) -> Tensor:
        if call.proj is None:
            return run(_dense(call._replace(x=x, residual=added)))
        return run(_dense(call._replace(x=x, proj_x=added)))

    return function


def _output_like(call: TailArguments, pool: Pool | None) -> Tensor:
    """An empty tensor of the shape of the result."""
    from ..core.problem import Problem

    n, k, p, q = Problem.from_tail(_dense(call)).output_shape
    if pool is not None:
        window, stride, padding = pool
        p, q = ((size + 2 * padding[i] - window[i]) // stride[i] + 1 for i, size in enumerate((p, q)))
    y = torch.zeros(n, k, p, q, dtype=call.x.dtype, device=call.x.device)
    return y.contiguous(memory_format=torch.channels_last)


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _function(node: fx.Node, module: nn.Module) -> tuple[str, Callable[..., Any]]:
    """What a node calls, and its name."""
    target: Any = node.target
    if node.op == "call_module":
        return str(target), module.get_submodule(str(target))
    if node.op == "call_method":
        return str(target), lambda value, *args, **kwargs: getattr(value, target)(*args, **kwargs)
    return getattr(target, "__name__", str(target)), target
