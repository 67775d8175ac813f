"""The extension in place, for the GPU of this machine: the first step of :mod:`benchmarks.gpu_day`.

A module that was carried along and loads here is left as it is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOADS = (
    "from fused_resnet.core import extensions as e; print(e.why_not_cuda() or e.cuda().build_info()['architectures'])"
)


def state() -> str:
    """The architectures of the module that is there, or why there is none; asked in a process of its own."""
    done = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, cwd=ROOT)
    return (done.stdout or done.stderr).strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_build", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--dry", action="store_true", help="for an H200, then the stand-in as well")
    options = parser.parse_args()
    if options.dry:
        arch = "9.0"
    else:
        import torch

        arch = ".".join(map(str, torch.cuda.get_device_capability()))
    wanted = f"sm_{arch.replace('.', '')}"
    if wanted in (there := state()):
        print(f"gpu_build: the module that is there serves {wanted} ({there})")
    else:
        print(f"gpu_build: building for {wanted}: {there}", flush=True)
        environment = {"TORCH_CUDA_ARCH_LIST": arch, "MAX_JOBS": str(options.jobs), "FUSED_RESNET_CUDA": "1"}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | environment)
        print(f"gpu_build: {state()}", flush=True)
    if options.dry:
        subprocess.run([sys.executable, "-m", "benchmarks.gpu_stand_in", "--build"], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
