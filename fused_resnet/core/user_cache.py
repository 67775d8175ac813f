"""Where tuning results and compiled kernels are kept, for one user of this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def directory() -> Path:
    """The environment variable ``FUSED_RESNET_CACHE_DIR``, else a folder in the user's cache, by the system's rule."""
    chosen = os.environ.get("FUSED_RESNET_CACHE_DIR")
    if chosen:
        return Path(chosen)
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA") or os.path.join(home, "AppData", "Local")
        return Path(local, "fused_resnet", "fused_resnet", "Cache")
    if sys.platform == "darwin":
        return Path(home, "Library", "Caches", "fused_resnet")
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # the XDG specification has a relative path ignored
    return Path(xdg if os.path.isabs(xdg) else os.path.join(home, ".cache"), "fused_resnet")
