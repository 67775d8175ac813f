"""What is handed out: the sdist, the metadata, the README as PyPI shows it, and what an import costs."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import fused_resnet
from fused_resnet.core import extensions

ROOT = Path(__file__).resolve().parents[2]
SOURCE = re.compile(r'^Source = "(.+)"$', re.MULTILINE)


def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("needs git and a clone")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def test_the_sdist_holds_every_tracked_file(tmp_path: Path) -> None:
    """So what its tests, its documentation and its benchmarks need is in it."""
    files = tracked()
    for name in files:  # a build leaves its traces in the tree
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    environment = os.environ | {"CXX": "no-such-compiler"}  # what is compiled does not matter here
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--formats", "gztar", "--dist-dir", str(tmp_path / "dist")],
        cwd=tmp_path / "tree", env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as tar:
        held = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
    assert not files - held
    made = {name for name in held if name.startswith("fused_resnet.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert not held - files - made


def test_the_readme_links_to_files_that_exist_by_addresses_that_work_anywhere() -> None:
    """PyPI shows the README without the repository around it."""
    match = SOURCE.search((ROOT / "pyproject.toml").read_text())
    assert match is not None
    source = match[1]
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", readme)
    assert links
    for link in links:
        if link.startswith("#"):
            continue
        assert link.startswith("https://"), link
        if link.startswith(source.replace("https://github.com", "https://raw.githubusercontent.com")):
            assert (ROOT / link.split("/main/")[1]).exists(), link
        elif link.startswith(f"{source}/"):
            assert (ROOT / re.split("/(?:blob|tree)/main/", link)[1]).exists(), link


def test_the_package_adds_little_to_the_time_that_torch_takes_to_import() -> None:
    """At most 50 ms of processor time; repeated, since the first import of a machine reads the disk."""
    code = (
        "import sys, time, torch\n"
        "taken = []\n"
        "for _ in range(5):\n"
        "    for name in [name for name in sys.modules if name.split('.')[0] == 'fused_resnet']:\n"
        "        del sys.modules[name]\n"
        "    start = time.process_time()\n"
        "    import fused_resnet\n"
        "    taken.append(time.process_time() - start)\n"
        "print(min(taken))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert float(done.stdout) < 0.05


def test_what_the_build_wrote_down_is_in_the_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fused-resnet doctor` and every refusal of backend="cuda" name the variable that left the module out."""
    (tmp_path / "core").mkdir()
    (tmp_path / "_C_cuda.txt").write_text("FUSED_RESNET_CUDA=0 left it out of this build")
    monkeypatch.setattr(extensions, "__file__", str(tmp_path / "core/extensions.py"))
    monkeypatch.setattr(extensions, "_modules", {})

    def missing(name: str, package: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    sentence = extensions.why_not_cuda()
    assert sentence is not None
    assert sentence.startswith(
        "the extension fused_resnet._C_cuda is not built (FUSED_RESNET_CUDA=0 left it out of this build): install nvcc"
    )
    (tmp_path / "_C_cuda.txt").unlink()
    extensions._modules.clear()
    assert "is not built: install nvcc" in str(extensions.why_not_cuda())


def test_the_metadata_is_what_tools_ask_for() -> None:
    """Where validate-pyproject is installed, by its rules as well."""
    if sys.version_info >= (3, 11):
        import tomllib

        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert project["name"] == fused_resnet.__name__
        assert {"authors", "classifiers", "keywords", "license", "readme", "urls"} <= project.keys()
        api = pytest.importorskip("validate_pyproject.api", reason="validate-pyproject is not installed")
        api.Validator()(tomllib.loads((ROOT / "pyproject.toml").read_text()))
    else:
        pytest.skip("tomllib comes with Python 3.11")


def test_the_workflow_is_one_and_its_targets_exist() -> None:
    """By the schema where check-jsonschema is installed; `make` targets and options are those of this repository."""
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    targets = set(re.findall(r"run: make ([\w-]+)", text))
    assert targets
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    workflow = yaml.safe_load(text)
    assert set(workflow["jobs"]) == {"test", "cuda-build", "docs", "package", "gpu"}
    stacks = workflow["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert len({stack["python"] for stack in stacks}) == len({stack["torch"] for stack in stacks}) == 2
    assert workflow["jobs"]["gpu"]["if"] == "vars.GPU_RUNNER != ''"
    checker = shutil.which("check-jsonschema", path=str(Path(sys.executable).parent))
    if checker is not None:
        done = subprocess.run(
            [checker, "--builtin-schema", "vendor.github-workflows", str(ROOT / ".github/workflows/ci.yml")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
