"""The command line through its entry point: output, exit status, and errors of one sentence."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import fused_resnet
from fused_resnet.backends import cpu
from fused_resnet.cli import app

torchvision = pytest.importorskip("torchvision")

#: A small ResNet in a user's own file: two residual blocks, one with a projection.
MODEL_FILE = """
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

class Net(nn.Module):
    def __init__(self, classes=4, channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        down = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
        self.layer1 = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 32, 2, down))
        self.fc = nn.Linear(32, classes)

    def forward(self, x):
        x = self.layer1(self.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))

class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))

instance = Net()
factory = lambda: Net(classes=3)
number = 5

def needs_arguments(width):
    return Net()

def fails():
    raise OSError("no such disk")
"""


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "my_net.py"
    path.write_text(MODEL_FILE)
    return path


@pytest.fixture
def checkpoint(model_file: Path, tmp_path: Path) -> Path:
    """Weights of ``Net`` as a training loop under DataParallel would leave them."""
    from fused_resnet.cli.target import load_target

    model = load_target(f"{model_file}:Net").model
    meta = {"classes": ["ant", "bee", "cat", "dog"], "size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    path = tmp_path / "net.pt"
    torch.save({"model": state, "epoch": 3, "meta": meta}, path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    for i, (name, size) in enumerate((("a.png", (40, 50)), ("deeper/b.jpg", (64, 33)), ("c.bmp", (32, 32)))):
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=g, dtype=torch.uint8)
        image = Image.fromarray(pixels.numpy())
        (image.convert("L") if i == 2 else image).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def ok(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: object) -> str:
    """The last line on stderr of a user's error: its one sentence."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    *notes, error = result.stderr.splitlines()
    assert error.startswith("error: "), result.stderr
    assert all(note.startswith(("note: ", "unreadable: ")) for note in notes), result.stderr
    return error


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


# ---- explain ---------------------------------------------------------------------------------------------------


def test_explain_a_torchvision_model_by_name() -> None:
    text = ok("explain", "resnet18")
    for name in ("layer1.0", "layer2.0", "layer4.1"):
        assert f"{name} (BasicBlock)" in text
    assert "conv2+bn2+(downsample.0+downsample.1)+relu" in text


@pytest.mark.parametrize("what", ["Net", "instance", "factory"], ids=["class", "module", "factory"])
def test_explain_a_users_file(model_file: Path, what: str) -> None:
    document = json.loads(ok("explain", f"{model_file}:{what}", "--json"))
    states = {entry["name"]: entry["state"] for entry in document["entries"]}
    assert states["layer1.0"] == states["layer1.1"] == "fusable"


def test_explain_a_model_without_blocks(model_file: Path) -> None:
    assert "no residual tail to fuse" in " ".join(ok("explain", f"{model_file}:Mlp").split())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet19", "'resnet19' is no model of torchvision or timm; did you mean resnet"),
        ("timm:no_such", "is no model of timm"),
        ("missing.py:Net", "no file 'missing.py'"),
        ("no.such.module:Net", "expected a name or file.py:object"),
        ("{file}:number", "must be or make a torch.nn.Module, got a int"),
        ("{file}:needs_arguments", "must be callable without arguments"),
        ("{file}:fails", "() failed: OSError: no such disk"),
    ],
)
def test_a_wrong_model_is_one_sentence(model_file: Path, spec: str, message: str) -> None:
    assert message in fails("explain", spec.replace("{file}", str(model_file)))


def test_a_file_that_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "broken_net.py").write_text("import torch\nraise ValueError('half written')\n")
    assert "does not run: ValueError: half written" in fails("explain", f"{tmp_path / 'broken_net.py'}:Net")


# ---- weights ---------------------------------------------------------------------------------------------------


