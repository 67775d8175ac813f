"""Checkpoints: written atomically, read without executing anything in them."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import first_line

#: Grows when the content of a checkpoint changes its meaning.
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one sentence."""


def write_atomically(path: Path, write: Callable[[str], None]) -> None:
    """Have ``write`` make a file and put it at ``path`` in one step: a killed run leaves the old file or the new.

    The temporary file is in the same folder, for a rename within one file system is atomic.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    # A temporary file is its owner's alone; what is left behind is for whoever may read files made here.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(temporary, 0o666 & ~mask)
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def rng_state() -> dict[str, Any]:
    """The states of the random number generators a training step may draw from."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`rng_state` returned."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint: ``model`` (a state_dict), ``meta`` and whatever else the run needs to go on."""
    write_atomically(path, lambda temporary: torch.save({"format": FORMAT, **content}, temporary))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this package. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"checkpoint: no file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip, EOF and runtime errors for damaged files
        raise CheckpointError(f"checkpoint: {path} cannot be read ({first_line(error)})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"checkpoint: {path} is no checkpoint of format {FORMAT}, got {found!r}")
    return content


def export_safetensors(path: Path, model: nn.Module, meta: Mapping[str, Any]) -> None:
    """The weights alone, with ``meta`` as the file's metadata (JSON values)."""
    from safetensors.torch import save_file

    # safetensors stores dense, unshared tensors in C order; channels_last is the loader's business.
    state = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
    text = {key: json.dumps(value) for key, value in meta.items()}
    write_atomically(path, lambda temporary: save_file(state, temporary, metadata=text))


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state_dict and the metadata of a checkpoint or a safetensors file. Raises CheckpointError."""
    if path.suffix != ".safetensors":
        content = load(path)
        return content.get("ema") or content["model"], dict(content["meta"])
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"checkpoint: no file {path}")
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            meta = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint: {path} cannot be read ({error})") from error
    return state, meta
