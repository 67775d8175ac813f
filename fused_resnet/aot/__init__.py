"""Kernels compiled ahead of time, for users of the CUDA driver API: no GPU, no PyTorch at run time.

:func:`compile` writes ``kernel.ptx``, ``kernel.cubin`` and ``launch.json`` (see `launch_json` for the format).
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from pathlib import Path

from ..core.problem import Problem
from .launch_json import Launch

__all__ = ["Launch", "compile"]

BACKENDS = ("cuda", "triton")


def compile(  # the name of the command: fused-resnet compile
    backend: str,
    arch: str,
    problem: Problem | str,
    out_dir: str | os.PathLike[str],
    *,
    proj: str | None = None,
    splitk: int | None = None,
    tile: str | None = None,
    eps: float = 1e-5,
    proj_eps: float = 1e-5,
) -> Launch:
    """Compile the kernel that ``backend`` would launch for ``problem`` and write it to ``out_dir``.

    ``arch`` is ``"sm_75"`` (cuda alone), ``"sm_80"`` or newer. ``problem`` may be the text that
    :meth:`Problem.parse` reads; in it, or as arguments, ``proj`` adds a projection (``CxHxWxSTRIDE``), ``splitk`` fixes
    the number of blocks that share one tile's sum, ``tile`` the tile configuration (``"128x64"``); by default the
    planner chooses both. The two eps are BatchNorm's. A text that begins with ``op=`` asks for a training pass instead,
    such as ``"op=bn_stats,n=8,h=14,w=14,c=64,dtype=float16"`` (see :mod:`.training`), and ``op=conv_bn_stats`` before
    the text of a problem for its convolution alone, with the statistics of its output. Raises ValueError for what the
    backend refuses and RuntimeError where a compiler is missing.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if not arch.removeprefix("sm_").rstrip("af").isdigit():
        raise ValueError(f"arch: expected sm_75 or newer, got {arch!r}")
    if isinstance(problem, str) and problem.lstrip().startswith("op="):
        return _compile_training(backend, arch, problem, Path(out_dir), proj=proj, splitk=splitk, tile=tile)
    if isinstance(problem, str):
        problem, in_text = _split_options(problem if proj is None else f"{problem},proj={proj}")
        splitk = splitk if splitk is not None else _positive("splitk", in_text.get("splitk"))
        tile = tile if tile is not None else in_text.get("tile")
    elif proj is not None:
        problem = Problem.parse(f"{problem},proj={proj}")
    problem = dataclasses.replace(problem, device_type="cuda")
    # each has compile(problem, arch, out_dir, *, splitk, tile, eps, proj_eps) -> Launch
    implementation = importlib.import_module(f".{backend}", __name__)
    launch: Launch = implementation.compile(
        problem, arch, Path(out_dir), splitk=splitk, tile=tile, eps=eps, proj_eps=proj_eps
    )
    return launch


def _compile_training(
    backend: str, arch: str, text: str, out_dir: Path, *, proj: str | None, splitk: int | None, tile: str | None
) -> Launch:
    from . import cuda, training
    from .planner import CONV_STATS

    if backend != "cuda":
        raise ValueError(f"{backend}: no artifacts of training passes, expected the backend cuda")
    op, _, rest = text.partition(",")
    if op.strip() == f"op={CONV_STATS}" and proj is None:
        problem, in_text = _split_options(rest)
        problem = dataclasses.replace(problem, bn=False, activation="none", device_type="cuda")
        return cuda.compile(
            problem, arch, out_dir, splitk=splitk, tile=tile or in_text.get("tile"), statistics=True
        )  # fmt: skip
    for name, value in (("proj", proj), ("splitk", splitk), ("tile", tile)):
        if value is not None:
            raise ValueError(f"{name}: a training pass has none, got {value!r}")
    return cuda.compile_training(training.TrainingCall.parse(text), arch, out_dir)


def _split_options(text: str) -> tuple[Problem, dict[str, str]]:
    """The problem, and the options that stand beside it in the text."""
    options: dict[str, str] = {}
    fields: list[str] = []
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name in ("splitk", "tile"):
            options[name] = value
        else:
            fields.append(part)
    return Problem.parse(",".join(fields)), options


def _positive(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{name}: expected a positive integer, got {text!r}")
    return int(text)
