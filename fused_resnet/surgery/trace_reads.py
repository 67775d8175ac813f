"""The recorder of one trace: what runs, what is read of modules, and whether all of it can be guarded."""

from __future__ import annotations

import copy
import enum
import functools
import gc
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from . import bytecode
from .bytecode import imports, stored_names
from .code_kinds import kind_of, why_not_c_call, why_not_python_call
from .outside import Outside, content_of
from .reads import INTERNAL, ON_THIS_THREAD, Reads, Refused, Value, intercepted, object_getattribute
from .snapshot import MISSING, Snapshot, Unknown, is_atom, is_same_class, raw_attribute

# Ways around the attributes of an object, and names that a fused class, or a copy of a module, has another time.
_REFLECTION = {
    *("__dict__", "__getattribute__", "__dir__", "__getstate__", "__reduce__", "__reduce_ex__", "__hash__"),
    *("__globals__", "__closure__", "__code__", "__defaults__", "__kwdefaults__", "__builtins__", "__annotations__"),
    *("__name__", "__qualname__", "__mro__", "__bases__", "__base__", "__subclasses__"),
    *("f_globals", "f_locals", "f_back", "gi_frame", "cr_frame", "tb_frame"),
}


class _Switched:
    """A context in which a recorder is on, or off."""

    __slots__ = ("_before", "_on", "_recorder")

    def __init__(self, recorder: Recorder, on: bool) -> None:
        self._recorder, self._on = recorder, on

    def __enter__(self) -> None:
        self._before = self._recorder._on
        self._recorder._switch(self._on)

    def __exit__(self, *_: object) -> None:
        self._recorder._switch(self._before)


