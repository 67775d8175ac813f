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

from fused_resnet.aot.training import TrainingCall
from fused_resnet.backends.training import cuda as training_cuda
from fused_resnet.backends.training import eager as training_eager
from fused_resnet.backends.training.base import TrainingBackend
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import ConvBN, TailArguments, reference
from fused_resnet.core.training_call import BackwardPass, ForwardPass, Gradients, mask_words
from tests.support.training_calls import branch_of, means_of, values_of

CHANNELS_LAST = torch.channels_last
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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


def make_call(rng: random.Random) -> TailArguments:
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
    tail = TailArguments(
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


def expect_exact(tail: TailArguments, y: torch.Tensor) -> None:
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
            *(tail.proj or none), tail.proj_stride, module.ACTIVATIONS[tail.activation], False, 0, 0, splits, 0,
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
            "family": 0,
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
    assert "x: 2x2 is too small for a 3x3 filter with padding (0, 0) and dilation (1, 1)" in message(
        x=torch.zeros(1, 8, 2, 2), weight=torch.zeros(8, 8, 3, 3), stride=[2, 2]
    )
    assert "residual: expected 4 dimensions, got 2" in message(residual=torch.zeros(8, 8))
    assert "cuda: activation must be 0 (none), 1 (relu) or 2 (relu6), got 3" in message(activation=3)
    assert runtime.ptxi_cudart_launches() == 0


def direct(module: ModuleType, runtime: ctypes.CDLL) -> None:
    """The way past the dispatcher, and when it hands over to the operator."""
    from fused_resnet.backends import cuda

    cuda._current_device, cuda._stream = (lambda: 0), (lambda index: 0)
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


def statistics(module: ModuleType, runtime: ctypes.CDLL) -> None:
    """The convolution with statistics, on tensors of any strides and alignment: one launch, y to the bit."""
    rng = random.Random(4)
    count = 0
    while count < 16:
        tail = make_call(rng)._replace(residual=None, proj_x=None, proj=None, activation="none")
        tail = tail._replace(conv=ConvBN(tail.conv.weight, bias=tail.conv.bias))
        if tail.x.numel() == 0:
            continue
        count += 1
        conv = tail.conv
        y, mean, var = torch.ops.fused_resnet_C.cuda_conv_stats(
            tail.x, conv.weight, conv.bias, tail.stride, tail.padding, tail.dilation, 1, False
        )
        expect_exact(tail, y)
        assert y.is_contiguous(memory_format=CHANNELS_LAST)
        exact = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(mean.double(), exact[1], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(var.double(), exact[0], rtol=1e-5, atol=1e-5)
        assert runtime.ptxi_cudart_launches() == count
    x, weight = torch.zeros(1, 8, 4, 4), torch.zeros(8, 4, 1, 1)

    def message(x: torch.Tensor) -> str:
        try:
            torch.ops.fused_resnet_C.cuda_conv_stats(x, weight, None, [1, 1], [0, 0], [1, 1], 2, False)
        except ValueError as error:
            return str(error)
        raise AssertionError("no error")

    assert "x: expected at least one element" in message(x[:0])
    assert "cuda: groups must be 1, got 2" in message(x)


def training(module: ModuleType, runtime: ctypes.CDLL) -> None:
    """The training backend: any mix of dtypes and alignments, one launch a pass, to the bit what eager gives."""
    rng = random.Random(3)
    for number in range(40):
        size = (rng.choice([1, 3]), rng.randint(1, 9), rng.randint(1, 9), rng.choice([1, 8, 13, 24, 64]))
        call = TrainingCall(
            "bn_apply_add_relu", *size,
            rng.choice(DTYPES), activation=rng.choice(["relu", "relu6", "none"]), affine=rng.choice(["none", "both"]),
        )  # fmt: skip
        kind = rng.choice(["residual", "proj", "none"])
        if kind != "none":
            call = dataclasses.replace(call, **{kind: rng.choice(DTYPES)})
        results = [_training_step(backend, call, number) for backend in (training_cuda.BACKEND, training_eager.BACKEND)]
        for got, expected in zip(*results, strict=True):
            assert got.dtype == expected.dtype, call
            assert torch.equal(got, expected), call
    assert runtime.ptxi_cudart_launches() == 3 * 40
    y = torch.randn(5, 24, 9, 11).contiguous(memory_format=CHANNELS_LAST) + 50
    for _ in range(2):  # the second launch finds the workspace as the first left it
        mean, var = training_cuda.BACKEND.stats(y)
        exact = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(mean.double(), exact[1], rtol=2e-7, atol=0)
        torch.testing.assert_close(var.double(), exact[0], rtol=4e-6, atol=0)


def _training_step(backend: TrainingBackend, call: TrainingCall, seed: int) -> tuple[torch.Tensor, ...]:
    """Forward and backward of one tail on small integers; every third activation lies at an odd address."""
    values = dict(values_of(call, "integers", seed))
    values |= values_of(dataclasses.replace(call, op="bn_backward_apply"), "integers", seed + 1) | values
    for i, (name, t) in enumerate(sorted(values.items())):
        if t.dim() == 4 and (i + seed) % 3 == 0:
            values[name] = _shifted(t)
    bn, proj = branch_of(values, ""), branch_of(values, "proj_")
    assert bn is not None
    out = torch.empty(call.shape, dtype=call.out_dtype, memory_format=CHANNELS_LAST)
    mask = None if call.activation == "none" else torch.empty(mask_words(call.numel), dtype=torch.int32)
    backend.apply(ForwardPass(bn, values.get("residual"), proj, call.activation, out, mask))
    backward = BackwardPass(values["grad_out"], mask, bn, proj)
    sums = backend.backward_reduce(backward)
    second = call.proj or call.residual
    d_y = torch.empty_like(values["y"], memory_format=CHANNELS_LAST)
    d_second = None if second is None else torch.empty(call.shape, dtype=second, memory_format=CHANNELS_LAST)
    means, proj_means = means_of(values, ""), means_of(values, "proj_")
    assert means is not None
    backend.backward_apply(backward, Gradients(means, proj_means, d_y, d_second))
    return tuple(t for t in (out, mask, *sums, d_y, d_second) if t is not None)


def _shifted(t: torch.Tensor) -> torch.Tensor:
    n, c, h, w = t.shape
    view = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    return view.copy_(t)


def captures(module: ModuleType, runtime: ctypes.CDLL) -> None:
    """Every launch that counts arrivals, on two streams and in captures: right, and nothing else is captured."""
    runtime.test_end_capture.restype = ctypes.c_void_p
    runtime.test_mallocs.restype = runtime.test_captured_memsets.restype = ctypes.c_long
    rng = random.Random(5)
    op = torch.ops.fused_resnet_C.cuda_conv_bn_add_relu.default
    none = ConvBN(weight=None)  # type: ignore[arg-type]
    tails = [tail for tail in (make_call(rng) for _ in range(24)) if tail.x.numel()][:6]
    y = integers(rng, 5, 24, 9, 11, dtype=torch.float32).contiguous(memory_format=CHANNELS_LAST)
    exact = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)

    def run_all() -> None:
        for tail, tile in zip(tails, (32, 64) * 3, strict=True):
            out = op(
                tail.x, *tail.conv, tail.residual, tail.stride, tail.padding, tail.dilation, tail.groups, tail.proj_x,
                *(tail.proj or none), tail.proj_stride, module.ACTIVATIONS[tail.activation], False, tile, tile, 3, 0,
            )  # fmt: skip
            expect_exact(tail, out)
        convolution = torch.ops.fused_resnet_C.cuda_conv_stats(y, weight, None, [1, 1], [0, 0], [1, 1], 1, False)
        for mean, var in (training_cuda.BACKEND.stats(y), convolution[1:]):
            torch.testing.assert_close(mean.double(), exact[1], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(var.double(), exact[0], rtol=1e-5, atol=0)

    weight = torch.eye(24).view(24, 24, 1, 1)
    mallocs = []
    for _ in range(4):
        for stream in (0x10, 0x20):
            handle = ctypes.c_void_p(stream)
            runtime.test_use_stream(handle)
            run_all()
            runtime.test_begin_capture(handle, 0)
            run_all()
            graph = runtime.test_end_capture(handle)
            assert graph, "the capture was invalidated"
            run_all()
            runtime.test_destroy_graph(ctypes.c_void_p(graph))
        mallocs.append(runtime.test_mallocs())
    assert mallocs[0] == mallocs[-1]
    assert runtime.test_captured_memsets() == 0
    assert runtime.test_attribute_values() == 1  # whatever a plan takes: threads must not undo each other's


def training_errors(module: ModuleType, runtime: ctypes.CDLL) -> None:
    ops = torch.ops.fused_resnet_C
    y = torch.zeros(2, 8, 4, 4).contiguous(memory_format=CHANNELS_LAST)
    vector = torch.zeros(8)

    def message(op: Any, *arguments: Any) -> str:
        try:
            op(*arguments)
        except ValueError as error:
            return str(error)
        raise AssertionError(f"no error for {op}")

    stats, reduce = ops.cuda_bn_stats, ops.cuda_bn_backward_reduce
    assert "y: expected the shape of y, dense in channels_last" in message(stats, y.contiguous(), vector, vector)
    assert "y: expected dtype float16, bfloat16 or float32" in message(stats, y.double(), vector, vector)
    assert "mean: expected one float32 per channel" in message(stats, y, vector[:7], vector)
    assert "var: expected one float32 per channel" in message(stats, y, vector, vector.double())
    none = (None, None, None)
    mask = torch.zeros(7, dtype=torch.int32)
    sentence = message(reduce, y, mask, y, vector, vector, *none, vector, vector, None)
    assert "mask: expected one int32 for 32 elements of y, got 7 numbers" in sentence
    strided = torch.zeros(16, dtype=torch.int32)[::2]
    assert "mask: expected a dense tensor" in message(
        reduce, y, strided, y, vector, vector, *none, vector, vector, None
    )
    sentence = message(reduce, y[:1], None, y, vector, vector, *none, vector, vector, None)
    assert "grad_out: expected the shape of y" in sentence
    sentence = message(reduce, y, None, y, vector, vector, *none, vector, vector, vector)
    assert "proj_sum_dz_xhat: expected no address, the plan has no such tensor" in sentence
    assert runtime.ptxi_cudart_launches() == 0


CHECKS = {
    check.__name__: check for check in (operator, errors, direct, statistics, training, training_errors, captures)
}

if __name__ == "__main__":
    loaded = load(sys.argv[1])
    CHECKS[sys.argv[2]](*loaded)
    failure = loaded[1].ptxi_cudart_error().decode()
    assert not failure, failure
    print("ok")
