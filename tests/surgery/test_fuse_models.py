"""fuse() on the models that people use: how many launches, equal in eval and training, every name kept."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import BlurPool2d, FrozenBatchNormAct2d
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

from fused_resnet import explain, fuse, unfuse
from tests.support.surgery_helpers import assert_same_step, count_launches, outputs, randomise


class Narrow(ResNet):
    """torchvision's own code on an eighth of the channels, so that the comparison in float64 is quick."""

    def __init__(self, block: Any, layers: list[int], **kwargs: Any) -> None:
        super().__init__(block, layers, **kwargs)
        self.fc = nn.Linear(64 * block.expansion, 5)

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *args, **kwargs)


def tiny(block: type[nn.Module] = Bottleneck, **kwargs: Any) -> nn.Module:
    return Narrow(block, [1, 2, 1, 1], **kwargs)


def tiny_timm(name: str = "resnet18", **kwargs: Any) -> nn.Module:
    # `channels` keeps the comparison in float64 quick; the code is the one of the full model
    kwargs = {"num_classes": 5, "layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32), "stem_width": 8, **kwargs}
    return timm.create_model(name, pretrained=False, **kwargs)


def backbone(norm: Callable[..., nn.Module], **kwargs: Any) -> nn.Module:
    return torchvision.models._utils.IntermediateLayerGetter(
        tiny(norm_layer=norm, **kwargs), {"layer2": "low", "layer4": "out"}
    )


# Per model: how it is made, its fused launches in eval mode, and words that explain() must say of what is left.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, tuple[str, ...]]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), 17, ()),
    "bottleneck": (tiny, 16, ()),
    "resnext": (lambda: tiny(groups=4, width_per_group=32), 16, ()),
    "wide": (lambda: tiny(width_per_group=128), 16, ()),
    "basic": (lambda: tiny(BasicBlock), 11, ()),
    "dilated": (lambda: tiny(replace_stride_with_dilation=[False, True, True]), 16, ()),
    "frozen": (lambda: tiny(norm_layer=FrozenBatchNorm2d), 16, ()),
    "zero-init": (lambda: tiny(zero_init_residual=True), 16, ()),
    "segmentation backbone": (
        lambda: backbone(nn.BatchNorm2d, replace_stride_with_dilation=[False, True, True]),
        16,
        (),
    ),
    "detection backbone": (lambda: backbone(FrozenBatchNorm2d), 16, ()),
    "timm basic": (tiny_timm, 9, ()),
    "timm bottleneck": (lambda: tiny_timm("resnet50"), 13, ()),
    "timm deep stem, average pooling": (lambda: tiny_timm("resnet26d"), 15, ()),
    "timm squeeze-excitation": (lambda: tiny_timm("seresnet50"), 17, ("se",)),
    "timm anti-aliased": (lambda: tiny_timm(aa_layer=BlurPool2d), 9, ("aa",)),
    "timm drop-path": (lambda: tiny_timm(drop_path_rate=0.3), 9, ("in training mode",)),
    "timm drop-block": (lambda: tiny_timm(drop_block_rate=0.2), 9, ("in training mode",)),
    "timm frozen": (lambda: timm.layers.freeze_batch_norm_2d(tiny_timm("resnet50")), 13, ()),
    "timm grouped": (lambda: tiny_timm("resnext50_32x4d", cardinality=4, base_width=32), 13, ()),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_is_fused_and_equal(name: str) -> None:
    make, launches, words = MODELS[name]
    torch.manual_seed(0)
    model = randomise(make())
    fused = fuse(model, everywhere=True)
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in model.named_modules()]
    assert list(fused.state_dict()) == list(model.state_dict())
    explanation = explain(fused)
    assert explanation.unfused == ()
    for word in words:
        assert word in str(explanation)
    x = torch.randn(2, 3, 39, 33, dtype=torch.float64)
    for training in (True, False):
        # rounding grows through a network with random gammas
        assert_same_step(model, fused, x, training, tolerance=1e-7)
    with torch.no_grad(), count_launches() as count:
        fused.eval()(x)
    assert count.fused == launches == sum(e.launches for e in explanation)


