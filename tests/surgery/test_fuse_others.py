"""What others do to a fused model: hooks, parametrizations, conversions, copies, autocast, torch.compile."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models.resnet import BasicBlock

from fused_resnet import explain, fuse, refresh, unfuse
from tests.support.surgery_helpers import LAUNCHES, SmallResNet, assert_same, assert_same_step, launches, randomise


@pytest.fixture
def model() -> SmallResNet:
    return randomise(SmallResNet())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        (where, kind)
        for where in ("layer1.0.bn1", "layer1.1.downsample", "layer1.1.downsample.0", "conv1", "layer1.0.relu")
        for kind in ("forward", "pre", "backward", "global")
        # torch itself refuses a backward hook where an in-place ReLU comes before or after
        if kind != "backward" or where not in ("layer1.0.bn1", "layer1.0.relu")
    ],
)
def test_hooks_on_bypassed_submodules(model: SmallResNet, x: Tensor, where: str, kind: str) -> None:
    fused = fuse(model).eval()
    target = fused.get_submodule(where)
    seen: list[nn.Module] = []
    if kind == "forward":
        handle = target.register_forward_hook(lambda module, args, out: seen.append(module))
    elif kind == "pre":
        handle = target.register_forward_pre_hook(lambda module, args: seen.append(module))
    elif kind == "backward":
        handle = target.register_full_backward_hook(lambda module, gi, go: seen.append(module))
    else:
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        assert_same_step(model, fused, x, training=False)
        assert target in seen
        block = where.rpartition(".")[0] if where.startswith("layer1.0") else "layer1.1" if "." in where else ""
        reason = explain(fused)[block].reason
        assert reason is not None
        assert "hook" in reason
    finally:
        handle.remove()
    assert launches(fused, x) == LAUNCHES


def test_hooks_on_blocks_and_layers_go_on_working(model: SmallResNet, x: Tensor) -> None:
    fused = fuse(model).eval()
    features: dict[str, Tensor] = {}
    fused.layer1[0].register_forward_hook(lambda module, args, out: features.__setitem__("block", out))
    fused.layer1.register_forward_hook(lambda module, args, out: features.__setitem__("layer", out))
    assert launches(fused, x) == LAUNCHES
    with torch.no_grad():
        stem = model.eval().relu(model.bn1(model.conv1(x)))
        torch.testing.assert_close(features["block"], model.layer1[0](stem))
    assert features["layer"].shape == (3, 12, 5, 4)


def test_parametrizations_pruning_and_forwards_of_ones_own(model: SmallResNet, x: Tensor) -> None:
    fused = fuse(model)
    for m in (model, fused):
        torch.nn.utils.parametrizations.weight_norm(m.layer1[0].conv1)
        prune.custom_from_mask(m.layer1[1].conv2, "weight", torch.arange(12 * 12 * 9).view(12, 12, 3, 3) % 3 > 0)
        plain = m.bn1.forward
        m.bn1.forward = lambda t, plain=plain: 2 * plain(t)
    for training in (True, False):
        assert_same_step(model, fused, x, training)
    sentences = {e.name: e.sentence for e in explain(fused)}
    assert sentences["layer1.0"] == "runs unfused now: conv1 is a ParametrizedConv2d, it was a Conv2d"
    assert sentences["layer1.1"] == "runs unfused now: conv2 has a forward pre-hook"
    assert sentences[""] == "runs unfused now: bn1 has a forward of its own (set on the instance)"


def test_synchronised_batch_norms_after_fuse(model: SmallResNet, x: Tensor) -> None:
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fuse(model))
    assert type(fused.layer1[0].bn1) is nn.SyncBatchNorm
    assert launches(fused.eval(), x) == LAUNCHES
    assert_same(fused, model.eval(), x)
    # One process: the statistics are this batch's, updated as BatchNorm2d's.
    assert_same_step(model, fused, x, training=True)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "copy of a copy"])
def test_copies_of_a_fused_model(model: SmallResNet, x: Tensor, how: str) -> None:
    fused = fuse(model, backend="eager").eval()
    if how == "deepcopy":
        other = copy.deepcopy(fused)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(fused))
    elif how == "torch.save":
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        other = copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(fused))))
    assert launches(other, x) == LAUNCHES
    assert_same(other, fused, x, tolerance=0)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in fused.parameters()}
    for training in (True, False):
        assert_same_step(model, other, x, training)
    assert type(unfuse(other).layer1[0]) is BasicBlock
    assert launches(fused.eval(), x) == LAUNCHES


def test_a_pickled_model_names_no_class_of_ours(model: SmallResNet) -> None:
    data = pickle.dumps(fuse(model))
    assert b"torchvision.models.resnet" in data
    assert pickle.loads(data).layer1[0].__class__.__name__ == "BasicBlock"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast(dtype: torch.dtype, training: bool) -> None:
    model = randomise(SmallResNet(), torch.float32).train(training)
    fused, exact = fuse(model), copy.deepcopy(model).double()
    x = torch.randn(4, 3, 12, 12)
    reference = exact(x.double()).detach()
    with torch.autocast("cpu", dtype=dtype):
        expected, got = model(x), fused(x)
    assert got.dtype == expected.dtype
    errors = [float((y.detach().double() - reference).abs().max()) for y in (got, expected)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * float(reference.abs().max())


def test_compile_without_graph_breaks(model: SmallResNet, x: Tensor) -> None:
    torch._dynamo.reset()
    fused = fuse(model)
    for training in (False, True):
        fused.train(training)
        compiled = torch.compile(fused, fullgraph=True, backend="eager")
        twin = copy.deepcopy(fused)
        torch.testing.assert_close(compiled(x), twin(x))
        for b, c in zip(fused.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(b, c)
    torch._dynamo.reset()


def test_inputs_that_are_not_one_batch_of_images(model: SmallResNet, x: Tensor) -> None:
    fused = fuse(model).eval()
    model.eval()
    torch.testing.assert_close(fused(x=x), model(x=x))  # by keyword: runs its own forward
    assert fused(x[:0]).shape == (0, 4)
    with pytest.raises(ValueError, match="expected 4D input"):
        fused.layer1[0](torch.randn(8, 9, 7).double())
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        fused()


def test_the_wrong_kind_of_argument() -> None:
    for function in (fuse, unfuse, explain, refresh):
        with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got a str"):
            function("resnet18")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"fuse: model: expected a torch.nn.Module, got the class BasicBlock"):
        fuse(BasicBlock)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="backend: expected 'auto' or one of"):
        fuse(nn.Identity(), backend="fastest")
    with pytest.raises(ValueError, match="winograd: expected 'auto', 'f2' or 'off', got 'f8'"):
        fuse(nn.Identity(), winograd="f8")


def test_a_model_without_batch_norm_is_left_alone() -> None:
    with torch.device("meta"):
        model = torchvision.models.vgg11(num_classes=3)
    fused = fuse(model)
    assert all(type(a) is type(b) for a, b in zip(fused.modules(), model.modules(), strict=True))
    text = str(explain(fused))
    assert text.startswith("VGG: nothing to fuse")
    assert "there is no tail to fuse" in text
