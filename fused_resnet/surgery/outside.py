"""What lies behind the code that a forward runs: functions, classes, globals, closures, and what these hold."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from .bytecode import Reference, opcodes, references
from .reads import Reads, Value
from .snapshot import MISSING, Snapshot, Unknown, is_atom

_MODULE_CLASSES = frozenset(nn.Module.__mro__)
_EXAMINERS = frozenset(("isinstance", "issubclass", "type", "callable"))
_OF_EVERY_CLASS = frozenset(("__dict__", "__weakref__", "__slots__", "__annotations__", "__abstractmethods__"))
_FUNCTIONS = (
    types.FunctionType, types.MemberDescriptorType, types.GetSetDescriptorType, types.BuiltinFunctionType,
    types.MethodDescriptorType, types.WrapperDescriptorType,
)  # fmt: skip


class Outside:
    """The part of a recorder that looks at what is no attribute of a module."""

    def __init__(self) -> None:
        self.reads = Reads()
        self.problems: dict[str, None] = {}
        self._late: dict[Any, tuple[str, set[tuple[types.CodeType, int]]]] = {}
        self._snapshots: list[Snapshot] = []
        self._found: dict[types.CodeType, types.FunctionType] = {}
        self._looked_into: set[int] = set()
        self._members: dict[Any, Value] = {}  # what classes hold, by class and name
        self._unknown: dict[str, str] = {}
        self._any_name = False  # whether names of attributes are made while it runs

    def _snapshot(self, value: Any, say: str, where: Any, line: tuple[types.CodeType, int] | None = None) -> Any:
        """The key of ``value``, MISSING (and a problem) where it cannot be taken apart."""
        try:
            snapshot = Snapshot(value)
        except Unknown as error:
            text = f"reads {say}, {error}, which cannot be compared at each call"
            if line is None:
                self.problems[text] = None
            else:
                self._late.setdefault(where, (text, set()))[1].add(line)
            return MISSING
        self._keep(snapshot)
        for cls in snapshot.instances:
            self.reads.seen.update(cls.__mro__)
        return snapshot.key

    def _note_class(self, cls: type) -> None:
        """Hold what ``cls``, its bases and the classes in it, as far as a user wrote them, are defined as."""
        metaclass: type = type(cls)
        for c in cls.__mro__ + metaclass.__mro__:
            if c in _MODULE_CLASSES or not _is_users(c) or c in self.reads.classes:
                continue
            self.reads.classes[c] = dict(c.__dict__)
            for name, value in list(c.__dict__.items()):
                self._look_into(value)
                if (
                    name not in _OF_EVERY_CLASS
                    and not is_atom(part := _part(value))
                    and not isinstance(part, _FUNCTIONS)
                ):
                    self._note_member(c, name, part)

    def _note_member(self, cls: type, name: str, value: Any) -> None:
        # `type(self).options["x"]` reads what a class holds without asking an instance for it. Whether anything does
        # is known at the end, by the name.
        if isinstance(value, type):
            self._note_class(value)
            return
        say = f"{cls.__name__}.{name}"
        try:
            snapshot = Snapshot(value)
        except Unknown as error:
            self._unknown[name] = f"reads {say}, which holds {error} and cannot be compared at each call"
            return
        self._keep(snapshot)
        again = functools.partial(_member, cls.__dict__, name)
        self._members["class", cls, name] = Value(say, again, snapshot.key, True)

    def _keep(self, snapshot: Snapshot) -> None:
        self._snapshots.append(snapshot)
        for function in snapshot.functions:
            self._look_into(function)
        for cls in snapshot.instances:
            self._note_class(cls)

    def _look_into(self, value: Any) -> None:
        """Find the functions behind ``value``: itself, what it wraps, what its closure holds."""
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, (property, functools.cached_property)):
            for name in ("fget", "fset", "func"):
                self._look_into(getattr(value, name, None))
            return
        if isinstance(value, types.MethodType):
            value = value.__func__
        if not isinstance(value, types.FunctionType) or id(value) in self._looked_into:
            return
        self._looked_into.add(id(value))
        self._found.setdefault(value.__code__, value)
        self._note_attributes(value)
        self._look_into(getattr(value, "__wrapped__", None))
        for cell in value.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:
                continue
            self._look_into(content)

    def _note_attributes(self, function: types.FunctionType) -> None:
        """Hold the attributes that somebody gave a function (``helper.gain = 2``)."""
        try:
            snapshot = Snapshot(function.__dict__)
        except Unknown as error:
            for name in function.__dict__:
                self._unknown[name] = f"reads {function.__name__}.{name}, which holds {error}"
            return
        self._keep(snapshot)
        self.reads.attributes[function] = snapshot.key if function.__dict__ else None

    def _enter(self, frame: types.FrameType) -> None:
        """Look at the globals and closure variables of a function that is about to run for the first time."""
        code, scope = frame.f_code, frame.f_globals
        local = frame.f_locals if code.co_freevars else {}
        for reference in references(code):
            if reference.closure:
                if reference.name != "__class__":
                    self._note_closure(code, reference, local.get(reference.name, MISSING))
            elif reference.name in scope:
                self._note_global(code, reference, scope)
            else:
                self._note_absent(reference.name, scope, frame.f_builtins)
        if opcodes(code) & {"MATCH_CLASS"}:
            self.reads.examined = True

    def _note_closure(self, code: types.CodeType, reference: Reference, value: Any) -> None:
        # How it is read again is known when the function has been found.
        self._note_value(("closure", code, reference.name), reference, code, list, value, reference.attributes)

    def _note_global(self, code: types.CodeType, reference: Reference, scope: dict[str, Any]) -> None:
        self._note_item(scope, reference.name, reference, code, reference.attributes)

    def _note_absent(self, name: str, scope: dict[str, Any], builtins: dict[str, Any]) -> None:
        """A builtin, or no variable at all: one day there may be a global of this name."""
        self.reads.examined |= name in _EXAMINERS
        self._any_name |= name in ("getattr", "hasattr")
        again = functools.partial(_global, scope, builtins, name)
        self.reads.outside["global", id(scope), name] = Value(name, again, builtins.get(name, MISSING), False)

    def _note_item(
        self, scope: dict[str, Any], name: str, reference: Reference, code: types.CodeType, rest: tuple[str, ...]
    ) -> None:
        where = ("global", id(scope), name)
        value = scope.get(name, MISSING)
        if isinstance(value, types.ModuleType):
            self.reads.outside.setdefault(
                where, Value(str(reference), functools.partial(scope.get, name, MISSING), value, False)
            )
            torchs = value.__name__.split(".")[0] == "torch"
            if not rest:
                if not torchs:
                    self._late.setdefault(where, (f"hands the module {value.__name__} on", set()))[1].add(
                        (code, reference.line)
                    )
                return
            if len(rest) == 1 and reference.stores:
                self._late.setdefault((*where, rest[0]), (f"assigns {reference} in its forward", set()))[1].add(
                    (code, reference.line)
                )
                return
            if rest[0] in value.__dict__ and not value.__name__.startswith("numpy.random"):
                self._note_item(value.__dict__, rest[0], reference, code, rest[1:])
            else:
                text = f"reads {reference}, which the module {value.__name__} does not simply hold"
                self._late.setdefault((*where, rest[0]), (text, set()))[1].add((code, reference.line))
            return
        self._note_value(where, reference, code, functools.partial(scope.get, name, MISSING), value, rest)

    def _note_value(
        self,
        where: Any,
        reference: Reference,
        code: types.CodeType,
        again: Callable[[], Any],
        value: Any,
        rest: tuple[str, ...],
    ) -> None:
        line = (code, reference.line)
        self._any_name |= value is getattr or value is hasattr
        if isinstance(value, types.ModuleType) and value.__name__.split(".")[0] not in ("torch", "math"):
            text = f"reads {reference}, of a module that is no global"
            self._late.setdefault(where, (text, set()))[1].add(line)
            return
        if where not in self.reads.outside and where not in self._late:
            if is_atom(value) or _is_torchs(value) or isinstance(value, (type, types.BuiltinFunctionType)):
                self.reads.outside[where] = Value(str(reference), again, value, False)
                if isinstance(value, type):
                    self._note_class(value)
            else:
                key = self._snapshot(value, str(reference), where, line)
                if key is not MISSING:
                    function = isinstance(value, types.FunctionType)
                    self.reads.outside[where] = Value(str(reference), again, value if function else key, not function)
        elif where in self._late:
            self._late[where][1].add(line)
        if rest and isinstance(value, (type, types.FunctionType)) and not _is_torchs(value):
            attribute = rest[0]
            again_attribute = functools.partial(getattr, value, attribute, MISSING)
            found = again_attribute()
            if not isinstance(found, (types.FunctionType, types.MethodType, property)) and found is not MISSING:
                inner = Reference(reference.line, reference.name, reference.attributes, False, reference.stores)
                self._note_value((*where, attribute), inner, code, again_attribute, found, ())


def _is_users(cls: type) -> bool:
    # An fx.GraphModule has a class of its own, made where torch defines it, with the forward of its graph.
    return "<locals>" in cls.__qualname__ or cls.__module__.split(".")[0] not in (
        "torch",
        "builtins",
        "collections",
        "enum",
    )


def _part(value: Any) -> Any:
    """What is behind a member of a class: its function, which may be an object of any kind."""
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    if isinstance(value, property):
        return value.fget
    return value.func if isinstance(value, functools.cached_property) else value


def _member(own: Any, name: str) -> Any:
    return _part(own.get(name, MISSING))


def _global(scope: dict[str, Any], builtins: dict[str, Any], name: str) -> Any:
    value = scope.get(name, MISSING)
    return builtins.get(name, MISSING) if value is MISSING else value


def content_of(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def _is_torchs(value: Any) -> bool:
    """Functions and classes of torch and numpy, which are compared by identity."""
    if isinstance(value, nn.Module):
        return False
    module = getattr(value, "__module__", None) or type(value).__module__
    if not isinstance(module, str) or "numpy.random" in (module, type(getattr(value, "__self__", None)).__module__):
        return False
    return module.split(".")[0] in ("torch", "numpy") and callable(value) and not module.startswith("numpy.random")
