"""What a recorded network does: steps over numbered values, each a run of convolutions or a call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.cpu_program import Link, input_number, pack, program
from ..core.packed_weights import Packed, PackedWeights
from ..nn import tail


class Slot(NamedTuple):
    """The place of a value among those of a run, and one like it."""

    number: int
    example: Any


class Convolutions:
    """Links that run in one call."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.inputs: list[int] = []
        self.outputs: list[tuple[int, int]] = []  # (link, slot)
        self._program: Tensor | None = None
        self._operands: list[Tensor] = []

    def place(self, slot: int) -> int:
        """What stands for the value in ``slot`` in a link."""
        if slot not in self.inputs:
            self.inputs.append(slot)
        return input_number(self.inputs.index(slot))

    def finish(self, kept: PackedWeights) -> None:
        self.outputs.sort()
        returned = {link for link, _ in self.outputs}
        self.links = [link._replace(returned=number in returned) for number, link in enumerate(self.links)]
        self._program = program(self.links)
        for link in self.links:
            self._operands += [_packed(link, kept), *(t for t in link.conv[1:6] if isinstance(t, Tensor))]

    def run(self, values: list[Any]) -> None:
        inputs = [values[slot].contiguous(memory_format=torch.channels_last) for slot in self.inputs]
        made = torch.ops.fused_resnet_C.conv_program.default(inputs, self._operands, self._program, False)
        for (_, slot), value in zip(self.outputs, made, strict=True):
            values[slot] = value

    def __str__(self) -> str:
        return f"{len(self.links)} convolutions in one call"


def _packed(link: Link, kept: PackedWeights) -> Tensor:
    weight, algorithm = link.conv.weight, link.algorithm
    packed: Tensor = kept.find(weight, algorithm, lambda: Packed(pack(weight, algorithm), torch.empty(0))).value
    return packed


class Call:
    """A function called with values of the run, and constants."""

    def __init__(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any, output: int) -> None:
        self.name, self.function, self.args, self.kwargs, self.output = name, function, args, kwargs, output

    def run(self, values: list[Any]) -> None:
        def value(argument: Any) -> Any:
            return values[argument.number] if isinstance(argument, Slot) else argument

        args, kwargs = map_values(self.args, value), map_values(self.kwargs, value)
        values[self.output] = self.function(*args, **kwargs)

    def __str__(self) -> str:
        return self.name


def map_values(value: Any, function: Callable[[Any], Any]) -> Any:
    """``value`` with everything in its tuples, lists and dictionaries replaced by ``function`` of it."""
    if isinstance(value, (Slot, tail.Recorded)):
        return function(value)
    if isinstance(value, tuple):
        parts = [map_values(item, function) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [map_values(item, function) for item in value]
    if isinstance(value, dict):
        items = {key: map_values(item, function) for key, item in value.items()}
        return type(value)(items) if isinstance(value, OrderedDict) else items  # a graph's own are immutable
    if isinstance(value, slice):
        return slice(*(map_values(part, function) for part in (value.start, value.stop, value.step)))
    return function(value)


class Recording:
    """What a recorded module does for inputs like those it was recorded with."""

    def __init__(self, steps: Sequence[Convolutions | Call], slots: int, output: Any) -> None:
        self.steps, self._slots, self._output = tuple(steps), slots, output

    def __call__(self, x: Tensor) -> Any:
        values: list[Any] = [None] * self._slots
        values[0] = x
        for step in self.steps:
            step.run(values)
        return map_values(self._output, lambda v: values[v.number] if isinstance(v, Slot) else v)

    def __str__(self) -> str:
        return "; ".join(str(step) for step in self.steps if str(step))
