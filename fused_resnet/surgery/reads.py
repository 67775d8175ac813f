"""What a forward reads while it is traced: attributes of modules, classes, functions, globals, closures, state.

Tracing turns all of it into constants. A :class:`Recorder` takes notice of each source while the trace runs and says
afterwards what the graph depends on (:class:`Reads`), or why that cannot be compared at each call:

* attributes of the copy's modules, by a ``__getattribute__`` that ``nn.Module`` has for as long as the trace runs;
* globals, closures and classes, by the bytecode of the lines that ran (``sys.settrace``);
* functions of other libraries and of C that read or change state of their own, by ``sys.setprofile``.

Whatever was read is looked at again when the trace is over: a forward that changes it is refused.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .code_kinds import kind_of
from .snapshot import Snapshot, Unknown, is_atom

INTERNAL = {"_compiled_call_impl", *nn.Module().__dict__} - {"training", "_modules", "_parameters", "_buffers"}
object_getattribute = object.__getattribute__


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
    children: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    """path -> names of the submodules, where they were iterated over, and of those that are None."""
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
    attributes: dict[types.FunctionType, Any] = field(default_factory=dict)
    """A function in reach -> the key of a snapshot of the attributes it has been given, None where it has none."""
    outside: dict[Any, Value] = field(default_factory=dict)
    """Globals, closures and what classes hold."""
    distinct: int | None = None
    """How many modules were asked for, where the code compares objects; None where it does not."""
    examined: bool = False
    """Whether the code asked for the class of anything."""


# ---- attributes of modules ---------------------------------------------------------------------------------

ON_THIS_THREAD = threading.local()
_intercepting = threading.RLock()
_depth = 0


def _getattribute(module: Any, name: str) -> Any:
    recorder = getattr(ON_THIS_THREAD, "recorder", None)
    if recorder is not None and (name not in INTERNAL or kind_of(sys._getframe(1).f_code) == "user"):
        path = recorder.recording(module)
        if path is not None:
            return recorder.read(module, path, name)
    return object_getattribute(module, name)


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
                recorder = getattr(ON_THIS_THREAD, "recorder", None)
                if recorder is not None and recorder.recording(module) is not None:
                    recorder.refuse_assignment(module, name, value)
                setattribute(module, name, value)

            def delete(module: Any, name: str) -> None:
                recorder = getattr(ON_THIS_THREAD, "recorder", None)
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
