"""The rule among kernels that nothing has measured, and the model behind it."""

from __future__ import annotations

import pytest
import torch

from fused_resnet.backends import gpu_rule
from fused_resnet.core.problem import Problem
from fused_resnet.testing import RESNET_TAILS, in_dtype


def _best(text: str, device: str) -> list[str]:
    from fused_resnet import devices

    problem = Problem.parse(text + ",device=cuda")
    return gpu_rule.order(("eager", "two_pass", "cudnn", "triton", "cuda"), problem, devices.find(device))


def test_the_rule_prefers_fusion_where_memory_binds() -> None:
    bottleneck = "n=256,h=56,w=56,c=64,k=256,r=1,dtype=float16,residual=1"
    for device in ("A100", "RTX 4090"):
        order = _best(bottleneck, device)
        assert order[0] == "cuda"
        assert order[-1] == "eager"
    projected = "n=256,h=56,w=56,c=64,k=256,r=1,dtype=float16,proj=64x56x56x1"  # two launches and a z that travels
    order = _best(projected, "H200")
    assert set(order[:2]) == {"cuda", "triton"}
    assert order[-1] == "eager"


def test_the_rule_leaves_mma_sync_where_blackwells_tensor_cores_bind() -> None:
    deep = "n=256,h=14,w=14,c=256,k=256,padding=1,dtype=float16,residual=1"
    order = _best(deep, "B200")
    assert order.index("cuda") > order.index("triton")
    assert order.index("two_pass") < order.index("eager")


def test_the_rule_counts_launches_where_nothing_else_binds() -> None:
    small = "n=1,h=7,w=7,c=512,k=512,padding=1,dtype=float16,residual=1"
    order = _best(small, "H200")
    assert order[0] == "cuda"
    assert order.index("cudnn") > order.index("two_pass")  # a fold on each call is ten launches more


def test_the_rule_knows_what_gathering_costs() -> None:
    from fused_resnet import devices

    stem = "n=256,h=224,w=224,c=3,k=64,r=7,stride=2,padding=3,dtype=float16"
    assert _best(stem, "H200")[0] == "cudnn"
    wider = stem.replace("c=3", "c=8")  # 2.7 times the products, by loads of 16 bytes
    narrow_s, wide_s = (gpu_rule.seconds("cuda", Problem.parse(text), devices.find("H200")) for text in (stem, wider))
    assert wide_s < 0.7 * narrow_s


#: Microseconds by the model's own table, ResNet-50 in fp16 at batch 256 on an H200: mma.sync, Triton, cuDNN, eager.
MODELLED = {
    "h=224,w=224,c=3,k=64,r=7,stride=2,padding=3": (1010, 507, 358, 812),
    "h=56,w=56,c=256,k=64,r=1": (148, 149, 143, 260),
    "h=56,w=56,c=64,k=64,padding=1": (198, 179, 147, 263),
    "h=56,w=56,c=64,k=256,r=1,residual=1": (265, 265, 256, 936),
    "h=56,w=56,c=64,k=256,r=1,proj=64x56x56x1": (242, 244, 399, 1306),
    "h=28,w=28,c=128,k=128,padding=1": (139, 122, 103, 163),
    "h=14,w=14,c=256,k=1024,r=1,residual=1": (89, 85, 94, 269),
    "h=7,w=7,c=512,k=512,padding=1": (137, 116, 101, 120),
}


@pytest.mark.parametrize("text", MODELLED)
def test_the_model_gives_the_figures_that_were_worked_out_by_hand(text: str) -> None:
    from fused_resnet import devices
    from fused_resnet.kernels import gpu_model

    problem = Problem.parse(f"n=256,{text},dtype=float16,device=cuda")
    h200 = devices.find("H200")
    folds = gpu_model.FOLD_OPERATORS * gpu_model.FOLD_DEVICE * (2 if problem.projection else 1)
    found = [1e6 * gpu_model.device_seconds(name, problem, h200) for name in ("cuda", "triton", "cudnn", "eager")]
    found[2] -= 1e6 * folds
    assert found == pytest.approx(MODELLED[text], rel=0.03)


def test_memory_bound_tiles_leave_room_for_a_second_program() -> None:
    """One 256x128 tile a multiprocessor idles through its loads; where arithmetic is the limit it is still first."""
    from fused_resnet.kernels.config import SHARED_LIMIT, candidates

    for tail in RESNET_TAILS:
        problem = in_dtype(tail.problem, torch.float16, n=256, device_type="cuda")
        first = candidates(problem, 90, 132, False)[0]
        if tail.network == "resnet50" and tail.stage in ("layer1", "layer1.0"):
            assert 2 * first.shared_bytes(2) <= SHARED_LIMIT[90], f"{first} for {problem}"
    deep = Problem.parse("n=256,h=28,w=28,c=512,k=512,padding=1,dtype=float16")
    assert candidates(deep, 90, 132, False)[0].m * candidates(deep, 90, 132, False)[0].n == 256 * 128


@pytest.mark.parametrize("device", ["A100", "H100", "H200", "RTX 4090", "L4", "B200"])
def test_the_rules_first_is_never_expected_to_be_slower_than_eager(device: str) -> None:
    from fused_resnet import devices

    for tail in RESNET_TAILS:
        for n in (1, 8, 256):
            problem = in_dtype(tail.problem, torch.float16, n=n, device_type="cuda")
            first = gpu_rule.order(gpu_rule.PREFERENCE, problem, devices.find(device))[0]
            chosen, eager = (gpu_rule.seconds(name, problem, devices.find(device)) for name in (first, "eager"))
            assert chosen <= eager
