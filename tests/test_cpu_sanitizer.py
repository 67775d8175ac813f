"""The convolution kernels under AddressSanitizer and UndefinedBehaviorSanitizer, built without Torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "g++")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs the compiler {COMPILER}")
def test_no_stray_access_and_no_undefined_behaviour(tmp_path: Path) -> None:
    program = tmp_path / "kernels"
    sources = [ROOT / "tests/cpu_sanitizer.cpp", ROOT / "csrc/cpu/conv.cpp", ROOT / "csrc/cpu/memory.cpp"]
    # of UBSan the checks that say something here: its null and alignment checks triple the time to compile
    checks = "address,bounds,integer-divide-by-zero,signed-integer-overflow,shift,float-cast-overflow"
    flags = ["-std=c++17", "-O1", "-g0", "-Wno-psabi", f"-fsanitize={checks}", "-fno-sanitize-recover=all"]
    built = subprocess.run(
        [COMPILER, *flags, f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(program)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "cannot find -lasan" in built.stderr:
        pytest.skip("this compiler comes without the sanitizers")
    assert built.returncode == 0, built.stderr[-4000:]
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "0 failures" in result.stdout
