"""The demo's steps, in order; each prints what it found."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from ...comparison import sides
from ...comparison.verify import Row, verify
from ...core.timing import ROUNDS, compare
from ...demo.digits import DigitsResNet
from ...surgery import explain, freeze, fuse
from ...trainer.data import Data, load_data
from ...trainer.loop import Result, TrainConfig, train
from ..inspect import print_explanation
from ..measure import print_table
from .outcome import Outcome, Timed
from .picture import draw

#: Between right answers in float32 and in bfloat16; what is judged more strictly is judged before anything is timed.
_MAX_ERROR = 5e-2
#: What the demo promises of its training, in percent.
WANTED_ACCURACY = 97.0


def run(
    folder: Path,
    *,
    epochs: int = 12,
    rounds: int = ROUNDS,
    compiled: bool = True,
    imagenet: bool = True,
    console: Console | None = None,
) -> Outcome:
    """Run the demo, leaving checkpoint, images and picture in ``folder``. RuntimeError when a promise is not kept."""
    console = console or Console()

    console.rule("1. train a small ResNet on handwritten digits")
    data = load_data("digits")
    result = _train(data, folder / "training", epochs, console)
    model = result.model.eval()
    pixels, x, labels = held_out(data)
    _save_images(pixels, labels, folder / "digits")
    if result.accuracy < WANTED_ACCURACY:
        raise RuntimeError(f"demo: the network reached {result.accuracy:.1f} % on the held-out digits, expected 97 %")

    console.rule("2. fuse it: one call, the same Parameters, the same state_dict")
    fused = fuse(model)
    print_explanation(explain(fused), console)

    console.rule("3. is it the same network?")
    answers = predict(fused, x).argmax(1)
    same = int((predict(model, x).argmax(1) == answers).sum())
    verification = verify(model, fused, x)
    _print_errors(verification.end_to_end, same, len(x), console)
    if same != len(x):
        raise RuntimeError(f"demo: fused and eager agree on {same} of {len(x)} digits, expected all")
    if not verification.passed:
        raise RuntimeError("demo: the fused network's errors exceed the bar; `fused-resnet verify` shows the blocks")
    bfloat16 = freeze(model, dtype=torch.bfloat16)
    _print_bfloat16(predict(bfloat16, x).argmax(1), answers, labels, explain(bfloat16).notes, console)

    console.rule("4. is it faster?")
    side = x.shape[-1]
    # Compiling takes torch half a minute, so only the larger network is compiled.
    digits_compiled = compiled and not imagenet
    timed = [_time(f"digits ResNet, {side}x{side}, batch 64", model, x[:64], rounds, digits_compiled, console)]
    if imagenet:
        from torchvision.models import resnet18

        image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        timed.append(_time("ResNet-18, 224x224, batch 1", resnet18().eval(), image, rounds, compiled, console))

    picture = draw(Outcome(result, pixels, labels, answers, same, verification, timed), folder / "demo.png")
    console.rule("5. what you have now")
    console.print(f"picture:    [bold]{picture}[/]")
    console.print(f"checkpoint: [bold]{result.weights}[/]; held-out digits as images: [bold]{folder / 'digits'}[/]")
    console.print(
        f"try:        fused-resnet predict fused_resnet.demo.digits:DigitsResNet {folder / 'digits'} "
        f"--weights {result.weights} -k 2",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    console.print(f"[bold]On a GPU:[/] {ON_A_GPU}")
    return Outcome(result, pixels, labels, answers, same, verification, timed)


def _train(data: Data, folder: Path, epochs: int, console: Console) -> Result:
    shutil.rmtree(folder, ignore_errors=True)  # each demo is a new run
    start = time.perf_counter()
    result = train(TrainConfig(data="digits", model=DigitsResNet, epochs=epochs, output=folder))
    parameters = sum(p.numel() for p in result.model.parameters())
    console.print(
        f"{result.accuracy:.1f} % of {len(data.test)} held-out digits are right after {epochs} epochs of "
        f"{len(data.train)} images ({parameters:,} parameters, {time.perf_counter() - start:.0f} s)"
    )
    return result


def held_out(data: Data) -> tuple[Tensor, Tensor, Tensor]:
    """The test images: as uint8 pixels, as normalised input, and their labels."""
    pixels = data.test.images.load(torch.arange(len(data.test)))
    return pixels, data.normalise(pixels), data.test.labels


def predict(model: nn.Module, x: Tensor, batch: int = 120) -> Tensor:
    """Logits of all images, in eval mode."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(piece) for piece in x.split(batch)])


def _save_images(pixels: Tensor, labels: Tensor, folder: Path) -> None:
    """Some held-out digits as files, for ``fused-resnet predict``."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(min(20, len(pixels))):
        Image.fromarray(pixels[i, 0].numpy()).save(folder / f"{i:02d}_is_{int(labels[i])}.png")


def _print_errors(row: Row, same: int, images: int, console: Console) -> None:
    console.print(f"{same} of {images} predictions are the same")
    console.print(
        f"logits against float64, largest error relative to the largest logit: eager {row.eager_max:.1e}, "
        f"fused {row.fused_max:.1e}; rms: eager {row.eager_rms:.1e}, fused {row.fused_rms:.1e}",
        highlight=False,
    )
    console.print(f"the bar: {row.rule} + one rounding: {'passed' if row.passed else 'FAILED'}", highlight=False)


def _print_bfloat16(rounded: Tensor, answers: Tensor, labels: Tensor, notes: tuple[str, ...], console: Console) -> None:
    right, same, images = int((rounded == labels).sum()), int((rounded == answers).sum()), len(labels)
    console.print(
        "frozen and computed in bfloat16, freeze(model, dtype=torch.bfloat16): "
        f"{100 * right / images:.1f} % are right, {same} of {images} predictions are those of float32"
    )
    for note in (note for note in notes if note.startswith("bfloat16:")):
        console.print(note, highlight=False)


def _time(title: str, model: nn.Module, x: Tensor, rounds: int, compiled: bool, console: Console) -> Timed:
    contenders = [sides.eager(model), sides.eager_channels_last(model)]
    contenders += [sides.compiled(model)] if compiled else []
    contenders += [sides.fused(model), sides.frozen(model)]
    contenders.append(sides.frozen(model, sides.FROZEN_BF16, dtype=torch.bfloat16))
    with console.status(f"timing {title} ..."):
        result = compare(
            contenders, lambda _: (x,), expected=sides.expected_output(model), rounds=rounds, max_error=_MAX_ERROR
        )
    rows = sides.summary(result, len(x))
    print_table(f"{title}, CPU, {result.threads} threads", rows, result.absent, console)
    return Timed(title, len(x), rows, result.absent)


#: What would change, for the reader who has none here.
ON_A_GPU = (
    "the same fuse() call runs each residual tail as one CUDA or Triton kernel in fp16, bf16 or tf32 (sm_80 or "
    "newer): convolution, BN, residual and ReLU without a trip through memory in between, 2 launches for a "
    "BasicBlock and 3 for a Bottleneck, their projections included. There the gain is memory traffic and launches; "
    "here, on the CPU, it is fewer multiplications (Winograd), matrix tiles where there are any (AMX) and the same "
    "saved traffic. `fused-resnet bench MODEL --device cuda --dtype float16` measures it; no figure for a GPU is "
    "claimed before that has been run."
)
