"""A checked rewrite of one module's forward, and how a module carries it.

A fused module gets a subclass of its own class, made on the fly, whose ``forward`` runs the rewritten program.
A class swap (rather than a bound method in the instance) keeps ``isinstance``, ``state_dict``, hooks on the module,
``DataParallel`` replicas and ``torch.compile`` working; pickle and deepcopy go through
:meth:`FusedForward.__reduce_ex__`, which names the original class, so that a saved model never refers to a class
that does not exist where it is loaded.
"""

from __future__ import annotations

import functools
import linecache
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from .. import tails
from .chain import Chains, Steps
from .match import Matcher, Tail, rewrite
from .trace import Traced, trace

ATTRIBUTE = "_fused_resnet"
"""The instance attribute (not a buffer, not a submodule) that holds a fused module's :class:`Fusion`."""


@dataclass(frozen=True)
class Bypassed:
    """A submodule whose call the program replaces (or traced through), and what it was when the plan was made."""

    path: str
    names: tuple[str, ...]
    cls: type
    length: int | None
    """Number of children, for a container that was traced through; None for a leaf."""

    def why_not(self, module: nn.Module | None) -> str | None:
        """None, or why the program may not stand for a call of ``module`` any more."""
        if module is None:
            return f"{self.path} is gone"
        if type(module) is not self.cls and not (
            tails.is_plain_batch_norm(module) and issubclass(self.cls, (nn.BatchNorm2d, nn.SyncBatchNorm))
        ):
            return f"{self.path} is a {type(module).__name__}, it was a {self.cls.__name__}"
        if self.length is not None and len(module._modules) != self.length:
            return f"{self.path} has {len(module._modules)} submodules, it had {self.length}"
        if isinstance(module, nn.Conv2d):
            why_not = tails.why_not_fusable(module)
            if why_not is not None:
                return f"{self.path} {why_not}"
        why_not = tails.why_not_bypassed(module)
        return None if why_not is None else f"{self.path} {why_not}"


@dataclass(frozen=True)
class Program:
    """The rewritten forward for one mode, and the conditions under which it may run."""

    source: str
    function: Callable[..., Any] = field(compare=False)
    tails: tuple[Tail, ...]
    left: tuple[str, ...]
    """What the program still does by itself, by module path or function name."""
    bypassed: tuple[Bypassed, ...]
    reads: tuple[tuple[tuple[str, ...], str, Any], ...]
    steps: Steps = field(compare=False)
    """How it begins, for calls in one piece."""

    @property
    def is_steps(self) -> bool:
        """Whether there is nothing but steps, and the last one's value is the result."""
        return self.steps.complete

    def rest(self, count: int) -> Callable[..., Any] | None:
        """The program after its first ``count`` steps; None where it reads more of them than the last one's value."""
        return self.steps.rest(count, _compile_graph)

    def why_not(self, root: nn.Module) -> str | None:
        """None when the program may run for ``root`` now, else a clause that says why not."""
        if torch_module._has_any_global_hook():
            return "a global module hook is registered"
        for bypassed in self.bypassed:
            why_not = bypassed.why_not(_descend(root, bypassed.names))
            if why_not is not None:
                return why_not
        for names, attribute, value in self.reads:
            now = getattr(_descend(root, names), attribute, None)
            if now is not value and now != value:
                return f"{'.'.join((*names, attribute))} is {now!r}, the plan was made for {value!r}"
        return None


def _descend(root: nn.Module, names: tuple[str, ...]) -> Any:
    module: Any = root
    for name in names:
        if module is None:
            return None
        module = module._modules.get(name)
    return module


