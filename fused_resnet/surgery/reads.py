"""What a forward reads while it is traced: attributes of modules, classes, functions, globals, closures, state.

Tracing turns all of it into constants. A :class:`Recorder` takes notice of each source while the trace runs and says
afterwards what the graph depends on (:class:`Reads`), or why that cannot be compared at each call:

* attributes of the copy's modules, by a ``__getattribute__`` that ``nn.Module`` has for as long as the trace runs;
* globals, closures and classes, by the bytecode of the lines that ran (``sys.settrace``);
* functions of other libraries and of C that read or change state of their own, by ``sys.setprofile``.

Whatever was read is looked at again when the trace is over: a forward that changes it is refused.
"""

from __future__ import annotations

import copy
import functools
import gc
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .bytecode import Reference, imports, opcodes, references, stored_names
from .code_kinds import kind_of, why_not_c_call, why_not_python_call
from .snapshot import MISSING, Snapshot, Unknown, is_atom

_INTERNAL = {"_compiled_call_impl", *nn.Module().__dict__} - {"training", "_modules", "_parameters", "_buffers"}
_MODULE_CLASSES = frozenset(nn.Module.__mro__)
_object_getattribute = object.__getattribute__
_EXAMINERS = frozenset(("isinstance", "issubclass", "type", "callable"))


class Refused(Exception):
    """A forward that a plan cannot stand for; the message is a clause that follows the module's name."""


@dataclass(frozen=True)
class Value:
    """Something that was read outside the modules: how it is read again, and what it was."""

    say: str
    again: Callable[[], Any]
    was: Any
    """The value itself, where identity says it all, or the key of a snapshot."""
    deep: bool

    def changed(self) -> bool:
        """Whether it is another one now."""
        now = self.again()
        if not self.deep:
            return now is not self.was and not (is_atom(self.was) and type(now) is type(self.was) and now == self.was)
        try:
            return bool(Snapshot(now).key != self.was)
        except Unknown:
            return True


@dataclass
class Reads:
    """All that one trace read, as what a guard compares."""

    values: dict[tuple[str, str], Any] = field(default_factory=dict)
    """(path, attribute) of an instance -> an atom or MISSING."""
    deep: dict[tuple[str, str], Any] = field(default_factory=dict)
    """(path, attribute) of an instance -> the key of a snapshot."""
    unshadowed: dict[tuple[str, str], None] = field(default_factory=dict)
    """(path, name) found on the class, which the instance must not hide."""
    children: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """path -> names of the submodules, where they were iterated over."""
    asked: dict[tuple[str, str], type | None] = field(default_factory=dict)
    """(path, name) -> class of the submodule that was asked for by name, None where there is None."""
    tensors: dict[tuple[str, str], bool] = field(default_factory=dict)
    """(path, name) -> whether that parameter or buffer is a tensor (or None)."""
    classes: dict[type, dict[str, Any]] = field(default_factory=dict)
    """A class that a user wrote -> all that is defined in it."""
    seen: set[type] = field(default_factory=set)
    """The classes of objects that were read."""
    functions: dict[types.FunctionType, tuple[Any, ...]] = field(default_factory=dict)
    """A function that ran -> its code and defaults."""
    outside: dict[Any, Value] = field(default_factory=dict)
    """Globals, closures and what classes hold."""
    examined: bool = False
    """Whether the code asked for the class of anything."""


# ---- attributes of modules ---------------------------------------------------------------------------------

_on_this_thread = threading.local()
_intercepting = threading.RLock()
_depth = 0


def _getattribute(module: Any, name: str) -> Any:
    recorder = getattr(_on_this_thread, "recorder", None)
    if recorder is not None and name not in _INTERNAL:
        path = recorder.recording(module)
        if path is not None:
            return recorder.read(module, path, name)
    return _object_getattribute(module, name)


@contextmanager
def intercepted() -> Iterator[None]:
    """Have ``nn.Module`` tell the thread's recorder what is read of a module and assigned to it.

    Entered once around many traces, because it makes Python look through all of the classes under ``nn.Module``.
    """
    global _depth
    base: Any = nn.Module
    with _intercepting:
        _depth += 1
        if _depth == 1:
            setattribute, delattribute = base.__setattr__, base.__delattr__

            def assign(module: Any, name: str, value: Any) -> None:
                recorder = getattr(_on_this_thread, "recorder", None)
                if recorder is not None and recorder.recording(module) is not None:
                    recorder.refuse_assignment(module, name, value)
                setattribute(module, name, value)

            def delete(module: Any, name: str) -> None:
                recorder = getattr(_on_this_thread, "recorder", None)
                if recorder is not None and recorder.recording(module) is not None:
                    raise Refused(f"deletes self.{name} in its forward")
                delattribute(module, name)

            _originals[:] = [setattribute, delattribute]
            base.__getattribute__, base.__setattr__, base.__delattr__ = _getattribute, assign, delete
    try:
        yield
    finally:
        with _intercepting:
            _depth -= 1
            if _depth == 0:
                del base.__getattribute__
                base.__setattr__, base.__delattr__ = _originals


