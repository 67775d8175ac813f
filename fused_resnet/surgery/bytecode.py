"""The names that a function's code refers to: its globals and closure variables, with the attributes read of them."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_STORES = ("STORE_ATTR", "DELETE_ATTR")


@dataclass(frozen=True)
class Reference:
    """``name.attributes[0].attributes[1]...`` as one line of a function's code reads it."""

    line: int
    name: str
    attributes: tuple[str, ...]
    closure: bool
    stores: bool
    """Whether an attribute of it is assigned."""

    def __str__(self) -> str:
        return ".".join((self.name, *self.attributes))


@functools.lru_cache(maxsize=1024)
def references(code: types.CodeType) -> tuple[Reference, ...]:
    """All globals and closure variables that ``code`` itself refers to (not the functions defined in it)."""
    found: list[Reference] = []
    lines = _line_table(code)
    instructions = list(dis.get_instructions(code))
    for i, instruction in enumerate(instructions):
        name = instruction.opname
        if name in ("LOAD_GLOBAL", "LOAD_NAME"):
            closure = False
        elif (
            name in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF")
            and instruction.argval in code.co_freevars
        ):
            closure = True
        else:
            continue
        attributes: list[str] = []
        following = iter(instructions[i + 1 :])
        after = next(following, None)
        while after is not None and (after.opname in _ATTRIBUTES or after.opname in ("PUSH_NULL", "CACHE")):
            if after.opname in _ATTRIBUTES:
                attributes.append(after.argval)
            after = next(following, None)
        stores = after is not None and after.opname in _STORES
        if stores and after is not None:
            attributes.append(after.argval)
        found.append(
            Reference(lines.get(instruction.offset, -1), instruction.argval, tuple(attributes), closure, stores)
        )
    return tuple(found)


@functools.lru_cache(maxsize=1024)
def stored_names(code: types.CodeType) -> tuple[tuple[int, str], ...]:
    """Line and name of each global or closure variable that ``code`` assigns."""
    lines = _line_table(code)
    return tuple(
        (lines.get(i.offset, -1), i.argval)
        for i in dis.get_instructions(code)
        if i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")
        or (i.opname in ("STORE_DEREF", "DELETE_DEREF") and i.argval in code.co_freevars)
    )


@functools.lru_cache(maxsize=1024)
def imports(code: types.CodeType) -> tuple[tuple[int, str], ...]:
    """Line and module of each import statement in ``code``."""
    lines = _line_table(code)
    return tuple((lines.get(i.offset, -1), i.argval) for i in dis.get_instructions(code) if i.opname == "IMPORT_NAME")


@functools.lru_cache(maxsize=1024)
def attributes(code: types.CodeType) -> tuple[tuple[int, str], ...]:
    """Line and name of each attribute that ``code`` reads."""
    lines = _line_table(code)
    return tuple((lines.get(i.offset, -1), i.argval) for i in dis.get_instructions(code) if i.opname in _ATTRIBUTES)


@functools.lru_cache(maxsize=1024)
def names(code: types.CodeType) -> frozenset[str]:
    """All names that ``code`` may read as attributes: those written out, and every part of a string."""
    strings = [c for c in _flat(code.co_consts) if isinstance(c, str)]
    return frozenset((*code.co_names, *(part for string in strings for part in string.split("."))))


def _flat(constants: Any) -> Iterator[Any]:
    for constant in constants:
        if isinstance(constant, (tuple, frozenset)):
            yield from _flat(constant)
        else:
            yield constant


@functools.lru_cache(maxsize=1024)
def compares(code: types.CodeType) -> bool:
    """Whether ``code`` may ask if two objects are one."""
    return any(
        i.opname in ("IS_OP", "CONTAINS_OP") or (i.opname == "COMPARE_OP" and str(i.argval) in ("==", "!="))
        for i in dis.get_instructions(code)
    )


@functools.lru_cache(maxsize=1024)
def opcodes(code: types.CodeType) -> frozenset[str]:
    """The names of the instructions in ``code``."""
    return frozenset(i.opname for i in dis.get_instructions(code))


def _line_table(code: types.CodeType) -> dict[int, int]:
    table: dict[int, int] = {}
    for start, end, line in code.co_lines():
        for offset in range(start, end, 2):
            table[offset] = line if line is not None else -1
    return table
