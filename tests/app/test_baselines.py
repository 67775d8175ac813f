"""The rivals in the benchmarks compute what eager computes: a wrong rival would make a table meaningless."""

from __future__ import annotations

import pytest
import torch

from benchmarks import baselines, onednn, peaks
from fused_resnet.core.problem import Problem
from fused_resnet.core.timing import compare, relative_error
from fused_resnet.testing import RESNET_TAILS, make_tail

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "text",
    ["n=2,h=8,w=8,c=32,k=32,padding=1,residual=1", "n=1,h=7,w=7,c=32,k=64,r=1,residual=1",
     "n=1,h=8,w=8,c=32,k=48,padding=1,proj=16x16x16x2", "n=1,h=8,w=8,c=16,k=32,padding=1"],
    ids=["residual", "1x1", "projection", "no residual"],
)  # fmt: skip
def test_every_side_of_a_tail_agrees_with_float64(text: str) -> None:
    problem = Problem.parse(text)
    result = compare(
        baselines.tail_contenders(problem, CPU, compiled=False),
        baselines.tail_inputs(problem, CPU),
        expected=baselines.reference_of(problem, CPU),
        max_error=1e-5,
        rounds=2,
    )
    names = ["eager", "eager channels_last", "folded", "oneDNN fused", "fused", "fused, f2", "fused, no Winograd"]
    assert list(result.timings) == names
    assert not result.absent


def test_inputs_differ_from_round_to_round() -> None:
    make = baselines.tail_inputs(Problem.parse("n=1,h=6,w=6,c=8,k=8,padding=1,residual=1"), CPU)
    first, second = make(1), make(2)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_folded_and_onednn_networks_agree_with_eager(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics that folding must not lose
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.0)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        last = x.contiguous(memory_format=torch.channels_last)
        assert relative_error(baselines._folded_model(model)(last), expected) < 1e-4
        assert relative_error(onednn.network(model)(last), expected) < 1e-4


def test_roof_is_the_slower_of_compute_and_memory() -> None:
    roof = peaks.Peaks(flops=1e12, bandwidth=1e11)
    assert roof.bound(1e12, 1e10) == 1.0
    assert roof.bound(1e11, 1e11) == 1.0
    assert roof.bound(2e12, 1e11) == 2.0


def test_real_tails_are_those_of_the_networks() -> None:
    """What the operator benchmark times is what torchvision's networks contain."""
    torchvision = pytest.importorskip("torchvision")
    for network in ("resnet18", "resnet50"):
        model = torchvision.models.get_model(network, weights=None)
        blocks = [block for i in range(1, 5) for block in getattr(model, f"layer{i}")]
        own = [tail for tail in RESNET_TAILS if tail.network == network]
        assert sum(tail.blocks for tail in own) == len(blocks)
        last = "conv2" if network == "resnet18" else "conv3"
        shapes = {tuple(getattr(block, last).weight.shape) for block in blocks}
        assert {tuple(make_tail(tail.problem).conv.weight.shape) for tail in own} == shapes
