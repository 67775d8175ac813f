"""Which tools are missing, for test modules that are skipped without them."""

from __future__ import annotations

import re
import shutil
import subprocess


def _missing(tool: str) -> str | None:
    if tool == "_C":
        from fused_resnet.core import extensions

        return extensions.why_not_cpu()
    if tool == "nvcc":
        from fused_resnet.aot.cuda import toolkit

        try:
            toolkit()
        except RuntimeError as reason:
            return str(reason)
        return None
    if tool == "cuobjdump":
        from benchmarks.static import sass

        try:
            sass.cuobjdump()
        except FileNotFoundError as reason:
            return str(reason)
        return None
    return None if shutil.which(tool) else f"needs {tool}"


def why_not(*tools: str) -> str | None:
    """Why the tests that need these tools cannot run here, or None."""
    return next((reason for tool in tools if (reason := _missing(tool))), None)


def why_not_disassembled(arch: str) -> str | None:
    """Why the loops of machine code for ``arch`` ("sm_120") cannot be read here, or None."""
    from benchmarks.static import sass

    printed = subprocess.run([sass.cuobjdump(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.", printed)
    if arch == "sm_120" and found and int(found[1]) < 13:  # Triton 3.6 ships 12.8's
        return f"needs cuobjdump of CUDA 13 for the loops of sm_120, got {found[0]}"
    return None
