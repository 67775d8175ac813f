"""``fused_resnet.export``: a program with the fused operators, right in every form and in every process."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import fused_resnet
from fused_resnet import FusedBasicBlock, export, freeze, fuse, unfuse
from fused_resnet.core.packed_weights import OF_THE_PROCESS
from tests.support.surgery_helpers import randomise, run_in_new_process

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BATCH = ({0: torch.export.Dim("batch", min=1, max=64)},)


def resnet(block: Any = BasicBlock, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomise(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=4, **options), torch.float32).eval()


def operators(program: torch.export.ExportedProgram) -> Counter[str]:
    """Our operators in the program, by name."""
    names = (str(node.target).split(".") for node in program.graph.nodes if node.op == "call_function")
    return Counter(parts[1] for parts in names if parts[0] == "fused_resnet")


def assert_runs_as(program: torch.export.ExportedProgram, model: nn.Module, x: Tensor, tolerance: float = 1e-4) -> None:
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=10 * tolerance, atol=tolerance)


MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "unfused": lambda m: m,
    "fused": fuse,
    "frozen": freeze,
    "frozen fused": lambda m: freeze(fuse(m)),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_tail_is_one_operator(name: str, strict: bool) -> None:
    model = resnet()
    program = export(MODELS[name](model), X, strict=strict, dynamic_shapes=BATCH)
    tails = {"conv_bn_add_relu": 5, "conv_bn_proj_add_relu": 3, "conv_bn_add_relu_max_pool": 1}
    assert operators(program) == tails
    # between them the layout is the kernels': it is changed at the network's ends alone
    assert sum("contiguous" in str(node.target) for node in program.graph.nodes) <= 2
    assert set(program.state_dict) == set(model.state_dict())
    for images in (X, X[:1], torch.cat([X, X])):
        assert_runs_as(program, model, images)


@pytest.mark.parametrize("strict", [False, True])
def test_height_and_width_may_be_dynamic(strict: bool) -> None:
    model, auto = resnet(), torch.export.Dim.AUTO
    x = torch.randn(4, 3, 64, 64)
    program = export(model, x, strict=strict, dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    decomposed = program.run_decompositions(fused_resnet.decompositions())
    for x in (torch.randn(1, 3, 96, 64), torch.randn(3, 3, 64, 128)):
        assert_runs_as(program, model, x)
        assert_runs_as(decomposed, model, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = resnet().to(dtype)
    program = export(model, X.to(dtype))
    assert operators(program)
    assert_runs_as(program, model, X.to(dtype), 1e-10 if dtype is torch.float64 else 5e-2)


def test_layouts() -> None:
    model = resnet().to(memory_format=torch.channels_last)
    x = X.contiguous(memory_format=torch.channels_last)
    program = export(model, x)
    assert sum("contiguous" in str(node.target) for node in program.graph.nodes) <= 2
    for images in (x, X):  # the program is not told what layout its input has
        assert_runs_as(program, model, images)


@pytest.mark.parametrize(
    "model",
    [
        lambda: resnet(Bottleneck, groups=4, width_per_group=4),
        lambda: resnet(norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
        lambda: FusedBasicBlock(3, 3).eval(),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)).eval(),
    ],
    ids=["bottleneck", "batch statistics", "a block of ours", "no tails"],
)
def test_other_models(model: Callable[[], nn.Module]) -> None:
    original = model()
    program = export(original, X)
    assert_runs_as(program, unfuse(copy.deepcopy(original)), X)
    decomposed = program.run_decompositions(fused_resnet.decompositions())
    assert not operators(decomposed)
    assert_runs_as(decomposed, original, X)


def test_what_somebody_fused_stays_as_it_was_fused() -> None:
    model = resnet()
    model.layer1 = fuse(model.layer1, winograd="off")
    program = export(model, X)
    assert operators(program) == {"conv_bn_add_relu": 2}
    options = [node.args[-1] for node in program.graph.nodes if "conv_bn_add_relu" in str(node.target)]
    assert options == ["off", "off"]
    assert_runs_as(program, resnet(), X)


def test_a_batch_norm_in_training_mode_still_counts() -> None:
    model = resnet()
    model.layer1[0].bn1.train()
    expected = copy.deepcopy(model)
    module = export(model, X).module()
    torch.testing.assert_close(module(X), expected(X), rtol=1e-3, atol=1e-4)
    for name, value in expected.layer1[0].bn1.state_dict().items():
        torch.testing.assert_close(module.state_dict()[f"layer1.0.bn1.{name}"], value, rtol=1e-3, atol=1e-5)


def test_it_leaves_the_model_as_it_was() -> None:
    fused = fuse(resnet())
    blocks = [m.__dict__["_fused_resnet"] for m in fused.modules() if "_fused_resnet" in m.__dict__]
    packed = [block.packed_weights for block in blocks]
    program = export(fused, X)
    assert all(block.packed_weights is own for block, own in zip(blocks, packed, strict=True))
    # a number that means the same in every process
    numbers = {
        node.args[[argument.name for argument in node.target._schema.arguments].index("packed_weights")]
        for node in program.graph.nodes
        if "conv_bn" in str(node.target)
    }
    assert numbers == {OF_THE_PROCESS.number} == {-1}
    assert not operators(torch.export.export(fused, (X,)))
    assert not operators(torch.export.export(fused, (X,), strict=True))


def test_it_is_differentiable() -> None:
    model = resnet()
    gradients = []
    for module in (export(model, X).module(), model):
        x = X.clone().requires_grad_()
        gradients += torch.autograd.grad(module(x).square().sum(), [x])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-2, atol=1e-4)


def test_a_changed_weight_is_seen() -> None:
    model = resnet()
    module = export(model, X).module()
    with torch.no_grad():
        module(X)
        changed = {name: value * 1.25 for name, value in model.state_dict().items()}
        model.load_state_dict(changed)
        module.load_state_dict({name: changed[name] for name in module.state_dict()})
        torch.testing.assert_close(module(X), model(X), rtol=1e-3, atol=1e-4)


def test_compiled() -> None:
    model = resnet()
    module = export(model, X).module()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, backend="aot_eager")(X), model(X), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("imports", ["import fused_resnet, torch", "import torch, fused_resnet"])
def test_a_saved_program_runs_in_a_process_that_imports_the_package_alone(imports: str, tmp_path: Path) -> None:
    model = resnet()
    torch.export.save(export(model, X, dynamic_shapes=BATCH), tmp_path / "program.pt2")
    torch.save((X, model(X).detach()), tmp_path / "call.pt")
    code = (
        f"{imports}\n"
        "x, expected = torch.load('call.pt')\n"
        "program = torch.export.load('program.pt2')\n"
        "with torch.no_grad():\n"
        "    for _ in range(3):\n"
        "        torch.testing.assert_close(program.module()(x), expected, rtol=1e-3, atol=1e-4)\n"
        "    decomposed = program.run_decompositions(fused_resnet.decompositions())\n"
        "    torch.testing.assert_close(decomposed.module()(x[:1]), expected[:1], rtol=1e-3, atol=1e-4)\n"
    )
    run_in_new_process(code, tmp_path)


def test_onnx_translates_it_decomposed(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = resnet()
    kinds = []
    for program in (export(model, X, dynamic_shapes=BATCH), torch.export.export(model, (X,), dynamic_shapes=BATCH)):
        path = tmp_path / f"{len(kinds)}.onnx"
        program = program.run_decompositions(fused_resnet.decompositions())
        torch.onnx.export(program, (), str(path), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for x in (X, X[:1]):
            (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-3, atol=1e-4)
        kinds.append(Counter(node.op_type for node in onnx.load(path).graph.node))
    assert kinds[0] == kinds[1]


def test_what_it_refuses() -> None:
    with pytest.raises(TypeError, match=r"export: model: expected a torch\.nn\.Module, got a str"):
        export("resnet18", X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected evaluation mode \(model.eval\(\)\)"):
        export(resnet().train(), X)