_originals: list[Any] = []


class Recorder:
    """Takes notice of what runs and what is read, while :meth:`watch` is entered; :meth:`finish` says the result."""

    def __init__(self, root: nn.Module, paths: dict[int, str] | None = None) -> None:
        self.paths = paths or {id(m): name for name, m in root.named_modules()}
        self.modules = {name: m for name, m in root.named_modules()}
        self.reads = Reads()
        self.problems: dict[str, None] = {}
        self._late: dict[Any, tuple[str, set[tuple[types.CodeType, int]]]] = {}
        self._ran: dict[types.CodeType, set[int]] = {}
        self._snapshots: list[Snapshot] = []
        self._instances: dict[tuple[str, str], Any] = {}
        self._found: dict[types.CodeType, types.FunctionType] = {}
        self._looked_into: set[int] = set()
        self._unknown: dict[str, str] = {}
        self._on = False
        for module in self.modules.values():
            self._note_class(type(module))

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """What is read in this context is part of the forward again."""
        on, self._on = self._on, True
        try:
            yield
        finally:
            self._on = on

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is read in this context is no part of the forward."""
        on, self._on = self._on, False
        try:
            yield
        finally:
            self._on = on

    # ---- running code -----------------------------------------------------------------------------------------

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record on this thread until the context is left, whenever :meth:`resumed`."""
        profile, trace, collecting = sys.getprofile(), sys.gettrace(), gc.isenabled()
        with intercepted():
            gc.disable()  # what finalizers run is no part of the forward
            _on_this_thread.recorder = self
            try:
                sys.settrace(self._call)
                sys.setprofile(self._profile)
                yield
            finally:
                self._on = False
                _on_this_thread.recorder = None
                if profile is None or callable(profile):
                    sys.setprofile(profile)
                else:  # cProfile's has no function of Python's to be set again
                    sys.setprofile(None)
                    profile.enable()
                sys.settrace(trace)
                if collecting:
                    gc.enable()

    def read(self, module: Any, path: str, name: str) -> Any:
        """The attribute ``name`` of the module at ``path``, recorded."""
        caller = sys._getframe(2).f_code
        if kind_of(caller) == "machinery":
            return _object_getattribute(module, name)
        try:
            value = _object_getattribute(module, name)  # may run a property of the model's
        except AttributeError:
            with self.paused():
                self._note_registered(_object_getattribute(module, "__dict__"), path, name)
            raise
        with self.paused():
            self._note(module, path, name, value, caller)
        return value

    def recording(self, module: Any) -> str | None:
        """The path of ``module`` where what is done to it is recorded now."""
        return self.paths.get(id(module)) if self._on else None

    def refuse_assignment(self, module: nn.Module, name: str, value: Any) -> None:
        if name.startswith("_tensor_constant"):
            raise Refused("computes with a tensor that is neither its parameter nor its buffer")
        made = f", a {type(value).__name__} made at each call," if isinstance(value, nn.Module) else ""
        raise Refused(f"assigns self.{name}{made} in its forward")

    def _profile(self, frame: types.FrameType, event: str, argument: Any) -> None:
        if not self._on:
            return
        if event == "call":
            caller = frame.f_back
            problem = None if caller is None else why_not_python_call(caller.f_code, frame.f_code)
        elif event == "c_call":
            problem = why_not_c_call(frame.f_code, argument)
        else:
            return
        if problem is not None:
            self.problems[problem] = None

    def _call(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if not self._on or kind_of(code) != "user":
            return None
        if code.co_filename == "<string>" and frame.f_back is not None and kind_of(frame.f_back.f_code) != "user":
            return None  # what a namedtuple or dataclass of torch's generated
        lines = self._ran.get(code)
        if lines is None:
            lines = self._ran[code] = set()
            with self.paused():
                self._enter(frame)
        lines.add(frame.f_lineno)
        return self._line

    def _line(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self._ran[frame.f_code].add(frame.f_lineno)
        return self._line

    # ---- attributes of modules --------------------------------------------------------------------------------

    def _note(self, module: nn.Module, path: str, name: str, value: Any, caller: types.CodeType) -> None:
        own = _object_getattribute(module, "__dict__")
        if name in ("_modules", "_parameters", "_buffers"):
            if name == "_modules":
                self.reads.children.setdefault(path, tuple(value))
            elif caller.co_name != "__getattr__":
                self.problems["goes through its parameters or buffers as a collection"] = None
        elif name.startswith("__"):
            if name == "__dict__" and kind_of(caller) == "user":
                self.problems["reads self.__dict__"] = None
            if name == "__class__" and kind_of(caller) == "user":
                self.reads.examined = True
        elif name in own:
            self._note_instance(path, name, own[name])
        else:
            self.reads.unshadowed[path, name] = None
            self._note_class_value(type(module), name)

    def _note_class_value(self, cls: type, name: str) -> None:
        where = ("class", cls, name)
        raw = next((c.__dict__[name] for c in cls.__mro__ if name in c.__dict__), MISSING)
        if callable(raw) or hasattr(type(raw), "__get__") or where in self.reads.outside:
            return
        key = self._snapshot(raw, f"self.{name}", where)
        if key is not MISSING:
            again = functools.partial(getattr, cls, name, MISSING)
            self.reads.outside[where] = Value(f"self.{name}", again, raw if is_atom(raw) else key, not is_atom(raw))

    def _note_registered(self, own: dict[str, Any], path: str, name: str) -> None:
        if name in own.get("_modules", ()):
            child = own["_modules"][name]
            self.reads.asked[path, name] = None if child is None else type(child)
        elif name in own.get("_parameters", ()):
            self.reads.tensors[path, name] = own["_parameters"][name] is not None
        elif name in own.get("_buffers", ()):
            self.reads.tensors[path, name] = own["_buffers"][name] is not None
        else:
            self.reads.values[path, name] = MISSING

    def _note_instance(self, path: str, name: str, value: Any) -> None:
        if (path, name) in self._instances:
            return
        if is_atom(value):
            self.reads.values[path, name] = self._instances[path, name] = value
            return
        key = self._snapshot(value, f"self.{name}", ("attribute", path, name))
        self._instances[path, name] = key
        if key is not MISSING:
            self.reads.deep[path, name] = key

    # ---- values, and what is behind them -------------------------------------------------------------------------

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
        self._snapshots.append(snapshot)
        for function in snapshot.functions:
            self._look_into(function)
        for cls in snapshot.instances:
            self._note_class(cls)
            self.reads.seen.update(cls.__mro__)
        return snapshot.key

    def _note_class(self, cls: type) -> None:
        """Hold what ``cls`` and its bases, as far as a user wrote them, are defined as."""
        for c in cls.__mro__:
            if c in _MODULE_CLASSES or not _is_users(c):
                continue
            if c not in self.reads.classes:
                self.reads.classes[c] = dict(c.__dict__)
                for name, value in list(c.__dict__.items()):
                    self._look_into(value)
                    if not name.startswith("__") and isinstance(value, (list, dict, set, deque)):
                        self._note_container(c, name, value)

    def _note_container(self, cls: type, name: str, value: Any) -> None:
        # `type(self).options["x"]` reads what a class holds without asking an instance for it.
        try:
            self._snapshots.append(snapshot := Snapshot(value))
        except Unknown as error:
            self._unknown[name] = (
                f"reads {cls.__name__}.{name}, which holds {error} and cannot be compared at each call"
            )
            return
        again = functools.partial(getattr, cls, name, MISSING)
        self.reads.outside["class", cls, name] = Value(f"{cls.__name__}.{name}", again, snapshot.key, True)

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
        self._look_into(getattr(value, "__wrapped__", None))
        for cell in value.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:
                continue
            self._look_into(content)

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
            elif reference.name in _EXAMINERS:
                self.reads.examined = True
        if opcodes(code) & {"MATCH_CLASS"}:
            self.reads.examined = True

    def _note_closure(self, code: types.CodeType, reference: Reference, value: Any) -> None:
        # How it is read again is known when the function has been found.
        self._note_value(("closure", code, reference.name), reference, code, list, value, reference.attributes)

    def _note_global(self, code: types.CodeType, reference: Reference, scope: dict[str, Any]) -> None:
        self._note_item(scope, reference.name, reference, code, reference.attributes)

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
            if rest[0] in value.__dict__:
                self._note_item(value.__dict__, rest[0], reference, code, rest[1:])
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

    # ---- the result ----------------------------------------------------------------------------------------------

    def mark(self) -> Any:
        """The state of the record, to which :meth:`rollback` returns."""
        state = {name: copy.copy(value) for name, value in self.__dict__.items() if name not in ("paths", "modules")}
        state["reads"] = Reads(**{k: copy.copy(v) for k, v in self.reads.__dict__.items()})
        state["_ran"] = {code: set(lines) for code, lines in self._ran.items()}
        state["_late"] = {k: (text, set(lines)) for k, (text, lines) in self._late.items()}
        return state

    def rollback(self, mark: Any) -> None:
        """Forget what was recorded after ``mark``."""
        on = self._on
        self.__dict__.update(mark)
        self._on = on

    def forget_modes(self, mark: Any, paths: list[str]) -> None:
        """No dependence on the mode of the modules at ``paths``, unless there was one before ``mark``."""
        for path in paths:
            if (path, "training") not in mark["reads"].values:
                self.reads.values.pop((path, "training"), None)
                self._instances.pop((path, "training"), None)

    def why_not(self) -> str | None:
        """None, or why what has been recorded so far cannot be guarded; undoes what the forward changed."""
        on, self._on = self._on, False
        try:
            changed = self._why_not_unchanged()  # first, because it puts things back
            return self._why_not_known() or self._why_not_code() or changed
        finally:
            self._on = on

    def _why_not_known(self) -> str | None:
        for text, lines in self._late.values():
            if any(line in self._ran.get(code, ()) for code, line in lines):
                return text
        return next(iter(self.problems), None)

    def _why_not_code(self) -> str | None:
        nested = {c for code in self._ran for c in code.co_consts if isinstance(c, types.CodeType)}
        for code, lines in self._ran.items():
            for name in code.co_names:
                if name in self._unknown:
                    return self._unknown[name]
            for line, name in imports(code):
                if line in lines and name.split(".")[0] not in ("torch", "math"):
                    return f"imports {name} in its forward"
            for line, name in stored_names(code):
                if line in lines:
                    return f"assigns the variable {name}, which is not its own, in its forward"
            function = self._found.get(code)
            if function is None:
                if code not in nested:
                    return f"runs {code.co_name}, a function that cannot be found again to see whether it is the same"
                continue
            defaults = (function.__defaults__, function.__kwdefaults__)
            try:
                key = Snapshot(defaults).key
            except Unknown as error:
                return f"runs {code.co_name}, whose default values hold {error}"
            self.reads.functions[function] = (code, *defaults, key)
        return None

    def _why_not_unchanged(self) -> str | None:
        changed = None
        for (path, name), key in self._instances.items():
            own = _object_getattribute(self.modules[path], "__dict__")
            now = own.get(name, MISSING)
            try:
                same = now is key or Snapshot(now).key == (
                    key if (path, name) in self.reads.deep else Snapshot(key).key
                )
            except Unknown:
                same = False
            if not same and key is not MISSING:
                changed = changed or f"changes self.{name} in its forward"
        for where, value in list(self.reads.outside.items()):
            if where[0] == "closure":
                function = self._found.get(where[1])
                if function is None:  # defined while it ran, from values that are looked at where they come from
                    del self.reads.outside[where]
                    continue
                cell = (function.__closure__ or ())[where[1].co_freevars.index(where[2])]
                value = replace(value, again=functools.partial(_content, cell))
                self.reads.outside[where] = value
            if value.changed():
                changed = changed or f"changes {value.say} in its forward"
        for cls, was in self.reads.classes.items():
            if dict(cls.__dict__) != was:
                changed = changed or f"changes the class {cls.__name__} in its forward"
        if changed is not None:
            self._restore()
        return changed

    def _restore(self) -> None:
        for snapshot in self._snapshots:
            snapshot.restore()
        for cls, was in self.reads.classes.items():
            for name in set(cls.__dict__) - set(was):
                delattr(cls, name)
            for name, value in was.items():
                if cls.__dict__.get(name) is not value:
                    setattr(cls, name, value)


def _is_users(cls: type) -> bool:
    # An fx.GraphModule has a class of its own, made where torch defines it, with the forward of its graph.
    return "<locals>" in cls.__qualname__ or cls.__module__.split(".")[0] not in (
        "torch",
        "builtins",
        "collections",
        "enum",
    )


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def _is_torchs(value: Any) -> bool:
    """Functions and classes of torch and numpy, which are compared by identity."""
    if isinstance(value, nn.Module):
        return False
    module = getattr(value, "__module__", None) or type(value).__module__
    return isinstance(module, str) and module.split(".")[0] in ("torch", "numpy") and callable(value)
