"""Finding tails in a traced forward, and rewriting the graph so that each becomes one call."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..nn import parts
from ..nn.pristine import DROPOUTS
from .trace import Traced, is_batch_norm

# The activations by name, as they are written in the wild. A new one is one more entry (and a branch in each
# backend's epilogue).
_ACT_MODULES: dict[Any, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
_ACT_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
}
_ACT_METHODS: dict[str, str] = {"relu": "relu", "relu_": "relu"}
_ADDS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ("add", "add_", "__add__", "__iadd__")


@dataclass
class MatchedTail:
    """One fused call: what it computes, by the names of the modules whose calls it replaces."""

    conv: str
    bn: str | None
    activation: str
    adds: bool
    projection: tuple[str, str | None] | None
    bypassed: tuple[str, ...]
    nodes: list[fx.Node] = field(repr=False, compare=False, default_factory=list)
    source: fx.Node | None = field(repr=False, compare=False, default=None)
    residual: fx.Node | None = field(repr=False, compare=False, default=None)
    residual_first: bool = False
    """Whether the residual, or the projection, is the first operand of the addition."""
    pool: str | None = None
    """The max pool right after it, which joins the pass on the CPU."""
    then: str | None = None
    """The batch norm's own activation, where it is none of the tail's: a module that is called on the result."""

    def __str__(self) -> str:
        parts = [self.conv] + ([self.bn] if self.bn else [])
        if self.projection:
            parts.append("(" + "+".join(p for p in self.projection if p) + ")")
        elif self.adds:
            parts.append("add")
        if self.activation != "none":
            parts.append(self.activation)
        return "+".join(parts)

    @property
    def stack(self) -> tuple[str, ...]:
        """The modules, outermost first, inside whose forwards all of this tail happens."""
        stacks = [node.meta["stack"] for node in self.nodes]
        common = []
        for level in zip(*stacks, strict=False):
            if len(set(level)) > 1:
                break
            common.append(level[0])
        return tuple(common)


@dataclass
class _Branch:
    """conv or conv -> BN, as found when walking up from where its output is used."""

    conv: str
    bn: str | None
    activation: str | None
    """None for one that is none of the tail's."""
    bypassed: list[str]
    nodes: list[fx.Node]
    source: fx.Node