def test_a_detection_model() -> None:
    torch.manual_seed(0)
    body = backbone(FrozenBatchNorm2d)
    anchors = torchvision.models.detection.anchor_utils.AnchorGenerator(((32,),), ((1.0,),))

    class Features(nn.Module):
        out_channels = 256

        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
            return OrderedDict([("0", self.body(x)["out"])])

    model = torchvision.models.detection.FasterRCNN(
        Features(), 3, rpn_anchor_generator=anchors, min_size=64, max_size=64,
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], 3, 2),
    ).eval()  # fmt: skip
    fused = fuse(model)
    assert [e.name for e in explain(fused).unfused] == []
    assert {e.name for e in explain(fused).fused} == {"backbone.body"} | {
        f"backbone.body.layer{i}.{j}" for i, count in enumerate((1, 2, 1, 1), 1) for j in range(count)
    }
    image = torch.rand(3, 60, 50)
    with torch.inference_mode(), count_launches() as count:
        got = fused([image])
    assert count.fused == 16
    with torch.inference_mode():
        for a, b in zip(outputs(got), outputs(model([image])), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_pairs_outside_blocks_are_fused_where_they_are() -> None:
    """The head of a segmentation model: every conv-BN-ReLU is one launch, in the module whose forward holds it."""
    torch.manual_seed(0)
    head = torchvision.models.segmentation.deeplabv3.DeepLabHead(256, 4, (2, 3))
    model = randomise(torchvision.models.segmentation.DeepLabV3(backbone(nn.BatchNorm2d), head).eval(), torch.float32)
    fused = fuse(model, everywhere=True)
    assert explain(fused).unfused == ()
    assert sum(e.launches for e in explain(fused) if e.name.startswith("classifier")) == 6
    x = torch.randn(1, 3, 40, 56)
    with torch.inference_mode():
        expected, got = model(x)["out"], fused(x)["out"]
    assert float((got - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_frozen_batch_norm_without_an_eps_attribute() -> None:
    """Detectron's and DETR's older classes write their eps in the forward: it is measured."""

    class Frozen(nn.Module):
        eps_in_forward = 1e-5

        def __init__(self, n: int) -> None:
            super().__init__()
            for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                self.register_buffer(name, torch.full((n,), value))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            w, b, m, v = (getattr(self, n)[:, None, None] for n in ("weight", "bias", "running_mean", "running_var"))
            scale = w * (v + self.eps_in_forward).rsqrt()
            return x * scale + (b - m * scale)

    class NoEps(Frozen):
        eps_in_forward = 0.0

    for norm in (Frozen, NoEps):
        model = randomise(BasicBlock(8, 8, norm_layer=norm))
        with torch.no_grad():
            model.bn1.running_var.mul_(1e-4)  # where eps counts
        fused = fuse(model)
        assert explain(fused)[""].launches == 2
        assert_same_step(model, fused, torch.randn(2, 8, 7, 5).double(), training=True)


def test_batch_norm_with_its_own_activation() -> None:
    """timm's BatchNormAct2d: the ReLU inside the norm becomes the launch's."""
    norm_act = timm.layers.BatchNormAct2d

    class Block(nn.Module):
        def __init__(self, norm: Callable[..., nn.Module]) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8)
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8, apply_act=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x).relu()

    for norm in (norm_act, FrozenBatchNormAct2d):
        model = randomise(Block(norm))
        fused = fuse(model)
        assert explain(fused)[""].tails == ("conv1+bn1+relu", "conv2+bn2+add+relu")
        for training in (True, False):
            assert_same_step(model, fused, torch.randn(2, 8, 7, 5).double(), training)


def test_a_model_that_is_wrapped() -> None:
    """Data-parallel and compile wrappers hold the model as a submodule; names gain its prefix and nothing else."""
    model = randomise(tiny(BasicBlock), torch.float32).eval()
    wrapped = fuse(nn.Sequential(OrderedDict(module=model)))
    assert len(explain(wrapped).fused) == 6
    assert explain(wrapped)["module.layer2.1"].launches == 2


def test_a_very_deep_model_is_compared_without_magnifying_rounding() -> None:
    torch.manual_seed(0)
    fused = fuse(Narrow(BasicBlock, [3, 60, 40, 3]))
    assert explain(fused).unfused == ()
    assert explain(fused)[""].tails == ("conv1+bn1+relu",)


def test_unfuse_restores_every_class() -> None:
    model = torchvision.models.segmentation.DeepLabV3(
        backbone(nn.BatchNorm2d), torchvision.models.segmentation.fcn.FCNHead(256, 4)
    )
    original = copy.deepcopy(model)
    unfuse(fuse(model, inplace=True, check=False))
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))
    assert all(a.stride() == b.stride() for a, b in zip(model.parameters(), original.parameters(), strict=True))


def test_group_norm_is_explained() -> None:
    explanation = explain(fuse(tiny(BasicBlock, norm_layer=lambda c: nn.GroupNorm(2, c))))
    assert {e.sentence for e in explanation} == {
        "left as it is: normalises with GroupNorm, only batch norm fits a convolution's epilogue"
    }
    assert len(explanation.unfused) == 5
    assert explanation.to_dict()["entries"][0]["state"] == "unfused"
