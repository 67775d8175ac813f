"""The training convolution with statistics on a GPU: `pytest -m gpu`. Every backend that has one, at real sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import ops
from fused_resnet.backends.training import dispatch as training_dispatch
from fused_resnet.core.training_call import ConvGeometry
from fused_resnet.testing import assert_within_bar
from fused_resnet.testing.tolerances import FORWARD_FACTOR
from tests.support.conv_stats_checks import assert_statistics_of

pytestmark = [pytest.mark.gpu]

assert ops.NAMESPACE == "fused_resnet"
OPS = torch.ops.fused_resnet
ONE = (1, 1)
#: N, C, H = W, K, R, stride: the stages of a ResNet at a training batch, the stem, and sizes that fit no tile.
SIZES = [
    (64, 64, 56, 64, 3, 1), (64, 256, 14, 256, 3, 1), (64, 512, 7, 512, 3, 1), (64, 256, 56, 128, 1, 2),
    (32, 3, 224, 64, 7, 2), (5, 37, 29, 70, 3, 1),
]  # fmt: skip


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if (why_not := training_dispatch.get(name).can_run(torch.zeros(1, 8, 1, 1, device="cuda"))) is not None:
        pytest.skip(why_not)
    return name


def operands(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, ConvGeometry]:
    n, c, h, k, r, stride = size
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(n, c, h, h, generator=g, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(k, c, r, r, generator=g, device="cuda") / (c * r * r) ** 0.5
    geometry = ConvGeometry((stride, stride), (r // 2, r // 2), ONE, 1)
    return x, weight.to(dtype).contiguous(memory_format=torch.channels_last), geometry


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_output_and_statistics(backend: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, geometry = operands(size, dtype)
    if (why_not := training_dispatch.get(backend).why_not_conv_stats(x, weight, geometry)) is not None:
        pytest.skip(why_not)
    results = [OPS.conv_bn_stats(x, weight, None, *geometry, backend) for _ in range(3)]
    y, mean, var = results[0]
    exact = F.conv2d(x.double(), weight.double(), None, *geometry)
    eager = F.conv2d(x, weight, None, *geometry)
    assert y.stride() == eager.stride()
    assert_within_bar(y, float((eager.double() - exact).abs().max()), exact, f"{backend} {size}", FORWARD_FACTOR)
    assert_statistics_of(y, mean, var)
    for other in results[1:]:  # whoever came last
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_in_a_cuda_graph(backend: str) -> None:
    x, weight, geometry = operands(SIZES[1], torch.float16)
    expected = OPS.conv_bn_stats(x, weight, None, *geometry, backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = OPS.conv_bn_stats(x, weight, None, *geometry, backend)
    for _ in range(2):
        for t in got:
            t.zero_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
