"""Which modules of a model are planned: the residual blocks first, then the conv-BN pairs around them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .check import difference
from .match import Matcher
from .plan import ATTRIBUTE, Fusion, graphs_of, is_fused, original_class, planner, runs_tails
from .program import Plan, make_plan
from .reads import intercepted
from .snapshot import Snapshot, Unknown
from .trace import Traced, Untraceable, inside, is_batch_norm, is_container, trace


@dataclass
class Found:
    """What discovery says about one module: a plan, or why there is none."""

    name: str
    module: nn.Module
    plan: Plan | None
    reason: str | None
    residual: bool = True


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
_REGISTRIES = frozenset(nn.Module().__dict__) - {"training"}


def discover(model: nn.Module, check: bool = True) -> Discovery:
    """Plan every block of ``model`` that can be planned; nothing is changed."""
    with intercepted():
        return _discover(model, check)


def _discover(model: nn.Module, check: bool) -> Discovery:
    result = Discovery()
    opaque: dict[int, nn.Module] = {}
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        names.setdefault(id(module), name)
        if runs_tails(module):
            opaque[id(module)] = module
    result.already = [names[i] for i, m in opaque.items() if not is_fused(m)]
    had_fused = bool(opaque)
    refused: set[int] = set()
    _blocks(model, names, opaque, refused, result, check, set())
    if had_fused or any(f.plan is not None for f in result.found):
        _surroundings(model, names, {**opaque}, refused, result, check)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    result.found.sort(key=lambda f: order[f.name])
    return result


def _holds_tail_parts(module: nn.Module, opaque: dict[int, nn.Module]) -> bool:
    parts = list(inside(module, opaque))
    return any(isinstance(m, nn.Conv2d) for m in parts) and any(is_batch_norm(m) for m in parts)


def _blocks(
    module: nn.Module,
    names: dict[int, str],
    opaque: dict[int, nn.Module],
    refused: set[int],
    result: Discovery,
    check: bool,
    seen: set[int],
) -> bool:
    """Plan the residual blocks under ``module``, innermost first; True when there is one (or a refused one)."""
    if id(module) in seen or id(module) in opaque:
        return id(module) in opaque
    seen.add(id(module))
    below = [_blocks(child, names, opaque, refused, result, check, seen) for child in module.children()]
    if is_container(module) or is_batch_norm(module) or type(module).__module__.startswith("torch.nn.modules"):
        return any(below)
    if not any(isinstance(m, nn.Conv2d) for m in inside(module, opaque)):
        return any(below)
    name = names[id(module)]
    try:
        adds, tails, traces = _additions(module, opaque)
    except Untraceable as error:
        direct = [m for m in module.children() if id(m) not in opaque]
        if any(below) and any(isinstance(m, nn.Conv2d) for m in direct) and any(map(is_batch_norm, direct)):
            result.found.append(Found(name, module, None, str(error)))
        if any(below) or not _holds_tail_parts(module, opaque):
            return any(below)  # not a block, and nothing that a user would call one
        result.found.append(Found(name, module, None, str(error)))
        refused.add(id(module))
        opaque[id(module)] = module
        return True
    if not adds or (any(below) and not tails):
        return any(below)
    found = _plan(name, module, opaque, refused, check, traces)
    if found is None:
        if not tails:
            found = Found(name, module, None, _why_no_tail(module, opaque))
        else:
            return any(below)
    result.found.append(found)
    opaque[id(module)] = module
    if found.plan is None:
        refused.add(id(module))
    return True


def _additions(module: nn.Module, opaque: dict[int, nn.Module]) -> tuple[bool, bool, list[Traced]]:
    """Whether the module's forward adds to a convolution, whether that makes a residual tail, and its traces."""
    adds = tails = False
    traces = [trace(module, opaque, training) for training in (True, False)]
    for traced in traces:
        matcher = Matcher(traced)
        adds = adds or any(matcher.added(n) is not None for n in matcher.graph.nodes)
        tails = tails or any(t.adds for t in matcher.tails())
    return adds, tails, traces


def _why_no_tail(module: nn.Module, opaque: dict[int, nn.Module]) -> str:
    norms = sorted(
        {
            type(m).__name__
            for m in inside(module, opaque)
            if "norm" in type(m).__name__.lower() and not is_batch_norm(m)
        }
    )
    if norms:
        return f"normalises with {' and '.join(norms)}, only batch norm fits a convolution's epilogue"
    return "has no conv -> BN -> add in its forward"


