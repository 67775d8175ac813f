"""The package as a whole: import is silent, quick and needs nothing optional; metadata and layout hold together."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterable
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


# ---- the map: CONTRIBUTING's table of rooms is the law that is checked here -----------------------------------

CONTRIBUTING = ROOT.parent / "CONTRIBUTING.md"
in_a_source_tree = pytest.mark.skipif(not CONTRIBUTING.exists(), reason="not in a source tree")
Graph = dict[str, set[str]]


def rooms_in_contributing() -> dict[str, tuple[int, set[str]]]:
    """Each room of the table: its floor, and the rooms it imports."""
    rows = re.findall(r"^\| (\d+) \| `(\S+)` \|.*\| ([^|]*) \|$", CONTRIBUTING.read_text(), re.MULTILINE)
    return {room: (int(floor), set(re.findall(r"`(\S+?)`", imports))) for floor, room, imports in rows}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, without that of the package itself."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports() -> Graph:
    """What each module imports of this package: at its top, inside functions, and for type checkers only."""
    known = modules()
    graph: Graph = {name: set() for name in known}
    for name, path in known.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                absolute = (node.module or "").split(".")
                if node.level:
                    base = [*package[: len(package) - node.level + 1], *filter(None, absolute)]
                elif absolute[0] == "fused_resnet":
                    base = absolute[1:]
                else:
                    continue
                for alias in node.names:
                    module = ".".join([*filter(None, base), alias.name])
                    graph[name].add(module if module in known else ".".join(filter(None, base)))
            elif isinstance(node, ast.Import):
                whole = [alias.name.partition(".") for alias in node.names]
                graph[name] |= {module for top, _, module in whole if top == "fused_resnet"}
        graph[name].discard(name)
    return graph


def circle(graph: Graph) -> list[str]:
    """A circle of ``graph``, or an empty list: what is left when all that imports nothing left is taken away."""
    left = dict(graph)
    while lowest := [name for name, below in left.items() if not below & left.keys()]:
        for name in lowest:
            del left[name]
    return sorted(left)


def room_of(module: str, rooms: Iterable[str]) -> str:
    """The innermost room of the table that holds ``module``; what lies at the top level is the front door."""
    if module in ("", "__main__"):
        return "fused_resnet"
    return max((room for room in rooms if f"{module}.".startswith(f"{room}.")), key=len, default=module)


@in_a_source_tree
def test_the_map_in_contributing_is_how_the_rooms_import_each_other() -> None:
    table = rooms_in_contributing()
    drawn = {room: below for room, (_, below) in table.items()}
    found: Graph = {room: set() for room in drawn}
    for module, below in imports().items():
        room = room_of(module, table)
        assert room in table, f"{module} is in no room of CONTRIBUTING's table"
        found[room] |= {room_of(other, table) for other in below} - {room}
    assert found == drawn


@in_a_source_tree
def test_rooms_import_from_lower_floors_only() -> None:
    table = rooms_in_contributing()
    for room, (floor, below) in table.items():
        assert floor == max((table[other][0] + 1 for other in below), default=0), f"the floor of {room}"
    assert max(floor for floor, _ in table.values()) < 11


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle(imports()) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == ["a", "b", "c", "d"]


def test_only_the_front_door_is_at_the_top_level() -> None:
    names = {path.name for path in ROOT.iterdir() if path.is_file() and not path.name.startswith("_C")}
    assert names == {"__init__.py", "__main__.py", "py.typed"}


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
    folders = [ROOT, *(ROOT.parent / name for name in ("csrc", "tests", "benchmarks") if CONTRIBUTING.exists())]
    long = {
        str(path.relative_to(ROOT.parent)): lines
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".sh")
        and (lines := len(path.read_text().splitlines())) >= 400
    }
    assert not long


def test_modules_import_one_by_one() -> None:
    """Each in a fresh interpreter would take minutes; that each imports at all shows what no circle hides."""
    pytest.importorskip("triton")
    for name in sorted(modules()):
        if name and not name.endswith("__main__"):
            importlib.import_module(f"fused_resnet.{name}")
