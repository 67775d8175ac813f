"""The training loop: recipes, checkpoints, resuming, errors that keep the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from fused_resnet.trainer import checkpoint
from fused_resnet.trainer.data import DataError, load_data
from fused_resnet.trainer.log import Epoch, Progress, draw_curves, read_csv
from fused_resnet.trainer.loop import ConfigError, FinetuneConfig, TrainConfig, finetune, train
from fused_resnet.trainer.recipe import make_optimizer, make_schedule
from tests.support.training_models import SmallResNet, small_resnet

pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")


@pytest.fixture(autouse=True)
def one_thread():  # type: ignore[no-untyped-def]
    """Two test processes share two cores; and sums are then independent of the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(tmp_path: Path, **changes: object) -> TrainConfig:
    base = TrainConfig(model=small_resnet, epochs=2, batch_size=128, output=tmp_path / "run", progress=False)
    return replace(base, **changes)  # type: ignore[arg-type]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_digits_are_learnt_and_everything_is_kept(tmp_path: Path) -> None:
    result = train(config(tmp_path, epochs=6, label_smoothing=0.1))
    assert result.accuracy > 95
    assert result.best_accuracy >= result.accuracy
    assert set(result.per_class) == set("0123456789")
    assert result.history[-1].train_loss < result.history[0].train_loss
    # one line an epoch, cosine learning rates
    lines = read_csv(tmp_path / "run" / "log.csv")
    assert lines == result.history
    assert [line.epoch for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0].learning_rate == 0.1
    assert lines[3].learning_rate == pytest.approx(0.05)
    assert (tmp_path / "run" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert not list((tmp_path / "run").glob(".*")), "no temporary file is left"
    # the exported weights are the model's, with what is needed to use them
    weights, meta = checkpoint.read_weights(result.weights)
    assert_equal_states(weights, {k: v.contiguous() for k, v in state(result.model).items()})
    assert meta["classes"] == list("0123456789")
    assert (meta["in_channels"], meta["size"]) == (1, 8)
    assert meta["accuracy"] == result.accuracy


def test_per_class_accuracy_is_that_of_the_exported_model(tmp_path: Path) -> None:
    result = train(config(tmp_path))
    data = load_data("digits")
    images = data.normalise(data.test.images.load(torch.arange(len(data.test))))
    with torch.no_grad():
        right = result.model.eval()(images).argmax(1) == data.test.labels
    assert result.accuracy == pytest.approx(100 * float(right.float().mean()))
    for label, name in enumerate(data.classes):
        assert result.per_class[name] == pytest.approx(100 * float(right[data.test.labels == label].float().mean()))


def test_fused_and_plain_training_go_the_same_way(tmp_path: Path) -> None:
    """The same seed gives the same start and the same batches: the first epoch's losses agree to rounding.

    In float64: at this size (1x1 pixels in the last stage) a float32 run of eager's moves by a percent with the number
    of threads alone.
    """
    pytest.importorskip("torchvision")
    common = {"model": "resnet18", "epochs": 1, "batch_size": 256, "lr": 0.02, "dtype": torch.float64}
    runs = [train(config(tmp_path, fused=fused, output=tmp_path / str(fused), **common)) for fused in (True, False)]
    kinds = [type(run.model).__module__ for run in runs]
    assert kinds[0].startswith("fused_resnet")
    assert kinds[1].startswith("torchvision")
    assert runs[0].history[0].train_loss == pytest.approx(runs[1].history[0].train_loss, rel=1e-9)


def test_a_run_is_a_function_of_its_configuration(tmp_path: Path) -> None:
    first = train(config(tmp_path, output=tmp_path / "a"))
    second = train(config(tmp_path, output=tmp_path / "b"))
    other = train(config(tmp_path, output=tmp_path / "c", seed=1))
    assert_equal_states(state(first.model), state(second.model))
    assert not torch.equal(first.model.fc.weight, other.model.fc.weight)


@pytest.mark.parametrize("options", [{}, {"optimizer": "adam", "ema": 0.9, "schedule": "step"}, {"amp": "bf16"}])
def test_resume_equals_an_uninterrupted_run(
    tmp_path: Path, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config(tmp_path, output=tmp_path / "whole", epochs=4, **options))
    cut = config(tmp_path, output=tmp_path / "cut", epochs=4, **options)
    from fused_resnet.trainer.loop import _Run

    original = _Run._epoch

    def stops_in_epoch_3(self: _Run, epoch: int) -> None:
        if epoch == 3:
            raise KeyboardInterrupt
        original(self, epoch)

    monkeypatch.setattr(_Run, "_epoch", stops_in_epoch_3)
    with pytest.raises(KeyboardInterrupt):
        train(cut)
    monkeypatch.setattr(_Run, "_epoch", original)
    resumed = train(replace(cut, resume=True))
    assert_equal_states(state(whole.model), state(resumed.model))
    strip = [replace(line, seconds=0.0) for line in whole.history]
    assert strip == [replace(line, seconds=0.0) for line in resumed.history]
    assert resumed.best_accuracy == whole.best_accuracy


_VICTIM = """
import torch; torch.set_num_threads(1)
from pathlib import Path
from tests.support.training_models import small_resnet
from fused_resnet.trainer.loop import TrainConfig, train
train(TrainConfig(model=small_resnet, epochs=30, batch_size=128, output=Path({output!r}), progress=False))
"""


def test_kill_minus_9_and_resume_equal(tmp_path: Path) -> None:
    """Killed at any moment, a run goes on from its last whole checkpoint to the weights it would have had."""
    output = tmp_path / "victim"
    script = _VICTIM.format(output=str(output))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with open(tmp_path / "stderr", "w+") as stderr:
        victim = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=stderr)
    try:
        deadline = time.monotonic() + 120
        log = output / "log.csv"
        while not log.exists() or len(read_csv(log)) < 2:
            assert victim.poll() is None, (tmp_path / "stderr").read_text()
            assert time.monotonic() < deadline, "no second epoch in two minutes"
            time.sleep(0.02)
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    base = TrainConfig(model=small_resnet, epochs=30, batch_size=128, progress=False, output=output, resume=True)
    finished = len(checkpoint.load(output / "last.pt")["history"])
    assert 2 <= finished < 30
    # Two epochs further than the kill, against the same epochs of a run that was left alone.
    states = {}
    for name in ("resumed", "alone"):
        run = base if name == "resumed" else replace(base, output=tmp_path / "alone", resume=False)
        states[name] = _stop_after(run, finished + 2)
    assert_equal_states(states["resumed"], states["alone"])


