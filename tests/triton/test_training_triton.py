"""The Triton training kernels in Triton's interpreter: results, the mask, and the bytes they move."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start"),
]
pytest.importorskip("triton")

from fused_resnet import ops  # noqa: E402
from fused_resnet.core.training_call import mask_words  # noqa: E402

assert ops.NAMESPACE == "fused_resnet"
OPS = torch.ops.fused_resnet
FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
#: Several tiles of rows, a partial last one, a partial block of channels, words that straddle pixels; one word only.
SHAPES = [(3, 37, 7, 5), (1, 64, 9, 8), (2, 130, 4, 4), (1, 1, 2, 3)]


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=g).to(dtype).contiguous(memory_format=torch.channels_last)


def powers(channels: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.tensor([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0])[torch.randint(0, 6, (channels,), generator=g)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", [(FLOAT, FLOAT), (HALF, HALF), (BRAIN, FLOAT)])
@pytest.mark.parametrize("kind", ["plain", "residual", "projection"])
@pytest.mark.parametrize("activation", ["relu", "relu6", "none"])
def test_bit_exact_on_small_integers(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], kind: str, activation: str
) -> None:
    """Scales are powers of two and values integers: nothing rounds, so every bit must be eager's."""
    y, second = integers(shape, dtypes[0], 0), integers(shape, dtypes[1], 1)
    vectors = [powers(shape[1], seed) for seed in range(8)]
    mean, invstd, weight, bias = vectors[:4]
    if activation == "relu6":
        bias = bias + 3
    if kind == "plain":
        weight, bias = None, None
    proj = (second, *vectors[4:]) if kind == "projection" else (None,) * 5
    residual = second if kind == "residual" else None
    results = []
    for backend in ("triton", "eager"):
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
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [*SHAPES, (5, 70, 11, 13)])
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_statistics(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    y = (torch.randn(shape, generator=g) * 2 + 300).to(dtype).contiguous(memory_format=torch.channels_last)
    for _ in range(2):  # the second launch meets what the first one left
        mean, var = OPS.bn_stats(y, "triton")
        exact_var, exact_mean = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(mean.double(), exact_mean, rtol=2e-7, atol=0)
        torch.testing.assert_close(var.double(), exact_var, rtol=4e-6, atol=1e-9)


def test_nan_and_infinity_pass() -> None:
    y = torch.zeros(1, 32, 2, 2).contiguous(memory_format=torch.channels_last)
    y[0, 3, 0, 1], y[0, 4, 1, 1] = float("nan"), float("inf")
    args = (y, torch.zeros(32), torch.ones(32), None, None, None, None, None, None, None, None)
    for activation in ("relu", "relu6"):
        for got, expected in zip(
            OPS.bn_apply_add_relu(*args, activation, True, "triton"),
            OPS.bn_apply_add_relu(*args, activation, True, "eager"),
            strict=True,
        ):
            assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


class ByteCounter:
    """Counts the bytes that the kernels' loads and stores move, element by element, lanes that are off excluded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.moved: dict[int, int] = {}
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counted_load(builder, ptrs, mask, other, *rest):  # type: ignore[no-untyped-def]
            self._count(ptrs, mask)
            return load(builder, ptrs, mask, other, *rest)

        def counted_store(builder, ptrs, value, mask, *rest):  # type: ignore[no-untyped-def]
            self._count(ptrs, mask)
            return store(builder, ptrs, value, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)

    def _count(self, ptrs, mask) -> None:  # type: ignore[no-untyped-def]
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        for address in ptrs.data[mask.data].ravel().tolist():
            self.moved[address] = self.moved.get(address, 0) + size

    def of(self, tensor: Tensor) -> int:
        """Bytes moved to or from ``tensor``'s memory since the last call."""
        first = tensor.data_ptr()
        inside = [a for a in self.moved if first <= a < first + tensor.numel() * tensor.element_size()]
        return sum(self.moved.pop(a) for a in inside)


@pytest.mark.parametrize("conv_stats", [True, False], ids=["conv+stats", "stats"])
def test_activation_traffic_is_nine_or_ten_tensors_and_three_masks(
    conv_stats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward of the tail in units of the tensor: eager 16, here 9 with the statistics taken in the
    convolution's epilogue and 10 without (see functional_training).

    The mask's words are each needed by 32 elements, which are one memory sector's neighbours: they count once a pass.
    """
    shape = (2, 64, 6, 6)
    y, residual, grad = (torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(3))
    weight, bias = torch.rand(64), torch.rand(64)
    tensor = y.numel() * y.element_size()
    counter = ByteCounter(monkeypatch)
    total = 0

    def activations(*tensors: Tensor) -> int:
        return sum(counter.of(t) for t in tensors)

    if conv_stats:
        x, filters = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last), torch.randn(64, 8, 1, 1)
        y, mean, var = OPS.conv_bn_stats(x, filters, None, (1, 1), (0, 0), (1, 1), 1, "triton")
        # The convolution's own store, and nothing is read back.
        assert activations(y) == tensor
    else:
        mean, var = OPS.bn_stats(y, "triton")
        # Each program reads one pixel more, its pivot: less than a tile of 32 rows.
        pivots = 4 * 64 * 3
        stats = activations(y)
        assert tensor <= stats <= tensor + pivots
        total += tensor
    invstd = torch.rsqrt(var + 1e-5)
    out, mask = OPS.bn_apply_add_relu(y, mean, invstd, weight, bias, residual, *[None] * 5, "relu", True, "triton")
    forward = activations(y, residual, out)
    assert forward == 3 * tensor
    assert activations(mask) == 4 * mask_words(y.numel()) == tensor // 32
    total += forward
    sums = OPS.bn_backward_reduce(grad, mask, y, mean, invstd, None, None, None, "triton")
    reduce = activations(grad, y)
    assert reduce == 2 * tensor
    total += reduce
    means = [s / (y.numel() // 64) for s in sums[:2]]
    d_y, d_residual = OPS.bn_backward_apply(
        grad, mask, y, mean, invstd, weight, *means, *[None] * 6, torch.float32, "triton"
    )
    backward = activations(grad, y, d_y, d_residual)
    assert backward == 4 * tensor
    total += backward
    assert total == (9 if conv_stats else 10) * tensor


def test_many_parts_are_merged() -> None:
    """More programs than the last one reads at once, the last of them smaller than the others."""
    from fused_resnet.kernels import bn_launch

    g = torch.Generator().manual_seed(0)
    y = (torch.randn(3, 8, 61, 40, generator=g) + 50).contiguous(memory_format=torch.channels_last)
    assert bn_launch._Reduction(y, 2).grid[1] > 2 * 64
    mean, var = OPS.bn_stats(y, "triton")
    exact_var, exact_mean = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=2e-7, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=4e-6, atol=0)
    grad = integers(tuple(y.shape), FLOAT, 1)
    none = torch.empty(0, dtype=torch.int32)
    args = (grad, none, y.round(), torch.full((8,), 50.0), torch.ones(8), None, None, None)
    for got, expected in zip(
        OPS.bn_backward_reduce(*args, "triton"), OPS.bn_backward_reduce(*args, "eager"), strict=True
    ):
        assert torch.equal(got, expected)
