"""Whose code runs while a forward is traced, and which functions of others a plan can do without.

A model's own code, and that of the libraries it is written with (torchvision, timm), is read line by line. Torch and
the standard library are not: a call into them is let through where it is known to depend on its arguments alone.
"""

from __future__ import annotations

import functools
import os
import re
import sysconfig
import types
from typing import Any

from ..nn.pristine import TORCH

_STDLIB = tuple(os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib"))
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_OUR_MODULES = (_HERE + "models.py", _HERE + "nn.py")
_MACHINERY = (TORCH + "fx" + os.sep, TORCH + "overrides.py", TORCH + "_library" + os.sep)
_MODULES = tuple(TORCH + os.path.join("nn", name) for name in ("modules" + os.sep, "functional.py", "parameter.py"))
# Of torch's own Python, what computes with its arguments alone.
_PURE_TORCH = tuple(TORCH + n for n in ("_jit_internal.py", "functional.py", "_tensor.py", "_VF.py", "_lowrank.py"))
_PURE_FUNCTIONS = frozenset(("is_tensor", "_assert", "typename", "is_storage"))
_PURE_STDLIB = frozenset(
    [
        "abc",
        "collections",
        "contextlib",
        "copy",
        "dataclasses",
        "enum",
        "fractions",
        "functools",
        "numbers",
        "operator",
        "re",
        "string",
        "types",
        "typing",
        "_collections_abc",
    ]
)
_OUTSIDE = "which may read or change a state outside the model"
# Torch's own Python that changes or asks for its state, wherever it is called from (a decorator counts).
_STATE = (
    ("amp", "enters autocast in its forward"),
    ("cuda" + os.sep + "amp", "enters autocast in its forward"),
    ("autograd" + os.sep + "grad_mode.py", "sets the gradient mode in its forward"),
    ("utils" + os.sep + "_contextlib.py", "runs its forward in a context (no_grad, autocast or the like)"),
    ("utils" + os.sep + "checkpoint.py", "checkpoints in its forward"),
)


@functools.lru_cache(maxsize=4096)
def kind_of(code: types.CodeType) -> str:
    """``user``, ``machinery`` (what traces), ``modules`` (torch.nn), ``torch`` or ``stdlib``."""
    name = code.co_filename
    if name.startswith(_MACHINERY) or (name.startswith(_HERE) and name not in _OUR_MODULES):
        return "machinery"
    if name.startswith(_MODULES):
        return "modules"
    if name.startswith(TORCH):
        return "torch"
    if name.startswith("<frozen ") or (
        os.path.realpath(name).startswith(_STDLIB) and "site-packages" not in name and "dist-packages" not in name
    ):
        return "stdlib"
    return "user"


def why_not_python_call(caller: types.CodeType, callee: types.CodeType) -> str | None:
    """None, or a clause that says why a trace through this call cannot be trusted."""
    kind = kind_of(callee)
    if kind == "torch":
        for part, clause in _STATE:
            if callee.co_filename.startswith(TORCH + part):
                return clause
        if kind_of(caller) != "user" or callee.co_filename.startswith(_PURE_TORCH):
            return None
        if callee.co_name in _PURE_FUNCTIONS or callee.co_name == "is_scripting":
            return None
        return f"calls torch's {_name(callee)}, {_OUTSIDE}"
    if kind == "stdlib" and kind_of(caller) == "user":
        module = _standard_module(callee.co_filename)
        if module not in _PURE_STDLIB:
            return f"calls {module}'s {_name(callee)}, {_OUTSIDE}"
    return None


def _standard_module(filename: str) -> str:
    if filename.startswith("<frozen "):
        return filename[len("<frozen ") : -1].split(".")[0]
    return os.path.relpath(os.path.realpath(filename), _STDLIB[0]).split(os.sep)[0].removesuffix(".py")


_PURE_MODULES = frozenset(
    "math cmath operator _operator itertools _functools functools _collections _abc _typing".split()  # noqa: SIM905
)
_IMPURE_BUILTINS = frozenset(
    "print open input exec eval globals locals vars breakpoint compile __import__ id dir hash".split()  # noqa: SIM905
)
_VALUE_TYPES: tuple[type, ...] = (
    str, bytes, int, float, complex, bool, list, tuple, dict, set, frozenset, range, slice, types.MappingProxyType,
    type(None), type({}.keys()), type({}.values()), type({}.items()),
)  # fmt: skip
_TORCH_STATE = re.compile(r"^_?_?(is|are|get|set|has|use|autocast|clear|current|default|initial|manual|log)_")
_FACTORIES = frozenset(
    (
        *("tensor", "as_tensor", "asarray", "from_numpy", "frombuffer", "scalar_tensor", "empty", "empty_strided"),
        *("zeros", "ones", "full", "eye", "arange", "range", "linspace", "logspace", "complex", "polar"),
        *("rand", "randn", "randint", "randperm", "normal"),
    )
)
_TORCH_PURE = re.compile(
    r"^_?has_torch_function|^is_(floating_point|complex|nonzero|same_size|conj|neg|signed|tensor)$"
)


def why_not_c_call(caller: types.CodeType, function: Any) -> str | None:
    """The same for a function written in C, called from ``caller``."""
    if kind_of(caller) != "user":
        return None
    owner = getattr(function, "__self__", None)
    name = function.__name__
    if owner is None or isinstance(owner, types.ModuleType):
        module = str(getattr(function, "__module__", None) or getattr(owner, "__name__", ""))
        if isinstance(function, types.MethodDescriptorType):
            return (
                None
                if issubclass(function.__objclass__, _VALUE_TYPES) or _is_torchs(function.__objclass__)
                else _clause(function)
            )
        if module == "builtins":
            return f"calls {name}() in its forward" if name in _IMPURE_BUILTINS else None
        if module in _PURE_MODULES:
            return None
        if name in _FACTORIES and module.split(".")[0] == "torch":
            return f"makes a tensor by torch.{name} in its forward, which the default dtype and device may decide"
        if module.split(".")[0] in ("torch", "") or owner is None:
            return _clause(function) if _TORCH_STATE.match(name) and not _TORCH_PURE.match(name) else None
        return _clause(function)
    if isinstance(owner, type):
        return None if issubclass(owner, _VALUE_TYPES) or owner in (object, type) else _clause(function)
    if isinstance(owner, _VALUE_TYPES) or type(owner).__module__ in ("collections", "numpy") or _is_torchs(type(owner)):
        return _clause(function) if _TORCH_STATE.match(name) and type(owner).__name__ == "type" else None
    return _clause(function)


def _is_torchs(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "torch"


def _clause(function: Any) -> str:
    owner = getattr(function, "__module__", None) or type(getattr(function, "__self__", None)).__name__
    return f"calls {owner}.{function.__name__}, {_OUTSIDE}"


def _name(code: types.CodeType) -> str:
    return str(getattr(code, "co_qualname", code.co_name))
