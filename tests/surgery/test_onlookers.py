"""Whoever looks at a fused model sees its own forward: the original's graph and results, no operator of ours."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.models.resnet import BasicBlock, Bottleneck

import fused_resnet
from fused_resnet import FusedBasicBlock, FusedBottleneck, FusedConvBNReLU, freeze, fuse
from tests.support.surgery_helpers import run_in_new_process

Seen = tuple[str, Any]
"""A graph in words, and a result."""


class ConvBNReLU(nn.Module):
    """What FusedConvBNReLU stands for."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _down(planes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(16, planes, 1, 2, bias=False), nn.BatchNorm2d(planes))


def _resnet() -> nn.Module:
    return torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module], tuple[int, ...]]] = {
    "fused": (_resnet, fuse, (2, 3, 32, 32)),
    "frozen": (_resnet, freeze, (2, 3, 32, 32)),
    "frozen fused": (_resnet, lambda m: freeze(fuse(m)), (2, 3, 32, 32)),
    "BasicBlock": (
        lambda: BasicBlock(16, 8, 2, _down(8)),
        lambda m: FusedBasicBlock(16, 8, 2, _down(8)),
        (2, 16, 9, 9),
    ),
    "Bottleneck": (lambda: Bottleneck(32, 8), lambda m: FusedBottleneck(32, 8), (2, 32, 6, 6)),
    "models.ResNet": (
        _resnet,
        lambda m: fused_resnet.models.ResNet(FusedBasicBlock, [1, 1, 1, 1], num_classes=4),
        (2, 3, 32, 32),
    ),
    "ConvBNReLU": (lambda: ConvBNReLU(8), lambda m: FusedConvBNReLU(8, 8), (2, 8, 6, 6)),
}


