"""A checked rewrite of one module's forward, and how a module carries it.

A fused module gets a subclass of its own class, made on the fly, whose ``forward`` runs the rewritten program.
A class swap (rather than a bound method in the instance) keeps ``isinstance``, ``state_dict``, hooks on the module,
``DataParallel`` replicas and ``torch.compile`` working; pickle and deepcopy go through
:meth:`FusedForward.__reduce_ex__`, which names the original class, so that a saved model never refers to a class
that does not exist where it is loaded.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from ..core.packed_weights import PackedWeights
from ..nn import FusedModule, tail
from ..nn.onlookers import watched
from .program import Plan

ATTRIBUTE = "_fused_resnet"
"""The instance attribute (not a buffer, not a submodule) that holds a fused module's :class:`Fusion`."""


@dataclass
class Fusion:
    """What one fused module carries: its plan and the options."""

    plan: Plan | None
    backend: str = "auto"
    winograd: str = "auto"
    partly: str | None = None
    """Why the addition is not part of the plan, where it is not."""
    problem: str | None = None
    """Why there is no plan (a loaded module whose code has changed since it was saved)."""

    left: dict[str, str] = field(default_factory=dict)
    """By path, the submodules that could be planned and are called as they are: why nothing is gained by it."""
    expands: bool = True
    """See :class:`fused_resnet.nn.tail.Options`; a plan whose sums always expand is none."""
    graphs: list[tuple[str, dict[str, Any]]] = field(default_factory=list, repr=False, compare=False)
    """The code of the graphs that the plan was made from, where the module is an ``fx.GraphModule``."""
    packed_weights: PackedWeights = field(default_factory=PackedWeights, repr=False, compare=False)

    @property
    def options(self) -> tail.Options:
        return tail.Options(self.backend, self.winograd, self.packed_weights, self.expands)

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusion:
        # A plan is never changed: copies share it. Packed weights are each module's own.
        return replace(self, packed_weights=PackedWeights())

    def __getstate__(self) -> dict[str, Any]:
        # The program is code; it is made again from the module's own code when it is loaded.
        return {**self.__dict__, "plan": None, "graphs": []}


_planners: list[Callable[[Any], None]] = []


def planner(function: Callable[[Any], None]) -> Callable[[Any], None]:
    """Let ``function`` make the plan of a loaded or changed module again; discovery stands above this file."""
    _planners.append(function)
    return function


def _replan(module: Any) -> None:
    for make in _planners:
        make(module)