@dataclass(frozen=True)
class Plan:
    """The programs of a module: one where training and eval mode are the same code, else one for each."""

    programs: tuple[Program, ...]

    def choose(self, root: nn.Module) -> tuple[Program | None, str | None]:
        """The program that may run for ``root`` now, or None and the reason of the first that fits the mode."""
        reason = None
        # The training program is right in eval mode too where it read no mode, but the other one may fuse more.
        for program in self.programs if root.training else self.programs[::-1]:
            why_not = program.why_not(root)
            if why_not is None:
                return program, None
            reason = reason or why_not
        return None, reason

    @property
    def tails(self) -> tuple[Tail, ...]:
        """The tails in eval mode."""
        return self.programs[-1].tails

    def convs(self, root: nn.Module) -> list[nn.Conv2d]:
        """The convolutions that the programs run."""
        found: list[nn.Conv2d] = []
        for tail in {str(t): t for p in self.programs for t in p.tails}.values():
            for path in (tail.conv, tail.projection[0] if tail.projection else None):
                module = None if path is None else _descend(root, tuple(path.split(".")))
                if isinstance(module, nn.Conv2d) and not any(module is m for m in found):
                    found.append(module)
        return found


def make_plan(module: nn.Module, opaque: dict[int, nn.Module], residual: bool = True) -> Plan | None:
    """Plan ``module``'s forward in both modes; None where it has no tail. Raises trace.Untraceable."""
    programs = [_program(trace(module, opaque, training), residual) for training in (True, False)]
    if not any(p.tails for p in programs):
        return None
    train, evaluation = programs
    # Where the mode was not asked for, one program serves both: BN modules say at each call what they use.
    same = train.source == evaluation.source and train.reads == evaluation.reads
    return Plan((evaluation,) if same else (train, evaluation))


def _program(traced: Traced, residual: bool) -> Program:
    found = Matcher(traced).tails(residual)
    reads = dict(traced.reads)
    bypassed: dict[str, Bypassed] = {}
    inlined = [(path, len(traced.modules[path]._modules)) for path in traced.inlined if path]
    for path, length in [*inlined, *((p, None) for tail in found for p in tail.bypassed)]:
        module = traced.modules[path]
        cls = type(module)
        if length is not None:
            cls = cls.__mro__[1]  # the class under the recording one
        bypassed[path] = Bypassed(path, tuple(path.split(".")), cls, length)
        if length is None and cls is not nn.Identity and not module.training and _dropped(module):
            reads[path, "training"] = False
    graph = rewrite(traced, found)
    left = tuple(_name(n) for n in graph.nodes if _is_work(n))
    source = graph.python_code("self")
    guards = tuple(
        (tuple(p.split(".")) if p else (), attr, value) for (p, attr), value in sorted(reads.items(), key=str)
    )
    # `training` matters only where train and eval differ; see make_plan.
    return Program(
        source.src, _compile(source.src, source.globals), tuple(found), left, tuple(bypassed.values()), guards,
        Steps(graph),
    )  # fmt: skip


def _dropped(module: nn.Module) -> bool:
    from .match import is_identity_in_eval

    return is_identity_in_eval(module)


def _is_work(node: fx.Node) -> bool:
    return node.op in ("call_module", "call_function", "call_method") and node.target not in (
        tails.conv_bn_act,
        tails.conv_bn_proj_act,
    )


def _name(node: fx.Node) -> str:
    if node.target is tails.conv_bn_act_max_pool:  # the pool is part of the pass on the CPU only
        node = cast(fx.Node, node.args[2])
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _compile_graph(graph: fx.Graph) -> Callable[..., Any]:
    source = graph.python_code("self")
    return _compile(source.src, source.globals)


_compiled: dict[str, Callable[..., Any]] = {}


def _compile(source: str, names: dict[str, Any]) -> Callable[..., Any]:
    """The function defined by ``source``; the same for equal sources, so that torch.compile meets it once."""
    if source not in _compiled:
        filename = f"<fused_resnet program {len(_compiled)}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        scope = dict(names)
        exec(compile(source, filename, "exec"), scope)
        _compiled[source] = scope["forward"]
    return _compiled[source]


# ---- the class swap ----------------------------------------------------------------------------------------


