"""Which tools are missing, for test modules that are skipped without them."""

from __future__ import annotations

import shutil


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
