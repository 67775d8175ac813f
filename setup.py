"""Build of the extension; all metadata is in pyproject.toml.

Never asks for a GPU. Without a C++ compiler the package installs as pure Python, with one printed line.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def say(line: str) -> None:
    print(f"fused_resnet: {line}", flush=True)


def have_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "c++")) is not None


def extension_arguments() -> dict[str, object]:
    """`ext_modules` and `cmdclass` for setup(); empty for a pure-Python install."""
    if not have_compiler():
        say("no C++ compiler found, installing the pure-Python package (backends: eager, triton, cudnn)")
        return {}
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sources = sorted(str(p.relative_to(ROOT)) for p in [ROOT / "csrc/bindings.cpp", *ROOT.glob("csrc/cpu/*.cpp")])
    extension = CppExtension(
        "fused_resnet._C",
        sources,
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        extra_compile_args=["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"],
        # libtorch_python is not needed: pybind11 is its own and torch is reached through the stable ABI
        py_limited_api=False,
    )
    extension.libraries = [name for name in extension.libraries if name != "torch_python"]
    say(f"building _C from {len(sources)} files")
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=True)}}


setup(**(extension_arguments() if (ROOT / "csrc/bindings.cpp").exists() else {}))
