"""Which modules own the tails of one forward: each tail is planned in the innermost module that holds all of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .match import MatchedTail, Matcher
from .trace import Traced, is_container


@dataclass(frozen=True)
class Survey:
    """What one forward says of the tails in it, by paths from its module."""

    traceable: bool
    owners: list[str]
    """The modules to be planned, innermost first; ``""`` is the module itself."""
    between: list[str]
    """Other modules that it runs through, called with one value, innermost first."""
    unreached: list[str]
    """Modules that the forward in eval mode does not call."""


def survey_of(module: nn.Module, traced: Traced) -> Survey:
    """The survey of ``module``, whose forward in eval mode is ``traced``."""
    owners = {_owner(module, tail, traced) for tail in Matcher(traced).tails()}
    # A container joins the owner around it: `Sequential(Sequential(conv, bn, relu), conv, bn)` is one.
    owners -= {
        path
        for path in owners
        if path and is_container(module.get_submodule(path)) and any(_is_inside(path, other) for other in owners)
    }
    reached = traced.called | set(traced.inlined)
    innermost = sorted(traced.one_input, key=lambda path: -path.count("."))
    between = [path for path in innermost if not is_container(module.get_submodule(path))]
    unreached = list(_outermost(module, reached))
    return Survey(True, sorted(owners, key=lambda path: -path.count(".")), between, unreached)


def _is_inside(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))


def _owner(module: nn.Module, tail: MatchedTail, traced: Traced) -> str:
    """The innermost module whose forward holds all of ``tail``, and is called with one value.

    Of a container inside of a block it is the block, so that whoever calls the block goes on with its activations.
    """
    paths = [path for path in reversed(tail.stack) if path in traced.one_input]
    blocks = [path for path in paths if not is_container(module.get_submodule(path))]
    return next(iter(blocks or paths), "")


def _outermost(module: nn.Module, reached: set[str], prefix: str = "") -> Iterator[str]:
    """Paths of the submodules of ``module`` that have not been reached, nor any module inside them."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if any(_is_inside(other, path) for other in reached):
            yield from _outermost(child, reached, f"{path}.")
        elif path not in reached:
            yield path
