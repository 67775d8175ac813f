"""Which modules of a model are planned: the residual blocks first, then the conv-BN pairs around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .check import NEVER_RUNS, difference, one_thread
from .gain import blocks_gain, why_no_gain, why_not_worth
from .guards import descend, names_of
from .match import Matcher
from .plan import ATTRIBUTE, Fusion, graphs_of, is_fused, original_class, planner, runs_tails
from .program import Plan, make_plan
from .reads import intercepted
from .structure import structure
from .survey import Survey, survey_of
from .trace import SeveralInputs, Traced, Untraceable, inside, is_batch_norm, is_container, trace


@dataclass
class Found:
    """What discovery says about one module: a plan, or why there is none."""

    name: str
    module: nn.Module
    plan: Plan | None
    reason: str | None
    residual: bool = True
    left: dict[str, str] = field(default_factory=dict)
    """See :attr:`.plan.Fusion.left`."""


@dataclass
class Discovery:
    """The modules of a model that have a plan or a reason, in the model's order."""

    found: list[Found] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    """Names of modules that are fused as they are (FusedBasicBlock and its like)."""

    @property
    def planned(self) -> list[Found]:
        return [f for f in self.found if f.plan is not None]


# Verdicts by what was compared: equal blocks (one stage of a ResNet) are compared once.
_verdicts: dict[Any, str | None] = {}
_MOST_VERDICTS = 256


def discover(model: nn.Module, check: bool = True, everywhere: bool = False) -> Discovery:
    """Plan every block of ``model`` that can be planned, and is worth it or ``everywhere``; nothing is changed."""
    with intercepted(), one_thread():
        search = _Search(model, check, everywhere)
        search.blocks(model)
        search.leave_blocks()
        search.surroundings()
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    search.result.found.sort(key=lambda f: order[f.name])
    return search.result


@dataclass
class _Block:
    """What pass one says of a module: whether it is a residual block, and what became of it."""

    is_one: bool
    plan: Plan | None = None
    reason: str | None = None
    residual: bool = True
    untraceable: bool = False


