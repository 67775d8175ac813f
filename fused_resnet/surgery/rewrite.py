"""Rewriting a traced graph so that each tail becomes one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from .. import tails
from .match import Tail
from .trace import Traced


def rewrite(traced: Traced, found: list[Tail]) -> fx.Graph:
    """The graph with each tail replaced by one call; parameters ``backend`` and ``winograd`` are added to it."""
    graph = traced.graph
    placeholder = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(placeholder):
        winograd = graph.placeholder("winograd")
    with graph.inserting_after(placeholder):
        backend = graph.placeholder("backend")
    order = {node: i for i, node in enumerate(graph.nodes)}
    for tail in found:
        end = max(tail.nodes, key=lambda n: order[n])
        with graph.inserting_before(end):

            def get(path: str | None) -> fx.Node | None:
                return None if path is None else graph.get_attr(path)

            call: Callable[..., Any]
            args: tuple[Any, ...]
            if tail.pool is not None:
                call = tails.conv_bn_act_max_pool
                args = (get(tail.conv), get(tail.bn), get(tail.pool), tail.source)
            elif tail.projection is not None:
                call = tails.conv_bn_proj_act
                proj = (get(tail.projection[0]), get(tail.projection[1]), tail.residual)
                args = (get(tail.conv), get(tail.bn), tail.source, *proj)
            else:
                call = tails.conv_bn_act
                args = (get(tail.conv), get(tail.bn), tail.source, tail.residual)
            new = graph.call_function(call, (*args, tail.activation, backend, winograd))
        end.replace_all_uses_with(new)
        order[new] = order[end]
        for other in found:  # a later tail may read or add what this one makes
            if other.source is end:
                other.source = new
            if other.residual is end:
                other.residual = new
        for node in sorted(tail.nodes, key=lambda n: order[n], reverse=True):
            graph.erase_node(node)
    return graph
