"""The rewritten forward of one module, and the conditions under which it may run."""

from __future__ import annotations

import linecache
import types
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any, cast

from torch import fx, nn

from ..nn import between, tail
from ..nn.pristine import DROPOUTS
from .guards import Bypassed, Guards, descend, names_of
from .match import MatchedTail, Matcher
from .reads import Reads
from .rewrite import rewrite
from .trace import Traced, trace


@dataclass(frozen=True)
class Program:
    """The rewritten forward for one mode, and the conditions under which it may run."""

    source: str
    function: Callable[..., Any] = field(compare=False)
    tails: tuple[MatchedTail, ...]
    left: tuple[str, ...]
    """What the program still does by itself, by module path or function name."""
    guards: Guards = field(compare=False)
    graph: fx.Graph = field(compare=False, repr=False)
    """What ``function`` does."""

    @property
    def joins(self) -> bool:
        """Whether it calls modules that may be made of tails, which then hand activations on to one another."""
        return any(node.target is tail.call for node in self.graph.nodes)

    def why_not(self, root: nn.Module) -> str | None:
        """None when the program may run for ``root`` now, else a clause that says why not."""
        return self.guards.why_not(root)


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
    def tails(self) -> tuple[MatchedTail, ...]:
        """The tails in eval mode."""
        return self.programs[-1].tails

    def convs(self, root: nn.Module) -> list[nn.Conv2d]:
        """The convolutions that the programs run."""
        found: list[nn.Conv2d] = []
        for matched in {str(t): t for p in self.programs for t in p.tails}.values():
            for path in (matched.conv, matched.projection[0] if matched.projection else None):
                module = None if path is None else descend(root, tuple(path.split(".")))
                if isinstance(module, nn.Conv2d) and not any(module is m for m in found):
                    found.append(module)
        return found


def make_plan(
    module: nn.Module,
    opaque: dict[int, nn.Module],
    residual: bool = True,
    traces: list[Traced] | None = None,
    plain: Container[int] = (),
) -> Plan | None:
    """Plan ``module``'s forward in both modes; None where it has no tail. Raises trace.Untraceable.

    Of the ``opaque`` submodules, which it calls as a whole, the ``plain`` ones, by id, are not made of tails.
    """
    traces = traces or [trace(module, opaque, training) for training in (True, False)]
    inner = {key: m for key, m in opaque.items() if key not in plain}
    programs = [_program(traced, residual, inner) for traced in traces]
    if not any(p.tails or p.joins for p in programs):
        return None
    train, evaluation = programs
    # Where the mode was not asked for, one program serves both: BN modules say at each call what they use.
    same = train.source == evaluation.source and train.guards.key == evaluation.guards.key
    return Plan((evaluation,) if same else (train, evaluation))


def _program(traced: Traced, residual: bool, opaque: dict[int, nn.Module]) -> Program:
    found = Matcher(traced).tails(residual)
    bypassed = {
        path: Bypassed(path, names_of(path), type(traced.modules[path]), True) for path in traced.inlined if path
    }
    projections = {matched.projection[0] for matched in found if matched.projection}
    for path in (p for matched in found for p in matched.bypassed):
        for inner, module in traced.modules[path].named_modules(prefix=path):
            bypassed[inner] = Bypassed(inner, names_of(inner), type(module), False, inner in projections)
            _add_fields(module, inner, traced.reads)
    called = frozenset(str(n.target) for n in traced.graph.nodes if n.op == "call_module") - _examined(traced.reads)
    guards = Guards(traced.reads, tuple(bypassed.values()), _aliases(traced), _classes(traced, bypassed), called)
    graph = rewrite(traced, found, opaque)
    left = tuple(_name(n) for n in graph.nodes if _is_work(n))
    source = graph.python_code("self")
    return Program(source.src, _compile(source.src, source.globals), tuple(found), left, guards, graph)


def _add_fields(module: nn.Module, path: str, reads: Reads) -> None:
    """What a replaced module does by attributes that the program does not read again."""
    if isinstance(module, nn.ReLU6):
        reads.values[path, "min_val"], reads.values[path, "max_val"] = module.min_val, module.max_val
    elif isinstance(module, DROPOUTS):
        reads.values[path, "training"] = False


def _examined(reads: Reads) -> set[str]:
    """Paths of the modules of which something was read."""
    return {path for path, _ in (*reads.values, *reads.deep, *reads.asked, *reads.unshadowed)} | set(reads.children)


def _aliases(traced: Traced) -> tuple[tuple[str, str], ...]:
    """Pairs of paths that lead to one module: the program calls it by the first, whatever the forward called it."""
    return tuple((paths[0], other) for paths in traced.aliases.values() for other in paths[1:])


def _classes(traced: Traced, bypassed: dict[str, Bypassed]) -> tuple[type, ...]:
    """The users' classes that count: of the modules that the program replaces, and of the functions that ran."""
    reads = traced.reads
    relevant = {c for b in bypassed.values() for c in b.cls.__mro__} | set(type(traced.modules[""]).__mro__)
    relevant |= {
        cls for cls in reads.classes if any(f in reads.functions for f in map(_function, cls.__dict__.values()))
    }
    relevant |= {v.was for v in reads.outside.values() if isinstance(v.was, type)} | reads.seen
    return tuple(c for c in reads.classes if c in relevant)


def _function(value: Any) -> Any:
    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
    return value if isinstance(value, types.FunctionType) else None


def _is_work(node: fx.Node) -> bool:
    return node.op in ("call_module", "call_function", "call_method") and node.target not in (
        tail.conv_bn_act,
        tail.conv_bn_proj_act,
        tail.enter,
        tail.leave,
    )


def _name(node: fx.Node) -> str:
    if node.target is tail.conv_bn_act_max_pool:  # the pool is part of the pass on the CPU only
        node = cast(fx.Node, node.args[2])
    if node.target in (tail.call, between.run):
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
