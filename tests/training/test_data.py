"""Data sets and batches: formats, clear errors, and batches that fit together over processes."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fused_resnet.trainer.data import Batches, Data, DataError, augment, evaluation_batches, load_data

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


# ---- digits and batches --------------------------------------------------------------------------------------


def test_digits(digits: Data) -> None:
    assert len(digits.train) + len(digits.test) == 1797
    assert digits.classes == tuple("0123456789")
    images = digits.normalise(digits.train.images.load(torch.arange(len(digits.train))))
    assert images.shape[1:] == (1, 8, 8)
    assert abs(float(images.mean())) < 1e-5
    assert abs(float(images.std()) - 1) < 1e-4
    counts = torch.bincount(digits.test.labels)
    assert counts.min() >= 34, "every class is tested"


def test_training_and_test_images_are_disjoint(digits: Data) -> None:
    train = {tuple(i.flatten().tolist()) for i in digits.train.images.load(torch.arange(len(digits.train)))}
    test = {tuple(i.flatten().tolist()) for i in digits.test.images.load(torch.arange(len(digits.test)))}
    assert not train & test


def test_batches_of_two_processes_are_the_halves_of_one(digits: Data) -> None:
    whole = list(Batches(digits, 64, seed=3).epoch(2))
    parts = [list(Batches(digits, 32, seed=3, rank=rank, world=2).epoch(2)) for rank in (0, 1)]
    assert len(whole) == len(parts[0]) == len(digits.train) // 64
    for (images, labels), *halves in zip(whole, *parts, strict=True):
        assert torch.equal(images, torch.cat([h[0] for h in halves]))
        assert torch.equal(labels, torch.cat([h[1] for h in halves]))


def test_batches_depend_on_seed_and_epoch_only(digits: Data) -> None:
    def first(seed: int, epoch: int) -> torch.Tensor:
        return next(iter(Batches(digits, 32, seed=seed).epoch(epoch)))[0]

    torch.manual_seed(1)
    reference = first(0, 1)
    torch.manual_seed(2)
    assert torch.equal(reference, first(0, 1))
    assert not torch.equal(reference, first(0, 2))
    assert not torch.equal(reference, first(1, 1))


def test_an_epoch_holds_every_image_at_most_once(digits: Data) -> None:
    labels = torch.cat([labels for _, labels in Batches(digits, 100).epoch(0)])
    assert (torch.bincount(labels, minlength=10) <= torch.bincount(digits.train.labels)).all()


def test_evaluation_batches_cover_everything_once(digits: Data) -> None:
    labels = [torch.cat([labels for _, labels in evaluation_batches(digits, 50, rank, 2)]) for rank in (0, 1)]
    assert torch.equal(torch.cat(labels).sort().values, digits.test.labels.sort().values)


def test_augment_crops_and_flips() -> None:
    images = torch.arange(1, 1 + 400 * 12, dtype=torch.float32).view(400, 1, 3, 4)
    out = augment(images, 1, True, torch.Generator().manual_seed(0), 400, slice(0, 400))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    seen = set()
    for i in range(400):
        for top in range(3):
            for left in range(3):
                for flip in (False, True):
                    crop = padded[i, :, top : top + 3, left : left + 4]
                    if torch.equal(out[i], crop.flip(2) if flip else crop):
                        seen.add((top, left, flip))
                        break
    # 18 equally likely cases; that one of them is missing among 400 images has a probability below 1e-8
    assert len(seen) == 18
    unflipped = augment(images, 0, False, torch.Generator().manual_seed(0), 400, slice(0, 400))
    assert torch.equal(unflipped, images)


def test_more_images_a_batch_than_there_are(digits: Data) -> None:
    with pytest.raises(DataError, match=r"training images, fewer than one batch of 4000; take smaller batches"):
        Batches(digits, 2000, world=2)


def test_unknown_data() -> None:
    with pytest.raises(DataError, match="expected digits, cifar10 or folder:PATH, got 'mnist'"):
        load_data("mnist")


# ---- CIFAR-10 ------------------------------------------------------------------------------------------------

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar_files(images: int = 4) -> dict[str, dict[bytes, object]]:
    """The content of the real archive's files (Python 2 pickles: bytes keys), with few images."""
    rng = np.random.default_rng(0)
    files: dict[str, dict[bytes, object]] = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        files[name] = {
            b"batch_label": name.encode(),
            b"labels": rng.integers(0, 10, images).tolist(),
            b"data": rng.integers(0, 256, (images, 3072), dtype=np.uint8),
            b"filenames": [b"x.png"] * images,
        }
    files["batches.meta"] = {
        b"num_cases_per_batch": images,
        b"label_names": [n.encode() for n in NAMES],
        b"num_vis": 3072,
    }
    return files


