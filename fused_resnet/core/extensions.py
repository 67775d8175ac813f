"""The only loader of the compiled extension.

``_C`` holds the CPU kernels and ``_C_cuda`` the CUDA ones. Each is optional: a missing or broken module is
remembered as one sentence with its remedy, never raised at import.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import torch

from .errors import first_line

_REMEDIES = {
    "_C": "install a C++ compiler and run `pip install --no-build-isolation .` in the source tree",
    "_C_cuda": "install nvcc and run `FUSED_RESNET_CUDA=1 pip install --no-build-isolation .` in the source tree, "
    "which fails with the compiler's words where it cannot be built",
}
_modules: dict[str, ModuleType | str] = {}


def _load(name: str) -> ModuleType | str:
    """The module, or the sentence that says why it cannot be had. Tried once per process."""
    if name not in _modules:
        try:
            _modules[name] = importlib.import_module(f"..{name}", __package__)
        except ModuleNotFoundError:
            _modules[name] = _why_not_built(name)
        except ImportError as error:
            _modules[name] = _why_not_loaded(name, error)
    return _modules[name]


def _why_not_built(name: str) -> str:
    try:  # what the build (setup.py) wrote down in the module's place
        left_out = f" ({(Path(__file__).parents[1] / f'{name}.txt').read_text()})"
    except OSError:
        left_out = ""
    return f"the extension fused_resnet.{name} is not built{left_out}: {_REMEDIES[name]}"


def _why_not_loaded(name: str, error: ImportError) -> str:
    return (
        f"the extension fused_resnet.{name} does not load with torch {torch.__version__} ({first_line(error)}): "
        f"{_REMEDIES[name]}"
    )


def cpu() -> ModuleType | None:
    """``fused_resnet._C``, or None."""
    module = _load("_C")
    return module if isinstance(module, ModuleType) else None


def cuda() -> ModuleType | None:
    """``fused_resnet._C_cuda``, or None."""
    module = _load("_C_cuda")
    return module if isinstance(module, ModuleType) else None


def why_not_cpu() -> str | None:
    """One sentence why ``_C`` is missing, or None when it is there."""
    module = _load("_C")
    return module if isinstance(module, str) else None


def why_not_cuda() -> str | None:
    """One sentence why ``_C_cuda`` is missing, or None when it is there."""
    module = _load("_C_cuda")
    return module if isinstance(module, str) else None