def _stop_after(run: TrainConfig, epochs: int) -> dict[str, torch.Tensor]:
    from fused_resnet.trainer.loop import _Run

    class Stop(Exception):
        pass

    class Short(_Run):
        def _epoch(self, epoch: int) -> None:
            if epoch > epochs:
                raise Stop
            super()._epoch(epoch)

    from fused_resnet.trainer.distributed import process_group

    with process_group("cpu") as group:
        short = Short(run, group, load_data("digits"))
        with pytest.raises(Stop):
            short.run()
        return state(short.model)


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"model": {"w": torch.ones(2)}, "meta": {}})

    def dies(temporary: str) -> None:
        Path(temporary).write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(path, dies)
    assert torch.equal(checkpoint.load(path)["model"]["w"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_a_run_are_as_readable_as_any_other(tmp_path: Path) -> None:
    """A temporary file is private; the checkpoint it becomes is not."""
    before = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "last.pt", {"model": {"w": torch.ones(2)}, "meta": {}})
    finally:
        os.umask(before)
    assert (tmp_path / "last.pt").stat().st_mode & 0o777 == 0o640


def test_no_progress_bar_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(True)
    with progress.epoch(1, 2, 3):
        progress.step(0.5)
    progress.say("epoch 1")
    assert capsys.readouterr().out == "epoch 1\n"


def test_bad_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="no file"):
        checkpoint.load(tmp_path / "none.pt")
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(checkpoint.CheckpointError, match=r"bad\.pt cannot be read"):
        checkpoint.load(tmp_path / "bad.pt")
    torch.save({"w": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(checkpoint.CheckpointError, match="is no checkpoint of format 1"):
        checkpoint.load(tmp_path / "other.pt")
    (tmp_path / "bad.safetensors").write_bytes(b"xx")
    with pytest.raises(checkpoint.CheckpointError, match=r"bad\.safetensors cannot be read"):
        checkpoint.read_weights(tmp_path / "bad.safetensors")


def test_a_run_is_not_overwritten_nor_continued_as_another(tmp_path: Path) -> None:
    first = config(tmp_path, epochs=1)
    train(first)
    with pytest.raises(ConfigError, match=r"holds a run; give --resume or another --output"):
        train(first)
    with pytest.raises(ConfigError, match=r"resume: batch_size: expected 128, as in .*last\.pt, got 64"):
        train(replace(first, resume=True, batch_size=64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "lion"}, "optimizer: expected one of sgd, adam, got 'lion'"),
        ({"amp": "int8"}, "amp: expected one of off, bf16, fp16, got 'int8'"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"ema": 1.5}, "ema: expected a decay between 0 and 1, got 1.5"),
    ],
)
def test_bad_configurations(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**change)  # type: ignore[arg-type]


def test_ema_is_what_is_judged_and_exported(tmp_path: Path) -> None:
    result = train(config(tmp_path, ema=0.99, epochs=1))
    content = checkpoint.load(result.last)
    assert not torch.equal(content["ema"]["fc.weight"], content["model"]["fc.weight"])
    assert torch.equal(checkpoint.read_weights(result.weights)[0]["fc.weight"], content["ema"]["fc.weight"])
    assert torch.equal(result.model.state_dict()["fc.weight"], content["ema"]["fc.weight"])


