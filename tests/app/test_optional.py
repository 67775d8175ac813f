"""Where torch is the only package: calls, blocks and training work, and the command line says what it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fused_resnet
from fused_resnet.core import user_cache

ROOT = Path(fused_resnet.__file__).parents[1]

#: With these names only, besides the standard library, torch is alone: it and what it requires.
TORCH = "torch torchgen functorch typing_extensions filelock fsspec jinja2 markupsafe mpmath networkx setuptools sympy"
#: What some commands need, and calls never do.
OPTIONAL = "numpy safetensors torchvision timm sklearn matplotlib PIL torchmetrics triton platformdirs"

#: All other modules are as if they were not installed.
HIDE = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and hidden(name):
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__module__", "").startswith("_frozen")]
sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


def run(code: str, folder: Path, hidden: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`code` as a program, in which the modules are missing for whose `name` the expression `hidden` holds."""
    script = folder / "program.py"
    script.write_text(f"hidden = lambda name: {hidden}\n{HIDE}\n{code}")
    env = {k: v for k, v in os.environ.items() if k not in ("FUSED_RESNET_CACHE_DIR", "PYTHONPATH")}
    env |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, env=env, cwd=folder, check=False
    )


def test_torch_alone_is_enough_for_calls_blocks_and_training(tmp_path: Path) -> None:
    done = run(
        """
import torch
from torch import nn
import fused_resnet
from fused_resnet import functional, models

for name in ("numpy", "triton", "rich"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is there: nothing is tested")

x, w = torch.randn(2, 8, 9, 9), torch.randn(8, 8, 3, 3)
bn = nn.BatchNorm2d(8).eval()
y = functional.conv_bn_add_relu(
    x, w, None, bn.weight, bn.bias, bn.running_mean, bn.running_var, eps=bn.eps, residual=x, padding=1)
expected = torch.relu(bn(nn.functional.conv2d(x, w, padding=1)) + x)
torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
with torch.inference_mode():
    functional.conv_bn_add_relu(x, w, residual=x, padding=1)

model = models.resnet18(num_classes=4).eval()
image = torch.randn(1, 3, 32, 32)
with torch.inference_mode():
    before = model(image)
fused_resnet.fuse(model)
with torch.inference_mode():
    torch.testing.assert_close(model(image), before, rtol=1e-3, atol=1e-3)
print(len(fused_resnet.explain(model)), "blocks")

model = models.resnet18(num_classes=4).train()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loss = nn.functional.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 3]))
loss.backward()
optimizer.step()
print("trained" if loss.isfinite() else loss)
""",
        tmp_path,
        f"name not in {['fused_resnet', *TORCH.split()]} and not name.startswith('_sysconfigdata')"
        " and name not in sys.stdlib_module_names",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "trained"
    assert lines[0].endswith("blocks")
    assert not lines[0].startswith("0")
    assert "fused_resnet" not in done.stderr, "what is missing and not needed is not mentioned"


def cli(folder: Path, *arguments: str, missing: str) -> subprocess.CompletedProcess[str]:
    code = "from fused_resnet.__main__ import main\nsys.argv[0] = 'fused-resnet'\nmain()\n"
    return run(code, folder, f"name in {missing.split()}", *arguments)


@pytest.mark.parametrize(
    ("command", "missing", "sentence"),
    [
        ("doctor", "typer", "fused-resnet: the command line needs typer: pip install typer"),
        ("doctor", "rich", "fused-resnet: the command line needs rich: pip install rich"),
        ("explain resnet18", OPTIONAL, "MODEL: 'resnet18' needs torchvision or timm: pip install torchvision"),
        ("explain timm:resnet18", OPTIONAL, "MODEL: 'timm:resnet18' needs timm: pip install timm"),
        ("explain net.py:model --weights net.safetensors", OPTIONAL,
         "this command needs safetensors: pip install safetensors"),
        ("predict net.py:model picture.png", OPTIONAL, "this command needs numpy: pip install numpy"),
        ("predict net.py:model picture.png", "PIL", "this command needs PIL: pip install pillow"),
        ("train --data digits --output out", OPTIONAL, "digits needs scikit-learn; install fused_resnet[demo]"),
        ("demo", OPTIONAL, "the demo needs matplotlib: pip install 'fused_resnet[demo]'"),
        ("compile --backend triton --problem n=1,h=8,w=8,c=8,k=8,dtype=float16 --out made", OPTIONAL,
         "triton: the package triton is not installed"),
    ],
)  # fmt: skip
def test_the_command_line_says_in_one_sentence_what_is_missing(
    command: str, missing: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "picture.png").touch()
    (tmp_path / "net.safetensors").touch()
    (tmp_path / "net.py").write_text("from fused_resnet import models\nmodel = models.resnet18(num_classes=2)\n")
    done = cli(tmp_path, *command.split(), missing=missing)
    assert done.returncode in (1, 2)
    said = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "fused-resnet: "))]
    assert len(said) == 1, done.stderr
    assert sentence in said[0]
    assert "Traceback" not in done.stderr


def test_the_command_line_works_without_what_a_command_does_not_need(tmp_path: Path) -> None:
    done = cli(tmp_path, "explain", "fused_resnet:resnet18", missing=OPTIONAL)
    assert done.returncode == 0, done.stderr
    assert "layer4.1" in done.stdout
    done = cli(tmp_path, "doctor", missing=OPTIONAL)
    assert done.returncode == 0, done.stderr
    assert "eager on cpu:" in done.stdout


# ---- where things are kept ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "HOME/.cache/fused_resnet"),
        ("linux", {"XDG_CACHE_HOME": "/big/disk"}, "/big/disk/fused_resnet"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "HOME/.cache/fused_resnet"),
        ("linux", {"FUSED_RESNET_CACHE_DIR": "/here", "XDG_CACHE_HOME": "/big/disk"}, "/here"),
        ("darwin", {"XDG_CACHE_HOME": "/big/disk"}, "HOME/Library/Caches/fused_resnet"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/fused_resnet/fused_resnet/Cache"),
        ("win32", {}, "HOME/AppData/Local/fused_resnet/fused_resnet/Cache"),
    ],
)
def test_the_users_cache(
    platform: str, variables: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "FUSED_RESNET_CACHE_DIR", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": str(tmp_path), **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert user_cache.directory() == Path(expected.replace("HOME", str(tmp_path)))