def _plan(
    name: str,
    module: nn.Module,
    opaque: dict[int, nn.Module],
    refused: set[int],
    check: bool,
    traces: list[Traced] | None = None,
) -> Found | None:
    """A checked plan for ``module``: with its additions fused, else without them; None where it has no tail."""
    reason = None
    for residual in (True, False):
        try:
            plan = make_plan(module, opaque, residual, traces)
            traces = None  # a plan is made of them
        except Untraceable as error:
            return Found(name, module, None, str(error))
        if plan is None:
            break
        # A refused module is run as it is in the comparison: nothing is known of what it takes and returns.
        stand_ins = {key: m for key, m in opaque.items() if key not in refused}
        verdict = _verdict(module, plan, stand_ins) if check else None
        if verdict is None:
            return Found(name, module, plan, reason, residual=any(t.adds for t in plan.tails))
        reason = verdict
        if verdict.startswith("cannot be compared"):
            break
    return None if reason is None else Found(name, module, None, reason)


def _equal(module: nn.Module, plan: Plan, opaque: dict[int, nn.Module]) -> Any:
    """Everything that the comparison of ``plan`` depends on, as a key; None where that cannot be said.

    Classes, functions and code are in it as the objects that they are, never by name.
    """
    if any(id(m) in opaque for m in module.modules() if m is not module):
        return None  # what stands for a submodule in the comparison depends on that submodule
    parts: list[Any] = [(p.source, tuple(map(repr, p.tails)), p.guards.key) for p in plan.programs]
    torchs = all(type(m).__module__.startswith("torch.nn.modules") for m in module.modules() if m is not module)
    width = _Widths() if torchs else _number
    for path, m in module.named_modules(remove_duplicate=False):
        own = {k: v for k, v in m.__dict__.items() if k not in _REGISTRIES and k != ATTRIBUTE}
        if isinstance(m, nn.Conv2d) and m.groups == 1:
            own.update(in_channels=width(m.in_channels), out_channels=width(m.out_channels))
        elif isinstance(m, nn.BatchNorm2d):
            own["num_features"] = width(m.num_features)
        tensors = tuple((name, *_form(t, width)) for name, t in (*m._parameters.items(), *m._buffers.items()))
        hooked = bool(m._forward_hooks or m._forward_pre_hooks)
        try:
            parts.append((path, original_class(m), Snapshot(own).key, tensors, hooked))
        except Unknown:
            return None
    return tuple(parts)


class _Widths:
    """Numbers of channels by their first appearance, as far as only their being equal, or one, can matter.

    Torch's own modules do with 512 channels what they do with 64; code that asks for the number has it in its guards.
    """

    def __init__(self) -> None:
        self._known: dict[int, int] = {1: -1}

    def __call__(self, number: int) -> int:
        return self._known.setdefault(number, -1 - len(self._known))


def _number(number: int) -> int:
    return number


def _form(tensor: Any, width: Any) -> tuple[Any, ...]:
    if tensor is None:
        return (None,)
    return (*map(width, tensor.shape[:2]), *tensor.shape[2:], tensor.requires_grad)


def _verdict(module: nn.Module, plan: Plan, opaque: dict[int, nn.Module]) -> str | None:
    key = _equal(module, plan, opaque)
    if key is None:
        return difference(module, plan, opaque)
    if key not in _verdicts:
        if len(_verdicts) >= _MOST_VERDICTS:
            _verdicts.clear()
        _verdicts[key] = difference(module, plan, opaque)
    return _verdicts[key]


def _surroundings(
    model: nn.Module,
    names: dict[int, str],
    opaque: dict[int, nn.Module],
    refused: set[int],
    result: Discovery,
    check: bool,
) -> None:
    """Plan the conv-BN pairs outside the residual blocks (the stem), each in the module whose forward holds it."""
    queue: list[nn.Module] = [model]
    done: set[int] = set()
    while queue:
        module = queue.pop(0)
        if id(module) in done or id(module) in opaque or not _holds_tail_parts(module, opaque):
            continue
        done.add(id(module))
        owners = _owners(module, opaque)
        if module not in owners:
            queue += [*owners, *module.children()]
            continue
        found = _plan(names[id(module)], module, opaque, refused, check)
        if found is not None:
            found.residual = False
            result.found.append(found)
            if found.plan is not None:  # whatever its program runs through is no candidate of its own
                done.update(id(m) for m in inside(module, opaque))
                opaque[id(module)] = module
                continue
        queue += list(module.children())


def _owners(module: nn.Module, opaque: dict[int, nn.Module]) -> list[nn.Module]:
    """The modules, ``module`` or below, whose forwards hold all of a tail; empty where it cannot be traced."""
    try:
        found = Matcher(trace(module, opaque, training=False)).tails()
    except Untraceable:
        return []
    paths = sorted({tail.stack[-1] for tail in found})
    return [module.get_submodule(path) for path in paths]


@planner
def replan(module: nn.Module) -> None:
    """Make the plan of a fused module again, after loading it or when asked to by ``refresh``."""
    fusion: Fusion = module.__dict__.pop(ATTRIBUTE)
    fused: Any = type(module)
    module.__class__ = original_class(module)  # what is planned is its own forward
    opaque: dict[int, Any] = {id(m): m for m in module.modules() if m is not module and runs_tails(m)}
    try:
        plan = make_plan(module, opaque)
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
