"""Convolutions at which oneDNN crashes or overruns its memory; in processes of their own, because of that."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.core.convolution import conv2d, convolution_backward, pad_width, trainable_conv2d

#: No column sees the image: (3 x 29 x 3 x 1, 2 x 1 filter) and others that ended in a segmentation fault.
BLIND = [
    "n=3,h=3,w=1,c=29,k=16,r=2,s=1,stride=3:2,padding=3:1,dilation=1:2",
    "n=2,h=5,w=1,c=15,k=2,r=3,s=3,stride=2,padding=0:7,dilation=2",
    "n=3,h=3,w=1,c=37,k=32,r=3,s=1,stride=2,padding=2:9,dilation=2,residual=1",
    "n=1,h=4,w=1,c=35,k=15,r=3,s=1,stride=1:2,padding=1:1,dilation=2,dtype=bfloat16",
]

_TAILS = """
import sys
from unittest import mock
from fused_resnet.core import extensions
from fused_resnet import functional
from fused_resnet.backends import get
from fused_resnet.core.problem import Problem
from fused_resnet.testing import call_arguments, check_tail
with mock.patch.object(extensions, "cpu", lambda: None):
    for backend in ("cpu", "eager"):
        for text in sys.argv[1:]:
            problem = Problem.parse(text)
            if get(backend).can_run(problem) is None:
                run = lambda tail: functional.conv_bn_add_relu(**call_arguments(tail), backend=backend)
                check_tail(run, problem, kinds=("random",), any_order=True)
print("done")
"""

_GRADIENTS = """
import torch
from fused_resnet import functional
from fused_resnet.core.convolution import convolution_backward
torch.set_num_threads(1)
for channels in range(1, 9):
    x = torch.randn(2, channels, 32, 32).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(32, channels, 1, 1)
    grad = torch.randn(2, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    for _ in range(8):
        arguments = (True, (2, 2), (0, 0), (1, 1), 1, [True, True, True])
        got = convolution_backward(grad, x, weight, *arguments)
        exact = convolution_backward(grad.double(), x.double(), weight.double(), *arguments)
        for a, b in zip(got, exact):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-3)
print("done")
"""


def run(source: str, *arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments],
        env=os.environ | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")


@pytest.mark.parametrize("isa", ["DEFAULT", "AVX2"])
def test_columns_in_the_padding_alone(isa: str) -> None:
    run(_TAILS, *BLIND, ONEDNN_MAX_CPU_ISA=isa)


@pytest.mark.parametrize("isa", ["DEFAULT", "AVX2"])
def test_gradients_of_few_channels_under_a_stride(isa: str) -> None:
    run(_GRADIENTS, ONEDNN_MAX_CPU_ISA=isa)


def test_padding_is_done_where_a_column_may_be_blind_and_only_there() -> None:
    for width in range(1, 5):
        for window in range(1, 4):
            for padding in range(5):
                for dilation in range(1, 4):
                    if width + 2 * padding <= dilation * (window - 1):
                        continue
                    starts = range(-padding, width + padding - dilation * (window - 1))
                    blind = any(not any(0 <= i + t * dilation < width for t in range(window)) for i in starts)
                    x = torch.zeros(1, 1, 1, width)
                    padded, (_, left) = pad_width(x, window, (0, padding), (1, dilation))
                    assert (padded is not x) >= blind
                    if padding <= dilation * (window - 1) and dilation <= width:
                        assert padded is x
                    assert padded.shape[3] + 2 * left == width + 2 * padding


GEOMETRIES: list[tuple[Any, ...]] = [
    ((3, 4, 5, 6), (8, 4, 1, 1), (2, 3), (0, 0), (1, 1), 1),
    ((3, 4, 6, 6), (8, 2, 1, 1), (2, 1), (0, 0), (1, 1), 2),
    ((2, 4, 5, 6), (8, 4, 3, 1), (1, 1), (1, 2), (1, 1), 1),
    ((2, 4, 5, 3), (8, 4, 3, 2), (2, 2), (1, 4), (1, 2), 1),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_values_and_gradients(geometry: tuple[Any, ...], memory_format: torch.memory_format) -> None:
    """On integers, exactly: those of torch's convolution in float64."""
    shape, weight_shape, *rest = geometry

    def integers(*size: int) -> Tensor:
        return torch.randint(-3, 4, size).float().contiguous(memory_format=memory_format)

    x, weight, bias = integers(*shape), integers(*weight_shape), torch.ones(weight_shape[0])
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = F.conv2d(*leaves, *rest)
    grad = integers(*y.shape)
    expected = [y, *torch.autograd.grad(y, leaves, grad.double())]
    again = [t.clone().requires_grad_() for t in (x, weight, bias)]
    z = trainable_conv2d(*again, *rest)
    assert z.is_contiguous(memory_format=memory_format)
    for got in (
        [conv2d(x, weight, bias, *rest), *convolution_backward(grad, x, weight, True, *rest, [True, True, True])],
        [z, *torch.autograd.grad(z, again, grad)],
    ):
        for a, b in zip(got, expected, strict=True):
            assert a is not None
            assert torch.equal(a.double(), b)
    assert convolution_backward(grad, x, weight, True, *rest, [False, True, False])[0] is None