class FusedForward:
    """Mixin of every fused class: runs the program where it may, else the module's own forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        fusion: Fusion = self.__dict__[ATTRIBUTE]
        if fusion.plan is not None and len(args) == 1 and not kwargs:
            x = args[0]
            if isinstance(x, Tensor) and x.dim() == 4 and not watched(x):
                program, _ = fusion.plan.choose(self)  # type: ignore[arg-type]
                if program is not None:
                    return tail.leave(program.function(self, x, fusion.options))
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def run_inside(self, x: tail.Value) -> Any:
        """What the forward makes of ``x`` for :func:`.nn.tail.call`; NotImplemented where it runs unfused."""
        fusion: Fusion = self.__dict__[ATTRIBUTE]
        program = None if fusion.plan is None else fusion.plan.choose(self)[0]  # type: ignore[arg-type]
        return NotImplemented if program is None else program.function(self, x, fusion.options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # (copyreg.__newobj__, (this dynamic class, ...), state, ...): only the class is replaced by its name.
        reduced = super().__reduce_ex__(protocol)
        return (_new, (original_class(self),), *reduced[2:])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if self.__dict__[ATTRIBUTE].plan is None:
            _replan(self)


class FusedGraphModule(FusedForward):
    """The same for an ``fx.GraphModule``, which makes its class's forward anew from a graph.

    Whatever an fx.GraphModule does with its own class (compiling, copying, reducing) it does as what it was.
    """

    def recompile(self) -> Any:
        with _as_it_was(self) as module:
            code = module.recompile()
        fusion: Fusion = self.__dict__[ATTRIBUTE]
        # A feature extractor exchanges its graphs for one another with each change of mode: both are in the plan.
        if all((code.src, code.globals) != known for known in fusion.graphs):
            _replan(self)
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        fusion: Fusion = self.__dict__[ATTRIBUTE]
        with _as_it_was(self) as module:
            copied = copy.deepcopy(module, memo)
            carry_modes(module, copied)
        return _fused_again(copied, copy.deepcopy(fusion, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        fusion: Fusion = self.__dict__[ATTRIBUTE]
        with _as_it_was(self) as module:
            function, arguments = module.__reduce_ex__(protocol)
        return _loaded_graph, (function, arguments, fusion)


@contextmanager
def _as_it_was(module: Any) -> Iterator[Any]:
    """A fused module without its plan and in its own class, for as long as the context lasts."""
    fused, fusion = type(module), module.__dict__.pop(ATTRIBUTE)
    module.__class__ = original_class(module)
    try:
        yield module
    finally:
        module.__class__ = fused
        module.__dict__[ATTRIBUTE] = fusion


def _fused_again(module: Any, fusion: Fusion) -> Any:
    attach(module, fusion)
    _replan(module)
    return module


def _loaded_graph(function: Callable[..., Any], arguments: Any, fusion: Fusion) -> Any:
    return _fused_again(function(*arguments), fusion)


def graphs_of(module: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """The code of every graph that an ``fx.GraphModule`` holds."""
    if not isinstance(module, fx.GraphModule):
        return []
    graphs = [module.graph, *(g for g in module.__dict__.values() if isinstance(g, fx.Graph))]
    codes = [graph.python_code("self") for graph in graphs]
    return [(code.src, code.globals) for code in codes]


def carry_modes(original: nn.Module, copied: nn.Module) -> None:
    """Give each module of a copy the mode of the one it was copied from.

    A feature extractor comes out of ``deepcopy`` in training mode, and changes its graph with its mode.
    """
    for theirs, ours in zip(original.modules(), copied.modules(), strict=False):
        if ours.training is not theirs.training:
            if isinstance(ours, fx.GraphModule):
                ours.train(theirs.training)
            ours.training = theirs.training


def _new(cls: type) -> Any:
    return object.__new__(fused_class(cls))


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` itself has been fused by :func:`fused_resnet.fuse`."""
    return isinstance(module, FusedForward)


def runs_tails(module: nn.Module) -> bool:
    """Whether ``module`` itself runs fused: :func:`fused_resnet.fuse` made it so, or it is one of ours."""
    return is_fused(module) or isinstance(module, FusedModule)


def original_class(module: Any) -> type:
    """The class that ``module`` had before it was fused."""
    if not isinstance(module, FusedForward):
        return type(module)
    # Others may have subclassed ours in turn (FSDP2 does): what comes after the mixin is the original.
    mro = type(module).__mro__
    return mro[mro.index(FusedForward) + 1]


@functools.cache
def fused_class(cls: Any) -> type:
    """The fused subclass of ``cls``; one for each class, so that equal blocks keep equal types."""
    forward = _marked(cls)
    namespace = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    mixin = FusedGraphModule if issubclass(cls, fx.GraphModule) else FusedForward
    fused: Any = type(cls.__name__, (mixin, cls), {**namespace, "forward": forward, "_fused_names": None})
    fused._fused_names = frozenset(fused.__dict__)
    return fused


def _forward_of(cls: Any) -> Callable[..., Any]:
    run = FusedForward.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs)

    # torch.jit.script compiles what this wraps, and looks its names up here
    names = getattr(inspect.unwrap(cls.forward), "__globals__", forward.__globals__)
    return types.FunctionType(forward.__code__, names, "forward", None, forward.__closure__)


def _marked(cls: Any) -> Any:
    return tail.runs_inside(functools.wraps(cls.forward)(_forward_of(cls)))


def attach(module: nn.Module, fusion: Fusion) -> None:
    """Make ``module`` a fused one."""
    fusion.graphs = graphs_of(module)
    module.__dict__[ATTRIBUTE] = fusion
    if not is_fused(module):
        cls: Any = type(module)
        module.__class__ = fused_class(cls)


def detach(module: nn.Module) -> None:
    """Give ``module`` its own class back."""
    del module.__dict__[ATTRIBUTE]
    module.__class__ = original_class(module)