def build(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The original, ours with its weights, and an input."""
    make, ours, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    fused = ours(model).eval()
    fused.load_state_dict(model.state_dict())
    x = torch.randn(shape)
    with torch.no_grad():  # warm, as it is in use
        fused(x)
    return model, fused, x


# ---- those who make a graph ----------------------------------------------------------------------------------------


def _targets(graph: torch.fx.Graph) -> str:
    return "\n".join(f"{node.op} {node.target}" for node in graph.nodes)


def _exported(strict: bool) -> Callable[[nn.Module, Tensor], Seen]:
    def look(model: nn.Module, x: Tensor) -> Seen:
        program = torch.export.export(model, (x,), strict=strict)
        return _targets(program.run_decompositions().graph), program.module()(x)

    return look


def _draft(model: nn.Module, x: Tensor) -> Seen:
    program = torch.export.draft_export(model, (x,))
    return _targets(program.graph), program.module()(x)


def _made(mode: str, pre_dispatch: bool = False) -> Callable[[nn.Module, Tensor], Seen]:
    def look(model: nn.Module, x: Tensor) -> Seen:
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        made = make_fx(
            lambda s, x: torch.func.functional_call(model, s, (x,)), tracing_mode=mode, pre_dispatch=pre_dispatch
        )(state, x)
        return _targets(made.graph), made(state, x)

    return look


def _symbolic(model: nn.Module, x: Tensor) -> Seen:
    traced = torch.fx.symbolic_trace(model)
    return _targets(traced.graph), traced(x)


def _kinds(graph: Any) -> str:
    return "\n".join(node.kind() for node in graph.nodes() if node.kind().startswith(("aten", "fused_resnet")))


def _jit_traced(model: nn.Module, x: Tensor) -> Seen:
    traced = torch.jit.trace(model, x)
    return _kinds(traced.inlined_graph), traced(x)


def _saved(model: nn.Module, x: Tensor) -> Seen:
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), file)
    file.seek(0)
    program = torch.export.load(file)
    return _targets(program.graph), program.module()(x)


GRAPHS: dict[str, Callable[[nn.Module, Tensor], Seen]] = {
    "export": _exported(False),
    "export strict": _exported(True),
    "draft_export": _draft,
    "save and load": _saved,
    "make_fx real": _made("real"),
    "make_fx fake": _made("fake"),
    "make_fx symbolic": _made("symbolic"),
    "make_fx before dispatch": _made("fake", pre_dispatch=True),
    "symbolic_trace": _symbolic,
    "jit.trace": _jit_traced,
}


@pytest.mark.parametrize("looker", GRAPHS)
@pytest.mark.parametrize("name", MODELS)
def test_a_graph_is_the_originals(name: str, looker: str) -> None:
    if (name, looker) == ("ConvBNReLU", "symbolic_trace"):
        pytest.skip("its residual may be None, which a proxy cannot say")
    model, fused, x = build(name)
    (expected_graph, expected), (graph, got) = (GRAPHS[looker](m, x) for m in (model, fused))
    assert "fused_resnet" not in graph
    # torch.jit shares types and drops names; fx and export name what they lift after the arguments
    assert graph == expected_graph
    assert torch.equal(got, expected)


@pytest.mark.parametrize("qat", [False, True], ids=["after training", "in training"])
@pytest.mark.parametrize("name", ["fused", "frozen", "BasicBlock"])
def test_quantisation_finds_the_convolutions_of_the_original(name: str, qat: bool) -> None:
    if (name, qat) == ("frozen", True):
        pytest.skip("what is frozen is not trained")
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    xnnpack = pytest.importorskip("torchao.testing.pt2e._xnnpack_quantizer")
    *models, x = build(name)
    seen = []
    for model in models:
        quantizer = xnnpack.XNNPACKQuantizer()
        quantizer.set_global(xnnpack.get_symmetric_quantization_config(is_qat=qat))
        module = torch.export.export(model.train(qat), (x,)).module()
        prepared = (pt2e.prepare_qat_pt2e if qat else pt2e.prepare_pt2e)(module, quantizer)
        prepared(x)
        converted = pt2e.convert_pt2e(prepared)
        seen.append((_targets(converted.graph), converted(x)))
    assert seen[0][0].count("quantize_per_tensor") > 2 * sum(isinstance(m, nn.Conv2d) for m in models[0].modules())
    assert seen[0][0] == seen[1][0]
    assert torch.equal(seen[0][1], seen[1][1])


# ---- those who transform -------------------------------------------------------------------------------------------


def _called(model: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda p: torch.func.functional_call(model, p, (x,)).square().sum()


def _per_sample(model: nn.Module, x: Tensor) -> Any:
    parameters = dict(model.named_parameters())
    gradient = torch.func.grad(lambda p, x: _called(model, x[None])(p))
    return torch.func.vmap(gradient, in_dims=(None, 0))(parameters, x)


def _dual(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        y = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        return torch.autograd.forward_ad.unpack_dual(y).tangent


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda model, x: torch.func.grad(_called(model, x))(dict(model.named_parameters())),
    "vjp": lambda model, x: (lambda y, pull: pull(y)[0])(*torch.func.vjp(model, x)),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,))[1],
    "jacrev": lambda model, x: torch.func.jacrev(lambda s: model(x * s).flatten()[:3])(torch.ones(())),
    "jacfwd": lambda model, x: torch.func.jacfwd(lambda s: model(x * s))(torch.ones(())),
    "hessian": lambda model, x: torch.func.hessian(lambda s: model(x * s).square().sum())(torch.ones(())),
    "vmap": lambda model, x: torch.func.vmap(lambda x: model(x[None]))(x),
    "vmap of grad": _per_sample,
    "dual numbers": _dual,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", MODELS)
def test_a_transform_sees_the_original(name: str, transform: str) -> None:
    model, fused, x = build(name)
    expected, got = (TRANSFORMS[transform](m, x) for m in (model, fused))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", ["grad", "vjp"])
def test_a_transform_in_training_mode_sees_the_original(transform: str) -> None:
    models = build("fused")
    for model in models[:2]:
        torch.func.replace_all_batch_norm_modules_(model.train())  # running statistics cannot be transformed
    expected, got = (TRANSFORMS[transform](m, models[2]) for m in models[:2])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_tensor_that_is_more_than_numbers_gets_the_original() -> None:
    class Logged(Tensor):
        seen: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs)

    model, fused, x = build("fused")
    with torch.no_grad():
        got = fused(x.as_subclass(Logged))
        assert torch.equal(got.as_subclass(Tensor), model(x))
    assert "conv2d" in Logged.seen


# ---- torch.jit.script ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fused", "BasicBlock", "Bottleneck", "models.ResNet", "ConvBNReLU"])
def test_scripted_it_is_the_original(name: str) -> None:
    model, fused, x = build(name)
    scripted = torch.jit.script(fused)
    assert "fused_resnet::" not in str(scripted.inlined_graph)
    with torch.no_grad():
        assert torch.equal(scripted(x), model(x))


def test_a_scripted_forward_finds_the_names_of_its_own_file() -> None:
    fused = fuse(_Named().eval())
    assert fused_resnet.explain(fused).fused
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        assert torch.equal(torch.jit.script(fused)(x), fused_resnet.unfuse(copy.deepcopy(fused))(x))


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + x)


def test_a_frozen_model_refuses_to_be_scripted() -> None:
    with pytest.raises(TypeError, match="unfuse"):
        torch.jit.script(build("frozen")[1])


# ---- torch.compile is no onlooker ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fused", "BasicBlock"])
def test_compiled_it_is_fused(name: str) -> None:
    model, fused, x = build(name)
    targets: list[str] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module

    torch._dynamo.reset()
    torch.export.export(fused, (x,), strict=True)  # whose answer must not stay
    with torch.no_grad():
        got = torch.compile(fused, backend=backend, fullgraph=True)(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
    assert any("fused_resnet" in target for target in targets)
    assert not any("conv2d" in target for target in targets)


@pytest.mark.parametrize("name", ["fused", "models.ResNet"])
def test_compiled_it_changes_layouts_at_its_ends_alone(name: str) -> None:
    _, fused, x = build(name)
    targets: list[str] = []

    def compiler(module: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fused, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)(x)
    assert sum("fused_resnet" in target for target in targets) == 9
    copies = [target for target in targets if any(word in target for word in ("clone", "copy", "contiguous"))]
    assert len(copies) <= 2


def test_a_transform_inside_of_a_compiled_function_is_right() -> None:
    model, fused, x = build("fused")
    gradients = [
        torch.compile(lambda p, x, m=m: torch.func.grad(lambda p: _called(m, x)(p))(p), backend="aot_eager")(
            dict(m.named_parameters()), x
        )
        for m in (model, fused)
    ]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


# ---- programs that hold our operators ------------------------------------------------------------------------------


@pytest.mark.parametrize("imports", ["import fused_resnet, torch", "import torch, fused_resnet"])
def test_a_saved_program_with_our_operators_needs_the_package_alone(imports: str, tmp_path: Path) -> None:
    class Tail(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return fused_resnet.functional.conv_bn_add_relu(x, weight, residual=x, padding=1)

    arguments = (torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3, requires_grad=True))
    program = torch.export.export(Tail(), arguments)
    assert "fused_resnet" in _targets(program.graph)
    torch.export.save(program, tmp_path / "program.pt2")
    expected = Tail()(*arguments)
    torch.save((arguments, expected.detach()), tmp_path / "call.pt")
    code = (
        f"{imports}\n"
        "arguments, expected = torch.load('call.pt')\n"
        "got = torch.export.load('program.pt2').module()(*arguments)\n"
        "torch.testing.assert_close(got, expected)\n"
        "got.sum().backward()\n"
        "assert arguments[1].grad is not None\n"
    )
    run_in_new_process(code, tmp_path)
