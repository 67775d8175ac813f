"""How the CUDA sources become machine code: finds nvcc and its toolkit, compiles with ninja.

Used by setup.py for the module ``_C_cuda``, and on its own for planner and launcher as a small shared library without
Torch or Python (csrc/cuda/c_api.cpp)::

    python csrc/cuda_build.py build/launcher --arch 8.0 --cudart shared    # -> libfused_resnet_launch.so

Never looks for a GPU. Environment: ``CUDA_HOME``, ``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS``, ``CXX``,
``FUSED_RESNET_CUDART=static|shared``.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
HOPPER_KERNELS = [path for path in KERNELS if path.name.startswith("kernels_wgmma")]
#: The planner: needs neither Torch nor CUDA, so _C has it as well.
PLANNER = [
    CSRC / "cuda" / name for name in ("plan.cpp", "catalogue.cpp", "tensor_maps.cpp", "schedule.cpp", "bn_plan.cpp")
]
#: Planner and launcher, without Torch.
HOST_SOURCES = [*PLANNER, *(CSRC / "cuda" / name for name in ("launch.cpp", "encode_maps.cpp", "bn_launch.cpp"))]
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")
OLDEST = 75


class NoToolkit(Exception):
    """Why there is no usable CUDA toolkit, in one sentence."""


@dataclass(frozen=True)
class Toolkit:
    """An nvcc and where it finds its own headers and libraries."""

    nvcc: str
    version: str  # "13.0"
    include_dirs: tuple[str, ...]
    library_dirs: tuple[str, ...]
    supported: tuple[str, ...]  # virtual architectures: ("80", "86", "90", "90a", ...)

    def cudart(self, kind: str) -> list[str]:
        """Linker arguments for the CUDA runtime, ``static`` or ``shared``."""
        if kind not in ("static", "shared"):
            raise ValueError(f"FUSED_RESNET_CUDART: expected static or shared, got {kind!r}")
        # the PyPI package has libcudart.so.13 without the plain name that -lcudart looks for
        pattern = "libcudart_static.a" if kind == "static" else "libcudart.so*"
        for directory in self.library_dirs:
            found = sorted(glob.glob(os.path.join(directory, pattern)))
            if found:
                return [found[0], "-ldl", "-lrt", "-lpthread"] if kind == "static" else [found[0]]
        raise NoToolkit(f"{self.nvcc} has no {pattern} in {', '.join(self.library_dirs)}")


def _nvcc_candidates() -> list[str]:
    """CUDA_HOME, then PATH, then the packages nvidia-cuda-nvcc of PyPI."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:  # whoever sets it means it
        return [os.path.join(home, "bin", "nvcc")]
    candidates = [shutil.which("nvcc") or ""]
    packages = {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}
    for root in sorted(packages):
        candidates += sorted(glob.glob(os.path.join(root, "nvidia", "*", "bin", "nvcc")), reverse=True)
    return [*candidates, "/usr/local/cuda/bin/nvcc"]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoToolkit(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    return done.stdout + done.stderr


def find_toolkit() -> Toolkit:
    """The toolkit to build with; raises NoToolkit with the reason where there is none."""
    nvcc = next((path for path in _nvcc_candidates() if path and os.access(path, os.X_OK)), None)
    if nvcc is None:
        raise NoToolkit("found no nvcc in CUDA_HOME, on PATH or among the nvidia packages of this Python")
    version = re.search(r"release (\d+\.\d+)", _run(nvcc, "--version"))
    # What nvcc itself would use. Where nvcc on PATH is a wrapper script, its own directory says nothing.
    dryrun = _run(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull)
    top = re.search(r"^#\$ TOP=(.*)$", dryrun, re.MULTILINE)
    if version is None or top is None:
        raise NoToolkit(f"{nvcc} does not answer --version and --dryrun as nvcc does")
    root = os.path.realpath(top.group(1).strip())
    siblings = os.path.dirname(root)  # the PyPI packages of CUDA 12 put runtime and compiler side by side
    roots = [root, os.path.join(root, "targets", "x86_64-linux"), os.path.join(siblings, "cuda_runtime")]
    includes = [os.path.join(r, "include") for r in roots]
    libraries = [os.path.join(r, lib) for r in roots for lib in ("lib64", "lib")]
    includes = [d for d in includes if os.path.exists(os.path.join(d, "cuda_runtime_api.h"))]
    if not includes:
        raise NoToolkit(f"{nvcc} belongs to {root}, which has no cuda_runtime_api.h")
    listed = re.findall(r"compute_(\d+[af]?)", _run(nvcc, "--list-gpu-arch"))
    libraries = [d for d in libraries if os.path.isdir(d)]
    return Toolkit(nvcc, version.group(1), tuple(includes), tuple(libraries), tuple(listed))


def architectures(toolkit: Toolkit, text: str | None = None) -> list[str]:
    """The architectures to compile for, as ``["80", "90", ...]``, oldest first.

    From ``text`` or ``TORCH_CUDA_ARCH_LIST`` ("8.0;9.0+PTX"; PTX of the oldest is embedded in any case), else the
    default, as far as this nvcc knows them. Architectures before sm_75 are left out: no kernel here runs there.
    """
    text = text or os.environ.get("TORCH_CUDA_ARCH_LIST") or ""
    names = re.split(r"[;,\s]+", text.strip()) if text and text != "native" else list(DEFAULT_ARCHITECTURES)
    chosen = set()
    for name in filter(None, names):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected numbers like 8.0;9.0+PTX, got {name!r}")
        chosen.add(match.group(1) + match.group(2) + match.group(3))
    usable = [a for a in chosen if int(a.rstrip("af")) >= OLDEST and a.rstrip("af") in toolkit.supported]
    if not usable:
        raise NoToolkit(f"nvcc {toolkit.version} compiles for none of {sorted(chosen)} that is sm_{OLDEST} or newer")
    return sorted(usable, key=lambda a: (int(a.rstrip("af")), a))


def _plain(archs: list[str]) -> list[str]:
    """Those whose machine code is assembled from one PTX, that of the first."""
    return [a for a in archs if a.isdigit() and int(a) >= 80] or [archs[0]]


def built_for(archs: list[str]) -> str:
    """What the module says of itself: ``sm_75 sm_80 sm_90 compute_80``."""
    return " ".join([*(f"sm_{a}" for a in archs), f"compute_{_plain(archs)[0]}"])


def gencode(archs: list[str]) -> str:
    """One run of the front end: every cubin is assembled from the PTX of the oldest architecture, which is embedded.

    So the PTX that anyone can extract and execute is the very code that each GPU runs. (What cannot share it is
    compiled on its own: sm_75, which lacks what the others' code uses, and targets such as 90a.)
    """
    plain = _plain(archs)
    code = ",".join([f"compute_{plain[0]}", *(f"sm_{a}" for a in plain)])
    own = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs if a not in plain]
    return " ".join([f"-gencode=arch=compute_{plain[0]},code=[{code}]", *own])


