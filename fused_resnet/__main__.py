"""``fused-resnet`` and ``python -m fused_resnet``: the command line, or one sentence where its packages are missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script."""
    try:
        from .cli import app
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in ("rich", "typer"):
            raise
        sys.exit(f"fused-resnet: the command line needs {package}: pip install {package}")
    app()


if __name__ == "__main__":
    main()
