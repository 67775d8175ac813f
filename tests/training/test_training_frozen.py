"""Frozen BN, as in detection fine-tuning: gradients of the inference operator, and of the training passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fused_resnet.functional import bn_add_relu, conv_bn_add_relu


def frozen_bn(channels: int, dtype: torch.dtype) -> nn.BatchNorm2d:
    g = torch.Generator().manual_seed(3)
    bn = nn.BatchNorm2d(channels).to(dtype)
    for t in (bn.weight.data, bn.bias.data, bn.running_mean):
        t.copy_(torch.randn(channels, generator=g))
    bn.running_var.copy_(torch.rand(channels, generator=g) + 0.5)
    return bn.eval()


@pytest.mark.parametrize("path", ["inference operator", "training passes"])
def test_gradients_of_x_weight_gamma_beta_residual(path: str) -> None:
    g = torch.Generator().manual_seed(0)
    bn = frozen_bn(6, torch.float64)
    x = torch.randn(2, 4, 5, 5, generator=g, dtype=torch.float64)
    weight = torch.randn(6, 4, 3, 3, generator=g, dtype=torch.float64)
    residual = torch.randn(2, 6, 5, 5, generator=g, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bn.weight.data.clone(), bn.bias.data.clone(), residual)]

    def fn(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor) -> Tensor:
        if path == "inference operator":
            return conv_bn_add_relu(
                x, weight, None, gamma, beta, bn.running_mean, bn.running_var, eps=bn.eps, residual=residual, padding=1
            )
        from fused_resnet.functional import bn_add_relu_train

        y = nn.functional.conv2d(x, weight, padding=1)
        return bn_add_relu_train(
            y, gamma, beta, bn.running_mean, bn.running_var, eps=bn.eps, residual=residual, training=False
        )

    assert torch.autograd.gradcheck(fn, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_statistics_are_left_alone_and_may_change_before_backward(dtype: torch.dtype) -> None:
    """An EMA or a recalibration may write the running statistics between forward and backward."""
    g = torch.Generator().manual_seed(1)
    bn = frozen_bn(8, torch.float32)
    kept = [bn.running_mean.clone(), bn.running_var.clone(), bn.num_batches_tracked.clone()]
    y = torch.randn(2, 8, 3, 3, generator=g).to(dtype).requires_grad_()
    out = bn_add_relu(y, bn)
    assert [torch.equal(a, b) for a, b in zip(kept, bn.buffers(), strict=True)] == [True] * 3
    (expected,) = torch.autograd.grad(out.sum(), y, retain_graph=True)
    bn.running_mean.add_(1)
    bn.running_var.mul_(2)
    (got,) = torch.autograd.grad(out.sum(), y)
    assert torch.equal(got, expected)
