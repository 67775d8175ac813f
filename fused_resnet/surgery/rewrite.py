"""Rewriting a traced graph so that each tail becomes one call.

Between tails, and calls of modules that are made of tails, activations are :class:`fused_resnet.nn.tail.Value`;
whatever else reads one gets a plain tensor from :func:`fused_resnet.nn.tail.leave`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from ..nn import between, tail
from .match import MatchedTail
from .trace import Traced

TAILS = (tail.conv_bn_act, tail.conv_bn_proj_act, tail.conv_bn_act_max_pool)
_FREE = (between.run, between.cat)
_VALUES = (*TAILS, tail.call, *_FREE)
_READ_ONLY = (*TAILS, *_FREE)


def rewrite(traced: Traced, found: list[MatchedTail], opaque: dict[int, nn.Module]) -> fx.Graph:
    """The graph with each tail replaced by one call; it takes ``options`` as well.

    ``opaque`` holds the modules, by id, that may be made of tails themselves.
    """
    graph = traced.graph
    placeholder = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(placeholder):
        options = graph.placeholder("options")
    replaced: dict[Any, fx.Node] = {}
    _replace_calls(traced, opaque, replaced)
    _replace_tails(graph, found, options, replaced)
    _replace_free(traced, placeholder)
    for node in [placeholder, *(n for n in graph.nodes if is_value(n))]:
        _leave(graph, node)
    for node in list(graph.nodes):
        if node is not options and not is_value(node):
            _enter_once(graph, node)
    return graph


def is_value(node: Any) -> bool:
    """Whether what ``node`` makes is a :class:`fused_resnet.nn.tail.Value`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in _VALUES


def _replace_calls(traced: Traced, opaque: dict[int, nn.Module], replaced: dict[Any, fx.Node]) -> None:
    graph, stand_ins = traced.graph, {id(module) for module in opaque.values()}

    def may_be_tails(module: nn.Module | None) -> bool:
        if type(module) is nn.Sequential:
            return any(map(may_be_tails, module))
        return id(module) in stand_ins

    for node in list(graph.nodes):
        one_image = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        if one_image and isinstance(node.args[0], fx.Node) and may_be_tails(traced.modules.get(str(node.target))):
            with graph.inserting_before(node):
                new = graph.call_function(tail.call, (graph.get_attr(str(node.target)), node.args[0]))
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            replaced[node] = new


def _replace_tails(graph: fx.Graph, found: list[MatchedTail], options: fx.Node, replaced: dict[Any, fx.Node]) -> None:
    place = {node: i for i, node in enumerate(graph.nodes)}
    for matched in found:
        end = max(matched.nodes, key=lambda n: place[n])
        source, residual = (
            replaced.get(matched.source, matched.source),
            replaced.get(matched.residual, matched.residual),
        )
        with graph.inserting_before(end):

            def get(path: str | None) -> fx.Node | None:
                return None if path is None else graph.get_attr(path)

            call: Callable[..., Any]
            args: tuple[Any, ...]
            if matched.pool is not None:
                call = tail.conv_bn_act_max_pool
                args = (get(matched.conv), get(matched.bn), get(matched.pool), source)
            elif matched.projection is not None:
                call = tail.conv_bn_proj_act
                proj = (get(matched.projection[0]), get(matched.projection[1]), residual)
                args = (get(matched.conv), get(matched.bn), source, *proj)
            else:
                call = tail.conv_bn_act
                args = (get(matched.conv), get(matched.bn), source, residual)
            order: dict[str, Any] = {"residual_first": True} if matched.residual_first else {}
            new = graph.call_function(call, (*args, matched.activation, options), order)
            if matched.then is not None:
                new = graph.call_function(between.run, (get(matched.then), new))
        end.replace_all_uses_with(new)
        place[new] = place[end]
        replaced[end] = new
        for node in sorted(matched.nodes, key=lambda n: place[n], reverse=True):
            graph.erase_node(node)


def _replace_free(traced: Traced, placeholder: fx.Node) -> None:
    """Have what is the same in any layout go on with values; in place only where nobody else could see that."""
    graph = traced.graph
    for node in list(graph.nodes):
        read = [n for n in node.all_input_nodes if is_value(n) or n is placeholder]
        if not read:
            continue
        one = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        if one and between.is_free(module := traced.modules.get(str(node.target))):
            if getattr(module, "inplace", False) and (read[0] is placeholder or len(read[0].users) > 1):
                continue
            with graph.inserting_before(node):
                new = graph.call_function(between.run, (graph.get_attr(str(node.target)), read[0]))
        elif node.target is torch.cat and _is_along_channels(node) and len(read) == len(node.all_input_nodes):
            with graph.inserting_before(node):
                new = graph.call_function(between.cat, (node.args[0], 1))
        else:
            continue
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _is_along_channels(node: fx.Node) -> bool:
    dim = node.args[1] if len(node.args) == 2 else node.kwargs.get("dim")
    return dim in (1, -3) and set(node.kwargs) <= {"dim"} and isinstance(node.args[0], (list, tuple))


def _leave(graph: fx.Graph, value: fx.Node) -> None:
    """Give the readers of ``value`` a plain tensor, all of them the same one, unless all are tails.

    Whoever is no tail may write to what it reads, and the others must see that, as in eager. A module that is the only
    reader, and may be made of tails, goes on with the value itself.
    """
    readers = list(value.users)
    others = [user for user in readers if user.target not in _READ_ONLY and not _returns(user, value)]
    if not others or (len(readers) == 1 and is_value(readers[0])):
        return
    order = {node: i for i, node in enumerate(graph.nodes)}
    with graph.inserting_before(min(readers, key=lambda n: order[n])):
        left = graph.call_function(tail.leave, (value,))
    for reader in readers:
        reader.replace_input_with(value, left)


def _returns(user: fx.Node, value: fx.Node) -> bool:
    """Whether ``user`` is the output, and ``value`` all of it: the caller leaves, or goes on with it."""
    return user.op == "output" and user.args[0] is value


def _enter_once(graph: fx.Graph, node: fx.Node) -> None:
    """Convert what several tails read once, where nothing else could write to it in between."""
    readers = [user for user in node.users if is_value(user) and node not in _modules_of(user)]
    if len(readers) < 2 or len(readers) < len(node.users):
        return
    order = {n: i for i, n in enumerate(graph.nodes)}
    with graph.inserting_before(min(readers, key=lambda n: order[n])):
        entered = graph.call_function(tail.enter, (node,))
    for reader in readers:
        reader.replace_input_with(node, entered)


def _modules_of(call: fx.Node) -> list[Any]:
    return [argument for argument in call.args if isinstance(argument, fx.Node) and argument.op == "get_attr"]
