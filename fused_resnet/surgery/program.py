"""The rewritten forward of one module, and the conditions under which it may run."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from torch import fx, nn
from torch.nn.modules import module as torch_module

from .. import parts, tails
from .match import Matcher, Tail
from .rewrite import rewrite
from .trace import Traced, trace


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
            parts.is_plain_batch_norm(module) and issubclass(self.cls, (nn.BatchNorm2d, nn.SyncBatchNorm))
        ):
            return f"{self.path} is a {type(module).__name__}, it was a {self.cls.__name__}"
        if self.length is not None and len(module._modules) != self.length:
            return f"{self.path} has {len(module._modules)} submodules, it had {self.length}"
        if isinstance(module, nn.Conv2d):
            why_not = parts.why_not_fusable(module)
            if why_not is not None:
                return f"{self.path} {why_not}"
        why_not = parts.why_not_bypassed(module)
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
    graph: fx.Graph = field(compare=False, repr=False)
    """What ``function`` does."""

    def why_not(self, root: nn.Module) -> str | None:
        """None when the program may run for ``root`` now, else a clause that says why not."""
        if torch_module._has_any_global_hook():
            return "a global module hook is registered"
        for bypassed in self.bypassed:
            why_not = bypassed.why_not(descend(root, bypassed.names))
            if why_not is not None:
                return why_not
        for names, attribute, value in self.reads:
            now = getattr(descend(root, names), attribute, None)
            if now is not value and now != value:
                return f"{'.'.join((*names, attribute))} is {now!r}, the plan was made for {value!r}"
        return None


def descend(root: nn.Module, names: tuple[str, ...]) -> Any:
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
                module = None if path is None else descend(root, tuple(path.split(".")))
                if isinstance(module, nn.Conv2d) and not any(module is m for m in found):
                    found.append(module)
        return found


def make_plan(module: nn.Module, opaque: dict[int, nn.Module], residual: bool = True) -> Plan | None:
    """Plan ``module``'s forward in both modes; None where it has no tail. Raises trace.Untraceable."""
    programs = [_program(trace(module, opaque, training), residual, opaque) for training in (True, False)]
    if not any(p.tails for p in programs):
        return None
    train, evaluation = programs
    # Where the mode was not asked for, one program serves both: BN modules say at each call what they use.
    same = train.source == evaluation.source and train.reads == evaluation.reads
    return Plan((evaluation,) if same else (train, evaluation))


def _program(traced: Traced, residual: bool, opaque: dict[int, nn.Module]) -> Program:
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
    graph = rewrite(traced, found, opaque)
    left = tuple(_name(n) for n in graph.nodes if _is_work(n))
    source = graph.python_code("self")
    guards = tuple(
        (tuple(p.split(".")) if p else (), attr, value) for (p, attr), value in sorted(reads.items(), key=str)
    )
    # `training` matters only where train and eval differ; see make_plan.
    return Program(
        source.src, _compile(source.src, source.globals), tuple(found), left, tuple(bypassed.values()), guards, graph
    )


def _dropped(module: nn.Module) -> bool:
    from .match import is_identity_in_eval

    return is_identity_in_eval(module)


def _is_work(node: fx.Node) -> bool:
    return node.op in ("call_module", "call_function", "call_method") and node.target not in (
        tails.conv_bn_act,
        tails.conv_bn_proj_act,
        tails.enter,
        tails.leave,
    )


def _name(node: fx.Node) -> str:
    if node.target is tails.conv_bn_act_max_pool:  # the pool is part of the pass on the CPU only
        node = cast(fx.Node, node.args[2])
    if node.target is tails.call:
        node = cast(fx.Node, node.args[0])
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


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