def test_schedules_and_optimizers() -> None:
    model = SmallResNet()
    rates = {}
    for schedule in ("cosine", "step", "constant"):
        run = TrainConfig(epochs=8, schedule=schedule)
        optimizer = make_optimizer(run, model)
        scheduler = make_schedule(run, optimizer)
        rates[schedule] = []
        for _ in range(8):
            rates[schedule].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert rates["step"] == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)
    assert rates["constant"] == [0.1] * 8
    assert rates["cosine"] == pytest.approx(
        [0.05 * (1 + torch.cos(torch.tensor(torch.pi * i / 8)).item()) for i in range(8)]
    )
    assert isinstance(make_optimizer(TrainConfig(optimizer="adam"), model), torch.optim.Adam)
    assert make_optimizer(TrainConfig(), model).param_groups[0]["weight_decay"] == 5e-4


# ---- bad data ------------------------------------------------------------------------------------------------


def write_folder(root: Path, classes: int = 2, images: int = 10) -> None:
    g = torch.Generator().manual_seed(0)
    for c in range(classes):
        (root / str(c)).mkdir(parents=True)
        for i in range(images):
            pixels = torch.randint(0, 256, (12, 12, 3), generator=g, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / str(c) / f"{i}.png")


def test_an_image_that_breaks_keeps_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_resnet.trainer.loop import _Run

    write_folder(tmp_path / "images")
    original = _Run._epoch

    def breaks_before_epoch_2(self: _Run, epoch: int) -> None:
        if epoch == 2:
            (tmp_path / "images" / "1" / "0.png").write_bytes(b"gone")
        original(self, epoch)

    monkeypatch.setattr(_Run, "_epoch", breaks_before_epoch_2)
    run = config(tmp_path, data=f"folder:{tmp_path / 'images'}", image_size=8, batch_size=4, epochs=3)
    with pytest.raises(DataError, match=r"1/0\.png .*; the run up to epoch 1 is kept in .*last\.pt") as error:
        train(run)
    assert "\n" not in str(error.value)
    assert len(checkpoint.load(run.output / "last.pt")["history"]) == 1
    monkeypatch.setattr(_Run, "_epoch", original)
    write_folder(tmp_path / "repaired")
    (tmp_path / "images" / "1" / "0.png").write_bytes((tmp_path / "repaired" / "1" / "0.png").read_bytes())
    assert len(train(replace(run, resume=True)).history) == 3


# ---- fine-tuning ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(tmp_path_factory.mktemp("pretrained"), epochs=3)).weights


def finetuning(tmp_path: Path, pretrained: Path, **changes: object) -> FinetuneConfig:
    base = FinetuneConfig(
        model=small_resnet, epochs=1, batch_size=128, output=tmp_path / "ft", progress=False, weights=pretrained
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_finetune_freezes_weights_and_statistics(tmp_path: Path, pretrained: Path) -> None:
    before = checkpoint.read_weights(pretrained)[0]
    result = finetune(finetuning(tmp_path, pretrained, freeze_until="layer2"))
    after = state(result.model)
    for name, tensor in before.items():
        frozen = name.startswith(("conv1", "bn1", "layer1"))
        assert torch.equal(after[name].contiguous(), tensor) == frozen, name


def test_finetune_starts_where_the_weights_end(tmp_path: Path, pretrained: Path) -> None:
    tuned = finetune(finetuning(tmp_path, pretrained))
    scratch = train(config(tmp_path, epochs=1))
    assert tuned.history[0].train_loss < scratch.history[0].train_loss


def test_finetune_to_other_classes(tmp_path: Path, pretrained: Path) -> None:
    write_folder(tmp_path / "images", classes=3)

    def three_channels(classes: int, channels: int) -> nn.Module:
        return SmallResNet(classes, channels)

    with pytest.raises(ConfigError, match=r"has conv1\.weight of shape \[8, 1, 3, 3\], .* needs \[8, 3, 3, 3\]"):
        finetune(finetuning(tmp_path, pretrained, data=f"folder:{tmp_path / 'images'}", model=three_channels))
    with pytest.raises(ConfigError, match="num_classes: expected 10, the classes of digits, got 7"):
        finetune(finetuning(tmp_path, pretrained, num_classes=7))
    with pytest.raises(ConfigError, match="freeze_until: expected one of conv1, bn1, layer1, layer2, fc, got 'layer9'"):
        finetune(finetuning(tmp_path, pretrained, freeze_until="layer9"))
    with pytest.raises(checkpoint.CheckpointError, match="no file"):
        finetune(finetuning(tmp_path, tmp_path / "none.safetensors"))


def test_curves_of_two_runs(tmp_path: Path) -> None:
    line = Epoch(1, 1.0, 50.0, 1.0, 50.0, 0.1, 1.0)
    assert draw_curves(tmp_path / "curves.png", {"eager": [line], "fused": [line]})
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1200, 480)
