"""What `make` installs and builds, and when: the Makefile's stamps, with a stand-in for the environment's Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

if shutil.which("make") is None:
    pytest.skip("needs make", allow_module_level=True)

# Writes down what it was called for, and leaves a CUDA module where one would have been built.
PYTHON = """#!/bin/sh
case "$*" in
  *"pip install"*) what=${*##*-e .} ;;
  *build_ext*) what=build ;;
esac
echo "$what cuda=$FUSED_RESNET_CUDA archs=$TORCH_CUDA_ARCH_LIST" >> log
test "$FUSED_RESNET_CUDA" = 0 || touch fused_resnet/_C_cuda.so
"""


class Project:
    """A project of this Makefile, and an environment that has torch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(ROOT / "Makefile", folder)
        for name in ("csrc", "fused_resnet", ".venv/bin"):
            (folder / name).mkdir(parents=True)
        for name in ("pyproject.toml", "setup.py", "csrc/kernel.cpp", ".venv/.torch"):
            (folder / name).touch()
        for name, text in (("python", PYTHON), ("fused-resnet", "#!/bin/sh\n")):
            (folder / ".venv/bin" / name).write_text(text)
            (folder / ".venv/bin" / name).chmod(0o755)

    def make(self, target: str, gpu: bool = False, **environment: str) -> list[str]:
        """What the environment's Python was called for."""
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "TORCH_"))}
        # fixed here: this machine may have a GPU
        command = ["make", "-s", target, f"GPU={'yes' if gpu else ''}", "CAPABILITY=", "VENV=.venv"]
        done = subprocess.run(command, cwd=self.folder, env=clean | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return log.read_text().splitlines() if log.exists() else []

    def change(self, name: str) -> None:
        time.sleep(0.02)  # a file system's clock ticks a few hundred times a second
        (self.folder / name).touch()

    @property
    def has_cuda(self) -> bool:
        return (self.folder / "fused_resnet/_C_cuda.so").exists()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_a_demo_without_a_gpu_leaves_the_cuda_module_to_the_tests(project: Project) -> None:
    assert project.make("demo") == ["[demo] cuda=0 archs=8.0"]
    assert not project.has_cuda
    assert project.make("demo") == []
    assert project.make("install") == ["[dev] cuda=auto archs=8.0"]
    assert project.has_cuda
    assert project.make("demo") == project.make("demo", gpu=True) == project.make("install") == []


def test_a_demo_beside_a_gpu_has_the_cuda_module(project: Project) -> None:
    assert project.make("demo") == ["[demo] cuda=0 archs=8.0"]
    assert project.make("demo", gpu=True) == ["[demo] cuda=auto archs=8.0"]
    assert project.make("demo", gpu=True) == project.make("demo") == []
    assert project.make("install") == ["[dev] cuda=auto archs=8.0"]


@pytest.mark.parametrize("source", ["csrc/kernel.cpp", "setup.py"])
def test_a_changed_source_builds_again_and_nothing_is_left_of_the_old_one(project: Project, source: str) -> None:
    project.make("install")
    project.change(source)
    assert project.make("demo") == ["build cuda=0 archs=8.0"]
    assert not project.has_cuda, "the CUDA module of older sources"
    assert project.make("demo") == []
    assert [line.split(" ", 1)[1] for line in project.make("install")] == ["cuda=auto archs=8.0"]
    assert project.has_cuda
    project.change(source)
    assert project.make("install") == ["build cuda=auto archs=8.0"]
    assert project.make("demo") == project.make("install") == []


def test_a_changed_pyproject_installs_again(project: Project) -> None:
    project.make("install")
    project.change("pyproject.toml")
    assert project.make("install") == ["[dev] cuda=auto archs=8.0"]
    assert project.make("install") == []


def test_other_architectures_are_another_build(project: Project) -> None:
    project.make("install")
    assert project.make("install", TORCH_CUDA_ARCH_LIST="8.0;9.0") == ["build cuda=auto archs=8.0;9.0"]
    assert project.make("install", TORCH_CUDA_ARCH_LIST="8.0;9.0") == []
    assert project.make("install") == ["build cuda=auto archs=8.0"]
