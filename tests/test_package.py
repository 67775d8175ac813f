"""The package as a whole: import is silent, quick and needs nothing optional; metadata and layout hold together."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fused_resnet

ROOT = Path(fused_resnet.__file__).parent


def run_python(code: str, *, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    import os

    env = {**os.environ, **(environment or {}), "PYTHONPATH": str(ROOT.parent)}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=env, check=False
    )


def test_import_is_silent_and_takes_nothing_with_it() -> None:
    result = run_python(
        "import sys, fused_resnet\n"
        "heavy = {'torch', 'triton', 'torchvision', 'timm', 'matplotlib', 'sklearn', 'PIL', 'rich', 'typer', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert result.stdout.strip() == "[]"
    assert result.stderr == ""
    assert result.returncode == 0


def test_use_is_silent_without_gpu_triton_torchvision_or_extension() -> None:
    """Everything optional is made unimportable; the operator still answers, by the eager backend."""
    result = run_python(
        "import sys\n"
        "for name in ('triton', 'torchvision', 'timm', 'matplotlib', 'fused_resnet._C', 'fused_resnet._C_cuda'):\n"
        "    sys.modules[name] = None\n"
        "import torch, fused_resnet\n"
        "x, w = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3)\n"
        "y = fused_resnet.functional.conv_bn_add_relu(x, w, residual=torch.ones(1, 4, 3, 3))\n"
        "expected = torch.relu(torch.nn.functional.conv2d(x, w) + 1)\n"
        "torch.testing.assert_close(y, expected)\n"
        "print('heard' if any(m.startswith('triton') for m in sys.modules if sys.modules[m]) else 'ok')",
        environment={"CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "ok"
    assert result.stderr == ""


def test_public_names_exist_and_unknown_ones_do_not() -> None:
    for name in fused_resnet.__all__:
        assert getattr(fused_resnet, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'fuze'"):
        fused_resnet.fuze  # noqa: B018


def test_version_is_the_metadata_version() -> None:
    text = (ROOT.parent / "pyproject.toml").read_text() if (ROOT.parent / "pyproject.toml").exists() else None
    if text is None:
        pytest.skip("not in a source tree")
    assert f'version = "{fused_resnet.__version__}"' in text


#: What each layer may import of this package (design: data flows one way).
LAYERS = {
    "layout": set(),
    "packed_weights": set(),
    "convolution": {"layout"},
    "reference": {"convolution", "packed_weights"},
    "problem": {"layout", "reference"},
    "timing": set(),
    "images": set(),
}


@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_lower_layers_import_nothing_above_them(layer: str) -> None:
    path = ROOT / f"{layer}.py"
    files = [path] if path.exists() else sorted((ROOT / layer).rglob("*.py"))
    assert files
    for file in files:
        depth = len(file.relative_to(ROOT).parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == depth:
                modules = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
                above = set(modules) - LAYERS[layer]
                assert not above, f"{file.relative_to(ROOT)}:{node.lineno} imports {', '.join(sorted(above))}"


def includes_of(path: Path, csrc: Path) -> list[Path]:
    """The files of csrc that this one includes; every quoted name must be one."""
    found = []
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
        file = next((base / name for base in (path.parent, csrc) if (base / name).is_file()), None)
        assert file is not None, f'{path.relative_to(csrc)}: there is no "{name}"'
        found.append(file.resolve())
    return found


def test_no_circle_of_includes() -> None:
    csrc = ROOT.parent / "csrc"
    if not csrc.exists():
        pytest.skip("not in a source tree")
    files = [path.resolve() for path in csrc.rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu")]
    left = {path: set(includes_of(path, csrc)) for path in files}
    while leaves := {path for path, included in left.items() if not included}:
        left = {path: included - leaves for path, included in left.items() if path not in leaves}
    assert not left, f"include one another: {', '.join(sorted(path.name for path in left))}"


def test_files_stay_readable() -> None:
    """A file has fewer than 400 lines; one that outgrows that has two subjects."""
    long = {
        str(path.relative_to(ROOT)): lines
        for path in ROOT.rglob("*.py")
        if (lines := len(path.read_text().splitlines())) >= 400
    }
    assert not long


def test_modules_import_one_by_one() -> None:
    """No import cycle hides behind the order in which others were imported."""
    names = [p.stem for p in ROOT.glob("*.py") if p.stem not in ("__init__", "__main__")]
    assert names
    for name in names:
        importlib.import_module(f"fused_resnet.{name}")
