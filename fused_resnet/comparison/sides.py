"""The sides of a comparison of one model: eager in both layouts, torch.compile, fused, and frozen.

Every side owns a copy of the model; ``benchmarks/baselines.py`` adds the runtimes of others.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.timing import Comparison, Contender, first_tensor
from ..surgery import freeze, fuse

__all__ = [
    "EAGER",
    "FROZEN",
    "FROZEN_BF16",
    "FUSED",
    "channels_last_inputs",
    "compiled",
    "eager",
    "eager_channels_last",
    "frozen",
    "fused",
    "summary",
]

EAGER, EAGER_CHANNELS_LAST, COMPILED, FUSED = "eager", "eager channels_last", "torch.compile", "fused"
FROZEN, FROZEN_BF16 = "frozen", "frozen, bfloat16"

#: A speed-up is measured over the better of these two layouts.
EAGER_LAYOUTS = (EAGER, EAGER_CHANNELS_LAST)


def channels_last_inputs(*inputs: Any) -> tuple[Any, ...]:
    """A fresh channels_last copy of each 4-d tensor."""
    return tuple(
        t.clone(memory_format=torch.channels_last) if isinstance(t, Tensor) and t.dim() == 4 else t for t in inputs
    )


def eager(model: nn.Module) -> Contender:
    """The model as it is, NCHW."""
    return Contender(EAGER, lambda: copy.deepcopy(model).eval())


def eager_channels_last(model: nn.Module) -> Contender:
    return Contender(EAGER_CHANNELS_LAST, lambda: _channels_last(model), channels_last_inputs)


def compiled(model: nn.Module, name: str = COMPILED, **options: Any) -> Contender:
    """``torch.compile`` of the channels_last model; optional, since it needs a working C++ compiler."""

    def build() -> Callable[..., Any]:
        torch._dynamo.reset()  # what an earlier model left behind would count as recompilation
        run: Callable[..., Any] = torch.compile(_channels_last(model), **options)
        return run

    return Contender(name, build, channels_last_inputs, optional=True)


def fused(model: nn.Module, name: str = FUSED, backend: str = "auto", winograd: str = "auto") -> Contender:
    """``fuse(model)`` on channels_last input; ``model`` may be fused already, with the options wanted."""
    return Contender(name, lambda: fuse(model, backend=backend, winograd=winograd).eval(), channels_last_inputs)


def frozen(
    model: nn.Module, name: str = FROZEN, backend: str = "auto", winograd: str = "auto",
    dtype: torch.dtype | None = None,
) -> Contender:  # fmt: skip
    """``freeze(model)`` on channels_last input, computed in ``dtype``."""
    return Contender(name, lambda: freeze(model, backend=backend, winograd=winograd, dtype=dtype), channels_last_inputs)


def _channels_last(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().to(memory_format=torch.channels_last)


def summary(result: Comparison, images: int) -> list[dict[str, Any]]:
    """One row for each side: median and spread in ms, images per second, speed-up over the better eager layout."""
    rows = []
    layouts = [name for name in EAGER_LAYOUTS if name in result.timings]
    for name, timing in result.timings.items():
        ratio = result.speedup(name, layouts) if layouts else None
        rows.append(
            {
                "name": name,
                "median_ms": timing.median * 1e3,
                "p10_ms": timing.percentile(10) * 1e3,
                "p90_ms": timing.percentile(90) * 1e3,
                "images_per_second": images / timing.median,
                "speedup": ratio.median if ratio else None,
                "low": ratio.low if ratio else None,
                "high": ratio.high if ratio else None,
                "error": timing.error,
                "preparation_s": timing.preparation,
                "host_us": statistics.median(timing.host_times) * 1e6 if timing.host_times else None,
            }
        )
    return rows


def expected_output(model: nn.Module) -> Callable[..., Tensor]:
    """The float64 answer, the ``expected`` of :func:`fused_resnet.core.timing.compare`."""
    exact = copy.deepcopy(model).eval().double()
    return lambda *inputs: first_tensor(exact(*(t.double() for t in inputs)))
