"""The CPU kernels built without Torch: under the sanitizers, and for another processor than this one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / "tests/cpu/cpu_sanitizer.cpp", ROOT / "csrc/cpu/conv.cpp", ROOT / "csrc/cpu/memory.cpp"]
COMPILER = os.environ.get("CXX", "g++")
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
needs_cross_compiler = pytest.mark.skipif(
    shutil.which(CROSS_COMPILER) is None, reason=f"needs {CROSS_COMPILER} (Debian: apt install g++-aarch64-linux-gnu)"
)


def check_kernels(program: Path, *runner: str) -> None:
    result = subprocess.run([*runner, str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "0 failures" in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs the compiler {COMPILER}")
def test_no_stray_access_and_no_undefined_behaviour(tmp_path: Path) -> None:
    program = tmp_path / "kernels"
    # of UBSan the checks that say something here: its null and alignment checks triple the time to compile
    checks = "address,bounds,integer-divide-by-zero,signed-integer-overflow,shift,float-cast-overflow"
    flags = ["-std=c++17", "-O1", "-g0", "-Wno-psabi", f"-fsanitize={checks}", "-fno-sanitize-recover=all"]
    built = subprocess.run(
        [COMPILER, *flags, f"-I{ROOT / 'csrc'}", *map(str, SOURCES), "-o", str(program)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "cannot find -lasan" in built.stderr:
        pytest.skip("this compiler comes without the sanitizers")
    assert built.returncode == 0, built.stderr[-4000:]
    check_kernels(program)


@pytest.mark.slow
@needs_cross_compiler
@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"needs {EMULATOR} (Debian: apt install qemu-user)")
def test_the_portable_kernels_are_right_on_aarch64(tmp_path: Path) -> None:
    """With the register blocks of target_portable.h and training_portable.cpp, by NEON."""
    program = tmp_path / "kernels"
    flags = ["-std=c++17", "-O1", "-g0", "-Wno-psabi", "-static", "-DFR_LANES=4", "-DFR_ROWS=6", "-DFR_GRADIENT_ROWS=4"]
    built = subprocess.run(
        [CROSS_COMPILER, *flags, f"-I{ROOT / 'csrc'}", *map(str, SOURCES), "-o", str(program)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-4000:]
    check_kernels(program, EMULATOR)


@pytest.mark.slow
@needs_cross_compiler
def test_the_extension_compiles_for_aarch64() -> None:
    """Every file of ``_C`` against Torch's headers: nothing of x86 stands outside its ``#if``."""
    includes = [str(ROOT / "csrc"), sysconfig.get_paths()["include"], *include_paths()]
    files = {*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc/cpu").glob("*.cpp")} - {ROOT / "csrc/bindings_cuda.cpp"}
    built = subprocess.run(
        [CROSS_COMPILER, "-std=c++17", "-fsyntax-only", "-fvisibility=hidden", "-Wno-psabi",
         "-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-I{path}" for path in includes), *map(str, sorted(files))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-4000:]
