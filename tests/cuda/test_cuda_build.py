"""How the build finds nvcc and chooses architectures; nothing is compiled here."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "csrc"))

import cuda_build

ROOT = Path(__file__).resolve().parents[2]
TOOLKIT = cuda_build.Toolkit("nvcc", "13.0", ("include",), ("lib",), ("75", "80", "86", "90", "90a", "100", "120"))

# Answers --version, --dryrun and --list-gpu-arch as nvcc does, and compiles nothing.
FAKE_NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  *--dryrun*) echo "#$ _HERE_=elsewhere" >&2; echo "#$ TOP={top}/bin/.." >&2 ;;
  *--list-gpu-arch*) echo compute_80; echo compute_90 ;;
esac
"""


def fake_toolkit(top: Path, version: str = "13.0") -> Path:
    """A toolkit's folder with the files that the build looks for; returns its nvcc."""
    for folder in ("bin", "include", "lib64"):
        (top / folder).mkdir(parents=True)
    (top / "include" / "cuda_runtime_api.h").touch()
    (top / "lib64" / "libcudart_static.a").touch()
    (top / "lib64" / "libcudart.so.13").touch()
    nvcc = top / "bin" / "nvcc"
    nvcc.write_text(FAKE_NVCC.format(top=top, version=version))
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture
def no_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_nvcc_behind_a_wrapper_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_toolkit: None) -> None:
    real = fake_toolkit(tmp_path / "toolkit")
    wrapper = tmp_path / "path" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
    toolkit = cuda_build.find_toolkit()
    assert toolkit.nvcc == str(wrapper)
    assert toolkit.include_dirs == (str(tmp_path / "toolkit" / "include"),)
    assert toolkit.cudart("static")[0] == str(tmp_path / "toolkit" / "lib64" / "libcudart_static.a")
    assert toolkit.cudart("shared") == [str(tmp_path / "toolkit" / "lib64" / "libcudart.so.13")]
    with pytest.raises(ValueError, match="FUSED_RESNET_CUDART: expected static or shared, got 'dynamic'"):
        toolkit.cudart("dynamic")


def test_cuda_home_is_obeyed_even_where_it_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_toolkit(tmp_path / "toolkit", version="12.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert cuda_build.find_toolkit().version == "12.8"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(cuda_build.NoToolkit, match="found no nvcc in CUDA_HOME"):
        cuda_build.find_toolkit()


def test_nvcc_of_the_pypi_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_toolkit: None) -> None:
    site = tmp_path / "site-packages"
    fake_toolkit(site / "nvidia" / "cu13")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(cuda_build.sysconfig, "get_paths", lambda: {"purelib": str(site), "platlib": str(site)})
    assert cuda_build.find_toolkit().nvcc == str(site / "nvidia" / "cu13" / "bin" / "nvcc")


