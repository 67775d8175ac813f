"""What both the interpreted and the compiled convolution with statistics are held to."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import TailArguments, reference
from fused_resnet.kernels.config import TailConfig
from fused_resnet.testing import assert_bitexact, assert_within_bar, eager_error, make_tail


def convolution(problem: Problem) -> Problem:
    """The convolution of a tail's problem, without what follows it; NHWC as the training blocks run it."""
    return dataclasses.replace(problem, residual=None, projection=None, bn=False, activation="none", channels_last=True)


class Scratch:
    """Records that hold NaN before each launch, and one set of counters, for all launches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fused_resnet.kernels import conv_stats_launch

        self.counters = torch.zeros(1 << 16, dtype=torch.int32)
        monkeypatch.setattr(conv_stats_launch, "scratch", self._scratch)

    def _scratch(self, device: torch.device, records: int, counters: int) -> tuple[Tensor, Tensor]:
        assert counters <= self.counters.numel()
        return torch.full((records,), float("nan")), self.counters


def launch(tail: TailArguments, problem: Problem, config: TailConfig | None) -> tuple[Tensor, Tensor, Tensor]:
    """One launch: y, mean and var."""
    from fused_resnet.kernels.conv_stats_launch import conv_bn_stats

    return conv_bn_stats(problem, tail.x, tail.conv.weight, tail.conv.bias, config)


def assert_statistics_of(y: Tensor, mean: Tensor, var: Tensor, label: str = "") -> None:
    """Mean and variance are those of ``y`` as it is, to float32's accuracy relative to the spread of a channel."""
    exact_var, exact_mean = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
    assert mean.dtype == var.dtype == torch.float32
    spread = exact_var.sqrt()
    error = (mean.double() - exact_mean).abs()
    # the mean itself is rounded once; what it is made of is accurate relative to the spread
    assert bool((error <= 2.0**-23 * exact_mean.abs() + 1e-5 * spread).all()), f"{label}: mean is off by {error.max()}"
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=1e-30, msg=lambda m: f"{label}: var: {m}")


def check_conv_stats(problem: Problem, config: TailConfig | None, scratch: Scratch) -> None:
    """y within the error rule and bit-exact on small integers, the statistics those of y, the counters left zero."""
    problem = convolution(problem)
    label = f"{problem} {config}"
    for kind in ("integers", "random"):
        tail = make_tail(problem, kind)
        y, mean, var = launch(tail, problem, config)
        exact = reference(tail.to(torch.float64))
        if kind == "integers":
            assert_bitexact(y, exact, label)
        else:
            assert_within_bar(y, eager_error(problem), exact, label)
        assert_statistics_of(y, mean, var, label)
        assert not scratch.counters.any(), f"{label}: the counters are not left zero"


def far_from_zero(pixels: int, channels: int) -> tuple[Problem, TailArguments]:
    """A convolution whose output is its input: float32 values of mean 1e4 and deviation 1e-2.

    Sums of squares keep nothing of such a variance, and a mean rounded to float32 is off by a tenth of the deviation.
    """
    problem = convolution(Problem.parse(f"n=1,h=1,w={pixels},c={channels},k={channels},r=1"))
    tail = make_tail(problem)
    g = torch.Generator().manual_seed(3)
    x = 1e4 + 1e-2 * torch.randn(tail.x.shape, generator=g, dtype=torch.float64)
    tail.x.copy_(x)
    tail.conv.weight.copy_(torch.eye(channels).view_as(tail.conv.weight))
    return problem, tail
