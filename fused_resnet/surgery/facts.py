"""Reading modules while noting what was seen, so that one look tells later whether all of it is still so.

What is noted is identity: of a module's class and ``__dict__``, of the values in it and in its ``_parameters``,
``_buffers`` and ``_modules``, and that there are no hooks. Values that compare equal but are others count as changed;
the caller then reads again.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from .. import _extension, tails
from ..ops import plans
from ..reference import ConvBN

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(name for name in vars(torch_module) if name.startswith("_global_") and name.endswith("_hooks"))


class Unreadable(Exception):
    """Something about a module that cannot be compared by looking into dictionaries."""


class Reader:
    """Reads from ``root`` and the modules in it, and notes what it saw."""

    def __init__(self, root: nn.Module) -> None:
        module: Any = _extension.cpu()
        self._facts = module.Facts()
        self._noted: set[Any] = set()
        self.root = root
        self.hold = self._facts.hold
        """``hold(root)``: whether everything is as it was."""

    # -- notes, each once --

    def _vars(self, module: nn.Module) -> dict[str, Any] | None:
        # The root's __dict__ holds the facts in turn: None has it looked up anew each time.
        return None if module is self.root else vars(module)

    def item(self, dictionary: Any, key: Any, value: Any) -> None:
        """``dictionary[key]`` is ``value``."""
        if (id(dictionary), key) not in self._noted:
            self._noted.add((id(dictionary), key))
            self._facts.item(dictionary, key, value)

    def absent(self, dictionary: Any, key: Any) -> None:
        """There is no ``dictionary[key]``."""
        if (id(dictionary), key) not in self._noted:
            self._noted.add((id(dictionary), key))
            self._facts.absent(dictionary, key)

    def _size(self, dictionary: Any, size: int) -> None:
        if id(dictionary) not in self._noted:
            self._noted.add(id(dictionary))
            self._facts.size(dictionary, size)

    def _dictionary(self, module: nn.Module, name: str) -> dict[str, Any]:
        """``vars(module)[name]``, a dictionary."""
        value = vars(module)[name]
        if type(value) not in (dict, OrderedDict):
            raise Unreadable
        self.item(self._vars(module), name, value)
        found: dict[str, Any] = value
        return found

    # -- reading --

    def attribute(self, module: nn.Module, name: str) -> Any:
        """``getattr(module, name)``."""
        cls, own, where = type(module), vars(module), self._vars(module)
        static = inspect.getattr_static(cls, name, None)
        if hasattr(type(static), "__get__") or cls.__getattribute__ is not object.__getattribute__:
            raise Unreadable
        if name in own:
            self.item(where, name, own[name])
            return own[name]
        self.absent(where, name)
        if hasattr(cls, name):
            return static
        if cls.__getattr__ is not nn.Module.__getattr__:
            raise Unreadable
        for store_name in ("_parameters", "_buffers", "_modules"):
            store = self._dictionary(module, store_name)
            if name in store:
                self.item(store, name, store[name])
                return store[name]
            self.absent(store, name)
        raise Unreadable

    def child(self, module: nn.Module, name: str) -> nn.Module:
        """The child of ``module`` called ``name``; its class stays what it is."""
        children = self._dictionary(module, "_modules")
        found = children.get(name)
        if not isinstance(found, nn.Module) or found is self.root:
            raise Unreadable
        self.item(children, name, found)
        if ("object", id(found)) not in self._noted:
            self._noted.add(("object", id(found)))
            self._facts.object(found)
        return found

    def descendant(self, module: nn.Module, path: tuple[str, ...]) -> nn.Module:
        """The module at ``path`` in ``module``."""
        for name in path:
            module = self.child(module, name)
        return module

    def children(self, module: nn.Module) -> list[nn.Module]:
        """All children of ``module``, which get no more and no fewer."""
        self.length(module, len(vars(module)["_modules"]))
        return [self.child(module, name) for name in vars(module)["_modules"]]

    def length(self, module: nn.Module, length: int) -> None:
        """``module`` has so many children."""
        children = self._dictionary(module, "_modules")
        if len(children) != length:
            raise Unreadable
        self._size(children, length)

    def bypassed(self, module: nn.Module) -> None:
        """``module`` is not called any more: it has no hooks, and the forward of its class."""
        if "forward" in vars(module) or any(vars(module)[hooks] for hooks in _HOOKS):
            raise Unreadable
        for hooks in _HOOKS:
            self._size(self._dictionary(module, hooks), 0)
        self.absent(self._vars(module), "forward")

    def surroundings(self) -> None:
        """No hook for all modules, and the same choice of the backend."""
        for name in _GLOBAL_HOOKS:
            self.item(vars(torch_module), name, vars(torch_module)[name])
            self._size(vars(torch_module)[name], 0)
        environment, key = plans._environment, plans._BACKEND_VARIABLE
        if key in environment:
            self.item(environment, key, environment[key])
        else:
            self.absent(environment, key)

    def conv_bn(self, owner: nn.Module, conv_path: str, bn_path: str | None) -> tuple[ConvBN, dict[str, Any]]:
        """What ``tails`` would read of a convolution in eval mode and its batch norm with known statistics."""
        conv = self.descendant(owner, tuple(conv_path.split(".")))
        if not isinstance(conv, nn.Conv2d) or self.attribute(conv, "training"):
            raise Unreadable
        names = ("stride", "padding", "dilation", "groups", "kernel_size", "padding_mode")
        geometry = {name: self.attribute(conv, name) for name in names}
        geometry["padding"] = tails._same_padding(conv)[0]
        found = ConvBN(self.attribute(conv, "weight"), self.attribute(conv, "bias"))
        if bn_path is None:
            return found, geometry
        bn = self.descendant(owner, tuple(bn_path.split(".")))
        read = ("training", "eps", "weight", "bias", "running_mean", "running_var")
        _, _, gamma, beta, mean, var = (self.attribute(bn, name) for name in read)
        if tails.uses_batch_statistics(bn):
            raise Unreadable
        eps = tails.batch_norm_eps(bn)
        return found._replace(bn_weight=gamma, bn_bias=beta, running_mean=mean, running_var=var, eps=eps), geometry
