"""The C++ training kernels of every instruction set against the eager passes, where nothing may round differently."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fused_resnet import ops
from fused_resnet.core import extensions
from tests.support.instruction_sets import VECTORS, need

if extensions.cpu() is None:
    pytest.skip(str(extensions.why_not_cpu()), allow_module_level=True)

assert ops.NAMESPACE == "fused_resnet"
OPS = torch.ops.fused_resnet
CHANNELS = (1, 3, 8, 20, 32, 33, 64, 96, 130)
FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(FLOAT, FLOAT), (BRAIN, BRAIN), (HALF, HALF), (BRAIN, FLOAT), (HALF, FLOAT), (FLOAT, BRAIN), (FLOAT, HALF)]


@pytest.fixture(params=VECTORS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the extension that this processor has."""
    named = need(request.param)
    switch = torch.ops.fused_resnet_C.cpu_training_isa
    before = switch("")
    assert switch(named) == named
    yield named
    switch(before)


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=g).to(dtype).contiguous(memory_format=torch.channels_last)


def powers(channels: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.tensor([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0])[torch.randint(0, 6, (channels,), generator=g)]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "residual", "projection"])
@pytest.mark.parametrize("activation", ["relu", "relu6", "none"])
def test_bit_exact_on_small_integers(
    isa: str, dtypes: tuple[torch.dtype, torch.dtype], kind: str, activation: str
) -> None:
    """Scales are powers of two and values integers, so both backends must agree in every bit."""
    if kind == "projection" and dtypes[0] != dtypes[1]:
        pytest.skip("the projection's convolution has the dtype of the main one")
    for channels in CHANNELS:
        check_bit_exact(channels, dtypes, kind, activation)


def check_bit_exact(channels: int, dtypes: tuple[torch.dtype, torch.dtype], kind: str, activation: str) -> None:
    shape = (3, channels, 5, 7)
    y, second = integers(shape, dtypes[0], 0), integers(shape, dtypes[1], 1)
    vectors = [powers(channels, seed) for seed in range(8)]
    mean, invstd, weight, bias = vectors[:4]
    proj = (second, *vectors[4:]) if kind == "projection" else (None,) * 5
    residual = second if kind == "residual" else None
    results = []
    for backend in ("cpu", "eager"):
        out, mask = OPS.bn_apply_add_relu(y, mean, invstd, weight, bias, residual, *proj, activation, True, backend)
        grad = integers(shape, out.dtype, 2)
        sums = OPS.bn_backward_reduce(grad, mask, y, mean, invstd, *proj[:3], backend)
        means = (vectors[4], vectors[5]) if kind == "projection" else (None, None)
        grads = OPS.bn_backward_apply(
            grad, mask, y, mean, invstd, weight, vectors[6], vectors[7], *proj[:4], *means,
            None if residual is None else residual.dtype, backend,
        )  # fmt: skip
        results.append((out, mask, *sums, *grads))
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected), f"{channels} channels"


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, HALF])
@pytest.mark.parametrize("pixels", [(1, 1, 2), (3, 5, 7), (9, 40, 31)])
def test_statistics(isa: str, dtype: torch.dtype, pixels: tuple[int, int, int]) -> None:
    for channels in CHANNELS:
        check_statistics(channels, dtype, pixels)


def check_statistics(channels: int, dtype: torch.dtype, pixels: tuple[int, int, int]) -> None:
    g = torch.Generator().manual_seed(channels)
    n, h, w = pixels
    y = (torch.randn(n, channels, h, w, generator=g) * 3 + 40).to(dtype).contiguous(memory_format=torch.channels_last)
    mean, var = OPS.bn_stats(y, "cpu")
    exact_var, exact_mean = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=2e-7, atol=0)
    # ulps of a sum of squares over rows of 64, see kRowsPerFlush
    torch.testing.assert_close(var.double(), exact_var, rtol=64 * 2**-24, atol=1e-9)


def test_one_wild_first_row_does_not_spoil_the_shifted_sums(isa: str) -> None:
    y = torch.randn(8, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    y[0, :, 0, 0] = 1e4
    var = OPS.bn_stats(y, "cpu")[1]
    torch.testing.assert_close(var.double(), y.double().var(dim=(0, 2, 3), correction=0), rtol=1e-5, atol=0)


def test_mixing_bfloat16_and_float16_is_refused_by_cpu_and_taken_by_eager(isa: str) -> None:
    y, residual = integers((2, 8, 3, 3), BRAIN, 0), integers((2, 8, 3, 3), HALF, 1)
    args = (y, torch.zeros(8), torch.ones(8), None, None, residual, *[None] * 5)
    with pytest.raises(RuntimeError, match="cpu: activations must not mix bfloat16 and float16"):
        OPS.bn_apply_add_relu(*args, "relu", True, "cpu")
    assert OPS.bn_apply_add_relu(*args)[0].dtype == torch.float32


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan_and_infinity(isa: str) -> None:
    values = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-8, 3.5e38, float("inf"), float("nan"), 1e-40, 0.0])
    residual = values.repeat(8).view(1, 64, 1, 1).contiguous(memory_format=torch.channels_last)
    y = torch.zeros_like(residual, dtype=torch.bfloat16)
    one, zero = torch.ones(64), torch.zeros(64)
    out = OPS.bn_apply_add_relu(y, zero, one, one, residual.view(64), *[None] * 6, "none", False, "cpu")[0]
    torch.testing.assert_close(out, residual.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