def test_weights_from_safetensors_and_from_a_wrapped_checkpoint_agree(
    model_file: Path, checkpoint: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    from fused_resnet.cli.target import load_target

    a = load_target(f"{model_file}:Net", str(checkpoint))
    assert a.classes == ["ant", "bee", "cat", "dog"]
    assert (a.size, a.mean, a.std) == (32, (0.5,) * 3, (0.25,) * 3)
    path = tmp_path / "net.safetensors"
    save_file(a.model.state_dict(), path, metadata={"classes": json.dumps(a.classes)})
    b = load_target(f"{model_file}:Net", str(path))
    assert b.classes == a.classes
    for key, value in a.model.state_dict().items():
        assert torch.equal(value, b.model.state_dict()[key])


def test_number_of_classes_comes_from_the_weights(tmp_path: Path) -> None:
    from fused_resnet.cli.target import load_target

    model = torchvision.models.resnet18(num_classes=7)
    torch.save(model.state_dict(), tmp_path / "seven.pth")
    target = load_target("resnet18", str(tmp_path / "seven.pth"))
    assert target.model.fc.out_features == 7
    assert torch.equal(target.model.conv1.weight, model.conv1.weight)


def test_cifar_stem_and_grey_input_come_from_the_weights(tmp_path: Path) -> None:
    """What `train --model resnet18 --stem cifar` leaves is loaded by its plain name."""
    from fused_resnet.cli.target import load_target

    model = fused_resnet.models.resnet18(num_classes=10, stem="cifar", in_channels=1)
    torch.save(model.state_dict(), tmp_path / "grey.pth")
    target = load_target("resnet18", str(tmp_path / "grey.pth"))
    assert target.in_channels == 1
    assert target.model.conv1.stride == (1, 1)
    assert target.example(2, 8).shape == (2, 1, 8, 8)


class Payload:
    """What a hostile checkpoint would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("executed",))


def test_a_hostile_checkpoint_is_refused_and_not_executed(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Payload()}, "hostile.pt")
    assert "cannot be read as a checkpoint of tensors" in fails(
        "explain", f"{model_file}:Net", "--weights", "hostile.pt"
    )
    assert not Path("executed").exists()


def test_wrong_weights_are_one_sentence(model_file: Path, tmp_path: Path) -> None:
    spec = f"{model_file}:Net"
    assert "no file" in fails("explain", spec, "--weights", "nowhere.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    assert "holds no state_dict" in fails("explain", spec, "--weights", tmp_path / "empty.pt")
    (tmp_path / "garbage.safetensors").write_bytes(b"not a tensor")
    assert "--weights" in fails("explain", spec, "--weights", tmp_path / "garbage.safetensors")
    torch.save({"fc.weight": torch.zeros(2, 2), "other": torch.zeros(1)}, tmp_path / "other.pt")
    message = fails("explain", spec, "--weights", tmp_path / "other.pt")
    assert "fc.weight has shape [2, 2], expected [4, 32]" in message
    assert "tensors are missing, first conv1.weight" in message
    assert "expected a file or one of IMAGENET1K_V1" in fails("explain", "resnet18", "--weights", "IMAGENET9")


# ---- verify ----------------------------------------------------------------------------------------------------


def test_verify_passes_and_lists_each_block(model_file: Path) -> None:
    text = ok("verify", f"{model_file}:Net", "--size", 17)
    for row in ("layer1.0", "layer1.1", "end to end"):
        assert row in text
    assert "top-1 equal to eager's on 2 of 2 images" in text
    assert "every block and the whole model are within the bar" in text


def test_verify_fails_with_status_1_when_a_block_is_wrong(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_resnet import verify

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


# ---- predict ---------------------------------------------------------------------------------------------------


def test_predict_a_folder(model_file: Path, checkpoint: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.csv"
    text = ok("predict", f"{model_file}:Net", images, "--weights", checkpoint, "--top", 2, "-b", 2, "-o", out)
    for name in ("a.png", "b.jpg", "c.bmp"):
        assert name in text
    assert "notes.txt" not in text
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert list(rows[0]) == ["image", "class_1", "probability_1", "class_2", "probability_2"]
    assert {row["class_1"] for row in rows} <= {"ant", "bee", "cat", "dog"}
    assert all(float(row["probability_1"]) >= float(row["probability_2"]) for row in rows)


def test_predict_fused_and_unfused_agree_with_plain_torch(
    model_file: Path, checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    from fused_resnet.cli.target import load_target
    from fused_resnet.images import Preprocessing

    target = load_target(f"{model_file}:Net", str(checkpoint))
    x = Preprocessing(32, 3, target.mean, target.std).load(images / "a.png")
    with torch.no_grad():
        expected = target.model(x[None]).softmax(1)[0]
    for option in ("--fuse", "--no-fuse"):
        out = tmp_path / "one.csv"
        ok("predict", f"{model_file}:Net", images / "a.png", "--weights", checkpoint, option, "-k", 1, "-o", out)
        row = next(csv.DictReader(out.open()))
        assert row["class_1"] == target.classes[int(expected.argmax())]
        assert float(row["probability_1"]) == pytest.approx(float(expected.max()), abs=2e-6)


def test_predict_reports_an_unreadable_image_and_goes_on(model_file: Path, checkpoint: Path, images: Path) -> None:
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nand nothing more")
    result = invoke("predict", f"{model_file}:Net", images, "--weights", checkpoint)
    assert result.exit_code == 1
    assert "broken.png" in result.stderr
    assert "a.png" in result.stdout
    assert "broken.png" not in result.stdout


def test_predict_uses_given_labels_and_says_when_untrained(model_file: Path, images: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(["eins", "zwei", "drei", "vier"]))
    result = invoke("predict", f"{model_file}:Net", images / "c.bmp", "-s", 32, "--labels", labels, "-k", 4)
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("eins", "zwei", "drei", "vier"))
    assert "without trained weights" in result.stderr
    labels.write_text('{"0": "eins"}')
    assert "expected a JSON list" in fails("predict", f"{model_file}:Net", images / "c.bmp", "--labels", labels)


def test_predict_errors(model_file: Path, checkpoint: Path, tmp_path: Path) -> None:
    spec = f"{model_file}:Net"
    assert "no file or folder" in fails("predict", spec, tmp_path / "nowhere", "--weights", checkpoint)
    (tmp_path / "empty").mkdir()
    assert "found no image" in fails("predict", spec, tmp_path / "empty", "--weights", checkpoint)
    (tmp_path / "bad.png").write_bytes(b"no")
    assert "none of them could be read" in fails("predict", spec, tmp_path / "bad.png", "--weights", checkpoint)


def test_imagenet_names_come_with_torchvision() -> None:
    from fused_resnet.cli.predict import _imagenet_names

    names = _imagenet_names(1000)
    assert len(names) == 1000
    assert names[207] == "golden retriever"
    assert _imagenet_names(10) == []


def test_preprocessing_is_that_of_torchvision(images: Path) -> None:
    """The same pixels as torchvision's own ImageNet evaluation transform, to one grey level."""
    from PIL import Image

    from fused_resnet.images import Preprocessing

    transform = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    for name in ("a.png", "deeper/b.jpg"):
        with Image.open(images / name) as image:
            expected = transform(image.convert("RGB"))
        actual = Preprocessing(224).load(images / name)
        assert actual.shape == expected.shape
        assert float((actual - expected).abs().max()) < 1.01 / 255 / 0.224


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
    assert "arch: expected sm_80 or newer" in fails("compile", "--arch", "volta", "--problem", problem, "--out", out)
    assert "unknown field" in fails("compile", "--problem", "n=1,height=3", "--out", out)


# ---- tune, selftest, roofline ----------------------------------------------------------------------------------


def test_roofline_needs_no_gpu(model_file: Path, tmp_path: Path) -> None:
    spec = f"{model_file}:Net"
    document = json.loads(ok("roofline", spec, "-s", 32, "-b", 8, "--device", "A100 40GB", "--json"))
    assert document["device"] == "A100 40GB"
    assert document["bound_speedup"] > 1.2
    text = ok("roofline", spec, "-s", 32, "-b", 8, "--plot", tmp_path / "roof.png")
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
    monkeypatch.setattr(cpu, "_onednn_has", lambda dtype: dtype is torch.float32)
    text = ok("selftest", spec, "-s", 16, "--dtype", "bfloat16", "--device", "cpu")
    assert "nothing was checked" in " ".join(text.split())
    assert "--batch: expected positive integers" in fails("tune", spec, "--batch", "0")
