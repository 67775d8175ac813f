"""What MODEL and --weights may be, and what is said of those that cannot be read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_resnet
from tests.support.command_line import fails, ok

torchvision = pytest.importorskip("torchvision")


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
    assert "no tail to fuse" in " ".join(ok("explain", f"{model_file}:Mlp").split())


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
    for name in ("nothing.pt", "nothing.safetensors"):
        (tmp_path / name).touch()
        assert f"{name}" in fails("explain", spec, "--weights", tmp_path / name)
    (tmp_path / "garbage.safetensors").write_bytes(b"not a tensor")
    assert "--weights" in fails("explain", spec, "--weights", tmp_path / "garbage.safetensors")
    torch.save({"fc.weight": torch.zeros(2, 2), "other": torch.zeros(1)}, tmp_path / "other.pt")
    message = fails("explain", spec, "--weights", tmp_path / "other.pt")
    assert "fc.weight has shape [2, 2], expected [4, 32]" in message
    assert "tensors are missing, first conv1.weight" in message
    assert "expected a file or one of IMAGENET1K_V1" in fails("explain", "resnet18", "--weights", "IMAGENET9")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_prefixes_are_taken_off_in_any_order(model_file: Path, tmp_path: Path, prefix: str) -> None:
    from fused_resnet.cli.target import load_target

    state = load_target(f"{model_file}:Net").model.state_dict()
    counted = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(counted) < len(state)
    torch.save({prefix + key: value + 1 for key, value in counted.items()}, tmp_path / "wrapped.pt")
    loaded = load_target(f"{model_file}:Net", str(tmp_path / "wrapped.pt")).model.state_dict()
    assert all(torch.equal(loaded[key], value + 1) for key, value in counted.items())
    assert all(int(loaded[key]) == 0 for key in state.keys() - counted.keys())
