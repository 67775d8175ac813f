"""Both ONNX exporters see the model's own forward. Needs onnx, the newer exporter onnxscript as well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from fused_resnet import freeze, fuse

onnx: Any = pytest.importorskip("onnx", reason="onnx is not installed")


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("make", [fuse, freeze])
@pytest.mark.filterwarnings("ignore")
def test_an_exported_network_is_the_originals(
    make: Callable[[nn.Module], nn.Module], dynamo: bool, tmp_path: Path
) -> None:
    if dynamo:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    torch.manual_seed(0)
    model = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4).eval()
    x = torch.randn(1, 3, 32, 32)
    kinds = {}
    for name, network in (("original", model), ("ours", make(model))):
        torch.onnx.export(network, (x,), str(tmp_path / f"{name}.onnx"), dynamo=dynamo)
        exported = onnx.load(tmp_path / f"{name}.onnx")
        assert {node.domain for node in exported.graph.node} == {""}
        kinds[name] = [node.op_type for node in exported.graph.node]
    assert kinds["ours"] == kinds["original"]

    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(tmp_path / "ours.onnx", providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), model(x).detach(), rtol=1e-3, atol=1e-4)
