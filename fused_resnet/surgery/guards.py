"""The conditions under which a program may stand for a module's forward, as flat tuples looked at in each call.

Everything that the trace read (see ``reads``), and each submodule whose call the program replaces, must still be
what it was. In a compiled graph the attributes of the modules are read by the compiler, which then guards them; the
rest is looked at when the graph is made.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ..nn import parts, pristine
from .reads import Reads
from .snapshot import MISSING, Snapshot, Unknown, describe, is_atom, is_same_class

_OWN_CALL = frozenset(("forward", "_conv_forward", "_call_impl", "_wrapped_call_impl", "__call__"))


@dataclass(frozen=True)
class Bypassed:
    """A submodule whose call the program replaces (or traced through), and what it was when the plan was made."""

    path: str
    names: tuple[str, ...]
    cls: type
    inlined: bool
    """Whether its forward was traced through."""
    projection: bool = False
    """Whether it is a projection's convolution, the second one in a launch."""

    def why_not(self, module: nn.Module | None) -> str | None:
        """None, or why the program may not stand for a call of ``module`` any more."""
        if module is None:
            return f"{self.path} is gone"
        if type(module) is not self.cls and not (
            parts.is_plain_batch_norm(module) and issubclass(self.cls, (nn.BatchNorm2d, nn.SyncBatchNorm))
        ):
            return f"{self.path} is a {type(module).__name__}, it was a {self.cls.__name__}"
        if isinstance(module, nn.Conv2d):
            why_not = parts.why_not_fusable(module)
            if why_not is None and self.projection and not parts.is_projection(module):
                why_not = "is not a 1x1 convolution without padding and groups any more"
            if why_not is not None:
                return f"{self.path} {why_not}"
        why_not = parts.why_not_bypassed(module)
        return None if why_not is None else f"{self.path} {why_not}"


def descend(root: nn.Module, names: tuple[str, ...]) -> Any:
    """The submodule of ``root`` at ``names``, or None."""
    module: Any = root
    for name in names:
        if module is None:
            return None
        module = module._modules.get(name)
    return module


def names_of(path: str) -> tuple[str, ...]:
    return tuple(path.split(".")) if path else ()


