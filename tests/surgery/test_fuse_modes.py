"""A user's modes and default device: obeyed, or without effect on what is fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models.resnet import BasicBlock

from fused_resnet import freeze, fuse
from fused_resnet.nn import FusedBasicBlock
from tests.support.surgery_helpers import randomise


def test_models_stay_fused_and_their_guards_small() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = fuse(torchvision.models.resnet50())
    for block in model.layer1:
        plan = block.__dict__["_fused_resnet"].plan
        assert plan.choose(block)[1] is None
        for program in plan.programs:
            guards = program.guards
            assert (guards._outside, guards._attributes, guards._distinct) == ((), (), None)
            assert [cls.__name__ for cls, _, _ in guards._classes] == ["Bottleneck"]


# ---- modes of the user's -------------------------------------------------------------------------------------------


class Doubled(TorchFunctionMode):
    """Every convolution is twice what it was."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.conv2d or func is nn.functional.conv2d else out


@pytest.mark.parametrize("form", ["fused", "frozen", "nn"])
def test_a_mode_of_the_users_is_obeyed(form: str) -> None:
    block = randomise(BasicBlock(4, 4)).eval()
    make: Any = {"fused": fuse, "frozen": freeze, "nn": FusedBasicBlock.from_block}[form]
    fast = make(block)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        plain = block(x)
        torch.testing.assert_close(fast(x), plain)
        with Doubled():
            expected = block(x)
            torch.testing.assert_close(fast(x), expected)
        assert not torch.allclose(expected, plain)
        torch.testing.assert_close(fast(x), plain)


def test_a_default_device_costs_no_fusion() -> None:
    fused = fuse(BasicBlock(4, 4))
    fusion = fused.__dict__["_fused_resnet"]
    with torch.device("cpu"):
        assert fusion.plan.choose(fused)[1] is None
        with Doubled():
            assert fusion.plan.choose(fused)[1] == "a TorchFunctionMode is active, Doubled"
    assert fusion.plan.choose(fused)[1] is None
