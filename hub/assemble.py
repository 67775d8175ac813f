"""Put together what Hugging Face's kernel hub wants, from the package and the files of this folder.

    python hub/assemble.py                  # hub/build/project; nothing is uploaded

``project`` is a source tree for kernel-builder (build.toml, flake.nix, torch-ext); its ``build`` holds the variants
that kernel-builder would make of it, which ``kernels.get_local_kernel`` loads. Several versions of a kernel may live in
one process, so imports are relative, and operators are registered in a namespace of each build's own, which ``_ops.py``
names; kernel-builder writes that file itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

HUB = Path(__file__).resolve().parent
PACKAGE = HUB.parent / "fused_resnet"
NAME = "fused_resnet"
#: What the layers import, room by room; command line, surgery and tuning stay behind.
ROOMS = ("core", "devices", "kernels", "testing", "backends", "selection", "ops", "functional", "nn")
LEFT = ("testing/conformance", "core/lazy_operators.py")
BACKENDS = {"cpu": {"type": "cpu"}, "cuda": {"type": "cuda", "archs": ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]}}
OPS = '''"""The namespace of this build's operators."""

import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    return "{namespace}::" + op_name
'''

#: Older versions of kernels import the folder of this name.
ALIAS = """import importlib.util
import sys
from pathlib import Path

_place = Path(__file__).parents[1] / "__init__.py"
_spec = importlib.util.spec_from_file_location("{namespace}_alias", _place)
_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _module
_spec.loader.exec_module(_module)
globals().update(vars(_module))
"""


def portable(source: str, depth: int) -> str:
    """A module of the package with its operators in the build's namespace; ``depth`` folders below ``_ops.py``."""
    above = "." * (depth + 1)
    source = re.sub(r"^from fused_resnet\.", f"from {above}", source, flags=re.MULTILINE)
    made, count = re.subn(r"torch\.ops\.fused_resnet\b(?!_C)", "_hub.ops", source)
    made, defined = re.subn(
        r'^NAMESPACE = "fused_resnet"$', 'NAMESPACE = _hub.add_op_namespace_prefix("")[:-2]', made, flags=re.MULTILINE
    )
    made = re.sub(r'^assert _ops\.NAMESPACE == "fused_resnet"$', "", made, flags=re.MULTILINE)
    if count or defined:
        line = "from __future__ import annotations\n"
        made = made.replace(line, f"{line}\nfrom {above} import _ops as _hub\n", 1)
    return made


def sources() -> dict[str, str]:
    """Every file of ``torch-ext/fused_resnet`` and its text."""
    files = {path.name: path.read_text() for path in (HUB / "torch-ext" / NAME).glob("*.py")}
    for room in ROOMS:
        for path in sorted((PACKAGE / room).rglob("*.py")):
            place = path.relative_to(PACKAGE).as_posix()
            if not place.startswith(LEFT):
                files[place] = portable(path.read_text(), place.count("/"))
    return files


def write(folder: Path, files: dict[str, str]) -> None:
    for place, text in files.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text)


def variant(folder: Path, backend: str, files: dict[str, str]) -> None:
    """What kernel-builder makes of a pure-Python kernel for ``backend``."""
    unique = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:7]
    namespace = f"_{NAME}_{backend}_{unique}"
    files = {**files, "_ops.py": OPS.format(namespace=namespace)}
    files[f"{NAME}/__init__.py"] = ALIAS.format(namespace=namespace)
    write(folder, files)
    digests = {
        place: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for place, text in files.items()
    }
    metadata = {
        "id": namespace,
        "name": NAME.replace("_", "-"),
        "version": 1,
        "license": "mit",
        "python-depends": [],
        "backend": BACKENDS[backend],
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n")


def assemble(project: Path) -> None:
    files = sources()
    shutil.rmtree(project, ignore_errors=True)
    write(project / "torch-ext" / NAME, files)
    for name in ("build.toml", "flake.nix", "CARD.md"):
        shutil.copy(HUB / name, project / name)
    shutil.copytree(HUB / "tests", project / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for backend in BACKENDS:
        variant(project / "build" / f"torch-{backend}", backend, files)


if __name__ == "__main__":
    assemble(Path(sys.argv[1]) if len(sys.argv) > 1 else HUB / "build" / "project")
