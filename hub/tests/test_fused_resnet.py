"""What kernel-builder's CI runs on a build: the kernel against eager, on the device that is there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fused_resnet  # the build under test


@pytest.mark.kernels_ci
def test_the_tail_equals_eager() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(2, 32, 14, 14, device=device).to(memory_format=torch.channels_last)
    conv = nn.Conv2d(32, 32, 3, padding=1, bias=False).to(device)
    bn = nn.BatchNorm2d(32).to(device).eval()
    y = fused_resnet.conv_bn_add_relu(
        x, conv.weight, None, bn.weight, bn.bias, bn.running_mean, bn.running_var, eps=bn.eps, residual=x, padding=1
    )
    torch.testing.assert_close(y, torch.relu(bn(conv(x)) + x), rtol=1e-3, atol=1e-3)
