"""Build of the extensions; all metadata is in pyproject.toml.

``_C`` (CPU kernels, launch planner) needs a C++ compiler, ``_C_cuda`` (CUDA kernels) nvcc as well. Never asks for a
GPU. Without a C++ compiler the package installs as pure Python, and where _C_cuda does not compile without it, each
with one printed line. Environment variables:

    FUSED_RESNET_CUDA=auto|0|1        auto (default): build _C_cuda where nvcc is found and compiles it; 1: or fail
    FUSED_RESNET_CUDART=static|shared the CUDA runtime in _C_cuda (default: static)
    CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX   as usual
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import setuptools
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import cuda_build  # noqa: E402

SETUPTOOLS = 77  # the first that reads the licence in pyproject.toml


class CudaBuild(NamedTuple):
    toolkit: cuda_build.Toolkit
    archs: list[str]
    cudart: str
    link_arguments: list[str]


def say(line: str) -> None:
    print(f"fused_resnet: {line}", flush=True)


def have_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "c++")) is not None


def check_tools(*modules: str) -> None:
    """What build isolation would have installed, from pyproject.toml's build-system."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"fused_resnet: the build needs {' and '.join(missing)}: pip install {' '.join(missing)}, "
            "or install without --no-build-isolation"
        )


def cuda_build_plan() -> CudaBuild | str:
    """What to build `_C_cuda` with, or why this build is one without it."""
    wanted = os.environ.get("FUSED_RESNET_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"FUSED_RESNET_CUDA: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return "FUSED_RESNET_CUDA=0 left it out of this build"
    remedy = "install the CUDA toolkit and set CUDA_HOME, or pip install nvidia-cuda-nvcc nvidia-cuda-runtime"
    try:
        toolkit = cuda_build.find_toolkit()
        cudart = os.environ.get("FUSED_RESNET_CUDART", "static")
        return CudaBuild(toolkit, cuda_build.architectures(toolkit), cudart, toolkit.cudart(cudart))
    except ValueError as wrong:
        raise SystemExit(str(wrong)) from None
    except cuda_build.NoToolkit as reason:
        if wanted == "1":
            raise SystemExit(f"FUSED_RESNET_CUDA=1, but {reason}: {remedy}") from None
        say(f"building for the CPU only: {reason} ({remedy})")
        return str(reason)


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def extension(name: str, files: list[str], **arguments: Any) -> Any:
    from torch.utils.cpp_extension import CppExtension

    arguments.setdefault("extra_compile_args", [])
    arguments["extra_compile_args"] += [
        "-O3",
        "-g0",
        "-std=c++17",
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    include_dirs = [str(ROOT / "csrc"), *arguments.pop("include_dirs", [])]
    # the stable ABIs of Python (csrc/python.h) and torch: one module for Python 3.10 and torch 2.10 and all after them
    built = CppExtension(name, files, include_dirs=include_dirs, py_limited_api=True, **arguments)
    built.libraries = [library for library in built.libraries if library not in ("torch_python", "c10")]
    return built


def cuda_extension(build: CudaBuild) -> Any:
    toolkit, archs, cudart, runtime = build
    *code, ptx = cuda_build.built_for(archs).split()
    say(
        f"building _C_cuda with nvcc {toolkit.version} ({toolkit.nvcc}) for {', '.join(code)} and PTX of {ptx}, "
        f"CUDA runtime {cudart}, {os.environ.get('MAX_JOBS', 'all')} jobs"
    )
    files = sources("csrc/bindings_cuda.cpp", "csrc/bindings_planner.cpp", "csrc/cuda/*.cpp")
    files.remove("csrc/cuda/c_api.cpp")  # for the library without Python
    built = extension(
        "fused_resnet._C_cuda",
        files,
        include_dirs=list(toolkit.include_dirs),
        extra_compile_args=[
            f'-DFUSED_RESNET_ARCHITECTURES="{cuda_build.built_for(archs)}"',
            f'-DFUSED_RESNET_CUDART="{cudart}"',
            f'-DFUSED_RESNET_NVCC="{toolkit.version}"',
        ],
        # libtorch itself needs libtorch_cuda, where it was built with CUDA: the only way to it that any torch accepts
        extra_link_args=[*runtime, "-Wl,--no-as-needed", "-ltorch"],
    )
    built.cuda = build
    built.optional = os.environ.get("FUSED_RESNET_CUDA") != "1"
    return built


class BuildPy(build_py):
    """Adds the CUDA sources to the package: `fused-resnet compile` makes kernels for other GPUs from them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the source tree itself is there
            return
        for path in [ROOT / "csrc/cuda_build.py", *map(ROOT.joinpath, sources("csrc/*.h", "csrc/cuda/*.*h"))]:
            target = Path(self.build_lib) / "fused_resnet" / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def setup_arguments() -> dict[str, Any]:
    """`ext_modules` and `cmdclass` for setup(); no extension for a pure-Python install."""
    pure: dict[str, Any] = {"cmdclass": {"build_py": BuildPy}}
    if not have_compiler():
        say("no C++ compiler found, installing the pure-Python package (backends: eager, triton, cudnn)")
        return pure
    check_tools("torch")
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):  # type: ignore[misc, valid-type]
        """The kernels are compiled by our own rules: torch's need a torch with CUDA, and guess the toolkit's root."""

        without_cuda: str | None = None  # why

        def finalize_options(self) -> None:
            super().finalize_options()
            if self.editable_mode:  # pip's own folder is thrown away, and the next build would compile everything again
                self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"

        def run(self) -> None:
            only_here = sysconfig.get_config_var("EXT_SUFFIX")
            for ext in self.extensions:  # a module for one Python alone, of an earlier build, would come first
                for folder in (ROOT, Path(self.build_lib)):
                    (folder / (ext.name.replace(".", "/") + only_here)).unlink(missing_ok=True)
            self.without_cuda = cuda if isinstance(cuda, str) else None
            super().run()
            # for `fused-resnet doctor`; beside the module, whose place it takes
            note = (ROOT if self.inplace else Path(self.build_lib)) / "fused_resnet/_C_cuda.txt"
            note.unlink(missing_ok=True)
            if self.without_cuda is not None:
                note.write_text(self.without_cuda)

        def build_extension(self, ext: Any) -> None:
            whole, self.build_temp = self.build_temp, str(Path(self.build_temp) / ext.name.rpartition(".")[2])
            try:
                if hasattr(ext, "cuda"):
                    out_dir = Path(self.build_temp) / "cuda_kernels"
                    ext.extra_objects = cuda_build.compile_objects(ext.cuda.toolkit, ext.cuda.archs, out_dir)
                    ext.depends = [*ext.extra_objects, *sources("csrc/*.h", "csrc/cuda/*.h")]
                super().build_extension(ext)
            except Exception as error:  # of ninja, torch or setuptools: one module must not take the other with it
                if not ext.optional:
                    raise
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.without_cuda = f"it did not compile ({reason})"
                say(f"going on without _C_cuda, which does not compile ({reason}); FUSED_RESNET_CUDA=1 insists on it")
            finally:
                self.build_temp = whole

        def copy_extensions_to_source(self) -> None:
            failed = isinstance(cuda, CudaBuild) and self.without_cuda is not None
            if failed:  # what an earlier build left there belongs to other sources
                (ROOT / "fused_resnet/_C_cuda.abi3.so").unlink(missing_ok=True)
            super().copy_extensions_to_source()

    planner = [str(path.relative_to(ROOT)) for path in cuda_build.PLANNER]
    files = sources("csrc/bindings.cpp", "csrc/bindings_planner.cpp", "csrc/cpu/*.cpp", *planner)
    extensions = []
    if "csrc/bindings.cpp" in files:
        say(f"building _C from {len(files)} files")
        extensions.append(extension("fused_resnet._C", files, depends=sources("csrc/*.h", "csrc/*/*.h")))
    cuda = cuda_build_plan()
    if isinstance(cuda, CudaBuild):
        extensions.append(cuda_extension(cuda))
    if not extensions:
        return pure
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_py": BuildPy, "build_ext": Build.with_options(use_ninja=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS:
    raise SystemExit(
        f"fused_resnet: setuptools must be {SETUPTOOLS} or newer, got {setuptools.__version__}: "
        "pip install -U setuptools"
    )
setuptools.setup(**setup_arguments())