class Guards:
    """What must still hold; made once for a program, never changed."""

    def __init__(
        self,
        reads: Reads,
        bypassed: tuple[Bypassed, ...],
        same: tuple[tuple[str, str], ...],
        classes: tuple[type, ...],
        called: frozenset[str] = frozenset(),
    ) -> None:
        """``called`` are the submodules of which nothing counts but that the program calls them too."""
        self.bypassed = bypassed
        self._same = tuple((names_of(a), names_of(b)) for a, b in same)
        paths = ["", *(b.path for b in bypassed)]
        paths += [p for p, _ in (*reads.values, *reads.deep, *reads.asked, *reads.tensors)]
        paths += list(reads.children)
        self._paths = tuple(dict.fromkeys(self._with_parents(paths)))
        index = {path: i for i, path in enumerate(self._paths)}
        self._tree = tuple((index[p.rpartition(".")[0]], p.rpartition(".")[2]) for p in self._paths[1:])
        shadowed: dict[str, set[str]] = {}
        for path, name in reads.unshadowed:
            if path in index:
                shadowed.setdefault(path, set()).add(name)
        for b in bypassed:
            shadowed.setdefault(b.path, set()).update(_OWN_CALL)
        self._bypassed: Any = tuple(
            (index[b.path], b.cls, b, frozenset(shadowed.pop(b.path)), issubclass(b.cls, nn.Conv2d), b.projection)
            for b in bypassed
        )
        self._shadowed = tuple((index[path], path, frozenset(names)) for path, names in shadowed.items())
        self._values = tuple((index[path], path, name, value) for (path, name), value in reads.values.items())
        self._deep = tuple((index[path], path, name, key) for (path, name), key in reads.deep.items())
        self._children = tuple((index[path], path, names) for path, names in reads.children.items())
        self._asked = tuple(
            (index[path], path, name, cls if reads.examined or _join(path, name) not in called else None, cls is None)
            for (path, name), cls in reads.asked.items()
        )
        self._distinct = reads.distinct
        self._tensors = tuple((index[path], path, name, there) for (path, name), there in reads.tensors.items())
        self._classes = tuple((c, reads.classes[c], c.__mro__) for c in classes)
        self._attributes = tuple(reads.attributes.items())
        self._functions = tuple((f, *was) for f, was in reads.functions.items())
        self._outside = tuple(reads.outside.values())
        self._identical = tuple((v.again, v.was, v) for v in self._outside if not v.deep)
        self._contents = tuple(v for v in self._outside if v.deep)

    @staticmethod
    def _with_parents(paths: list[str]) -> list[str]:
        return [
            ".".join(path.split(".")[: i + 1]) if path else "" for path in paths for i in range(path.count(".") + 1)
        ]

    @property
    def key(self) -> Any:
        """All that is compared, for the question whether two programs have the same guards."""
        return (
            tuple((b.path, b.cls, b.inlined) for b in self.bypassed), self._same, self._shadowed, self._values_key,
            self._deep, self._children, self._asked, self._tensors, tuple(c for c, _, _ in self._classes),
            tuple(f[0] for f in self._functions), tuple((v.say, v.was if v.deep else id(v.was)) for v in self._outside),
        )  # fmt: skip

    def but_for_modes(self) -> Guards:
        """The same, whatever mode the modules are in."""
        other = copy.copy(self)
        other._values = tuple(value for value in self._values if value[2] != "training")
        return other

    @property
    def _values_key(self) -> Any:
        return tuple((path, name, type(value), value) for _, path, name, value in self._values)

    # ---- the check ------------------------------------------------------------------------------------------------

    def why_not(self, root: Any) -> str | None:
        """None while the program may run for ``root``, else a clause that says why not."""
        if torch.compiler.is_compiling():
            return self._why_not_compiled(root)
        why_not = pristine.why_not()
        if why_not is not None:
            return why_not
        if torch_module._has_any_global_hook():
            return "a global module hook is registered"
        modules: list[Any] = [root]
        for parent, name in self._tree:
            above = modules[parent]
            modules.append(None if above is None else above._modules.get(name))
        for i, cls, bypassed, names, conv, projection in self._bypassed:
            m: Any = modules[i]
            if (
                type(m) is not cls
                or m._forward_hooks
                or m._forward_pre_hooks
                or m._backward_hooks
                or m._backward_pre_hooks
                or (conv and (m.padding_mode != "zeros" or type(m.padding) is str))
                or (projection and not _is_plainly_projection(m))
                or not m.__dict__.keys().isdisjoint(names)
            ):
                why_not = bypassed.why_not(m) or self._why_shadowed(m, names, f"{bypassed.path}.")
                if why_not is not None:
                    return why_not
        return self._why_not_modules(modules) or self._why_not_outside(root)

    def _why_not_modules(self, modules: list[Any]) -> str | None:
        for i, path, names in self._shadowed:
            if modules[i] is not None and not modules[i].__dict__.keys().isdisjoint(names):
                return self._why_shadowed(modules[i], names, f"{path}." if path else "")
        for i, path, name, value in self._values:
            now = MISSING if modules[i] is None else modules[i].__dict__.get(name, MISSING)
            if now is not value and not (type(now) is type(value) and now == value):
                return _differs(path, name, now, value)
            if value is MISSING and modules[i] is not None and _is_registered(modules[i], name):
                return f"{_join(path, name)} is there, the plan was made without it"
        for i, path, name, key in self._deep:
            now = MISSING if modules[i] is None else modules[i].__dict__.get(name, MISSING)
            if not _same(now, key):
                return f"{_join(path, name)} is another than the plan was made for"
        for i, path, (children, absent) in self._children:
            held = {} if modules[i] is None else modules[i]._modules
            now = tuple(held)
            if now != children or ((absent or None in held.values()) and absent != _absent(held)):
                what = path or "the module"
                if len(now) != len(children):
                    return f"{what} has {len(now)} submodules, it had {len(children)}"
                return f"{what} has other submodules than the plan was made for"
        for i, path, name, cls, none in self._asked:
            child = None if modules[i] is None else modules[i]._modules.get(name)
            if (child is None) is not none:
                return (
                    f"{_join(path, name)} is {describe(child)}, the plan was made for {'None' if none else 'a module'}"
                )
            if cls is not None and type(child) is not cls and not _like(child, cls):
                return f"{_join(path, name)} is a {type(child).__name__}, it was a {cls.__name__}"
        if self._distinct is not None:
            asked = [None if modules[i] is None else modules[i]._modules.get(name) for i, _, name, _, _ in self._asked]
            if len(set(map(id, asked))) != self._distinct:
                return "some of its submodules are, or are no longer, the same one"
        for i, path, name, there in self._tensors:
            now = None if modules[i] is None else getattr(modules[i], name, None)
            if (now is not None) is not there:
                return f"{_join(path, name)} is {'there' if now is not None else 'None'}, which it was not"
        for one, other in self._same:
            if descend(modules[0], one) is not descend(modules[0], other):
                return f"{'.'.join(other)} is not {'.'.join(one)} any more"
        return None

    def _why_not_outside(self, root: Any) -> str | None:
        own = type(root).__dict__
        if "_fused_names" in own and own.keys() - own["_fused_names"]:
            names = [name for name in own.keys() - own["_fused_names"] if not name.startswith("__")]
            if names:
                return f"{min(names)} has been set on its class"
        for cls, was, mro in self._classes:
            if cls.__mro__ is not mro or not is_same_class(cls, was):
                return f"the class {cls.__name__} is not what it was"
        for function, code, defaults, kwdefaults, key in self._functions:
            if function.__code__ is not code or function.__defaults__ is not defaults:
                return f"{function.__name__} is not what it was"
            mutable = kwdefaults is not None or (defaults and not all(map(is_atom, defaults)))
            if mutable and not _same((function.__defaults__, function.__kwdefaults__), key):
                return f"{function.__name__} has other default values"
        for function, attributes in self._attributes:
            if function.__dict__ and (attributes is None or not _same(function.__dict__, attributes)):
                return f"{function.__name__} has other attributes"
            if attributes is not None and not function.__dict__:
                return f"{function.__name__} has lost its attributes"
        for again, value, held in self._identical:
            if again() is not value and held.changed():
                return f"{held.say} is another than the plan was made for"
        for held in self._contents:
            if held.changed():
                return f"{held.say} is another than the plan was made for"
        return None

    def _why_shadowed(self, module: Any, names: frozenset[str], prefix: str) -> str | None:
        for name in sorted(names & module.__dict__.keys()):
            return f"{prefix}{name} has been set on the instance"
        return None

    # ---- under torch.compile --------------------------------------------------------------------------------------

    def _why_not_compiled(self, root: Any) -> str | None:
        why_not = self._why_not_outside_now()
        if why_not is not None:
            return why_not
        if torch_module._has_any_global_hook():
            return "a global module hook is registered"
        for b in self.bypassed:
            why_not = b.why_not(descend(root, b.names))
            if why_not is not None:
                return why_not
        for _, path, names in self._shadowed:
            own = descend(root, names_of(path)).__dict__
            for name in names:
                if name in own:
                    return f"{_join(path, name)} has been set on the instance"
        for _, path, name, value in self._values:
            module = descend(root, names_of(path))
            if value is MISSING:
                if hasattr(module, name):
                    return f"{_join(path, name)} is there, the plan was made without it"
                continue
            now = getattr(module, name, MISSING)
            if type(now) is not type(value) or now != value:
                return _differs(path, name, now, value)
        for _, path, name, key in self._deep:
            if not matches(getattr(descend(root, names_of(path)), name, MISSING), key):
                return f"{_join(path, name)} is another than the plan was made for, or cannot be guarded in a graph"
        for _, path, (children, absent) in self._children:
            held = descend(root, names_of(path))._modules
            if tuple(held) != children or _absent(held) != absent:
                return f"{path or 'the module'} has other submodules than the plan was made for"
        for _, path, name, cls, none in self._asked:
            child = getattr(descend(root, names_of(path)), name)
            if (child is None) is not none or (cls is not None and type(child) is not cls and not _like(child, cls)):
                return f"{_join(path, name)} is another than the plan was made for"
        for _, path, name, there in self._tensors:
            if (getattr(descend(root, names_of(path)), name, None) is not None) is not there:
                return f"{_join(path, name)} is {'None' if there else 'there'}, which it was not"
        return None

    @pristine.constant
    def _why_not_outside_now(self) -> str | None:
        return pristine.why_not() or self._why_not_outside(self)


