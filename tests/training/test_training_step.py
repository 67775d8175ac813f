"""One training step of convolution + tail: torch.compile with fullgraph, and mixed precision with GradScaler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fused_resnet.functional import bn_add_relu
from tests.support.toolchain import why_not


class Step(nn.Module):
    """Convolution + tail, the smallest thing one trains."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fused = fused
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return bn_add_relu(y, self.bn, residual=x) if self.fused else torch.relu(self.bn(y) + x)


def image() -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 8, 6, 6, generator=g).contiguous(memory_format=torch.channels_last)


def test_torch_compile_fullgraph_training_step() -> None:
    x = image()
    eager, step = Step(False), Step(True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (eager, step)]
    for _ in range(3):
        losses = []
        for model, optimizer in zip((eager, compiled), optimizers, strict=True):
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(dict(step.named_buffers()), dict(eager.named_buffers()), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(why_not("g++") is not None, reason="Inductor needs g++")
def test_torch_compile_with_inductor() -> None:
    x = image()
    eager, step = Step(False), Step(True)
    compiled = torch.compile(step, fullgraph=True)
    for model in (eager, compiled):
        (model(x) - 1).square().mean().backward()
    for (name, p), q in zip(step.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_amp_with_grad_scaler(dtype: torch.dtype) -> None:
    """Weights after three AMP steps stay as close to a float32 run as eager AMP's do (factor three)."""
    x = image()
    weights = {}
    for name in ("exact", "eager", "fused"):
        model = Step(name == "fused")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype == torch.float16 and name != "exact")
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=name != "exact"):
                out = model(x)
            assert out.dtype == torch.float32  # the residual is float32, as in eager
            scaler.scale((out.float() - 1).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        weights[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    error = {n: float((weights[n] - weights["exact"]).abs().max()) for n in ("eager", "fused")}
    assert 0 < error["fused"] <= 3 * error["eager"]
