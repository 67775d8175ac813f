"""The demo: its promises, its files, and what it does when a promise is broken."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

from fused_resnet.cli.demo import run as demo
from fused_resnet.cli.demo.run import held_out, predict
from fused_resnet.demo.digits import DigitsResNet
from fused_resnet.trainer.data import load_data


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[demo.Outcome, Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    text = io.StringIO()
    console = Console(file=text, width=200, force_terminal=False)
    result = demo.run(folder, epochs=6, rounds=3, compiled=False, imagenet=False, console=console)
    return result, folder, text.getvalue()


@pytest.mark.slow
def test_it_keeps_its_promises(outcome: tuple[demo.Outcome, Path, str]) -> None:
    result, _, text = outcome
    assert result.training.accuracy >= 97.0
    assert result.same_predictions == len(result.labels) > 300
    assert float((result.answers == result.labels).float().mean()) >= 0.97
    assert result.verification.passed
    assert f"{len(result.labels)} of {len(result.labels)} predictions are the same" in text
    assert "conv2+bn2+(downsample.0+downsample.1)+relu" in text  # explain's sentences
    assert "On a GPU:" in text


@pytest.mark.slow
def test_it_times_both_eager_layouts_and_the_fused_network(outcome: tuple[demo.Outcome, Path, str]) -> None:
    (timed,) = outcome[0].timed
    *float32, bfloat16 = timed.rows
    assert [row["name"] for row in float32] == ["eager", "eager channels_last", "fused", "frozen"]
    assert all(row["median_ms"] > 0 and row["error"] < 1e-5 for row in float32)
    assert bfloat16["name"] == "frozen, bfloat16"
    assert bfloat16["median_ms"] > 0
    assert 1e-5 < bfloat16["error"] < 5e-2  # it rounds, and no more than that


@pytest.mark.slow
def test_it_says_how_right_bfloat16_is(outcome: tuple[demo.Outcome, Path, str]) -> None:
    _, _, text = outcome
    line = next(line for line in text.splitlines() if "computed in bfloat16" in line)
    accuracy = re.search(r"([0-9.]+) % are right", line)
    assert accuracy is not None
    assert float(accuracy[1]) >= 97.0


@pytest.mark.slow
def test_it_leaves_checkpoint_images_and_picture(outcome: tuple[demo.Outcome, Path, str]) -> None:
    from PIL import Image

    result, folder, _ = outcome
    assert result.training.weights.is_file()
    images = sorted((folder / "digits").glob("*.png"))
    assert len(images) == 20
    assert int(images[0].stem[-1]) == int(result.labels[0])
    with Image.open(folder / "demo.png") as picture:
        assert picture.size == (1560, 936)
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 100  # something is drawn


def test_an_unkept_promise_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "WANTED_ACCURACY", 101.0)
    monkeypatch.setattr(demo, "_train", _untrained)
    with pytest.raises(RuntimeError, match="on the held-out digits, expected 97 %"):
        demo.run(tmp_path, console=Console(file=io.StringIO()))


def _untrained(*_: object) -> object:
    from types import SimpleNamespace

    return SimpleNamespace(model=DigitsResNet(width=8), accuracy=10.0)


def test_network_is_plain_pytorch_with_a_cifar_stem() -> None:
    model = DigitsResNet(classes=7, channels=3, width=8)
    assert model.conv1.stride == (1, 1)
    assert predict(model, torch.randn(5, 3, 8, 8), batch=2).shape == (5, 7)
    assert not any(type(m).__module__.startswith("fused_resnet.nn") for m in model.modules())
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 15  # stem, 6 blocks of 2, 2 projections


def test_held_out_images_are_a_fifth_of_the_data() -> None:
    data = load_data("digits")
    pixels, x, labels = held_out(data)
    assert abs(len(labels) - (len(data.train) + len(labels)) / 5) < 10
    assert pixels.dtype == torch.uint8
    assert x.shape == (len(labels), 1, 8, 8)
