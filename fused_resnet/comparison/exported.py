"""A saved program beside the model it was exported from: does the file compute what the model does?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.timing import first_tensor
from ..testing.tolerances import EXPORTED_RMS_FACTOR, ROUNDING


@dataclass(frozen=True)
class Check:
    """One run of the file. Errors are root mean squares against float64, relative to the largest exact value."""

    images: int
    eager: float
    exported: float
    passed: bool

    @property
    def sentence(self) -> str:
        return f"batch {self.images}: rms error {self.exported:.1e}, eager's own {self.eager:.1e}"


def check(model: nn.Module, run: Callable[[Tensor], Any], inputs: list[Tensor]) -> list[Check]:
    """Compare ``run``, what a saved file computes, with ``model`` on each of ``inputs``."""
    exact_model = copy.deepcopy(model).double()
    checks = []
    with torch.no_grad():
        for x in inputs:
            exact = first_tensor(exact_model(x.double()))
            scale = float(exact.abs().max()) or 1.0
            eager, got = (first_tensor(f(x.clone())) for f in (model, run))
            if got.shape != exact.shape:
                checks.append(Check(len(x), 0.0, float("inf"), False))
                continue
            eager_rms, rms = (float(((y.double() - exact) / scale).square().mean().sqrt()) for y in (eager, got))
            passed = rms <= EXPORTED_RMS_FACTOR * max(eager_rms, ROUNDING[x.dtype])  # False for NaN
            checks.append(Check(len(x), eager_rms, rms, passed))
    return checks