class Recorder(Outside):
    """Takes notice of what runs and what is read, while :meth:`watch` is entered; :meth:`finish` says the result."""

    def __init__(self, root: nn.Module, paths: dict[int, str] | None = None) -> None:
        self.paths = paths or {id(m): name for name, m in root.named_modules()}
        self.modules = dict(root.named_modules())
        super().__init__()
        self._ran: dict[types.CodeType, set[int]] = {}
        self._ran_standard: set[types.CodeType] = set()
        self._instances: dict[tuple[str, str], Any] = {}
        self._noted: set[tuple[str, str, types.CodeType]] = set()
        self._on = self._watching = False
        for module in self.modules.values():
            self._note_class(type(module))

    def resumed(self) -> _Switched:
        """What is read in this context is part of the forward again."""
        return _Switched(self, True)

    def paused(self) -> _Switched:
        """What is read in this context is no part of the forward."""
        return _Switched(self, False)

    def _switch(self, on: bool) -> None:
        # Python calls the two functions for every line and every call of C, most of them torch's while it traces.
        if on is self._on:
            return
        self._on = on
        if self._watching:
            sys.setprofile(self._profile if on else None)
            sys.settrace(self._call if on else None)

    # ---- running code -----------------------------------------------------------------------------------------

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record on this thread until the context is left, whenever :meth:`resumed`."""
        profile, trace, collecting = sys.getprofile(), sys.gettrace(), gc.isenabled()
        with intercepted():
            gc.disable()  # what finalizers run is no part of the forward
            ON_THIS_THREAD.recorder = self
            try:
                self._watching = True
                yield
            finally:
                self._switch(False)
                self._watching = False
                ON_THIS_THREAD.recorder = None
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
        known = (path, name, caller)
        if known in self._noted or kind_of(caller) == "machinery":
            return object_getattribute(module, name)
        try:
            value = object_getattribute(module, name)  # may run a property of the model's
        except AttributeError:
            with self.paused():
                self._note_registered(module, path, name)
                self._noted.add(known)
            raise
        with self.paused():
            self._note(module, path, name, value, caller)
            self._noted.add(known)
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
            if caller is not None and kind_of(frame.f_code) == "stdlib" and self._serves(caller.f_code):
                self._ran_standard.add(frame.f_code)
        elif event == "c_call":
            if (argument is getattr or argument is hasattr) and self._serves(frame.f_code):
                self._any_name = True
            problem = why_not_c_call(frame.f_code, argument)
        else:
            return
        if problem is not None:
            self.problems[problem] = None

    def _serves(self, code: types.CodeType) -> bool:
        """Whether ``code`` is the forward's own, or runs in the standard library on its behalf."""
        return code in self._ran_standard or kind_of(code) == "user"

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
        own = object_getattribute(module, "__dict__")
        if name in ("_modules", "_parameters", "_buffers"):
            if name == "_modules":
                self.reads.children.setdefault(path, (tuple(value), tuple(n for n, m in value.items() if m is None)))
            elif caller.co_name != "__getattr__":
                self.problems["goes through its parameters or buffers as a collection"] = None
        elif name in INTERNAL:
            self.problems[f"reads self.{name}"] = None
        elif name.startswith("__"):
            if name == "__dict__" and caller.co_name != "__getattr__":
                self.problems["reads self.__dict__"] = None
            if name == "__class__":
                self.reads.examined = True
                if caller.co_name == "_get_name":
                    self.problems["asks a module for the name of its class"] = None
        elif name in own:
            self._note_instance(path, name, own[name])
        else:
            self.reads.unshadowed[path, name] = None
            self._note_class_value(type(module), name)

    def _note_class_value(self, cls: type, name: str) -> None:
        owner = next((c for c in cls.__mro__ if name in c.__dict__), None)
        if owner in self.reads.classes:
            self.reads.seen.add(owner)
            return
        if name in ("forward", "_call_impl", "_conv_forward"):
            return  # looked at for each module that is bypassed
        # One of torch's: a method, or whatever somebody has put there.
        where, raw = ("class", cls, name), raw_attribute(cls, name)
        if where in self.reads.outside or where in self._late:
            return
        again = functools.partial(raw_attribute, cls, name)
        if raw is MISSING or is_atom(raw) or callable(raw) or hasattr(type(raw), "__get__"):
            self.reads.outside[where] = Value(f"self.{name}", again, raw, False)
            return
        key = self._snapshot(raw, f"self.{name}", where)
        if key is not MISSING:
            self.reads.outside[where] = Value(f"self.{name}", again, key, True)

    def _note_registered(self, module: nn.Module, path: str, name: str) -> None:
        own = object_getattribute(module, "__dict__")
        if name in own.get("_modules", ()):
            child = own["_modules"][name]
            self.reads.asked[path, name] = None if child is None else type(child)
        elif name in own.get("_parameters", ()):
            self.reads.tensors[path, name] = own["_parameters"][name] is not None
        elif name in own.get("_buffers", ()):
            self.reads.tensors[path, name] = own["_buffers"][name] is not None
        else:
            self.reads.values[path, name] = MISSING
            self._note_class_value(type(module), name)

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

    # ---- the result ----------------------------------------------------------------------------------------------

    def mark(self) -> Any:
        """The state of the record, to which :meth:`rollback` returns."""
        state = {name: copy.copy(value) for name, value in self.__dict__.items() if name not in ("paths", "modules")}
        state["reads"] = Reads(**{k: copy.copy(v) for k, v in self.reads.__dict__.items()})
        state["_ran"] = {code: set(lines) for code, lines in self._ran.items()}
        state["_ran_standard"] = set(self._ran_standard)
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

    def close(self) -> None:
        """Take what classes hold into the reads, as far as a name in the code that ran may have led to it."""
        names = self._names()

        def read(name: str, cls: type) -> bool:
            return names is None or name in names or isinstance(cls, enum.EnumMeta)

        for (kind, cls, name), value in self._members.items():
            if read(name, cls):
                self.reads.outside.setdefault((kind, cls, name), value)
        for cls, own in self.reads.classes.items():
            data = (n for n, v in own.items() if not isinstance(v, types.FunctionType))
            if self.reads.examined or any(read(name, cls) for name in data):
                self.reads.seen.add(cls)
            for name, function in own.items():  # what a method was given is out of reach without its name
                if isinstance(function, types.FunctionType) and not read(name, cls):
                    self.reads.attributes.pop(function, None)
        if any(bytecode.compares(code) for code in self._ran):
            asked = [self.modules[path]._modules[name] for path, name in self.reads.asked]
            self.reads.distinct = len({id(module) for module in asked})

    def _names(self) -> frozenset[str] | None:
        """All names of attributes in the code that ran; None where they cannot be listed."""
        if self._any_name:
            return None
        return frozenset().union(*map(bytecode.names, (*self._ran, *self._ran_standard)))

    def why_not(self) -> str | None:
        """None, or why what has been recorded so far cannot be guarded; undoes what the forward changed."""
        with self.paused():
            changed = self._why_not_unchanged()  # first, because it puts things back
            return self._why_not_known() or self._why_not_code() or changed

    def _why_not_known(self) -> str | None:
        for text, lines in self._late.values():
            if any(line in self._ran.get(code, ()) for code, line in lines):
                return text
        return next(iter(self.problems), None)

    def _why_not_code(self) -> str | None:
        nested = {c for code in self._ran for c in code.co_consts if isinstance(c, types.CodeType)}
        names = self._names()
        for name, text in self._unknown.items():
            if names is None or name in names:
                return text
        for code, lines in self._ran.items():
            for line, name in bytecode.attributes(code):
                explicit = name == "__getattr__" and code.co_name != name
                if line in lines and (explicit or name in _REFLECTION):
                    return f"reads {name} in its forward"
            if bytecode.compares(code) and {"type", "__class__"} & set(code.co_names):
                return "compares classes, of which a fused module has one of its own"
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
            own = object_getattribute(self.modules[path], "__dict__")
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
                value = replace(value, again=functools.partial(content_of, cell))
                self.reads.outside[where] = value
            if value.changed():
                changed = changed or f"changes {value.say} in its forward"
        for value in self._members.values():
            if value.changed():
                changed = changed or f"changes {value.say} in its forward"
        for cls, was in self.reads.classes.items():
            if not is_same_class(cls, was):
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