def test_pypi_packages_of_cuda_12_lie_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_toolkit: None
) -> None:
    site = tmp_path / "site-packages"
    nvcc = fake_toolkit(site / "nvidia" / "cuda_nvcc", version="12.9")
    for folder in ("include", "lib64"):
        (site / "nvidia" / "cuda_runtime" / folder).parent.mkdir(exist_ok=True)
        (site / "nvidia" / "cuda_nvcc" / folder).rename(site / "nvidia" / "cuda_runtime" / folder)
    monkeypatch.setenv("PATH", str(nvcc.parent) + ":/usr/bin:/bin")
    toolkit = cuda_build.find_toolkit()
    assert toolkit.include_dirs == (str(site / "nvidia" / "cuda_runtime" / "include"),)
    assert toolkit.cudart("static")[0].startswith(str(site / "nvidia" / "cuda_runtime"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, ["75", "80", "90", "100", "120"]),
        ("native", ["75", "80", "90", "100", "120"]),
        ("8.0;9.0+PTX", ["80", "90"]),
        ("9.0a 8.6", ["86", "90a"]),
        ("12.0,7.0,8.0", ["80", "120"]),  # no kernel here runs before sm_75
        ("8.0;13.7", ["80"]),  # unknown to this nvcc
    ],
)
def test_architectures(text: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert cuda_build.architectures(TOOLKIT, text) == expected
    if text is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
        assert cuda_build.architectures(TOOLKIT) == expected


def test_architectures_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST: expected numbers like 8.0;9.0\+PTX, got 'Ampere'"):
        cuda_build.architectures(TOOLKIT, "Ampere")
    with pytest.raises(cuda_build.NoToolkit, match="none of \\['70'\\] that is sm_75 or newer"):
        cuda_build.architectures(TOOLKIT, "7.0")


def test_every_cubin_comes_from_the_embedded_ptx() -> None:
    assert cuda_build.gencode(["80", "90", "120"]) == "-gencode=arch=compute_80,code=[compute_80,sm_80,sm_90,sm_120]"
    assert cuda_build.gencode(["80", "90a"]) == (
        "-gencode=arch=compute_80,code=[compute_80,sm_80] -gencode=arch=compute_90a,code=sm_90a"
    )
    assert cuda_build.gencode(["75", "80", "90"]) == (
        "-gencode=arch=compute_80,code=[compute_80,sm_80,sm_90] -gencode=arch=compute_75,code=sm_75"
    )
    assert cuda_build.built_for(["75", "80", "90"]) == "sm_75 sm_80 sm_90 compute_80"
    assert cuda_build.gencode(["75"]) == "-gencode=arch=compute_75,code=[compute_75,sm_75]"
    assert cuda_build.gencode(["90a"]) == "-gencode=arch=compute_90a,code=[compute_90a,sm_90a]"


def test_who_asks_for_hopper_gets_its_own_instructions() -> None:
    """In files of their own: what every other kernel is made of does not change."""
    code = "-gencode=arch=compute_90a,code=[compute_90a,sm_90a] -DFUSED_RESNET_HOPPER=1"
    for archs in (["80", "90"], ["90"], ["80", "90a"]):
        assert cuda_build.hopper_gencode(TOOLKIT, archs) == code
    empty = "-gencode=arch=compute_80,code=compute_80 -DFUSED_RESNET_HOPPER=0"
    assert cuda_build.hopper_gencode(TOOLKIT, ["75", "80", "100"]) == empty
    old = dataclasses.replace(TOOLKIT, version="11.8")
    assert cuda_build.hopper_gencode(old, ["80", "90"]) == empty
    assert [path.name for path in cuda_build.HOPPER_KERNELS] == ["kernels_wgmma_bf16.cu", "kernels_wgmma_f16.cu"]


def setup_py(*command: str, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = ("CUDA_", "FUSED_RESNET_", "TORCH_CUDA_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(
        [sys.executable, "setup.py", *(command or ("--name",))], cwd=root, env=clean | environment,
        capture_output=True, text=True,
    )  # fmt: skip


def test_setup_says_what_it_will_build(tmp_path: Path) -> None:
    done = setup_py(FUSED_RESNET_CUDA="0", CXX="no-such-compiler")
    assert done.returncode == 0
    assert "fused_resnet: no C++ compiler found, installing the pure-Python package" in done.stdout
    done = setup_py(FUSED_RESNET_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert "FUSED_RESNET_CUDA=1, but found no nvcc" in done.stderr
    assert "pip install nvidia-cuda-nvcc" in done.stderr
    done = setup_py(FUSED_RESNET_CUDA="auto", CUDA_HOME=str(tmp_path))
    assert done.returncode == 0
    assert done.stdout.count("fused_resnet: building for the CPU only: found no nvcc") == 1
    home = str(fake_toolkit(tmp_path / "toolkit").parents[1])
    done = setup_py(CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="7.5")
    assert done.returncode == 0
    assert "fused_resnet: building for the CPU only: nvcc 13.0 compiles for none of ['75']" in done.stdout
    done = setup_py(CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="9.0")
    assert "fused_resnet: building _C_cuda with nvcc 13.0" in done.stdout
    assert "for sm_90 and PTX of compute_90, CUDA runtime static" in done.stdout
    done = setup_py(CUDA_HOME=home, FUSED_RESNET_CUDART="dynamic")
    assert "FUSED_RESNET_CUDART: expected static or shared, got 'dynamic'" in done.stderr
    done = setup_py(FUSED_RESNET_CUDA="yes")
    assert "FUSED_RESNET_CUDA: expected auto, 0 or 1, got 'yes'" in done.stderr


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ("65.5.0", "fused_resnet: setuptools must be 77 or newer, got 65.5.0: pip install -U setuptools"),
        ("80.9.0", "fused_resnet: the build needs torch: pip install torch, or install without "
                   "--no-build-isolation"),
    ],
)  # fmt: skip
def test_what_a_build_without_isolation_lacks(version: str, sentence: str, tmp_path: Path) -> None:
    """One sentence, no traceback. -S: an environment with nothing but this stand-in for setuptools."""
    (tmp_path / "setuptools" / "command").mkdir(parents=True)
    (tmp_path / "setuptools" / "__init__.py").write_text(f"__version__ = {version!r}\nsetup = print")
    (tmp_path / "setuptools" / "command" / "build_py.py").write_text("build_py = object")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "CXX": "sh"}
    done = subprocess.run(
        [sys.executable, "-S", "setup.py"], cwd=ROOT, env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.strip() == sentence


#: Answers as nvcc does, and makes an object file of nothing; `FAIL` in the source is an error.
COMPILING_NVCC = f"""{FAKE_NVCC}
while [ $# -gt 0 ]; do case "$1" in -c) source=$2; shift;; -o) target=$2; shift;; esac; shift; done
if [ -n "$target" ]; then
  if grep -q FAIL "$source"; then echo "$source: error: FAIL" >&2; exit 1; fi
  echo | c++ -fPIC -x c++ -c - -o "$target"
fi
"""
MODULE = """#include <Python.h>
PyMODINIT_FUNC __attribute__((visibility("default"))) PyInit_{name}() {{
  static PyModuleDef definition = {{PyModuleDef_HEAD_INIT, "{name}"}};
  return PyModule_Create(&definition);
}}
"""


def small_tree(folder: Path) -> Path:
    """setup.py with the smallest sources that it builds modules from."""
    for name in ("csrc/cuda", "fused_resnet"):
        (folder / name).mkdir(parents=True)
    for name in ("setup.py", "csrc/cuda_build.py"):
        shutil.copy(ROOT / name, folder / name)
    settings = '[project]\nname = "fused_resnet"\nversion = "0"\n[tool.setuptools]\npackages = ["fused_resnet"]\n'
    (folder / "pyproject.toml").write_text(settings)
    (folder / "fused_resnet/__init__.py").touch()
    (folder / "csrc/bindings.cpp").write_text(MODULE.format(name="_C"))
    (folder / "csrc/bindings_cuda.cpp").write_text(MODULE.format(name="_C_cuda"))
    (folder / "csrc/cuda/c_api.cpp").touch()
    (folder / "csrc/cuda/kernel.cu").touch()
    return folder


@pytest.mark.slow
def test_a_cuda_module_that_does_not_compile_leaves_the_other_alone(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    nvcc = fake_toolkit(tmp_path / "toolkit")
    nvcc.write_text(COMPILING_NVCC.format(top=tmp_path / "toolkit", version="13.0"))
    (tmp_path / "toolkit/lib64/libcudart_static.a").write_text("!<arch>\n")  # an archive of nothing
    tree = small_tree(tmp_path / "tree")
    modules = [tree / f"fused_resnet/{name}.abi3.so" for name in ("_C", "_C_cuda")]
    note = tree / "fused_resnet/_C_cuda.txt"  # what `fused-resnet doctor` reads

    def build(**environment: str) -> subprocess.CompletedProcess[str]:
        return setup_py(
            "build_ext", "--inplace", root=tree, CUDA_HOME=str(tmp_path / "toolkit"), CXX="c++", MAX_JOBS="1",
            TORCH_CUDA_ARCH_LIST="8.0", **environment,
        )  # fmt: skip

    older = tree / f"fused_resnet/_C{sysconfig.get_config_var('EXT_SUFFIX')}"  # which Python would prefer
    older.touch()
    done = build()
    assert done.returncode == 0, done.stderr
    assert not older.exists()
    assert "going on without" not in done.stdout
    assert all(module.exists() for module in modules)
    assert not note.exists()

    for broken in ("csrc/cuda/kernel.cu", "csrc/bindings_cuda.cpp"):
        sound = (tree / broken).read_text()
        (tree / broken).write_text("#error FAIL\n")
        done = build(FUSED_RESNET_CUDA="auto")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("fused_resnet: going on without _C_cuda, which does not compile") == 1
        assert [module.exists() for module in modules] == [True, False], "an older _C_cuda is not taken for a new one"
        assert note.read_text().startswith("it did not compile (")
        if broken.endswith(".cu"):
            (tree / broken).write_text(sound)

    done = build(FUSED_RESNET_CUDA="1")
    assert done.returncode != 0
    assert "going on without" not in done.stdout
    assert build(FUSED_RESNET_CUDA="0").returncode == 0
    assert note.read_text() == "FUSED_RESNET_CUDA=0 left it out of this build"
