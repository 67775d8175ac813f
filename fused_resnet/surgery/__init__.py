"""Model surgery: :func:`fuse`, :func:`unfuse`, :func:`explain`, :func:`refresh`, :func:`freeze` and :func:`export`.

``trace`` reads a forward as a graph, ``match`` finds the tails in it, ``plan`` makes the program and carries it,
``check`` compares it with the original, ``gain`` says whether it is worth it, ``discovery`` walks a model, ``live``
changes it, ``frozen`` prepares it for speed, ``exporting`` makes programs of it, ``report`` puts it into words.
"""

from __future__ import annotations

from .exporting import export
from .frozen import FrozenModel, freeze
from .live import fuse, refresh, unfuse
from .report import Entry, Explanation, explain

__all__ = ["Entry", "Explanation", "FrozenModel", "explain", "export", "freeze", "fuse", "refresh", "unfuse"]
