"""Other people's exceptions in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of the message that says anything, or the name of the exception where none does (EOFError)."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
