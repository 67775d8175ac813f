"""Every CPU kernel ends as eager does: NaN passes through an activation, and so does -0, which is not below 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_resnet.backends.cpu_rule import BF16X3_STEM, DIRECT, Algorithm
from fused_resnet.core.reference import ConvBN, TailArguments
from tests.cpu.test_cpu_kernels import ALGORITHMS, CODES, OPS, algorithms, name_of, run
from tests.support.instruction_sets import ALL, need

#: The largest panel and a part of one; with lanes left over for each number of lanes.
CHANNELS = 45
ACTIVATIONS = {"relu": torch.relu, "relu6": torch.nn.functional.relu6}
NEGATIVE_NAN = torch.tensor(-1, dtype=torch.int32).view(torch.float32).item()

activations = pytest.mark.parametrize("activation", ACTIVATIONS)
every_isa = pytest.mark.parametrize("isa", ALL)


def negated(shape: tuple[int, ...], c: int, residual: bool, **geometry: tuple[int, int]) -> TailArguments:
    """Random sums times -1 plus -0: every third channel has no weights, so its results are -0; and one input is NaN."""
    g = torch.Generator().manual_seed(1)
    n, h, w = shape
    x = torch.randn(n, c, h, w, generator=g)
    x[0, 0, h // 2, w // 2] = NEGATIVE_NAN
    weight = torch.randn(CHANNELS, c, 3, 3, generator=g)
    weight[::3] = 0.0
    zeros, ones = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    conv = ConvBN(weight, None, -ones, -zeros, zeros, ones, 0.0)
    padding = geometry.get("padding", (1, 1))
    stride = geometry.get("stride", (1, 1))
    tail = TailArguments(x, conv, stride=stride, padding=padding, activation="none")
    if residual:
        p, q = ((size + 2 * pad - 3) // step + 1 for size, pad, step in zip((h, w), padding, stride, strict=True))
        added = torch.randn(n, CHANNELS, p, q, generator=g)
        added[:, ::3, :, ::2] = -0.0
        tail = tail._replace(residual=added.contiguous(memory_format=torch.channels_last))
    return tail._replace(x=x.contiguous(memory_format=torch.channels_last))


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """NaN where the other has one, of any payload; else the same bits, so the same sign of zero."""
    assert torch.equal(actual.isnan(), expected.isnan())
    integers = torch.int32 if actual.dtype is torch.float32 else torch.int16
    bits = [t.masked_fill(t.isnan(), 1.0).view(integers) for t in (actual, expected)]
    assert torch.equal(*bits)


def has_all_kinds(before: Tensor) -> bool:
    """Whether there is a -0, a NaN, and something below 0 and above 6."""
    zero = (before == 0) & before.signbit()
    return all(bool(kind.any()) for kind in (zero, before.isnan(), before < 0, before > 6))


@algorithms
@every_isa
@activations
@pytest.mark.parametrize("residual", [False, True])
def test_convolutions(algorithm: Algorithm, isa: str, activation: str, residual: bool) -> None:
    need(isa)
    tail = negated((2, 9, 11), 20, residual)
    before = run(tail, algorithm, isa)
    assert has_all_kinds(before)
    assert_same_bits(run(tail._replace(activation=activation), algorithm, isa), ACTIVATIONS[activation](before))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=name_of)
@every_isa
def test_without_an_activation_all_stays(algorithm: Algorithm, isa: str) -> None:
    """Where weights are 0 the sum is +0, so the results are -1 * 0 + -0, and the residual's where it is not 0."""
    need(isa)
    tail = negated((1, 6, 7), 20, residual=True)
    y, added = run(tail, algorithm, isa), tail.residual
    assert added is not None
    finite = ~y.isnan()
    finite[:, [k for k in range(CHANNELS) if k % 3]] = False
    assert torch.equal(y[finite].view(torch.int32), added[finite].view(torch.int32))


@activations
@every_isa
@pytest.mark.parametrize("weights", ["whole", BF16X3_STEM.weights])
@pytest.mark.parametrize(("c", "stride"), [(3, 2), (3, 1), (4, 1)])  # row by row, and gathered
def test_max_pool(c: int, stride: int, weights: str, isa: str, activation: str) -> None:
    """The pool takes -0 for +0, as does eager's comparison; it must not take it for the largest, as its integer is."""
    need(isa)
    tail = negated((1, 23, 21), c, residual=False, stride=(stride, stride))
    if weights == BF16X3_STEM.weights:
        if isa not in ("amx", "portable"):
            pytest.skip(f"{isa} has no matrix tiles")
        if c * 9 < 32:
            pytest.skip("fewer than 32 inputs")
    before = run(tail, DIRECT)
    assert has_all_kinds(before)
    conv = tail.conv
    pooled = OPS.conv_max_pool(
        tail.x, OPS.conv_pack(conv.weight, 0, isa, weights), conv.weight.shape[:1] + conv.weight.shape[2:], isa,
        tail.stride, tail.padding, tail.dilation, *conv[1:], CODES[activation], (3, 3, 2, 2, 1, 1), weights,
    )  # fmt: skip
    expected = torch.nn.functional.max_pool2d(ACTIVATIONS[activation](before), 3, 2, 1)
    torch.testing.assert_close(pooled, expected, equal_nan=True)
    assert torch.equal(pooled.isnan(), expected.isnan())
    assert not pooled.signbit()[~pooled.isnan()].any()


@activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("residual", [False, True])
def test_the_epilogue_pass(
    residual: bool, memory_format: torch.memory_format, dtype: torch.dtype, activation: str
) -> None:
    g = torch.Generator().manual_seed(2)
    y = (torch.randn(2, CHANNELS, 5, 7, generator=g) * 4).to(dtype)
    y[:, ::3] = 0.0
    y[0, 1, 2, 3] = torch.nan
    y = y.contiguous(memory_format=memory_format)
    added = torch.full_like(y, -0.0) if residual else None
    zeros, ones = torch.zeros(CHANNELS), torch.ones(CHANNELS)

    def ended(name: str) -> Tensor:
        result = y.clone()
        OPS.scale_shift_add_act_(result, None, -ones, -zeros, zeros, ones, 0.0, added, CODES[name])
        return result

    before = ended("none")
    assert has_all_kinds(before)
    assert_same_bits(ended(activation), ACTIVATIONS[activation](before))
