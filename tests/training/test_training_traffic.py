"""Counted activation traffic of the training tail, forward and backward: eager 16 tensors, here 9 (or 10) and the mask.

Every operator that runs is counted by the activations among its arguments and results, one pass each; to the two that
pass over an argument twice the second pass is added. Whatever runs on an activation and is not the convolution itself
counts. That the Triton kernels behind the operators make no further pass is measured in bytes in
test_training_triton.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_resnet import functional
from fused_resnet.nn import tail

SHAPE = (2, 16, 8, 8)
#: What a convolution reads and writes is the same on both sides, and no part of the tail.
CONVOLUTIONS = (
    "aten::convolution", "aten::convolution_backward", "fused_resnet::conv_bn_stats", "fused_resnet::conv_backward",
)  # fmt: skip
#: BN in training mode reads y for the statistics and again to normalise; backward grad_out and y for the sums as well.
SECOND_PASSES = {"aten::native_batch_norm": 1, "aten::native_batch_norm_backward": 2}


class Passes(TorchDispatchMode):
    """Passes over activations by operator, and over the mask; which operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.activations: Counter[str] = Counter()
        self.masks = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        self.names.append(name)
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if name in CONVOLUTIONS or is_view:
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        size = torch.Size(SHAPE).numel()
        passes = sum(t.numel() == size for t in tensors)
        if passes:
            self.activations[name] += passes + SECOND_PASSES.get(name, 0)
        self.masks += sum(t.dtype == torch.int32 and t.numel() == size // 32 for t in tensors)
        return out


def by_module(conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor, residual: Tensor) -> Tensor:
    return tail.leave(tail.conv_bn_act(conv, bn, x, residual))  # type: ignore[no-any-return]


def by_function(conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor, residual: Tensor) -> Tensor:
    arguments = functional.batch_norm_arguments(bn)._asdict()
    return functional.conv_bn_add_relu_train(x, conv.weight, **arguments, padding=1, residual=residual)


def step(fused: Callable[..., Tensor] | None, memory_format: torch.memory_format) -> Passes:
    """One forward and backward of relu(bn(conv(x)) + residual)."""
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(4, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=memory_format)
    residual, grad = (torch.randn(SHAPE).contiguous(memory_format=memory_format) for _ in range(2))
    leaves = (x.requires_grad_(), residual.requires_grad_(), conv.weight, bn.weight, bn.bias)
    with Passes() as passes:
        out = torch.relu(bn(conv(x)) + residual) if fused is None else fused(conv, bn, x, residual)
        torch.autograd.grad(out, leaves, grad)
    return passes


def test_eager_takes_sixteen() -> None:
    passes = step(None, torch.channels_last)
    assert sum(passes.activations.values()) == 16, passes.activations


def test_nine_with_the_statistics_in_the_convolution() -> None:
    """A backend whose ``why_not_conv_stats`` says that it has no such convolution reads y once more: ten."""
    passes = step(by_module, torch.channels_last)
    assert passes.activations == {
        "fused_resnet::bn_apply_add_relu": 3,
        "fused_resnet::bn_backward_reduce": 2,
        "fused_resnet::bn_backward_apply": 4,
    }
    assert passes.masks == 3
    assert "fused_resnet::conv_bn_stats" in passes.names
    assert "fused_resnet::bn_stats" not in passes.names


def test_ten_without_it() -> None:
    """NCHW: eager's convolution, and the statistics of the copy that the passes need in any case."""
    passes = step(by_function, torch.contiguous_format)
    assert passes.activations["fused_resnet::bn_stats"] == 1
    ours = {name: n for name, n in passes.activations.items() if name.startswith("fused_resnet::")}
    assert sum(ours.values()) == 10
    assert passes.masks == 3