class Matcher:
    """Finds the tails of one traced forward."""

    def __init__(self, traced: Traced) -> None:
        self.graph = traced.graph
        self.modules = traced.modules
        self.unreadable = traced.unreadable
        self.claimed: set[fx.Node] = set()
        self._position = {node: i for i, node in enumerate(self.graph.nodes)}

    def order(self, node: fx.Node) -> int:
        """The place of ``node`` in the graph."""
        return self._position[node]

    # -- what a node is --

    def is_norm(self, module: nn.Module) -> bool:
        """Whether ``module`` may be the batch norm of a tail."""
        return is_batch_norm(module) and id(module) not in self.unreadable

    def module(self, node: Any) -> nn.Module | None:
        """The module that ``node`` calls on one argument, or None."""
        if isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            return self.modules.get(str(node.target))
        return None

    def activation(self, node: fx.Node) -> str | None:
        """The name of the activation that ``node`` applies to its first argument, or None."""
        module = self.module(node)
        if module is not None:
            return _activation_of(module)
        inplace_only = set(node.kwargs) <= {"inplace"}
        if node.op == "call_function" and inplace_only:
            return _ACT_FUNCTIONS.get(node.target)
        if node.op == "call_method" and len(node.args) == 1 and not node.kwargs:
            return _ACT_METHODS.get(str(node.target))
        return None

    def added(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The two distinct nodes that ``node`` adds, or None."""
        is_add = (node.op == "call_function" and node.target in _ADDS) or (
            node.op == "call_method" and node.target in _ADD_METHODS
        )
        if not is_add or node.kwargs or len(node.args) != 2:
            return None
        a, b = node.args
        return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b else None

    def transparent(self, node: fx.Node) -> bool:
        """Whether ``node`` hands its input through: torch's Identity, and its dropouts in eval mode."""
        module = self.module(node)
        if module is None:
            return False
        return type(module) is nn.Identity or (not module.training and type(module) in DROPOUTS)

    # -- walking --

    def up(self, node: Any) -> tuple[fx.Node | None, list[fx.Node]]:
        """From a use of ``node`` to where its value was made, through transparent single-use nodes."""
        passed: list[fx.Node] = []
        while isinstance(node, fx.Node) and len(node.users) == 1 and self.transparent(node):
            passed.append(node)
            node = node.args[0]
        return (node if isinstance(node, fx.Node) else None), passed

    def down(self, node: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
        """From ``node`` to its only use, through transparent nodes; None where there are several."""
        passed: list[fx.Node] = []
        while len(node.users) == 1:
            user = next(iter(node.users))
            if not self.transparent(user):
                return user, passed
            passed.append(user)
            node = user
        return None, passed

    def branch(self, use: Any) -> _Branch | None:
        """The conv (-> BN) whose output is ``use``, each step of single use and not yet part of a tail."""
        node, passed = self.up(use)
        bypassed, nodes = [str(n.target) for n in passed], list(passed)
        bn: str | None = None
        activation: str | None = "none"
        module = self.module(node)
        if node is not None and module is not None and self.is_norm(module) and self._free(node):
            if not _is_known_norm(module):
                return None
            bn, activation = str(node.target), _own_activation(module)
            nodes.append(node)
            bypassed.append(bn)
            node, passed = self.up(node.args[0])
            nodes += passed
            bypassed += [str(n.target) for n in passed]
            module = self.module(node)
        if node is None or not self._free(node) or not parts.is_plain_conv(module):
            return None
        assert isinstance(module, nn.Conv2d)
        if parts.why_not_fusable(module) is not None:
            return None
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return None
        conv = str(node.target)
        return _Branch(conv, bn, activation, [*bypassed, conv], [*nodes, node], source)

    def _free(self, node: fx.Node) -> bool:
        return len(node.users) == 1 and node not in self.claimed

    # -- tails --

    def tails(self, residual: bool = True) -> list[MatchedTail]:
        """All tails in the order of the graph; ``residual=False`` leaves the additions alone."""
        while True:
            found = self._tails(residual)
            split = self._split(found)
            if not split:
                return sorted(found, key=lambda tail: max(map(self.order, tail.nodes)))
            self.unreadable = self.unreadable | split
            self.claimed = set()

    def _split(self, found: list[MatchedTail]) -> set[int]:
        """Batch norms that would be called both in a tail and by themselves.

        Autograd refuses that in training: a call of torch's keeps the running statistics, which a tail's updates.
        """
        within = {node for tail in found for node in tail.nodes}
        norms = [(id(m), node in within) for node in self.graph.nodes if (m := self.module(node)) and self.is_norm(m)]
        return {key for key, _ in norms if (key, True) in norms and (key, False) in norms}

    def _tails(self, residual: bool) -> list[MatchedTail]:
        found: list[MatchedTail] = []
        if residual:
            for node in self.graph.nodes:
                found += self._claim(self._residual_tail(node))
        for node in self.graph.nodes:
            module = self.module(node)
            if node in self.claimed or module is None:
                continue
            if self.is_norm(module):
                found += self._claim(self._plain_tail(node))
        for node in self.graph.nodes:
            if node not in self.claimed and isinstance(self.module(node), nn.Conv2d):
                found += self._claim(self._plain_tail(node))
        return found

    def _claim(self, tail: MatchedTail | None) -> list[MatchedTail]:
        if tail is None:
            return []
        self.claimed.update(tail.nodes)
        return [tail]

    def _then_activation(self, end: fx.Node) -> tuple[str, list[fx.Node]]:
        user, passed = self.down(end)
        if user is None or user in self.claimed:
            return "none", []
        activation = self.activation(user)
        return ("none", []) if activation is None else (activation, [*passed, user])

    def _then_max_pool(self, end: fx.Node) -> fx.Node | None:
        """The max pool that is the only user of ``end``."""
        user = next(iter(end.users)) if len(end.users) == 1 else None
        if user is None or user in self.claimed or not parts.is_plain_max_pool(self.module(user)):
            return None
        return user

    def _residual_tail(self, node: fx.Node) -> MatchedTail | None:
        operands = self.added(node)
        if operands is None:
            return None
        branches = [self.branch(operand) for operand in operands]
        candidates = [i for i, b in enumerate(branches) if b is not None and b.activation == "none"]
        if not candidates:
            return None
        main_index = self._main(candidates, branches)
        main, other = branches[main_index], branches[1 - main_index]
        assert main is not None
        activation, act_nodes = self._then_activation(node)
        nodes, bypassed = [*main.nodes, node, *act_nodes], list(main.bypassed)
        bypassed += [str(n.target) for n in act_nodes if n.op == "call_module"]
        residual, passed = self.up(operands[1 - main_index])
        nodes += passed
        bypassed += [str(n.target) for n in passed]
        projection = None
        if other is not None and other.activation == "none" and self._is_projection(other):
            projection, residual = (other.conv, other.bn), other.source
            nodes += [n for n in other.nodes if n not in nodes]
            bypassed += other.bypassed
        return MatchedTail(
            main.conv, main.bn, activation, True, projection, tuple(bypassed), nodes, main.source, residual,
            residual_first=main_index == 1,
        )  # fmt: skip

    def _is_projection(self, branch: _Branch) -> bool:
        conv = self.modules[branch.conv]
        return isinstance(conv, nn.Conv2d) and parts.is_projection(conv)

    def _main(self, candidates: list[int], branches: list[_Branch | None]) -> int:
        """Of two convolutions that are added, the main one: the other one is then the 1x1 projection.

        A projection reads the block's input, so the branch that lies deeper in the graph is the main one.
        """
        if len(candidates) == 1:
            return candidates[0]
        first, second = branches
        assert first is not None
        assert second is not None
        if self._is_projection(first) != self._is_projection(second):
            return 1 if self._is_projection(first) else 0
        return 0 if _depth(first.source) >= _depth(second.source) else 1

    def _plain_tail(self, node: fx.Node) -> MatchedTail | None:
        """conv -> BN (-> activation), or conv -> activation."""
        # `branch` walks up from a use; the node itself may have many.
        if node in self.claimed:
            return None
        module = self.module(node)
        assert module is not None
        activation, act_nodes = self._then_activation(node)
        bypassed: list[str] = []
        nodes: list[fx.Node] = []
        bn = then = None
        if self.is_norm(module):
            own = _own_activation(module)
            branch = self.branch(node.args[0])
            if not _is_known_norm(module) or branch is None or branch.bn is not None:
                return None
            if own is None:
                activation, act_nodes, then = "none", [], f"{node.target}.act"
            elif own != "none":
                activation, act_nodes = own, []
            bn = str(node.target)
            bypassed = [bn, *branch.bypassed]
            nodes = [node, *branch.nodes]
            conv, source = branch.conv, branch.source
        else:
            first = node.args[0]
            if (
                activation == "none"
                or not parts.is_plain_conv(module)
                or not isinstance(first, fx.Node)
                or parts.why_not_fusable(module) is not None  # type: ignore[arg-type]
            ):
                return None
            conv, source = str(node.target), first
            bypassed, nodes = [conv], [node]
        nodes += act_nodes
        bypassed += [str(n.target) for n in act_nodes if n.op == "call_module"]
        pool = self._then_max_pool(max(nodes, key=self.order)) if activation != "none" else None
        if pool is not None:
            bypassed.append(str(pool.target))
            nodes.append(pool)
        path = None if pool is None else str(pool.target)
        return MatchedTail(conv, bn, activation, False, None, tuple(bypassed), nodes, source, pool=path, then=then)


def _depth(node: fx.Node) -> int:
    seen, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return len(seen)


def _is_known_norm(bn: nn.Module) -> bool:
    """Whether a batch norm module holds nothing but its tensors, an activation, and a dropout that is none."""
    children = dict(bn.named_children())
    return not set(children) - {"act", "drop"} and isinstance(children.get("drop"), (nn.Identity, type(None)))


def _own_activation(bn: nn.Module) -> str | None:
    """The activation inside a batch norm module (timm's BatchNormAct2d): ``none`` without one, None if unknown."""
    act = dict(bn.named_children()).get("act")
    return "none" if act is None or type(act) is nn.Identity else _activation_of(act)


def _activation_of(module: nn.Module) -> str | None:
    if isinstance(module, nn.ReLU6) and (module.min_val, module.max_val) != (0, 6):
        return None  # its limits are attributes, and may be others
    return _ACT_MODULES.get(type(module))