def write_archive(root: Path, files: dict[str, dict[bytes, object]]) -> None:
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as tar:
        for name, content in files.items():
            data = pickle.dumps(content, protocol=2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("unpacked", [False, True])
def test_cifar10_from_the_archive_or_unpacked(tmp_path: Path, unpacked: bool) -> None:
    files = cifar_files()
    write_archive(tmp_path, files)
    if unpacked:
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz") as tar:
            tar.extractall(tmp_path, filter="data")
        (tmp_path / "cifar-10-python.tar.gz").unlink()
    data = load_data("cifar10", tmp_path)
    assert data.classes == tuple(NAMES)
    assert (len(data.train), len(data.test)) == (20, 4)
    # row-major planes: red, then green, then blue
    expected = files["data_batch_2"][b"data"].reshape(4, 3, 32, 32)[1]
    assert np.array_equal(data.train.images.load(torch.tensor([5]))[0].numpy(), expected)
    assert data.test.labels.tolist() == files["test_batch"][b"labels"]
    images, labels = next(iter(Batches(data, 8).epoch(0)))
    assert images.shape == (8, 3, 32, 32)
    assert labels.shape == (8,)


def test_cifar10_missing_is_one_sentence_with_the_place(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        load_data("cifar10", tmp_path)
    assert "put cifar-10-python.tar.gz" in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_cifar10_damaged_archive(tmp_path: Path) -> None:
    write_archive(tmp_path, cifar_files())
    whole = (tmp_path / "cifar-10-python.tar.gz").read_bytes()
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="holds no readable cifar-10-batches-py"):
        load_data("cifar10", tmp_path)


def test_cifar10_label_out_of_range(tmp_path: Path) -> None:
    files = cifar_files()
    files["data_batch_3"][b"labels"] = [0, 1, 10, 2]
    write_archive(tmp_path, files)
    with pytest.raises(DataError, match="data_batch_3: expected labels below 10, got 10"):
        load_data("cifar10", tmp_path)


def test_cifar10_pickle_that_wants_to_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.mkdir, (str(tmp_path / "created"),))

    files = cifar_files()
    files["test_batch"] = {b"data": Evil()}
    write_archive(tmp_path, files)
    with pytest.raises(DataError, match="test_batch is no CIFAR-10 batch"):
        load_data("cifar10", tmp_path)
    assert not (tmp_path / "created").exists()


# ---- folders -------------------------------------------------------------------------------------------------


def write_images(folder: Path, count: int, colour: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (20 + i, 16), (colour, 0, i)).save(folder / f"{i}.png")


def test_folder_with_splits(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 2)):
        for i, name in enumerate(("cat", "ant")):
            write_images(tmp_path / split / name, count, 100 * i)
    data = load_data(f"folder:{tmp_path}", size=8)
    assert data.classes == ("ant", "cat")  # sorted, as ImageFolder does
    assert (len(data.train), len(data.test)) == (12, 4)
    images = data.train.images.load(torch.tensor([0, 11]))
    assert images.shape == (2, 3, 8, 8)
    assert images[0, 0].unique().tolist() == [100]
    assert images[1, 0].unique().tolist() == [0]


def test_folder_without_splits_keeps_every_fifth_for_testing(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 10, 0)
    write_images(tmp_path / "b", 6, 0)
    data = load_data(f"folder:{tmp_path}")
    assert (len(data.train), len(data.test)) == (13, 3)
    assert data.test.labels.tolist() == [0, 0, 1]


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is no folder"):
        load_data(f"folder:{tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty has no folders; expected one folder of images per class"):
        load_data(f"folder:{tmp_path / 'empty'}")
    write_images(tmp_path / "x" / "a", 5, 0)
    (tmp_path / "x" / "b").mkdir()
    with pytest.raises(DataError, match=r"the class folder .*b has no images"):
        load_data(f"folder:{tmp_path / 'x'}")
    write_images(tmp_path / "few" / "a", 5, 0)
    write_images(tmp_path / "few" / "b", 4, 0)
    with pytest.raises(DataError, match="b has fewer than 5 images"):
        load_data(f"folder:{tmp_path / 'few'}")
    for split, names in (("train", "ab"), ("val", "abc")):
        for name in names:
            write_images(tmp_path / "y" / split / name, 1, 0)
    with pytest.raises(DataError, match=r"train has 2 classes and .*val has 3; only one of them has c"):
        load_data(f"folder:{tmp_path / 'y'}")


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 5, 0)
    bad = tmp_path / "a" / "0.png"
    bad.write_bytes(bad.read_bytes()[:40])
    data = load_data(f"folder:{tmp_path}", size=8)
    with pytest.raises(DataError, match=r"cannot read the image .*a/0\.png"):
        data.train.images.load(torch.arange(len(data.train)))
