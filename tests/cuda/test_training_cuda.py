"""When the CUDA extension's training backend is taken, and the sentences where it is not. No GPU, no extension."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_resnet.backends.training import cuda as training_cuda
from fused_resnet.backends.training import dispatch as training_dispatch
from fused_resnet.core.training_call import ConvGeometry

BACKEND = training_cuda.BACKEND
ONCE = ConvGeometry((1, 1), (1, 1), (1, 1), 1)


def on_gpu(*shape: int, dtype: torch.dtype = torch.float16, channels_last: bool = True) -> Tensor:
    """A tensor that says it is on a GPU."""
    with FakeTensorMode():
        t = torch.empty(shape, dtype=dtype, device="cuda")
        return t.contiguous(memory_format=torch.channels_last) if channels_last else t


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An extension that runs everything, on a GPU whose capability the test chooses."""
    monkeypatch.setattr(training_cuda, "why_not_device", lambda device: None)
    monkeypatch.setattr(training_cuda.CONVOLUTION, "can_run", lambda problem: None)
    monkeypatch.setattr(training_cuda, "_capability", lambda index: 80)
    return monkeypatch


def test_place_in_the_order() -> None:
    """Before Triton, whose kernels it replaces without a compiler at run time."""
    names = training_dispatch.NAMES
    assert names.index("cuda") < names.index("triton") < names.index("eager")
    y = torch.zeros(1, 8, 2, 2)
    assert training_dispatch.reasons(y)["cuda"] == "cuda: y must be on a CUDA device, got cpu"
    with pytest.raises(RuntimeError, match="cuda: y must be on a CUDA device, got cpu"):
        training_dispatch.choose("cuda", y)


def test_dtypes(capability: pytest.MonkeyPatch) -> None:
    y = on_gpu(2, 8, 4, 4)
    for other in (torch.float16, torch.bfloat16, torch.float32):
        assert BACKEND.can_run(y, None, on_gpu(2, 8, 4, 4, dtype=other)) is None
    reason = BACKEND.can_run(y, on_gpu(2, 8, 4, 4, dtype=torch.float64))
    assert reason == "cuda: activations must be float16, bfloat16 or float32, got torch.float64"


def test_convolution_with_statistics(capability: pytest.MonkeyPatch) -> None:
    """Where tensor cores are beyond mma.sync, only where the pass over y weighs more than what they would win."""
    x, small, large = on_gpu(2, 64, 8, 8), on_gpu(64, 64, 3, 3), on_gpu(64, 128, 3, 3)
    wide = on_gpu(2, 128, 8, 8)
    assert BACKEND.why_not_conv_stats(x, small, ONCE) is None
    assert BACKEND.why_not_conv_stats(wide, large, ONCE) is None
    capability.setattr(training_cuda, "_capability", lambda index: 90)
    assert BACKEND.why_not_conv_stats(x, small, ONCE) is None
    reason = BACKEND.why_not_conv_stats(wide, large, ONCE)
    assert reason == "cuda: at most 800 products per output on sm_90, got 1152"
    exact = (on_gpu(2, 128, 8, 8, dtype=torch.float32), on_gpu(64, 128, 3, 3, dtype=torch.float32))
    capability.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert BACKEND.why_not_conv_stats(*exact, ONCE) is None
    nchw = on_gpu(2, 64, 8, 8, channels_last=False), on_gpu(64, 64, 3, 3, channels_last=False)
    assert BACKEND.why_not_conv_stats(*nchw, ONCE) == "cuda: the convolution with statistics takes x in channels_last"


def test_what_the_convolution_backend_refuses(capability: pytest.MonkeyPatch) -> None:
    capability.setattr(training_cuda.CONVOLUTION, "can_run", lambda problem: f"cuda: groups {problem.groups}")
    reason = BACKEND.why_not_conv_stats(on_gpu(2, 64, 8, 8), on_gpu(64, 32, 3, 3), ONCE._replace(groups=2))
    assert reason == "cuda: groups 2"
