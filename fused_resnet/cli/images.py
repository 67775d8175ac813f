"""Images from disk as a model's input: the usual resize, centre crop and normalisation of ImageNet evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import first_line
from ..trainer import data

__all__ = ["Preprocessing", "batches", "find_images"]

_SUFFIXES = data.SUFFIXES | {".gif", ".pbm"}

#: From this size on the centre 7/8 of the resized image is kept, as ImageNet's evaluation does; small pictures
#: (digits, CIFAR) have no margin to lose.
_CROP_FROM = 128


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The image files among ``paths`` and, recursively, in the folders among them, sorted within each folder.

    A file named by the user is taken whatever its suffix. FileNotFoundError names what does not exist.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"no file or folder {str(path)!r}")
    return found


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a tensor ``[channels, size, size]``: colour mode, resize, centre crop, normalise."""

    size: int
    channels: int = 3
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"images: expected a model with 1 or 3 input channels, got {self.channels}")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(
                f"images: expected {self.channels} means and stds, got {len(self.mean)} and {len(self.std)}"
            )

    def load(self, path: Path) -> Tensor:
        """Raises OSError (with PIL's sentence) when the file is no readable image."""
        import numpy as np
        from PIL import Image, ImageOps

        with Image.open(path) as file:
            image: Any = ImageOps.exif_transpose(file).convert("L" if self.channels == 1 else "RGB")
        shorter = self.size if self.size < _CROP_FROM else round(self.size * 8 / 7)
        scale = shorter / min(image.size)
        width, height = (max(shorter, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).reshape(self.size, self.size, self.channels)
        normalised = (pixels / 255 - torch.tensor(list(self.mean))) / torch.tensor(list(self.std))
        return normalised.permute(2, 0, 1).contiguous()


def batches(
    paths: Sequence[Path], preprocessing: Preprocessing, size: int
) -> Iterator[tuple[list[Path], Tensor, list[tuple[Path, str]]]]:
    """Batches of at most ``size`` readable images: their paths, their tensor, and what could not be read and why."""
    for start in range(0, len(paths), size):
        good: list[Path] = []
        tensors: list[Tensor] = []
        bad: list[tuple[Path, str]] = []
        for path in paths[start : start + size]:
            try:
                tensors.append(preprocessing.load(path))
                good.append(path)
            except (OSError, SyntaxError, ValueError) as error:  # PIL raises each of them for broken files
                bad.append((path, first_line(error)))
        empty = torch.empty(0, preprocessing.channels, preprocessing.size, preprocessing.size)
        yield good, torch.stack(tensors) if tensors else empty, bad
