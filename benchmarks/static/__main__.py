"""Compile every CUDA kernel for every architecture, read the machine code, compare it with its bounds.

    python -m benchmarks.static                    # all architectures -> benchmarks/static/cuda.{json,md}
    python -m benchmarks.static --arch sm_80 sm_90 # some of them

Needs nvcc and cuobjdump, no GPU. Exit status 1 where a bound is broken.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.static import gate, table
from fused_resnet.aot.planner import planner

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=list(gate.ARCHS), help="architectures, as sm_80 (default: all)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of cuda.json and cuda.md")
    options = parser.parse_args()
    pairs = [(k, arch) for arch in options.arch for k in planner().kernels.values() if k.runs_on(arch)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(lambda pair: gate.read(*pair), pairs))
    table.write(rows, options.out, "cuda")
    broken = [sentence for row in rows for sentence in gate.violations(row)]
    print(table.markdown(rows))
    print(f"{len(rows)} kernels, {len(broken)} bounds broken", *broken, sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
