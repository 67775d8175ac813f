"""Training data: ``digits``, ``cifar10`` and ``folder:PATH`` as uint8 images, and batches that do not depend on
how many processes share them.

Every epoch's order and every step's augmentation are functions of (seed, epoch, step) alone. A resumed run
therefore sees the batches it would have seen, and N processes see together what one process with N times the
batch sees.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

#: The image files that torchvision's ImageFolder takes.
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})


class DataError(ValueError):
    """The data cannot be used; the message is one sentence that says what was expected where."""


class MemoryImages:
    """Images held as one uint8 tensor ``[N, C, H, W]``."""

    def __init__(self, images: Tensor) -> None:
        self._images = images

    def __len__(self) -> int:
        return self._images.shape[0]

    def load(self, indices: Tensor) -> Tensor:
        return self._images[indices]


class FileImages:
    """Image files, decoded when a batch needs them: shorter side to ``size``, centre crop."""

    def __init__(self, files: Sequence[Path], size: int, workers: int = 4) -> None:
        self.files, self.size = list(files), size
        self._pool = ThreadPoolExecutor(max(1, workers))

    def __len__(self) -> int:
        return len(self.files)

    def _decode(self, index: int) -> Tensor:
        import numpy as np
        from PIL import Image, ImageOps

        path = self.files[index]
        try:
            with Image.open(path) as image:
                picture = ImageOps.fit(image.convert("RGB"), (self.size, self.size), Image.Resampling.BILINEAR)
        except (OSError, SyntaxError, ValueError) as error:  # PIL raises SyntaxError for some broken PNGs
            raise DataError(f"data: cannot read the image {path} ({error}); remove or replace it") from error
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def load(self, indices: Tensor) -> Tensor:
        return torch.stack(list(self._pool.map(self._decode, indices.tolist())))


Images = MemoryImages | FileImages


@dataclass(frozen=True)
class Split:
    """Images and their classes."""

    images: Images
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]


@dataclass(frozen=True)
class Data:
    """A classification data set and how its images are normalised and augmented."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    flip: bool

    @property
    def channels(self) -> int:
        return len(self.mean)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 ``[N, C, H, W]`` to float32 with the data set's mean and deviation removed.

        By table, rounded once: a pixel's value is the same on every machine and in every batch.
        """
        mean, std = (torch.tensor(v, dtype=torch.float64).unsqueeze(1) for v in (self.mean, self.std))
        table = ((torch.arange(256, dtype=torch.float64) / 255 - mean) / std).float()
        return table[torch.arange(self.channels).view(1, -1, 1, 1), images.long()]


def load_data(spec: str, root: str | Path = "data", size: int | None = None, workers: int = 4) -> Data:
    """The data called ``spec``: ``digits``, ``cifar10`` (looked for under ``root``) or ``folder:PATH``.

    A folder holds one folder of images per class (torchvision's ImageFolder), either directly, then every fifth
    image is kept for testing, or under ``train`` and ``val`` (or ``test``). ``size`` is that of folder images.
    Raises DataError.
    """
    if spec == "digits":
        return _digits()
    if spec == "cifar10":
        return _cifar10(Path(root))
    kind, _, path = spec.partition(":")
    if kind == "folder" and path:
        return _folder(Path(path), size or 32, workers)
    raise DataError(f"data: expected digits, cifar10 or folder:PATH, got {spec!r}")


# ---- digits ------------------------------------------------------------------------------------------------


def _digits() -> Data:
    try:
        import numpy as np
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("data: digits needs scikit-learn; install fused_resnet[demo]") from None
    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    train, test = _every_fifth(labels)
    # Sums of integers are exact; floating-point ones would depend on the number of threads.
    pixels = images[train].long()
    mean = int(pixels.sum()) / pixels.numel()
    variance = int((pixels * pixels).sum()) / pixels.numel() - mean * mean
    return Data(
        "digits",
        Split(MemoryImages(images[train]), labels[train]),
        Split(MemoryImages(images[test]), labels[test]),
        tuple(str(d) for d in range(10)),
        size=8,
        mean=(mean / 255,),
        std=(variance**0.5 / 255,),
        crop_padding=1,
        flip=False,  # a mirrored digit is another sign
    )


def _every_fifth(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices for training and testing: of each class every fifth image, in the order of the data, is for testing."""
    position = torch.zeros_like(labels)
    for label in labels.unique():
        of_class = labels == label
        position[of_class] = torch.arange(int(of_class.sum()))
    test = position % 5 == 4
    return (~test).nonzero().flatten(), test.nonzero().flatten()


# ---- CIFAR-10 ----------------------------------------------------------------------------------------------

_CIFAR_ARCHIVE = "cifar-10-python.tar.gz"
_CIFAR_FOLDER = "cifar-10-batches-py"


class _PlainUnpickler(pickle.Unpickler):
    """Reads what the CIFAR batches hold, numpy arrays in dicts, and refuses to import anything else."""

    _ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _cifar_file(root: Path, name: str) -> bytes:
    """One file of the data set, from the unpacked folder or out of the archive."""
    unpacked, archive = root / _CIFAR_FOLDER / name, root / _CIFAR_ARCHIVE
    if unpacked.is_file():
        return unpacked.read_bytes()
    if not archive.is_file():
        raise DataError(
            f"data: CIFAR-10 was not found: put {_CIFAR_ARCHIVE} (from https://www.cs.toronto.edu/~kriz/cifar.html) "
            f"into {root.resolve()}, or point --data-root to the folder that has it"
        )
    try:
        with tarfile.open(archive) as tar:
            member = tar.extractfile(f"{_CIFAR_FOLDER}/{name}")
            return b"" if member is None else member.read()
    except (tarfile.TarError, KeyError, OSError, EOFError) as error:
        raise DataError(f"data: {archive} holds no readable {_CIFAR_FOLDER}/{name} ({error})") from error


def _cifar_batch(root: Path, name: str) -> dict[bytes, Any]:
    try:
        content = _PlainUnpickler(io.BytesIO(_cifar_file(root, name)), encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"data: {_CIFAR_FOLDER}/{name} is no CIFAR-10 batch ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"data: {_CIFAR_FOLDER}/{name} is no CIFAR-10 batch (it holds a {type(content).__name__})")
    return content


def _cifar_split(root: Path, names: Sequence[str], classes: int) -> Split:
    import numpy as np

    images, labels = [], []
    for name in names:
        batch = _cifar_batch(root, name)
        pixels, targets = np.asarray(batch.get(b"data")), np.asarray(batch.get(b"labels"))
        if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072 or len(pixels) != targets.size:
            raise DataError(f"data: {_CIFAR_FOLDER}/{name}: expected n x 3072 bytes and n labels, got {pixels.shape}")
        if targets.min() < 0 or targets.max() >= classes:
            raise DataError(f"data: {_CIFAR_FOLDER}/{name}: expected labels below {classes}, got {targets.max()}")
        images.append(torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy()))
        labels.append(torch.from_numpy(targets.astype(np.int64)))
    return Split(MemoryImages(torch.cat(images)), torch.cat(labels))


def _cifar10(root: Path) -> Data:
    names = [name.decode() for name in _cifar_batch(root, "batches.meta").get(b"label_names", [])]
    if len(names) != 10:
        raise DataError(f"data: {_CIFAR_FOLDER}/batches.meta: expected 10 class names, got {len(names)}")
    return Data(
        "cifar10",
        _cifar_split(root, [f"data_batch_{i}" for i in range(1, 6)], len(names)),
        _cifar_split(root, ["test_batch"], len(names)),
        tuple(names),
        size=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        crop_padding=4,
        flip=True,
    )


# ---- a folder per class --------------------------------------------------------------------------------------


def _scan(path: Path) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    classes = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
    if not classes:
        raise DataError(f"data: {path} has no folders; expected one folder of images per class")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(p for p in (path / name).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise DataError(f"data: the class folder {path / name} has no images (looked for {_suffixes()})")
        files += found
        labels += [label] * len(found)
    return files, torch.tensor(labels), classes


def _suffixes() -> str:
    return ", ".join(sorted(SUFFIXES))


def _folder(path: Path, size: int, workers: int) -> Data:
    if not path.is_dir():
        raise DataError(f"data: {path} is no folder")
    held_out = next((path / name for name in ("val", "test") if (path / name).is_dir()), None)
    if (path / "train").is_dir() and held_out is not None:
        files, labels, classes = _scan(path / "train")
        test_files, test_labels, test_classes = _scan(held_out)
        if test_classes != classes:
            _different_classes(path / "train", classes, held_out, test_classes)
    else:
        all_files, all_labels, classes = _scan(path)
        train, test = _every_fifth(all_labels)
        if set(all_labels[test].tolist()) != set(range(len(classes))):
            least = classes[int(torch.bincount(all_labels).argmin())]
            raise DataError(f"data: {path / least} has fewer than 5 images, so none is left for testing")
        files, labels = [all_files[i] for i in train], all_labels[train]
        test_files, test_labels = [all_files[i] for i in test], all_labels[test]
    return Data(
        path.name,
        Split(FileImages(files, size, workers), labels),
        Split(FileImages(test_files, size, workers), test_labels),
        classes,
        size=size,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop_padding=max(1, size // 8),
        flip=True,
    )


def _different_classes(a: Path, names: Sequence[str], b: Path, others: Sequence[str]) -> NoReturn:
    only = ", ".join(sorted(set(names) ^ set(others)))
    raise DataError(f"data: {a} has {len(names)} classes and {b} has {len(others)}; only one of them has {only}")


# ---- batches -------------------------------------------------------------------------------------------------


def _generator(*numbers: int) -> torch.Generator:
    """A generator that is a function of ``numbers``."""
    import numpy as np

    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) & (2**63 - 1))


def augment(images: Tensor, padding: int, flip: bool, generator: torch.Generator, whole: int, part: slice) -> Tensor:
    """Random crop after zero padding, and random flip, of ``images``: the slice ``part`` of a batch of ``whole``.

    Every process draws the random numbers of the whole batch, so that the parts fit together.
    """
    tops, lefts = (torch.randint(0, 2 * padding + 1, (whole,), generator=generator)[part] for _ in range(2))
    mirrored = torch.rand(whole, generator=generator)[part] < 0.5
    n, c, h, w = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    rows = tops.view(n, 1, 1, 1) + torch.arange(h).view(1, 1, h, 1)
    columns = torch.arange(w).expand(n, w)
    if flip:
        columns = torch.where(mirrored.view(n, 1), columns.flip(1), columns)
    columns = columns.view(n, 1, 1, w) + lefts.view(n, 1, 1, 1)
    sample = torch.arange(n).view(n, 1, 1, 1)
    return padded[sample, torch.arange(c).view(1, c, 1, 1), rows, columns]


@dataclass(frozen=True)
class Batches:
    """The training batches of one process; ``batch_size`` is the process's own."""

    data: Data
    batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise DataError(
                f"data: {self.data.name} has {len(self.data.train)} training images, fewer than one batch of "
                f"{self.batch_size * self.world}; take smaller batches"
            )

    def __len__(self) -> int:
        return len(self.data.train) // (self.batch_size * self.world)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised, augmented images and labels of this process, step by step."""
        order = torch.randperm(len(self.data.train), generator=_generator(self.seed, epoch))
        whole = self.batch_size * self.world
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        with ThreadPoolExecutor(1) as ahead:  # the next batch is made while the model works on this one

            def make(step: int) -> tuple[Tensor, Tensor]:
                indices = order[step * whole : (step + 1) * whole][mine]
                images = self.data.train.images.load(indices)
                generator = _generator(self.seed, epoch, step)
                images = augment(images, self.data.crop_padding, self.data.flip, generator, whole, mine)
                return self.data.normalise(images), self.data.train.labels[indices]

            coming = ahead.submit(make, 0)
            for step in range(len(self)):
                batch = coming.result()
                if step + 1 < len(self):
                    coming = ahead.submit(make, step + 1)
                yield batch


def evaluation_batches(data: Data, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """The normalised test images of one process: every ``world``-th."""
    mine = torch.arange(rank, len(data.test), world)
    for indices in mine.split(batch_size):
        yield data.normalise(data.test.images.load(indices)), data.test.labels[indices]
