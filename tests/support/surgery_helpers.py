"""What the tests of blocks and of model surgery share: random weights, one step on both sides, launches counted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock

import fused_resnet
from fused_resnet import functional

M = TypeVar("M", bound=nn.Module)


def randomise(model: M, dtype: torch.dtype = torch.float64, seed: int = 0) -> M:
    """Weights and statistics under which nothing is hidden: gammas of both signs, means and variances at work."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if not t.is_floating_point():
                continue
            uniform = torch.rand(t.shape, generator=generator)
            if name.endswith("running_var"):
                t.copy_(0.5 + uniform)
            elif name.endswith("running_mean"):
                t.copy_(uniform - 0.5)
            elif t.dim() <= 1:
                t.copy_(torch.where(uniform < 0.5, -0.5 - uniform, uniform))
            else:
                t.copy_((uniform - 0.5) * (12 / t[0].numel()) ** 0.5)
    return model.to(dtype)


def outputs(value: Any) -> Iterator[Tensor]:
    """The tensors of a nested output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from outputs(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from outputs(item)


def assert_same_step(
    original: nn.Module, fused: nn.Module, x: Tensor, training: bool | None, *, seed: int = 0, tolerance: float = 1e-10
) -> None:
    """One forward and backward on both: outputs, gradients of input and parameters, and buffers agree.

    The two must hold different Parameters. ``training=None`` leaves the modes as they are. Errors are relative to
    each tensor's largest value; in float64 the same mathematics in another order stays under 1e-12.
    """
    seen: list[dict[str, Tensor | None]] = []
    for model in (original, fused):
        if training is not None:
            model.train(training)
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(seed)
        out = list(outputs(model(leaf * 1.0)))
        generator = torch.Generator().manual_seed(seed)
        sum((o * torch.randn(o.shape, generator=generator).to(o)).sum() for o in out).backward()  # type: ignore[union-attr]
        record: dict[str, Tensor | None] = {f"output {i}": o.detach() for i, o in enumerate(out)}
        record["gradient of the input"] = leaf.grad
        record |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
        record |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
        seen.append(record)
    assert list(seen[0]) == list(seen[1])
    for name, expected in seen[0].items():
        got = seen[1][name]
        assert (expected is None) == (got is None), name
        if expected is None or got is None:
            continue
        assert got.shape == expected.shape, name
        if expected.is_floating_point():
            scale = 1 + float(expected.abs().max())
            error = float((got - expected).abs().max())
            assert error <= tolerance * scale, f"{name}: error {error:.3g} of {scale:.3g}"
        else:
            assert torch.equal(got, expected), name


@dataclass
class Launches:
    fused: int = 0
    others: list[str] = field(default_factory=list)
    """Convolutions, batch norms, additions and ReLUs that ran outside a fused operator."""


@contextmanager
def count_launches() -> Iterator[Launches]:
    """Count calls of the fused operators, and name the tail's parts that run by themselves."""
    count = Launches()
    watched = {"convolution": "conv2d", "native_batch_norm": "batch_norm", "cudnn_batch_norm": "batch_norm",
               "_native_batch_norm_legit": "batch_norm", "_native_batch_norm_legit_no_training": "batch_norm",
               "_batch_norm_with_update": "batch_norm", "relu": "relu", "relu_": "relu_", "add": "add",
               "add_": "add_"}  # fmt: skip

    # What reaches the dispatcher; a TorchFunctionMode would have the blocks run their own forward.
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if name in watched and not inside:
                count.others.append(watched[name])
            return func(*args, **(kwargs or {}))

    patch = pytest.MonkeyPatch()
    inside: list[int] = []  # the max pool's may call the convolution's
    for name in ("conv_bn_add_relu", "conv_bn_proj_add_relu", "conv_bn_add_relu_max_pool"):
        operator = getattr(functional, name)

        def counted(*args: Any, _operator: Any = operator, **kwargs: Any) -> Any:
            count.fused += not inside
            inside.append(1)
            try:
                return _operator(*args, **kwargs)
            finally:
                inside.pop()

        patch.setattr(functional, name, counted)
    try:
        with Watch():
            yield count
    finally:
        patch.undo()


class SmallResNet(nn.Module):
    """A stem, an identity block and a projection block, as small as they get."""

    def __init__(self, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = norm(8)
        self.relu = nn.ReLU(inplace=True)
        down = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), norm(12))
        self.layer1 = nn.Sequential(BasicBlock(8, 8, norm_layer=norm), BasicBlock(8, 12, 2, down, norm_layer=norm))
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


LAUNCHES = 5  # stem 1, identity block 2, projection block 2


def launches(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), count_launches() as count:
        model(x)
    return count.fused


def assert_same(fused: nn.Module, original: nn.Module, x: Tensor, tolerance: float = 1e-10) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fused(x), original(x), rtol=tolerance, atol=tolerance)


def run_in_new_process(code: str, folder: Path) -> None:
    """Run ``code`` in ``folder`` by a Python that finds this package, and nothing else of ours; it must succeed."""
    env = os.environ | {"PYTHONPATH": str(Path(fused_resnet.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