@dataclass
class Fusion:
    """What one fused module carries: its plan, the options, and which weights were re-strided."""

    plan: Plan | None
    backend: str = "auto"
    winograd: str = "auto"
    restrided: tuple[str, ...] = ()
    digest: str = ""
    partly: str | None = None
    """Why the addition is not part of the plan, where it is not."""
    problem: str | None = None
    """Why there is no plan (a loaded module whose code has changed since it was saved)."""
    chains: Chains = field(default_factory=Chains, init=False, repr=False, compare=False)
    """Repeated calls of the eval-mode program in one piece; of this process, never copied or saved."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusion:
        return replace(self)  # a plan is never changed: copies share it

    def __getstate__(self) -> dict[str, Any]:
        # The program is code; it is made again from the module's own code when it is loaded.
        return {**self.__dict__, "plan": None, "chains": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.chains = Chains()


class FusedForward:
    """Mixin of every fused class: runs the program where it may, else the module's own forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        fusion: Fusion = self.__dict__[ATTRIBUTE]
        if fusion.plan is not None and len(args) == 1 and not kwargs:
            x = args[0]
            if isinstance(x, Tensor) and x.dim() == 4:
                if not torch.compiler.is_compiling():
                    y = fusion.chains.run(self, fusion, x)  # type: ignore[arg-type]
                    if y is not None:
                        return y
                program, _ = fusion.plan.choose(self)  # type: ignore[arg-type]
                if program is not None:
                    return program.function(self, x, fusion.backend, fusion.winograd)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def train(self, mode: bool = True) -> Any:
        fusion: Fusion = self.__dict__[ATTRIBUTE]
        if mode and fusion.plan is not None:
            tails.drop_packed(*fusion.plan.convs(self))  # type: ignore[arg-type]
        return super().train(mode)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # (copyreg.__newobj__, (this dynamic class, ...), state, ...): only the class is replaced by its name.
        reduced = super().__reduce_ex__(protocol)
        return (_new, (original_class(self),), *reduced[2:])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if self.__dict__[ATTRIBUTE].plan is None:
            from .discovery import replan

            replan(self)  # type: ignore[arg-type]


def _new(cls: type) -> Any:
    return object.__new__(fused_class(cls))


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` itself has been fused by :func:`fused_resnet.fuse`."""
    return isinstance(module, FusedForward)


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
    forward = functools.wraps(cls.forward)(_forward_of(cls))
    namespace = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (FusedForward, cls), {**namespace, "forward": forward})


def _forward_of(cls: type) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return FusedForward.forward(self, *args, **kwargs)

    return forward


def attach(module: nn.Module, fusion: Fusion) -> None:
    """Make ``module`` a fused one."""
    module.__dict__[ATTRIBUTE] = fusion
    if not is_fused(module):
        cls: Any = type(module)
        module.__class__ = fused_class(cls)


def detach(module: nn.Module) -> None:
    """Give ``module`` its own class back, and its weights the strides they had."""
    fusion: Fusion = module.__dict__.pop(ATTRIBUTE)
    module.__class__ = original_class(module)
    for path in fusion.restrided:
        conv = _descend(module, tuple(path.split(".")))
        weight = getattr(conv, "weight", None)
        if isinstance(weight, Tensor):
            weight.data = weight.data.contiguous()


def restride(module: nn.Module, plan: Plan, tied: set[int]) -> tuple[str, ...]:
    """Lay the planned weights out in channels_last, in the very same Parameters; the paths of those changed.

    Left alone are weights that are not contiguous, and weights that share their memory with another tensor
    (flattened or tied parameters), whose tie a new storage would cut.
    """
    changed = []
    names = {id(m): name for name, m in module.named_modules()}
    for conv in plan.convs(module):
        weight = conv.weight
        storage = weight.untyped_storage()
        alone = weight.is_meta or (
            storage.nbytes() == weight.numel() * weight.element_size() and storage.data_ptr() not in tied
        )
        if alone and weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
            changed.append(names[id(conv)])
    return tuple(changed)