def hopper_gencode(toolkit: Toolkit, archs: list[str]) -> str:
    """For the kernels on wgmma and tensor maps, which are instructions of sm_90a alone.

    Whoever asks for sm_90 gets them: the only GPUs of that number are Hopper, with all of sm_90a. Nobody else does:
    then they are empty functions, which the planner is told of by ``FUSED_RESNET_HOPPER`` and leaves alone.
    """
    knows = int(toolkit.version.split(".")[0]) >= 12  # nvcc lists no "90a" among what it supports
    if knows and {"90", "90a"} & set(archs):
        return "-gencode=arch=compute_90a,code=[compute_90a,sm_90a] -DFUSED_RESNET_HOPPER=1"
    oldest = _plain(archs)[0]
    return f"-gencode=arch=compute_{oldest},code=compute_{oldest} -DFUSED_RESNET_HOPPER=0"


def _ninja() -> str:
    found = shutil.which("ninja")
    if found is None:
        import ninja

        found = os.path.join(ninja.BIN_DIR, "ninja")
    return found


def compile_objects(
    toolkit: Toolkit, archs: list[str], out_dir: Path, host_sources: list[Path] | None = None
) -> list[str]:
    """Compile the kernels (and ``host_sources``) into ``out_dir``; ninja compiles only what changed."""
    out_dir.mkdir(parents=True, exist_ok=True)
    includes = " ".join(f"-I{d}" for d in toolkit.include_dirs)
    cxx = os.environ.get("CXX", "c++")
    lines = [
        "ninja_required_version = 1.5",
        "rule nvcc",
        f"  command = {toolkit.nvcc} -std=c++17 -O3 $gencode "
        "-Xcompiler -fPIC,-fvisibility=hidden -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
        "rule cxx",
        f"  command = {cxx} -std=c++17 -O2 -fPIC -fvisibility=hidden {includes} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    objects = []
    for source in [*KERNELS, *(host_sources or [])]:
        objects.append(str(out_dir.resolve() / f"{source.stem}.o"))
        rule = "nvcc" if source.suffix == ".cu" else "cxx"
        lines.append(f"build {_escaped(objects[-1])}: {rule} {_escaped(str(source))}")
        if rule == "nvcc":
            code = hopper_gencode(toolkit, archs) if source in HOPPER_KERNELS else gencode(archs)
            lines.append(f"  gencode = {code}")
    build_file = out_dir / "build.ninja"
    build_file.write_text("\n".join(lines) + "\n")
    jobs = os.environ.get("MAX_JOBS")
    command = [_ninja(), "-f", str(build_file.resolve()), *(["-j", jobs] if jobs else [])]
    subprocess.run(command, check=True, cwd=out_dir)
    return objects


def _escaped(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def build_launcher(out_dir: Path, arch_list: str | None = None, cudart: str | None = None) -> Path:
    """Planner, launcher and kernels as ``libfused_resnet_launch.so``; returns its path."""
    toolkit = find_toolkit()
    archs = architectures(toolkit, arch_list)
    objects = compile_objects(toolkit, archs, out_dir, [*HOST_SOURCES, CSRC / "cuda" / "c_api.cpp"])
    library = out_dir / "libfused_resnet_launch.so"
    runtime = toolkit.cudart(cudart or os.environ.get("FUSED_RESNET_CUDART", "static"))
    subprocess.run(
        [os.environ.get("CXX", "c++"), "-shared", "-o", str(library), *objects, *runtime, "-Wl,-z,defs"], check=True
    )
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--arch", help='architectures like "8.0;9.0" (default: TORCH_CUDA_ARCH_LIST, or all)')
    parser.add_argument("--cudart", choices=["static", "shared"], help="default: FUSED_RESNET_CUDART, or static")
    options = parser.parse_args()
    try:
        print(build_launcher(options.out_dir, options.arch, options.cudart))
    except NoToolkit as reason:
        sys.exit(f"fused_resnet: {reason}")


if __name__ == "__main__":
    main()
