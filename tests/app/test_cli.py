"""The command line through its entry point: output, exit status, and errors of one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import fused_resnet
from fused_resnet.backends import cpu
from fused_resnet.cli import app
from tests.support.command_line import fails, invoke, ok

torchvision = pytest.importorskip("torchvision")

# ---- entry points ----------------------------------------------------------------------------------------------


def test_python_m_in_a_process_of_its_own(model_file: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(fused_resnet.__file__).parents[1]), "COLUMNS": "200"}
    command = [sys.executable, "-m", "fused_resnet"]
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, env=env, check=False)
    assert (result.returncode, result.stdout) == (0, f"fused_resnet {fused_resnet.__version__}\n")
    wrong = subprocess.run(
        [*command, "explain", f"{model_file}:Nothing"], capture_output=True, text=True, env=env, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: MODEL: ")
    assert "has no 'Nothing'; it defines Net, Mlp" in wrong.stderr


def test_every_option_says_what_it_is() -> None:
    silent = [
        f"{name} {parameter.name}"
        for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
        for parameter in command.params
        if not getattr(parameter, "help", None)
    ]
    assert silent == []


def test_a_model_of_several_inputs_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(
        "from torchvision.models.resnet import BasicBlock, ResNet\n"
        "class Two(ResNet):\n"
        "    def forward(self, image1, image2):\n"
        "        return super().forward(image1 - image2)\n"
        "two = Two(BasicBlock, [1, 1, 1, 1])\n"
    )
    for command in ("verify", "bench", "tune", "selftest"):
        message = fails(command, f"{tmp_path / 'two.py'}:two")
        assert "expected a forward of one batch of images" in message
        assert "'image2'" in message


def test_help_needs_no_torch() -> None:
    code = "import sys; from fused_resnet.cli import app; print('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(Path(fused_resnet.__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert result.stdout == "False\n", result.stderr


def test_every_command_has_help() -> None:
    listing = ok("--help")
    commands = "doctor explain verify bench predict demo train finetune compile tune selftest roofline"
    for command in commands.split():
        assert command in listing
        assert "Usage" in ok(command, "--help")


def test_unknown_option_is_a_usage_error() -> None:
    assert invoke("explain", "--wat").exit_code == 2


# ---- doctor ----------------------------------------------------------------------------------------------------


def test_doctor_names_every_backend_and_its_reason() -> None:
    text = ok("doctor")
    assert torch.__version__ in text
    for name in fused_resnet.backends.names():
        assert f"{name} on cpu:" in text
        assert f"{name} on cuda:" in text
    assert "eager on cpu:         runs" in text


def test_doctor_as_json() -> None:
    document = json.loads(ok("doctor", "--json"))
    assert document["environment"]["torch"] == torch.__version__
    assert document["backends"]["eager"]["cpu"] is None


# ---- verify ----------------------------------------------------------------------------------------------------


def test_verify_passes_and_lists_each_block(model_file: Path) -> None:
    text = ok("verify", f"{model_file}:Net", "--size", 17)
    for row in ("layer1.0", "layer1.1", "end to end"):
        assert row in text
    assert "top-1 equal to eager's on 2 of 2 images" in text
    assert "every block and the whole model are within the bar" in text


def test_verify_fails_with_status_1_when_a_block_is_wrong(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_resnet.comparison import verify

    honest = verify._outputs

    def wrong(sides: Any, x: torch.Tensor) -> Any:
        eager, fused, exact = honest(sides, x)
        return eager, fused * 1.0001, exact

    monkeypatch.setattr(verify, "_outputs", wrong)
    result = invoke("verify", f"{model_file}:Net", "--size", 16, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert not document["passed"]
    assert all(row["ratio"] > 10 for row in document["rows"])


def test_verify_errors(model_file: Path) -> None:
    assert "nothing in this model is fused" in fails("verify", f"{model_file}:Mlp", "--size", 32)
    assert "--dtype: expected one of" in fails("verify", f"{model_file}:Net", "--dtype", "int8")
    assert "backend: expected 'auto'" in fails("verify", f"{model_file}:Net", "--backend", "cutlass")
    assert "winograd: expected" in fails("verify", f"{model_file}:Net", "--winograd", "f6")
    assert "--device" in fails("verify", f"{model_file}:Net", "--device", "warp")
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in fails("verify", f"{model_file}:Net", "--device", "cuda")


# ---- bench -----------------------------------------------------------------------------------------------------


def test_bench_prints_both_tables(model_file: Path) -> None:
    text = ok("bench", f"{model_file}:Net", "--size", 16, "--rounds", 3, "--no-compile", "--threads", 1)
    assert "Net, batch 1, 16x16, float32, CPU, 1 thread" in text
    for name in ("eager", "eager channels_last", "fused", "layer1.0", "layer1.1", "1x16x16x16"):
        assert name in text


def test_bench_as_json(model_file: Path) -> None:
    options = ("--rounds", 3, "--no-compile", "--no-blocks", "--json")
    document = json.loads(ok("bench", f"{model_file}:Net", "-b", "1,2", "-s", 16, *options))
    assert [entry["batch"] for entry in document["batches"]] == [1, 2]
    rows = {row["name"]: row for row in document["batches"][1]["rows"]}
    assert rows["fused"]["low"] <= rows["fused"]["speedup"] <= rows["fused"]["high"]
    assert rows["fused"]["images_per_second"] == pytest.approx(2e3 / rows["fused"]["median_ms"])
    assert min(rows["eager"]["speedup"], rows["eager channels_last"]["speedup"]) <= 1.0


def test_bench_errors(model_file: Path) -> None:
    assert "--batch: expected positive integers" in fails("bench", f"{model_file}:Net", "--batch", "1,x")
    assert "no block of it is fused" in fails("bench", f"{model_file}:Mlp", "-s", 32, "--rounds", 1, "--no-compile")


# ---- train, finetune, compile ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_then_finetune_then_predict(model_file: Path, tmp_path: Path, images: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("torchmetrics")
    run, second = tmp_path / "run", tmp_path / "second"
    spec = f"{model_file}:Net"
    text = ok("train", "--model", spec, "--epochs", 1, "--output", run, "--lr", 0.05)
    assert "accuracy" in text
    for name in ("last.pt", "best.pt", "weights.safetensors", "log.csv"):
        assert (run / name).is_file()
    assert "holds a run" in fails("train", "--model", spec, "--epochs", 1, "--output", run)
    ok("finetune", "--model", spec, "--weights", run / "best.pt", "--epochs", 1, "--freeze-until", "fc", "-o", second)
    before = torch.load(run / "best.pt", weights_only=True)["model"]
    after = torch.load(second / "last.pt", weights_only=True)["model"]
    assert torch.equal(before["conv1.weight"], after["conv1.weight"])
    assert not torch.equal(before["fc.weight"], after["fc.weight"])


def test_train_errors(model_file: Path, tmp_path: Path) -> None:
    assert "data: expected digits, cifar10 or folder:PATH" in fails("train", "--data", "imagenet", "-o", tmp_path / "a")
    message = fails("train", "--data", "cifar10", "--data-root", tmp_path, "-o", tmp_path / "a")
    assert "cifar-10-python.tar.gz" in message
    assert "must be callable" in fails("train", "--model", f"{model_file}:number", "-o", tmp_path / "b")
    missing = tmp_path / "missing.pt"
    assert "missing.pt" in fails("finetune", "--model", f"{model_file}:Net", "--weights", missing, "-o", tmp_path / "c")


def test_compile_refuses_with_the_librarys_sentence(tmp_path: Path) -> None:
    problem = "n=1,h=14,w=14,c=64,k=64,padding=1,dtype=float16,residual=1"
    out = tmp_path / "out"
    assert "backend: expected one of cuda, triton" in fails(
        "compile", "--backend", "opencl", "--problem", problem, "--out", out
    )
    assert "arch: expected sm_75 or newer" in fails("compile", "--arch", "volta", "--problem", problem, "--out", out)
    assert "unknown field" in fails("compile", "--problem", "n=1,height=3", "--out", out)


# ---- tune, selftest, roofline ----------------------------------------------------------------------------------


def test_roofline_needs_no_gpu(model_file: Path, tmp_path: Path) -> None:
    spec = f"{model_file}:Net"
    document = json.loads(ok("roofline", spec, "-s", 32, "-b", 8, "--device", "A100 40GB", "--json"))
    assert document["device"] == "A100 40GB"
    assert document["bound_speedup"] > 1.2
    assert {tail["family"] for tail in document["expected"]["tails"]} == {"mma.sync"}
    text = ok("roofline", spec, "-s", 32, "-b", 8, "--expected", "--plot", tmp_path / "roof.png")
    assert "by the model, not measured: H100" in text
    assert "full fusion can be at most" in text
    assert (tmp_path / "roof.png").stat().st_size > 5000
    assert "device: expected one of" in fails("roofline", spec, "--device", "abacus")
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in fails("roofline", spec, "-s", 32, "-b", 1, "--measure")


def test_tune_and_selftest_of_a_model(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_RESNET_CACHE_DIR", str(tmp_path))
    spec = f"{model_file}:Net"
    text = ok("tune", spec, "-s", 16, "-b", "1", "--dtype", "float32", "--device", "cpu", "--rounds", 2)
    assert "Tuned 5 calls" in text
    assert list(tmp_path.glob("tuning-*.json"))
    result = invoke("selftest", spec, "-s", 16, "--dtype", "float32", "--device", "cpu")
    assert "Selftest" in result.stdout
    assert "checks" in result.stdout
    monkeypatch.setattr(cpu.CpuBackend, "can_run", lambda self, problem: "cpu: a reason")
    text = ok("selftest", spec, "-s", 16, "--dtype", "bfloat16", "--device", "cpu")
    assert "nothing was checked" in " ".join(text.split())
    assert "--batch: expected positive integers" in fails("tune", spec, "--batch", "0")
