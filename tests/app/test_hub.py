"""hub/: the project for Hugging Face's kernel hub, loaded and put into torchvision's models by ``kernels`` itself."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

kernels: Any = pytest.importorskip("kernels", reason="Hugging Face's kernels is not installed (pip install kernels)")
torchvision = pytest.importorskip("torchvision")
from torchvision.models.resnet import BasicBlock, Bottleneck  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "project"
    subprocess.run([sys.executable, str(ROOT / "hub/assemble.py"), str(folder)], check=True)
    return folder


@pytest.fixture
def mapping(project: Path) -> Iterator[dict[str, Any]]:
    """Both blocks prepared for kernels, as its documentation says for classes of other libraries."""
    for block in (BasicBlock, Bottleneck):
        kernels.replace_kernel_forward_from_hub(block, block.__name__)
    yield {
        name: {"cpu": kernels.LocalLayerRepository(repo_path=project, layer_name=name)}
        for name in ("BasicBlock", "Bottleneck")
    }
    for block in (BasicBlock, Bottleneck):
        del block.kernel_layer_name, block.kernel_condition


def randomised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return model


def network(block: Any = BasicBlock) -> nn.Module:
    torch.manual_seed(0)
    return randomised(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=4)).eval()


def kernelized(model: nn.Module, mapping: dict[str, Any], mode: Any) -> nn.Module:
    with kernels.use_kernel_mapping(mapping):
        result: nn.Module = kernels.kernelize(copy.deepcopy(model), mode=mode, device="cpu")
    return result


def launches(model: nn.Module, x: torch.Tensor) -> int:
    """Tails of ours in one forward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x)
    return sum(
        event.count
        for event in profile.key_averages()
        if re.match(r"_fused_resnet_\w+::conv_bn_\w*add_relu", event.key)
    )


def test_the_project_is_one_by_the_builders_rules(project: Path) -> None:
    from kernels._rust import Backend, Build, Digest, DigestAlgorithm, Metadata

    assert set(Build.open(project).general.backends) == {Backend.CPU, Backend.CUDA}
    for backend in ("cpu", "cuda"):
        folder = project / "build" / f"torch-{backend}"
        metadata = Metadata.read_from_file(folder / "metadata.json")
        assert metadata.name.python_name == "fused_resnet"
        assert metadata.id.isidentifier()
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
    sources = [path.read_text() for path in (project / "torch-ext").rglob("*.py")]
    assert len(sources) > 50
    for source in sources:
        assert not re.search(r"^(?:from|import) fused_resnet", source, re.MULTILINE), "imports are relative"
        assert "torch.ops.fused_resnet." not in source, "operators are in the build's namespace"


def test_two_builds_and_the_package_live_in_one_process(project: Path) -> None:
    """In a process of its own, to see that the package is not needed."""
    code = f"""
import sys, torch, kernels
from pathlib import Path

def check(conv_bn_add_relu):
    x, w = torch.randn(1, 8, 9, 9), torch.randn(8, 8, 3, 3)
    expected = torch.relu(torch.nn.functional.conv2d(x, w, padding=1) + x)
    torch.testing.assert_close(conv_bn_add_relu(x, w, residual=x, padding=1), expected, rtol=1e-4, atol=1e-4)

for variant in ("torch-cpu", "torch-cuda"):
    check(kernels.get_local_kernel(Path({str(project)!r}) / "build" / variant).conv_bn_add_relu)
assert "fused_resnet" not in sys.modules
import fused_resnet
check(fused_resnet.functional.conv_bn_add_relu)
print(len({{name.split(".")[0] for name in sys.modules if name.startswith("_fused_resnet_")}}))
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"


@pytest.mark.parametrize(("block", "tails"), [(BasicBlock, 8), (Bottleneck, 12)])
def test_kernelize_puts_it_in_place_of_torchvisions(block: Any, tails: int, mapping: dict[str, Any]) -> None:
    model, x = network(block), torch.randn(2, 3, 40, 40)
    ours = kernelized(model, mapping, kernels.Mode.INFERENCE)
    assert type(ours.layer1[0]) is block
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), model(x), rtol=1e-3, atol=1e-4)
        assert launches(ours, x) == tails
        assert launches(model, x) == 0


def test_it_trains_as_the_original(mapping: dict[str, Any]) -> None:
    model, x = network().train(), torch.randn(4, 3, 40, 40)
    ours = kernelized(model, mapping, kernels.Mode.TRAINING)
    for side in (model, ours):
        side(x).square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-2, atol=1e-2 * float(one.grad.abs().max()), msg=name)
    for (name, one), other in zip(model.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4, msg=name)


def test_a_block_that_is_more_than_its_submodules_runs_its_own_forward(mapping: dict[str, Any]) -> None:
    model, x = network(), torch.randn(1, 3, 40, 40)
    ours = kernelized(model, mapping, kernels.Mode.INFERENCE)
    seen: list[str] = []
    ours.layer1[0].bn2.register_forward_hook(lambda *_: seen.append("called"))
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), model(x), rtol=1e-3, atol=1e-4)
        assert launches(ours, x) == 6
    assert seen
    ours.layer2[0].bn1 = nn.Identity()  # exchanged: seen at the next call
    model.layer2[0].bn1 = nn.Identity()
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), model(x), rtol=1e-3, atol=1e-4)


def test_it_compiles_in_one_graph(mapping: dict[str, Any]) -> None:
    model, x = network(), torch.randn(1, 3, 40, 40)
    ours = kernelized(model, mapping, kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE)
    torch._dynamo.reset()
    with torch.inference_mode():
        compiled = torch.compile(ours, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)