def _is_plainly_projection(conv: Any) -> bool:
    """``parts.is_projection``, in no time for one that is written in the usual way."""
    weight = conv._parameters.get("weight")
    if weight is None or conv.padding != (0, 0) or conv.groups != 1:
        return parts.is_projection(conv)
    return bool(weight.size(2) == 1 and weight.size(3) == 1)


def matches(now: Any, key: Any) -> bool:
    """Whether a snapshot of ``now`` would have ``key``, for plain containers; the compiler can follow this."""
    cls = key[0] if isinstance(key, tuple) else None
    if cls is None or type(now) is not cls:
        return False
    if cls in (list, tuple):
        return len(now) == len(key) - 1 and all(matches(a, b) for a, b in zip(now, key[1:], strict=True))
    if cls is dict:
        items = list(now.items())
        return len(items) == len(key) - 1 and all(
            matches(k, a) and matches(v, b) for (k, v), (a, b) in zip(items, key[1:], strict=True)
        )
    return cls in (bool, int, float, str, type(None)) and now == key[1]


def _absent(modules: Any) -> tuple[str, ...]:
    return tuple(name for name, module in modules.items() if module is None)


def _same(now: Any, key: Any) -> bool:
    try:
        return bool(Snapshot(now).key == key)
    except Unknown:
        return False


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _differs(path: str, name: str, now: Any, value: Any) -> str:
    return f"{_join(path, name)} is {describe(now)}, the plan was made for {describe(value)}"


def _is_registered(module: Any, name: str) -> bool:
    return name in module._modules or name in module._parameters or name in module._buffers


def _like(module: Any, cls: type) -> bool:
    """Whether ``module`` is what fusing or synchronising made of one of ``cls``."""
    return issubclass(type(module), cls) and type(module).__qualname__ == cls.__qualname__
