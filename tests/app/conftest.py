"""A user's model, its weights and images, for the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.command_line import MODEL_FILE

torchvision = pytest.importorskip("torchvision")


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
