"""What the demo measured; its picture is drawn from that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...comparison.verify import Verification
from ...trainer.loop import Result


@dataclass(frozen=True)
class Timed:
    """One network, timed on one input shape."""

    title: str
    images: int
    rows: list[dict[str, Any]]
    absent: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """Everything the demo measured; the picture is drawn from it."""

    training: Result
    pixels: Tensor  # the held-out images
    labels: Tensor
    answers: Tensor  # the fused network's
    same_predictions: int
    verification: Verification
    timed: list[Timed]
