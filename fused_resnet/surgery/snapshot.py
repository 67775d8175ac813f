"""A value as it is now, in a form that can be compared with what it is later.

A plan made from a forward holds for the values that the forward read. A snapshot is such a value taken apart into
types, plain values and objects that are compared by identity, as deep as it goes and within bounds; what cannot be
taken apart completely (a tensor, an array, an object of a C type, a large structure) raises :class:`Unknown`.
"""

from __future__ import annotations

import enum
import functools
import operator
import types
from collections import OrderedDict, defaultdict, deque
from typing import Any

import torch
from torch import Tensor, nn

_ATOMS = frozenset((bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented)))
_COMPARABLE = frozenset((torch.dtype, torch.device, torch.layout, torch.memory_format, range, slice))
_BY_IDENTITY = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_CONSTANT_MODULES = frozenset(("torch", "math", "cmath", "operator", "itertools"))
_MAX_ITEMS = 128
_MAX_DEPTH = 8
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class made by a class statement

#: What stands for the value of an attribute that is not there.
MISSING = type("Missing", (), {"__repr__": lambda self: "absent"})()


class Unknown(Exception):
    """A value that cannot be taken apart; the message is a noun phrase for it."""


def is_atom(value: Any) -> bool:
    """Whether ``value`` is compared by its type and ``==``: an immutable value without parts."""
    return type(value) in _ATOMS or type(value) in _COMPARABLE or value is MISSING


class Snapshot:
    """The parts of one value; ``seen`` are the mutable objects in it, which can be put back as they were."""

    __slots__ = ("_count", "_path", "containers", "functions", "instances", "key")

    def __init__(self, value: Any) -> None:
        self.containers: list[tuple[Any, Any]] = []
        self.functions: list[Any] = []
        self.instances: list[type] = []
        self._count = 0
        self._path: dict[int, int] = {}
        self.key = self._take(value, 0)

    def restore(self) -> None:
        """Give every mutable object in the value the contents that it had."""
        for value, content in self.containers:
            if isinstance(value, (list, deque)):
                value.clear()
                value.extend(content)
            elif isinstance(value, (dict, set)):
                value.clear()
                value.update(content)

    def _take(self, value: Any, depth: int) -> Any:
        cls = type(value)
        if cls in _ATOMS:
            return cls, value
        if cls in _COMPARABLE or value is MISSING:
            return cls, (value.start, value.stop, value.step) if cls is slice else value
        self._count += 1
        if self._count > _MAX_ITEMS or depth > _MAX_DEPTH:
            raise Unknown("a large structure")
        if id(value) in self._path:
            return "again", self._path[id(value)]
        self._path[id(value)] = len(self._path)
        if isinstance(value, types.FunctionType):
            self.functions.append(value)
            return (_Same(value), self._attributes(value, depth)) if value.__dict__ else _Same(value)
        if isinstance(value, types.ModuleType) and value.__name__.split(".")[0] not in _CONSTANT_MODULES:
            raise Unknown(f"the module {value.__name__}")
        if isinstance(value, types.ModuleType):
            return _Same(value)
        if isinstance(value, enum.Enum):
            self.instances.append(cls)
            return _Same(value), self._attributes(value, depth)
        if isinstance(value, type):
            self.instances.append(value)
            return _Same(value)
        if isinstance(value, types.BuiltinFunctionType) and not isinstance(
            value.__self__, (types.ModuleType, type(None), type)
        ):
            raise Unknown(f"a method of a {type(value.__self__).__name__}")
        if isinstance(value, _BY_IDENTITY):
            return _Same(value)
        if isinstance(value, types.MethodType):
            self.functions.append(value.__func__)
            if isinstance(value.__self__, type):
                return "method", _Same(value.__func__), _Same(value.__self__)
            if isinstance(value.__self__, nn.Module):
                raise Unknown("a method of a module")
            return "method", _Same(value.__func__), self._take(value.__self__, depth + 1)
        if isinstance(value, functools.partial):
            parts = [value.func, value.args, value.keywords, value.__dict__]
            return cls, *(self._take(part, depth + 1) for part in parts)
        if isinstance(value, (Tensor, nn.Module)):
            raise Unknown(f"a {cls.__name__}")
        return self._contents(value, cls, depth)

    def _attributes(self, value: Any, depth: int) -> Any:
        own = value.__dict__
        self.containers.append((own, dict(own)))
        return tuple((name, self._take(part, depth + 1)) for name, part in own.items())

    def _contents(self, value: Any, cls: type, depth: int) -> Any:
        def take(part: Any) -> Any:
            return self._take(part, depth + 1)

        scalar = _numpy_scalar(value)
        if scalar is not None:
            return cls, scalar
        base = _known_base(cls)
        parts: list[Any] = [cls]
        if base in (list, tuple, deque, torch.Size):
            parts += [take(item) for item in value]
        elif base in (dict, OrderedDict, defaultdict):
            parts += [(take(k), take(v)) for k, v in dict.items(value)]
        elif base in (set, frozenset):
            parts.append(frozenset(take(item) for item in value))
        elif base in _ATOMS:
            parts.append(base(value))
        elif base is types.MappingProxyType:
            parts += [(take(k), take(v)) for k, v in value.items()]
        elif base is not object and base is not types.SimpleNamespace:
            raise Unknown(f"a {cls.__module__}.{cls.__qualname__}")
        if base in (list, deque, dict, OrderedDict, defaultdict, set):
            self.containers.append((value, value.copy() if base is not defaultdict else dict(value)))
        if base is not cls:
            self.instances.append(cls)
        if isinstance(getattr(value, "__dict__", None), dict):
            parts.append(self._attributes(value, depth))
        for c in cls.__mro__:
            slots = c.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__"):
                    parts.append((name, take(getattr(value, name, MISSING))))
        return tuple(parts)


