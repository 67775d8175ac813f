"""Run by test_cuda_operator.py in a process of its own: the built module beside CPU tensors. Prints ok, or raises.

The module registers the same operator as the real extension, so the two cannot live in one process.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import random
import sys
from types import ModuleType
from typing import Any

import torch

from fused_resnet.problem import Problem
from fused_resnet.reference import ConvBN, Tail, reference

CHANNELS_LAST = torch.channels_last


def load(path: str) -> tuple[ModuleType, ctypes.CDLL]:
    spec = importlib.util.spec_from_file_location("fused_resnet._C_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fused_resnet._C_cuda"] = module
    spec.loader.exec_module(module)
    runtime = ctypes.CDLL(path)
    runtime.ptxi_cudart_error.restype = ctypes.c_char_p
    runtime.ptxi_cudart_launches.restype = ctypes.c_ulonglong
    # Allocations are torch's: which of its memory a kernel may touch is checked by the tests from launch.json.
    runtime.ptxi_cudart_allow(ctypes.c_uint64(1 << 12), ctypes.c_uint64((1 << 47) - (1 << 13)), 1, b"memory")
    return module, runtime


# ---- calls of small integers, where nothing is rounded ----


def integers(rng: random.Random, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def conv_bn(rng: random.Random, k: int, c: int, r: int, dtype: torch.dtype, norm_dtype: torch.dtype) -> ConvBN:
    conv = ConvBN(integers(rng, k, c, r, r, dtype=dtype), eps=1.0)
    if rng.random() < 0.4:
        conv = conv._replace(bias=integers(rng, k, dtype=dtype))
    if rng.random() < 0.8:
        conv = conv._replace(
            bn_weight=integers(rng, k, dtype=norm_dtype).sign() * 2 if rng.random() < 0.8 else None,
            bn_bias=integers(rng, k, dtype=norm_dtype) if rng.random() < 0.8 else None,
            running_mean=integers(rng, k, dtype=norm_dtype),
            running_var=integers(rng, k, dtype=norm_dtype).abs().sign() * 3,
        )
    return conv


def relaid(rng: random.Random, t: torch.Tensor) -> torch.Tensor:
    """The same values: contiguous, channels_last, a slice of something wider, or at an odd address."""
    way = rng.choice(["contiguous", "channels_last", "channels_last", "slice", "offset"])
    if way == "channels_last":
        return t.contiguous(memory_format=CHANNELS_LAST)
    if way == "slice":
        return torch.cat([t, t], 1)[:, : t.shape[1]]
    if way == "offset":
        n, c, h, w = t.shape
        view = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(n, h, w, c).permute(0, 3, 1, 2)
        return view.copy_(t)
    return t


def make_call(rng: random.Random) -> Tail:
    dtype = rng.choice([torch.float16, torch.float32])
    norm_dtype = rng.choice([dtype, torch.float32])
    n, c, k, r, h = (
        rng.choice([0, 1, 3]),
        rng.choice([3, 8, 24]),
        rng.choice([5, 16, 40]),
        rng.choice([1, 3]),
        rng.randint(3, 8),
    )
    stride = rng.choice([1, 2])
    out = (h + 2 * (r // 2) - r) // stride + 1
    conv = conv_bn(rng, k, c, r, dtype, norm_dtype)
    tail = Tail(
        relaid(rng, integers(rng, n, c, h, h, dtype=dtype)), conv._replace(weight=relaid(rng, conv.weight)),
        stride=(stride, stride), padding=(r // 2, r // 2), activation=rng.choice(["relu", "relu6", "none"]),
    )  # fmt: skip
    second = rng.choice(["residual", "expanded", "projection", "none"])
    if second == "residual":
        other = rng.choice([dtype, torch.float32])
        return tail._replace(residual=relaid(rng, integers(rng, n, k, out, out, dtype=other)))
    if second == "expanded":
        return tail._replace(residual=integers(rng, n, k, 1, 1, dtype=dtype).expand(n, k, out, out))
    if second == "projection":
        proj = conv_bn(rng, k, 8, 1, dtype, norm_dtype)
        proj_x = relaid(rng, integers(rng, n, 8, 2 * out, 2 * out, dtype=dtype))
        return tail._replace(proj_x=proj_x, proj=proj, proj_stride=(2, 2))
    return tail


def expect_exact(tail: Tail, y: torch.Tensor) -> None:
    expected = reference(tail.to(torch.float64)).to(y.dtype)
    assert y.shape == expected.shape
    assert torch.equal(y, expected), (tail.x.shape, tail.conv.weight.shape, (y - expected).abs().max())


# ---- the checks ----


def operator(module: ModuleType, runtime: ctypes.CDLL) -> None:
    """Any strides, alignment and dtype mix through the dispatcher."""
    op = torch.ops.fused_resnet_C.cuda_conv_bn_add_relu.default
    none = ConvBN(weight=None)  # type: ignore[arg-type]
    rng = random.Random(1)
    for splits in [0, 0, 2, 3] * 12:
        tail = make_call(rng)
        before = runtime.ptxi_cudart_launches()
        y = op(
            tail.x, *tail.conv, tail.residual, tail.stride, tail.padding, tail.dilation, tail.groups, tail.proj_x,
            *(tail.proj or none), tail.proj_stride, module.ACTIVATIONS[tail.activation], False, 0, 0, splits,
        )  # fmt: skip
        expect_exact(tail, y)
        assert y.is_contiguous(memory_format=CHANNELS_LAST)
        assert y.dtype == torch.result_type(tail.x, tail.x if tail.residual is None else tail.residual)
        assert runtime.ptxi_cudart_launches() - before == (1 if tail.x.shape[0] else 0)  # all of it in one launch


def errors(module: ModuleType, runtime: ctypes.CDLL) -> None:
    op = torch.ops.fused_resnet_C.cuda_conv_bn_add_relu.default
    x, weight = torch.zeros(1, 8, 4, 4), torch.zeros(8, 8, 1, 1)

    def message(**changes: Any) -> str:
        arguments: dict[str, Any] = {
            "x": x, "weight": weight, "bias": None, "bn_weight": None, "bn_bias": None, "running_mean": None,
            "running_var": None, "eps": 0.0, "residual": None, "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1],
            "groups": 1, "proj_x": None, "proj_weight": None, "proj_bias": None, "proj_bn_weight": None,
            "proj_bn_bias": None, "proj_running_mean": None, "proj_running_var": None, "proj_eps": 0.0,
            "proj_stride": [1, 1], "activation": 1, "tf32": False, "tile_m": 0, "tile_n": 0, "splits": 0,
        }  # fmt: skip
        try:
            op(**(arguments | changes))
        except ValueError as error:
            return str(error)
        raise AssertionError(f"no error for {changes}")

    assert "weight: expected the dtype of x" in message(weight=weight.half())
    assert "weight: expected as many input channels as x / groups, got 4" in message(weight=weight[:, :4])
    assert "x: expected dtype float16, bfloat16 or float32" in message(x=x.double(), weight=weight.double())
    assert "residual: expected the shape of the convolution's output" in message(residual=x[:, :4])
    assert "bias: expected one value per output channel, got 7 values" in message(bias=torch.zeros(7))
    assert "running_mean and running_var: expected both or neither" in message(running_mean=torch.zeros(8))
    assert "stride: expected two numbers, got 1" in message(stride=[1])
    assert "cuda: groups must be 1, got 2" in message(groups=2, weight=weight[:, :4].contiguous())
    assert "cuda: tile must be one of" in message(tile_m=48, tile_n=48)
    assert runtime.ptxi_cudart_launches() == 0


def direct(module: ModuleType, runtime: ctypes.CDLL) -> None:
    """The way past the dispatcher, and when it hands over to the operator."""
    from fused_resnet.backends import cuda

    torch._C._cuda_getDevice = lambda: 0  # type: ignore[attr-defined]
    torch._C._cuda_getCurrentRawStream = lambda index: 0  # type: ignore[attr-defined]
    properties = module.device_properties(0)
    cuda._properties = lambda index: properties  # type: ignore[assignment]
    rng = random.Random(2)
    straight = 0
    for _ in range(60):
        tail = make_call(rng)
        problem = dataclasses.replace(Problem.from_tail(tail), device_type="cuda")
        tile = rng.choice([(0, 0), (32, 32), (64, 64)])
        runner = cuda.BACKEND.bind(problem, tail, cuda.Configuration(*tile, rng.choice([0, 1, 2])))
        straight += isinstance(runner, cuda._Direct)
        assert isinstance(runner, cuda._Direct) == cuda._readable(tail)
        for _ in range(2):  # the second launch finds the workspace as the first left it
            expect_exact(tail, runner(tail))
    assert 10 < straight < 50


if __name__ == "__main__":
    loaded = load(sys.argv[1])
    {"operator": operator, "errors": errors, "direct": direct}[sys.argv[2]](*loaded)
    failure = loaded[1].ptxi_cudart_error().decode()
    assert not failure, failure
    print("ok")
