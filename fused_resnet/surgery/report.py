"""What :func:`fused_resnet.explain` returns: one sentence for every block, and the facts behind it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ..backends import cpu, cuda_launch
from ..core.problem import dtype_name
from .arguments import require_module
from .discovery import Discovery, Found, discover
from .frozen import FrozenModel
from .plan import ATTRIBUTE, Fusion, is_fused, original_class
from .program import Plan


@dataclass(frozen=True)
class Entry:
    """One block (or other module) of the model."""

    name: str
    """Its name in ``model.named_modules()``; empty for the model itself."""
    kind: str
    """Its class."""
    state: str
    """``fused``; ``blocked`` (fused, but running unfused now); ``fusable`` (not fused yet); ``unfused``."""
    sentence: str
    launches: int
    """Fused launches of one forward in eval mode."""
    tails: tuple[str, ...]
    left: tuple[str, ...]
    """What the forward does beside its fused launches, by module or function name."""
    reason: str | None
    """Why the block, or a part of it, is not fused."""

    @property
    def title(self) -> str:
        return f"{self.name or '(the model)'} ({self.kind})"


@dataclass(frozen=True)
class Explanation:
    """``explain(model)``: print it, iterate over its entries, or take ``to_dict()``."""

    model: str
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = field(default=())

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> Entry:
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(f"no entry for {name!r}; there are {', '.join(repr(e.name) for e in self.entries)}")

    @property
    def fused(self) -> tuple[Entry, ...]:
        """The entries that run fused now."""
        return tuple(e for e in self.entries if e.state == "fused")

    @property
    def unfused(self) -> tuple[Entry, ...]:
        """The entries that run as they were written, with their reasons."""
        return tuple(e for e in self.entries if e.state in ("unfused", "blocked"))

    def to_dict(self) -> dict[str, Any]:
        """The same as plain lists and strings, for JSON."""
        return {
            "model": self.model,
            "entries": [asdict(e) for e in self.entries],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        counts = {
            state: sum(e.state == state for e in self.entries) for state in ("fused", "fusable", "blocked", "unfused")
        }
        head = ", ".join(f"{n} {state}" for state, n in counts.items() if n) or "nothing to fuse"
        lines = [f"{self.model}: {head}"]
        lines += [f"  {e.title}: {e.sentence}" for e in self.entries]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def _launches(plan: Plan) -> str:
    names = ", ".join(str(t) for t in plan.tails)
    n = len(plan.tails)
    return f"{n} fused {'launch' if n == 1 else 'launches'} ({names})"


def _sentence_of_plan(plan: Plan, reason: str | None) -> str:
    program = plan.programs[-1]
    text = _launches(plan)
    if program.left:
        text += f"; left as it is: {', '.join(_short(program.left))}"
    if len(plan.programs) > 1 and plan.programs[0].tails != program.tails:
        text += f"; in training mode {', '.join(str(t) for t in plan.programs[0].tails) or 'nothing is fused'}"
    if reason:
        text += f"; not more, because with its addition it {reason}"
    return text


def _short(left: tuple[str, ...], limit: int = 8) -> list[str]:
    return list(left[:limit]) + (["..."] if len(left) > limit else [])


def explain_fused(name: str, module: nn.Module) -> Entry:
    """The entry of a module that carries a plan."""
    fusion: Fusion = module.__dict__[ATTRIBUTE]
    kind = original_class(module).__name__
    if fusion.plan is None:
        reason = fusion.problem or "it has no plan"
        return Entry(name, kind, "blocked", f"runs unfused: {reason}; call refresh() or fuse()", 0, (), (), reason)
    program, why_not = fusion.plan.choose(module)
    tails = tuple(str(t) for t in fusion.plan.tails)
    left = fusion.plan.programs[-1].left
    if program is None:
        return Entry(name, kind, "blocked", f"runs unfused now: {why_not}", 0, tails, left, why_not)
    text = "fused, " + _sentence_of_plan(fusion.plan, fusion.partly)
    return Entry(name, kind, "fused", text, len(tails), tails, left, fusion.partly)


def explain_found(found: Found) -> Entry:
    """The entry of a module that is not fused (yet)."""
    kind = original_class(found.module).__name__
    if found.plan is None:
        return _unfused(found.name, found.module, found.reason or "it has no tail")
    tails = tuple(str(t) for t in found.plan.tails)
    text = "can be fused, " + _sentence_of_plan(found.plan, found.reason)
    return Entry(found.name, kind, "fusable", text, len(tails), tails, found.plan.programs[-1].left, found.reason)


def _unfused(name: str, module: nn.Module, reason: str) -> Entry:
    return Entry(name, original_class(module).__name__, "unfused", f"left as it is: {reason}", 0, (), (), reason)


def _left(name: str, module: nn.Module) -> Iterator[tuple[str, Entry]]:
    left = module.__dict__[ATTRIBUTE].left
    for path, inner in module.named_modules(prefix=name):
        reason = left.get(path[len(name) + 1 :] if name else path)
        if reason is not None and not is_fused(inner):
            yield path, _unfused(path, inner, reason)


def explain_block(name: str, module: Any) -> Entry:
    """The entry of a module that is built fused (``fused_resnet.nn``)."""
    reason = module.why_not_fused()
    kind = type(module).__name__
    if reason is not None:
        return Entry(name, kind, "blocked", f"runs unfused now: {reason}", 0, (), (), reason)
    launches = getattr(module, "_convs", 1)
    plural = "launch" if launches == 1 else "launches"
    return Entry(name, kind, "fused", f"built fused, {launches} {plural}", launches, (), (), None)


def build(model: nn.Module, discovery: Discovery) -> Explanation:
    """The explanation of ``model``, from what it carries and what discovery says of the rest."""
    entries: dict[str, Entry] = {f.name: explain_found(f) for f in discovery.found}
    for name, module in model.named_modules():
        if is_fused(module):
            entries[name] = explain_fused(name, module)
            entries.update(_left(name, module))
        elif name in discovery.already:
            entries[name] = explain_block(name, module)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    notes = []
    if not entries:
        notes.append(
            f"No convolution of this {original_class(model).__name__} is followed by a batch norm or added to: "
            "there is no tail to fuse, and the model is left as it is."
        )
    weight = next((m.weight for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if entries and weight is not None:
        notes += _arithmetic(weight.dtype, weight.device)
    ordered = tuple(sorted(entries.values(), key=lambda e: order[e.name]))
    return Explanation(original_class(model).__name__, ordered, tuple(notes))


def build_frozen(frozen: FrozenModel) -> Explanation:
    """The explanation of a frozen model: that of its live model, and what has been prepared."""
    live = build(frozen.model, discover(frozen.model))
    notes = [f"frozen: {line}" for line in frozen.prepared_for()] or ["frozen, prepared at the first call"]
    if frozen.dtype is not None:
        notes.insert(0, f"computed in {dtype_name(frozen.dtype)}, from float32 to float32")
        notes += _arithmetic(frozen.dtype, next(frozen.model.parameters(), torch.empty(0)).device)
    return Explanation(f"frozen {live.model}", live.entries, (*live.notes, *notes))


def _arithmetic(dtype: torch.dtype, device: torch.device) -> list[str]:
    """How this device computes a 16-bit type: a GPU with which kernels of ours, a CPU where it is not with ours."""
    if device.type not in ("cpu", "cuda") or dtype.itemsize != 2:
        return []
    if device.type == "cpu":
        sentence = cpu.arithmetic(dtype)
    else:
        here = cuda_launch.of_index(torch.cuda.current_device() if device.index is None else device.index)
        sentence = None if here is None else cuda_launch.arithmetic(dtype, here)
    return [] if sentence is None else [sentence]


def explain(model: nn.Module) -> Explanation:
    """One sentence for every block of ``model``: how it is fused, why it is not, or what :func:`fuse` would do.

    Print the result, iterate over its entries, or take its ``to_dict()``. Nothing is changed.
    """
    require_module(model, "explain")
    if isinstance(model, FrozenModel):
        return build_frozen(model)
    return build(model, discover(model))
