"""The ready-made ResNets against torchvision's, checkpoints of every kind, and blocks from Keras arrays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from fused_resnet import explain, fuse, models
from tests.support.surgery_helpers import assert_same_step, count_launches, randomise

NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
BLOCKS = {"resnet18": 8, "resnet34": 16, "resnet50": 16, "resnet101": 33, "resnet152": 50}


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_is_torchvisions(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = getattr(models, name)(), getattr(torchvision.models, name)()
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    entries = explain(ours)
    assert len(entries.fused) == BLOCKS[name] + 1
    assert sum(e.launches for e in entries) == 1 + BLOCKS[name] * (2 if name in ("resnet18", "resnet34") else 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("resnet50", {"replace_stride_with_dilation": [False, True, True]}),
        ("resnet50", {"groups": 32, "width_per_group": 4, "norm_layer": FrozenBatchNorm2d}),
    ],
    ids=["resnet18", "resnet50-dilated", "resnext50-frozen"],
)
def test_results_are_torchvisions(name: str, options: dict[str, Any]) -> None:
    theirs = randomise(getattr(torchvision.models, name)(**options), torch.float32).eval()
    ours = getattr(models, name)(theirs.state_dict(), **options).eval()
    x = torch.randn(2, 3, 45, 61, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), count_launches() as count:
        got = ours(x)
    with torch.inference_mode():
        expected = theirs(x)
        exact = theirs.double()(x.double())
    assert count.fused == sum(e.launches for e in explain(ours))
    assert count.others == []
    # root mean square over 2,000 logits: the largest of a network's errors is a matter of luck
    ours_error, eagers_error = (float((y.double() - exact).square().mean().sqrt()) for y in (got, expected))
    assert ours_error <= 2 * eagers_error


def test_training_step_is_torchvisions() -> None:
    theirs = randomise(torchvision.models.resnet18(num_classes=3))
    ours = models.resnet18(num_classes=3).double()
    ours.load_state_dict(theirs.state_dict())
    assert_same_step(theirs, ours, torch.randn(2, 3, 33, 39, dtype=torch.float64), training=True, tolerance=1e-7)


def test_cifar_stem() -> None:
    model = models.resnet18(num_classes=10, stem="cifar", in_channels=1, zero_init_residual=True)
    assert model.conv1.weight.shape == (64, 1, 3, 3)
    assert not model.layer1[0].bn2.weight.any()
    shapes: list[torch.Size] = []
    model.layer1.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    assert shapes == [(2, 64, 32, 32)]


def test_hooks_on_the_stem_are_honoured() -> None:
    model = models.resnet18(num_classes=2, stem="cifar").eval()
    x = torch.randn(1, 3, 16, 16)
    expected = model(x)
    seen: list[Tensor] = []
    model.bn1.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 1
    assert explain(model)[""].sentence == "runs unfused now: bn1 has a forward hook"


def test_fuse_only_sets_the_options_of_a_model_that_is_built_fused() -> None:
    model = models.resnet18(num_classes=2, stem="cifar")
    fused = fuse(model, backend="eager", winograd="off")
    assert type(fused.layer1[0]) is type(model.layer1[0])
    assert (fused.backend, fused.layer1[0].backend, fused.layer1[0].winograd) == ("eager", "eager", "off")
    assert model.layer1[0].backend == "auto"


# ---- checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mapping", "pth", "wrapped", "safetensors"])
def test_checkpoints(kind: str, tmp_path: Path) -> None:
    state = torchvision.models.resnet18(num_classes=3).state_dict()
    weights: Any = state
    if kind == "safetensors":
        weights = tmp_path / "model.safetensors"
        save_file({k: v.contiguous() for k, v in state.items()}, weights)
    elif kind != "mapping":
        weights = tmp_path / "model.pth"
        torch.save({"state_dict": state, "epoch": 3} if kind == "wrapped" else state, weights)
    model = models.resnet18(weights, num_classes=3)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.is_contiguous() for p in model.parameters())


def test_checkpoints_that_do_not_fit() -> None:
    state = torchvision.models.resnet18(num_classes=3).state_dict()
    with pytest.raises(ValueError, match="num_classes: expected 3, the width of the checkpoint's fc, got 1000"):
        models.resnet18(state)
    with pytest.raises(
        ValueError, match=r"stem: expected the one of the checkpoint, whose conv1.weight is \[64, 3, 7, 7\]"
    ):
        models.resnet18(state, num_classes=3, stem="cifar")
    incomplete = copy.copy(state)
    del incomplete["layer1.0.bn1.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "layer1.0.bn1.weight"'):
        models.resnet18(incomplete, num_classes=3)
    with pytest.raises(FileNotFoundError, match=r"weights: there is no file 'nowhere.pth'"):
        models.resnet18("nowhere.pth")
    with pytest.raises(TypeError, match=r"weights: expected None, a checkpoint's path, .* got a int"):
        models.resnet18(3)
    with pytest.raises(ValueError, match="stem: expected 'imagenet' or 'cifar', got 'tiny'"):
        models.resnet18(stem="tiny")


# ---- Keras ---------------------------------------------------------------------------------------------------


def keras_conv(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None, stride: int) -> np.ndarray:
    """Keras's Conv2D(padding="same") by its definition: NHWC, kernel [R, S, C, K], odd padding bottom and right."""
    r, s, _, k = kernel.shape
    n, h, w, _ = x.shape
    p, q = -(-h // stride), -(-w // stride)
    pad_h, pad_w = max((p - 1) * stride + r - h, 0), max((q - 1) * stride + s - w, 0)
    x = np.pad(x, ((0, 0), (pad_h // 2, pad_h - pad_h // 2), (pad_w // 2, pad_w - pad_w // 2), (0, 0)))
    out = np.zeros((n, p, q, k))
    for i in range(p):
        for j in range(q):
            window = x[:, i * stride : i * stride + r, j * stride : j * stride + s]
            out[:, i, j] = np.einsum("nrsc,rsck->nk", window, kernel)
    return out if bias is None else out + bias


def keras_bn(x: np.ndarray, layer: dict[str, np.ndarray], epsilon: float) -> np.ndarray:
    scale = layer.get("gamma", np.ones(1)) / np.sqrt(layer["moving_variance"] + epsilon)
    return (x - layer["moving_mean"]) * scale + layer.get("beta", np.zeros(1))


class Arrays:
    """Makes layers of random arrays and keeps them under Keras's names."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.weights: dict[str, np.ndarray] = {}

    def conv(self, name: str, r: int, c: int, k: int, bias: bool = True) -> dict[str, np.ndarray]:
        layer = {"kernel": self.rng.normal(size=(r, r, c, k)) / r}
        if bias:
            layer["bias"] = self.rng.normal(size=k)
        return self.keep(name, layer)

    def bn(self, name: str, k: int, *left_out: str) -> dict[str, np.ndarray]:
        layer = {key: self.rng.normal(size=k) for key in ("gamma", "beta", "moving_mean") if key not in left_out}
        layer["moving_variance"] = self.rng.uniform(0.1, 2, size=k)
        return self.keep(name, layer)

    def keep(self, name: str, layer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.weights |= {f"{name}/{key}:0": value for key, value in layer.items()}
        return layer


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def basic_with_projection(a: Arrays) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
    """Automatic names from the tenth layer on, biases, a projection without BN, an even size at stride 2."""
    c1, b1 = a.conv("conv2d_9", 3, 4, 6), a.bn("batch_normalization_9", 6)
    c2, b2 = a.conv("conv2d_10", 3, 6, 6), a.bn("batch_normalization_10", 6)
    c3 = a.conv("conv2d_11", 1, 4, 6)

    def forward(x: np.ndarray) -> np.ndarray:
        h = relu(keras_bn(keras_conv(x, c1["kernel"], c1["bias"], 2), b1, 1e-3))
        h = keras_bn(keras_conv(h, c2["kernel"], c2["bias"], 1), b2, 1e-3)
        return relu(h + keras_conv(x, c3["kernel"], c3["bias"], 2))

    return 2, forward


def basic_identity(a: Arrays) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
    """No projection, no biases, BN with scale=False and with center=False."""
    c1, b1 = a.conv("conv2d", 3, 4, 4, bias=False), a.bn("batch_normalization", 4, "gamma")
    c2, b2 = a.conv("conv2d_1", 3, 4, 4, bias=False), a.bn("batch_normalization_1", 4, "beta")

    def forward(x: np.ndarray) -> np.ndarray:
        h = relu(keras_bn(keras_conv(x, c1["kernel"], None, 1), b1, 1e-3))
        return relu(keras_bn(keras_conv(h, c2["kernel"], None, 1), b2, 1e-3) + x)

    return 1, forward


def bottleneck_of_applications(a: Arrays) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
    """keras.applications' names: the shortcut is number 0, with BN, and the stride is on the first 1x1."""
    c0, b0 = a.conv("conv3_block1_0_conv", 1, 4, 12), a.bn("conv3_block1_0_bn", 12)
    c1, b1 = a.conv("conv3_block1_1_conv", 1, 4, 3), a.bn("conv3_block1_1_bn", 3)
    c2, b2 = a.conv("conv3_block1_2_conv", 3, 3, 3), a.bn("conv3_block1_2_bn", 3)
    c3, b3 = a.conv("conv3_block1_3_conv", 1, 3, 12), a.bn("conv3_block1_3_bn", 12)

    def forward(x: np.ndarray) -> np.ndarray:
        h = relu(keras_bn(keras_conv(x, c1["kernel"], c1["bias"], 2), b1, 1e-3))
        h = relu(keras_bn(keras_conv(h, c2["kernel"], c2["bias"], 1), b2, 1e-3))
        h = keras_bn(keras_conv(h, c3["kernel"], c3["bias"], 1), b3, 1e-3)
        return relu(h + keras_bn(keras_conv(x, c0["kernel"], c0["bias"], 2), b0, 1e-3))

    return 2, forward


@pytest.mark.parametrize("size", [(8, 6), (7, 9)], ids=["even", "odd"])
@pytest.mark.parametrize("make", [basic_with_projection, basic_identity, bottleneck_of_applications])
def test_keras_blocks(make: Callable[[Arrays], Any], size: tuple[int, int]) -> None:
    arrays = Arrays()
    stride, forward = make(arrays)
    block = models.from_keras(arrays.weights, stride=stride).double().eval()
    block.load_state_dict(models.from_keras(arrays.weights, stride=stride).state_dict())  # plain modules, plain names
    x = np.random.default_rng(1).normal(size=(2, *size, 4))
    with torch.no_grad(), count_launches() as count:
        got = block(torch.from_numpy(x).permute(0, 3, 1, 2))
    # the arrays went through float32, Keras's own dtype
    np.testing.assert_allclose(got.permute(0, 2, 3, 1).numpy(), forward(x), rtol=1e-5, atol=1e-5)
    assert count.fused == (3 if make is bottleneck_of_applications else 2)
    block.bn1.register_forward_hook(lambda *args: None)
    with torch.no_grad():
        torch.testing.assert_close(block(torch.from_numpy(x).permute(0, 3, 1, 2)), got)


def test_keras_constants_and_gradients() -> None:
    arrays = Arrays()
    basic_with_projection(arrays)
    block = models.from_keras(arrays.weights, stride=2)
    bn: Any = block.bn1
    assert bn.eps == 1e-3
    assert bn.momentum == pytest.approx(0.01)
    assert block.training
    block(torch.randn(2, 4, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_keras_arrays_that_are_no_block() -> None:
    arrays = Arrays()
    arrays.conv("conv2d", 3, 4, 6)
    with pytest.raises(ValueError, match="expected at least two convolutions, got conv2d"):
        models.from_keras(arrays.weights)
    arrays.conv("conv2d_1", 3, 6, 6)
    with pytest.raises(ValueError, match=r"expected a projection .* of 4 to 6 channels"):
        models.from_keras(arrays.weights)
    arrays.conv("conv2d_2", 1, 4, 6)
    arrays.bn("batch_normalization", 6)
    with pytest.raises(ValueError, match="expected a batch norm after each of the 2 convolutions or after none"):
        models.from_keras(arrays.weights)
    with pytest.raises(ValueError, match="expected keys of the form 'layer/variable', got 'kernel'"):
        models.from_keras({"kernel": np.zeros((3, 3, 4, 4))})


def test_norm_layer_reaches_every_block() -> None:
    model = models.resnet18(num_classes=2, norm_layer=FrozenBatchNorm2d)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