class _Same:
    """Equal to another one of the same object only, whatever the object's own idea of equality."""

    __slots__ = ("object",)

    def __init__(self, value: Any) -> None:
        self.object = value

    def __eq__(self, other: Any) -> bool:
        return type(other) is _Same and other.object is self.object

    def __hash__(self) -> int:
        return id(self.object)


_KNOWN_BASES = (
    torch.Size, list, tuple, deque, defaultdict, OrderedDict, dict, set, frozenset, types.SimpleNamespace,
    types.MappingProxyType, str, float, int, bytes,
)  # fmt: skip


def _known_base(cls: type) -> type:
    """The builtin type under ``cls``, when the classes above it are written in Python; the first unknown one else."""
    for c in cls.__mro__:
        if c in _KNOWN_BASES or c is object or not _is_pythons(c):
            return c
    return object


def _is_pythons(cls: type) -> bool:
    """Whether a class statement made ``cls``: of what C keeps in an object nothing is known."""
    own = cls.__dict__
    slots = own.get("__slots__", ())
    added = (1 if isinstance(slots, str) else len(tuple(slots))) + ("__dict__" in own) + ("__weakref__" in own)
    base = max((b.__basicsize__ for b in cls.__bases__), default=0)
    return bool(cls.__flags__ & _HEAP_TYPE) and cls.__module__ != "os" and cls.__basicsize__ - base <= 8 * added


def _numpy_scalar(value: Any) -> Any:
    """The bytes and dtype of a numpy number, or None; numpy is not imported for it."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and not hasattr(value, "__setitem__"):
        return str(value.dtype), value.tobytes()
    return None


def raw_attribute(cls: type, name: str) -> Any:
    """What ``cls`` holds under ``name``, itself or by a base, without binding it."""
    for c in cls.__mro__:
        if name in c.__dict__:
            return c.__dict__[name]
    return MISSING


def is_same_class(cls: type, was: dict[str, Any]) -> bool:
    """Whether ``cls`` holds the very objects that it did. (What copying and pickling note in it does not count.)"""
    now = cls.__dict__
    if len(now) == len(was) and all(map(operator.is_, now.values(), was.values())):
        return True
    names = (now.keys() | was.keys()) - {"__slotnames__"}
    return all(now.get(name, MISSING) is was.get(name, MISSING) for name in names)


def describe(value: Any) -> str:
    """``value`` in a sentence: short plain values as they are, others by their class."""
    text = repr(value) if is_atom(value) or isinstance(value, (tuple, list, dict, set)) else ""
    return text if text and len(text) <= 40 else f"a {type(value).__name__}"
