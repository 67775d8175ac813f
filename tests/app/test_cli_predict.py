"""The command predict: images in, classes out."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from tests.support.command_line import fails, invoke, ok

torchvision = pytest.importorskip("torchvision")


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
    from fused_resnet.cli.images import Preprocessing
    from fused_resnet.cli.target import load_target

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

    from fused_resnet.cli.images import Preprocessing

    transform = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    for name in ("a.png", "deeper/b.jpg"):
        with Image.open(images / name) as image:
            expected = transform(image.convert("RGB"))
        actual = Preprocessing(224).load(images / name)
        assert actual.shape == expected.shape
        assert float((actual - expected).abs().max()) < 1.01 / 255 / 0.224


def test_predict_says_so_when_the_answers_are_no_numbers(model_file: Path, images: Path, tmp_path: Path) -> None:
    from fused_resnet.cli.target import load_target

    state = load_target(f"{model_file}:Net").model.state_dict()
    state["fc.weight"].fill_(torch.nan)
    torch.save(state, tmp_path / "diverged.pt")
    message = fails("predict", f"{model_file}:Net", images, "--weights", tmp_path / "diverged.pt")
    assert "expected numbers from the network, got NaN" in message
