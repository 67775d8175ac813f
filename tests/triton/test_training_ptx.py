"""The compiled Triton training kernels, executed by the PTX interpreter: races, uninitialised data, bounds, results."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.ptx,
    pytest.mark.skipif(not os.environ.get("PTXI_HOME"), reason="needs PTXI_HOME, the folder of the PTX interpreter"),
]
pytest.importorskip("triton")

from fused_resnet.backends.training import eager as training_eager  # noqa: E402
from fused_resnet.core.training_call import (  # noqa: E402
    BackwardPass,
    BatchNorm,
    ForwardPass,
    Gradients,
    GradMeans,
    mask_words,
)

EAGER = training_eager.BACKEND


@pytest.fixture(scope="module", params=[80, 90])
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Triton compiles for this compute capability; the interpreter watches races within and between blocks."""

    sys.path.insert(0, os.environ["PTXI_HOME"])
    import triton_device

    triton_device.activate(request.param, global_race=1)
    return  # the next activation replaces this one


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=g).to(dtype).contiguous(memory_format=torch.channels_last)


def powers(channels: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.tensor([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0])[torch.randint(0, 6, (channels,), generator=g)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "kind"), [((2, 64, 9, 8), "residual"), ((3, 37, 7, 5), "projection")])
def test_passes(device: None, dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> None:
    from fused_resnet.kernels import bn_launch

    y, second, grad = (integers(shape, dtype, seed) for seed in range(3))
    vectors = [powers(shape[1], seed) for seed in range(10)]
    bn = BatchNorm(y, *vectors[:4])
    proj = BatchNorm(second, *vectors[4:8]) if kind == "projection" else None
    residual = None if proj is not None else second
    means, proj_means = GradMeans(*vectors[8:]), None if proj is None else GradMeans(*vectors[7:9])
    results = []
    for run in (bn_launch, EAGER):
        out, d_y, d_second = (torch.empty_like(y) for _ in range(3))
        mask = torch.empty(mask_words(y.numel()), dtype=torch.int32)
        forward, backward = ForwardPass(bn, residual, proj, "relu", out, mask), BackwardPass(grad, mask, bn, proj)
        gradients = Gradients(means, proj_means, d_y, d_second)
        if run is EAGER:
            EAGER.apply(forward)
            sums = EAGER.backward_reduce(backward)
            EAGER.backward_apply(backward, gradients)
        else:
            bn_launch.bn_apply_add_relu(forward)
            sums = bn_launch.bn_backward_reduce(backward)
            bn_launch.bn_backward_apply(backward, gradients)
        results.append((out, mask, *sums, d_y, d_second))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_statistics(device: None, dtype: torch.dtype) -> None:
    from fused_resnet.kernels import bn_launch

    g = torch.Generator().manual_seed(0)
    y = (torch.randn(2, 70, 9, 7, generator=g) * 2 + 300).to(dtype).contiguous(memory_format=torch.channels_last)
    mean, var = bn_launch.bn_stats(y)
    exact_var, exact_mean = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=2e-7, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=4e-6, atol=1e-9)
