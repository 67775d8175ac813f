"""``fused-resnet export``: a file counts as done once it has been loaded and computes what eager does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet.cli import export as command
from fused_resnet.cli.target import load_target
from tests.support import toolchain
from tests.support.command_line import fails, invoke, ok

SIZE = ("--size", 32)


@pytest.fixture
def weights(model_file: Path, tmp_path: Path) -> Path:
    torch.save(load_target(f"{model_file}:Net").model.state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


def _expected(model_file: Path, weights: Path, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = load_target(f"{model_file}:Net", str(weights)).model(x)
    return y


def test_pt2_keeps_the_fused_operators(model_file: Path, weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    output = ok("export", f"{model_file}:Net", "--weights", weights, "--format", "pt2", "--output", path, *SIZE)
    assert "batch 2: rms error" in output
    assert "batch 3: rms error" in output
    assert f"{path}: torch.export program with 5 fused operators, any number of images of 32x32" in output
    program = torch.export.load(path)
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(x), _expected(model_file, weights, x), rtol=1e-3, atol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.pt", "net.pt2"]


def test_one_batch_size_and_another_dtype(model_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    output = ok("export", f"{model_file}:Net", "-f", "pt2", "-o", path, *SIZE, "--batch", 1, "--dtype", "bfloat16")
    assert "batches of 1 of 32x32, bfloat16" in output
    assert torch.export.load(path).module()(torch.randn(1, 3, 32, 32).bfloat16()).shape == (1, 4)


def test_onnx(model_file: Path, weights: Path, tmp_path: Path) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnxruntime

    path = tmp_path / "net.onnx"
    ok("export", f"{model_file}:Net", "--weights", weights, "-f", "onnx", "-o", path, *SIZE)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 32, 32)
    (y,) = session.run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), _expected(model_file, weights, x), rtol=1e-3, atol=1e-4)


# ---- errors ----------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_one_sentence(model_file: Path, tmp_path: Path) -> None:
    model = f"{model_file}:Net"
    formats = fails("export", model, "-f", "tflite", "-o", tmp_path / "a")
    assert formats == "error: --format: expected one of onnx, pt2, aoti, got 'tflite'"
    assert "--output: no folder" in fails("export", model, "-f", "pt2", "-o", tmp_path / "none" / "a.pt2")
    assert "--output: expected a file, got the folder" in fails("export", model, "-f", "pt2", "-o", tmp_path)
    assert "MODEL: " in fails("export", f"{model_file}:number", "-f", "pt2", "-o", tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_remedy(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    message = fails("export", f"{model_file}:Net", "-f", "onnx", "-o", tmp_path / "a.onnx")
    assert message.endswith("pip install onnx onnxscript onnxruntime")


def test_what_cannot_be_exported_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "branching.py").write_text(
        textwrap.dedent(
            """
            import torch
            from torch import nn
            class Branching(nn.Module):
                def forward(self, x):
                    return x + 1 if x.sum() > 0 else x
            class OneBatch(nn.Module):
                def forward(self, x):
                    return x.view(2, -1)
            """
        )
    )
    call = ("export", f"{tmp_path / 'branching.py'}:Branching", "-f", "pt2", "-o", tmp_path / "a.pt2")
    message = fails(*call, *SIZE)
    assert message.startswith("error: Branching cannot be exported as pt2 (")
    result = invoke(*call, *SIZE, "--debug")
    assert result.exit_code == 1
    assert result.exception is not None
    assert not isinstance(result.exception, SystemExit)
    call = ("export", f"{tmp_path / 'branching.py'}:OneBatch", "-f", "pt2", "-o", tmp_path / "a.pt2")
    assert "--batch 1 asks for one batch size alone" in fails(*call, *SIZE)
    ok(*call, *SIZE, "--batch", 2)


def test_a_file_that_is_wrong_is_not_left(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nearly(model: Any, example: Tensor, any_batch: bool, path: Path) -> Any:
        path.write_text("a program")
        return "a program", lambda x: model(x) * (1.001 if len(x) == 3 else 1)

    monkeypatch.setitem(command._EXPORTERS, "pt2", nearly)
    (tmp_path / "net.pt2").write_text("an older one")
    result = invoke("export", f"{model_file}:Net", "-f", "pt2", "-o", tmp_path / "net.pt2", *SIZE)
    assert result.exit_code == 1
    assert "ok  batch 2" in result.stdout
    assert "FAILED  batch 3" in result.stdout
    assert result.stderr == "error: the exported file does not compute what the model does; nothing was written\n"
    assert (tmp_path / "net.pt2").read_text() == "an older one"
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt2"]


# ---- AOTInductor -----------------------------------------------------------------------------------------------

PROGRAM = """
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>
#include <fstream>
#include <vector>

int main(int, char** argv) {
  c10::InferenceMode mode;
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  std::vector<float> pixels(5 * 3 * 32 * 32);
  std::ifstream(argv[2], std::ios::binary).read(reinterpret_cast<char*>(pixels.data()), pixels.size() * 4);
  const at::Tensor x = torch::from_blob(pixels.data(), {5, 3, 32, 32});
  const at::Tensor y = loader.run({x})[0].contiguous();
  std::ofstream(argv[3], std::ios::binary).write(static_cast<const char*>(y.data_ptr()), y.nbytes());
}
"""


@pytest.mark.slow
def test_an_aotinductor_package_runs_from_cpp_without_python(model_file: Path, weights: Path, tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "c++")
    if reason := toolchain.why_not(compiler):
        pytest.skip(reason)
    path = tmp_path / "net.pt2"
    ok("export", f"{model_file}:Net", "--weights", weights, "--format", "aoti", "--output", path, *SIZE)
    (tmp_path / "main.cpp").write_text(PROGRAM)
    root = Path(torch.__file__).parent
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    subprocess.run(
        [compiler, "-std=c++20", "-O0", *includes, "main.cpp", "-o", "main", "-Wl,--no-as-needed", *libraries],
        cwd=tmp_path, check=True,
    )  # fmt: skip
    linked = subprocess.run(["ldd", "main"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "libpython" not in linked
    assert "libtorch_python" not in linked
    x = torch.randn(5, 3, 32, 32)
    (tmp_path / "x").write_bytes(x.numpy().tobytes())
    subprocess.run(["./main", path, "x", "y"], cwd=tmp_path, check=True)
    y = torch.frombuffer(bytearray((tmp_path / "y").read_bytes()), dtype=torch.float32).view(5, 4)
    torch.testing.assert_close(y, _expected(model_file, weights, x), rtol=1e-3, atol=1e-4)