class _Search:
    """One discovery: the residual blocks first, then what lies around them, innermost first.

    ``opaque`` are modules that others call as a whole, since they have a plan or a reason; of the ``refused``
    nothing is known but the reason. Those of them that could be planned, but gain nothing by it, are ``left``.
    """

    def __init__(self, model: nn.Module, check: bool, everywhere: bool) -> None:
        self.model, self.check, self.everywhere, self.result = model, check, everywhere, Discovery()
        self.opaque: dict[int, nn.Module] = {}
        self.refused: set[int] = set()
        self.left: dict[int, str] = {}
        self.names: dict[int, str] = {}
        for name, module in model.named_modules():
            self.names.setdefault(id(module), name)
            if runs_tails(module):
                self.opaque[id(module)] = module
        self.result.already = [self.names[i] for i, m in self.opaque.items() if not is_fused(m)]
        self._seen: set[int] = set()
        self._below: list[nn.Module] = []
        self._blocks: dict[Any, _Block] = {}
        self._plans: dict[Any, Found | None] = {}
        self._surveys: dict[Any, Survey] = {}

    def _holds_tail_parts(self, module: nn.Module) -> bool:
        parts = list(inside(module, self.opaque))
        return any(isinstance(m, nn.Conv2d) for m in parts) and any(is_batch_norm(m) for m in parts)

    # -- residual blocks --

    def blocks(self, module: nn.Module) -> bool:
        """Plan the residual blocks under ``module``, innermost first; True when there is one (or a refused one)."""
        if id(module) in self._seen or id(module) in self.opaque:
            return id(module) in self.opaque
        self._seen.add(id(module))
        below = any(list(map(self.blocks, module.children())))
        if is_container(module) or is_batch_norm(module) or type(module).__module__.startswith("torch.nn.modules"):
            return below
        if not any(isinstance(m, nn.Conv2d) for m in inside(module, self.opaque)):
            return below
        key = self._key(module)
        block = self._blocks.get(key)
        if key is None or block is None or not _holds(block.plan, module):
            block = self._blocks[key] = self._examine(module, below)
        if block.reason is not None or block.plan is not None:
            self._report(Found(self.names[id(module)], module, block.plan, block.reason, block.residual))
        if not block.is_one:
            return below
        self.opaque[id(module)] = module
        if block.plan is None:
            self.refused.add(id(module))
            if block.untraceable:
                self._below += module.children()
        return True

    def leave_blocks(self) -> None:
        """Leave the residual blocks as they are, together, where none of them gains: they hand activations on."""
        blocks = [(f, f.plan) for f in self.result.found if f.plan is not None]
        if self.everywhere or blocks_gain([(f.module, plan) for f, plan in blocks]):
            return
        for found, plan in blocks:
            found.plan, found.reason = None, why_no_gain(found.module, plan)
            self._leave(found.module, found.reason)

    def _leave(self, module: nn.Module, why_not: str) -> None:
        self.opaque[id(module)] = module
        self.refused.add(id(module))
        self.left[id(module)] = why_not

    def _examine(self, module: nn.Module, below: bool) -> _Block:
        try:
            adds, tails, traces = self._additions(module)
        except SeveralInputs as error:  # whoever calls it may be traced through it
            return _Block(False, reason=str(error) if self._holds_tail_parts(module) else None)
        except Untraceable as error:
            direct = [m for m in module.children() if id(m) not in self.opaque]
            own = any(isinstance(m, nn.Conv2d) for m in direct) and any(map(is_batch_norm, direct))
            if below or not self._holds_tail_parts(module):
                # Not a block, and nothing that a user would call one, unless it has parts of its own.
                return _Block(False, reason=str(error) if below and own else None)
            return _Block(True, reason=str(error), untraceable=True)
        if not adds or (below and not tails):
            return _Block(False)
        found = self._plan(module, traces)
        if found is None:
            return _Block(False) if tails else _Block(True, reason=_why_no_tail(module, self.opaque))
        if found.plan is None and (found.reason or "").startswith(NEVER_RUNS):
            return _Block(False, reason=found.reason)  # of one image; whoever calls it may be traced through it
        return _Block(True, found.plan, found.reason, found.residual)

    def _additions(self, module: nn.Module) -> tuple[bool, bool, list[Traced]]:
        """Whether the module's forward adds to a convolution, whether that makes a residual tail, and its traces."""
        traces = self._traces(module, (True, False))
        matchers = [Matcher(traced) for traced in traces]
        adds = any(matcher.added(n) is not None for matcher in matchers for n in matcher.graph.nodes)
        return adds, any(t.adds for matcher in matchers for t in matcher.tails()), traces

    def _traces(self, module: nn.Module, modes: tuple[bool, ...]) -> list[Traced]:
        """The forward in these modes. A plan takes one image: a planned module that is given more joins its caller."""
        while True:
            traces = [trace(module, self.opaque, training) for training in modes]
            joining = [m for traced in traces for m in map(traced.modules.get, traced.given_more) if self._has_plan(m)]
            if not joining:
                return traces
            self._unplan(joining)

    def _has_plan(self, module: nn.Module | None) -> bool:
        return any(f.module is module and f.plan is not None for f in self.result.found)

    def _unplan(self, modules: list[Any]) -> None:
        for module in modules:
            self.opaque.pop(id(module), None)
        self.result.found = [f for f in self.result.found if not any(f.module is m for m in modules)]

    # -- what lies around them --

    def surroundings(self) -> None:
        """Plan the conv-BN pairs outside the residual blocks, each in the innermost module whose forward holds it."""
        self._seen.clear()
        for module in (self.model, *self._below):
            self._around(module)

    def _around(self, module: nn.Module) -> None:
        """Plan the owners of the tails in ``module``'s forward, and in those of submodules that it does not reach."""
        if id(module) in self._seen or id(module) in self.opaque or not self._holds_tail_parts(module):
            return
        self._seen.add(id(module))
        key = self._key(module)
        found = self._surveys.get(key) if key is not None else None
        if found is None:
            found = self._surveys[key] = self._survey(module)
        for path in found.unreached:
            self._around(module.get_submodule(path))
        whole = "" in found.owners
        for path in found.owners:
            if path:
                owner = module.get_submodule(path)
                if id(owner) not in self.opaque and not self._settle(owner):
                    whole = True  # what cannot be planned by itself may be part of something that can
        for path in found.between:
            between = module.get_submodule(path)
            if id(between) not in self.opaque and self._joins(between):
                self._settle(between, said=False)
        if whole or (found.traceable and self._joins(module)):
            self._settle(module, whole)

    def _survey(self, module: nn.Module) -> Survey:
        try:
            (traced,) = self._traces(module, (False,))
        except Untraceable:
            return Survey(False, [], [], [name for name, _ in module.named_children()])
        return survey_of(module, traced)

    def _joins(self, module: nn.Module) -> bool:
        """Whether there are modules in ``module``'s forward that could hand activations on to one another."""
        return not is_container(module) and len(list(self._outermost_planned(module))) > 1

    def _outermost_planned(self, module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if id(child) not in self.opaque:
                yield from self._outermost_planned(child)
            elif id(child) not in self.refused:
                yield child

    def _settle(self, module: nn.Module, said: bool = True) -> bool:
        """Plan ``module`` with what is planned inside it; False where it cannot be, which is reported if ``said``."""
        key = self._key(module)
        known = self._plans.get(key)
        if key is None or key not in self._plans or not _holds(None if known is None else known.plan, module):
            known = self._plans[key] = self._plan(module)
        if known is None:
            return False
        left = {path: self.left[id(m)] for path, m in module.named_modules() if id(m) in self.left}
        found = Found(self.names[id(module)], module, known.plan, known.reason, False, left)
        if self._is_left(found, said):
            return True
        if found.plan is not None or said:
            self._report(found)
        if found.plan is not None:
            self.opaque[id(module)] = module
        return found.plan is not None

    def _is_left(self, found: Found, said: bool) -> bool:
        """Whether nothing is gained by the plan that has been found: the module is then called as it is."""
        if self.everywhere or found.plan is None:
            return False
        why_not = why_not_worth(found.module, found.plan, self._is_planned)
        if why_not is not None and said:
            self._report(Found(found.name, found.module, None, why_not, found.residual))
            self._leave(found.module, why_not)
        return why_not is not None

    def _is_planned(self, module: nn.Module) -> bool:
        if type(module) is nn.Sequential:
            return any(map(self._is_planned, module))
        return id(module) in self.opaque and id(module) not in self.refused

    def _key(self, module: nn.Module) -> Any:
        """What a plan of ``module`` depends on, as far as that can be said."""
        key = structure(module, self.opaque)
        return None if key is None else (key, tuple(id(m) in self.refused for m in module.modules()))

    def _report(self, found: Found) -> None:
        if found.plan is not None:  # what its program runs through needs no reason of its own
            replaced = [b for program in found.plan.programs for b in program.guards.bypassed]
            modules = (descend(found.module, b.names) for b in replaced)
            self._unplan([m for m in modules if m is not None and self._has_plan(m)])
            inlined = {self.names[id(m)] for m in inside(found.module, self.opaque)}
            self.result.found = [f for f in self.result.found if f.plan is not None or f.name not in inlined]
        self.result.found.append(found)

    # -- plans --

    def _plan(self, module: nn.Module, traces: list[Traced] | None = None) -> Found | None:
        """A checked plan for ``module``: with its additions, else without them; None where it has no tail."""
        name, reason = self.names[id(module)], None
        for residual in (True, False):
            try:
                plan = make_plan(module, self.opaque, residual, traces, self.refused)
                traces = None  # a plan is made of them
            except Untraceable as error:
                return Found(name, module, None, str(error))
            if plan is None:
                break
            # A refused module is run as it is in the comparison: nothing is known of what it takes and returns.
            stand_ins = {key: m for key, m in self.opaque.items() if key not in self.refused}
            verdict = _verdict(module, plan, stand_ins) if self.check else None
            if verdict is None:
                return Found(name, module, plan, reason, residual=any(t.adds for t in plan.tails))
            reason = verdict
            if verdict.startswith("cannot be compared"):
                break
        return None if reason is None else Found(name, module, None, reason)


def _holds(plan: Plan | None, module: nn.Module) -> bool:
    """Whether ``plan``, made for a module of the same structure, stands for ``module``: its guards say so."""
    return plan is None or all(p.guards.but_for_modes().why_not(module) is None for p in plan.programs)


def _why_no_tail(module: nn.Module, opaque: dict[int, nn.Module]) -> str:
    norms = sorted(
        {
            type(m).__name__
            for m in inside(module, opaque)
            if "norm" in type(m).__name__.lower() and not is_batch_norm(m) and next(m.children(), None) is None
        }
    )
    if norms:
        return f"normalises with {' and '.join(norms)}, only batch norm fits a convolution's epilogue"
    return "has no conv -> BN -> add in its forward"


def _verdict(module: nn.Module, plan: Plan, opaque: dict[int, nn.Module]) -> str | None:
    # What stands for a submodule in the comparison depends on that submodule.
    alone = not any(id(m) in opaque for m in module.modules() if m is not module)
    key = structure(module, {}) if alone else None
    if key is None:
        return difference(module, plan, opaque)
    key = (key, tuple((p.source, tuple(map(repr, p.tails)), p.guards.key) for p in plan.programs))
    if key not in _verdicts:
        if len(_verdicts) >= _MOST_VERDICTS:
            _verdicts.clear()
        _verdicts[key] = difference(module, plan, opaque)
    return _verdicts[key]


@planner
def replan(module: nn.Module) -> None:
    """Make the plan of a fused module again, after loading it or when asked to by ``refresh``."""
    fusion: Fusion = module.__dict__.pop(ATTRIBUTE)
    fused: Any = type(module)
    module.__class__ = original_class(module)  # what is planned is its own forward
    opaque: dict[int, Any] = {id(m): m for m in module.modules() if m is not module and runs_tails(m)}
    left = [m for m in (descend(module, names_of(path)) for path in fusion.left) if m is not None]
    opaque.update((id(m), m) for m in left)
    try:
        plan = make_plan(module, opaque, plain=set(map(id, left)))
        verdict = "it has no tail any more" if plan is None else None
        if plan is not None:
            verdict = _verdict(module, plan, opaque)
    except Untraceable as error:
        plan, verdict = None, str(error)
    finally:
        module.__class__ = fused
        module.__dict__[ATTRIBUTE] = fusion
    fusion.graphs = graphs_of(module)
    fusion.plan = plan if verdict is None else None
    fusion.problem = verdict
