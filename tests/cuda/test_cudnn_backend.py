"""Backend ``cudnn``: its refusals anywhere; its results, and the traps of cuDNN's operator, on a GPU."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_resnet import backends
from fused_resnet.backends import cudnn
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import ConvBN, TailArguments, reference, scale_shift
from fused_resnet.testing import PROBLEMS, Case, check_tail, in_dtype, make_tail
from tests.support.operators import SYNCHRONISING, Operators, on_fake_device

BACKEND = backends.get("cudnn")


def run(tail: TailArguments) -> Tensor:
    return BACKEND.run(Problem.from_tail(tail), tail)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("device=cpu", "cudnn: device must be cuda, got cpu"),
        ("device=cuda,dtype=float64", "cudnn: dtype must be float32, float16 or bfloat16, got float64"),
        ("device=cuda,activation=relu6", "cudnn: activation must be relu, got relu6"),
        (
            "device=cuda,dtype=float16,residual=float32",
            "cudnn: residual must have the dtype of x, float16, got float32",
        ),
    ],
)
def test_refusals(text: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert BACKEND.can_run(Problem.parse(f"h=8,w=8,c=16,k=16,padding=1,{text}")) == sentence


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """cuDNN's operators replaced, on any device: what reached them as x and z. z never shares memory with x."""
    calls: list[tuple[Tensor, Tensor]] = []

    def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[object, ...]) -> Tensor:
        assert bias is None or bias.dtype is x.dtype
        assert weight.dtype is x.dtype
        assert weight.is_contiguous(memory_format=torch.channels_last)
        return torch.ops.aten.convolution(x, weight, bias, *geometry[:3], False, [0, 0], geometry[3])

    class Adding:
        @staticmethod
        def default(
            x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor | None, *geometry: object
        ) -> Tensor:
            calls.append((x, z))
            assert alpha == 1.0
            assert not cudnn._share_memory(x, z)
            assert z.is_contiguous(memory_format=torch.channels_last)
            return (convolution(x, weight, bias, geometry) + z).relu()

    class Plain:
        @staticmethod
        def default(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: object) -> Tensor:
            return convolution(x, weight, bias, geometry).relu()

    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_add_relu", Adding, raising=False)
    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_relu", Plain, raising=False)
    return calls


def test_it_runs_what_it_does_not_refuse(calls: list[tuple[Tensor, Tensor]]) -> None:
    """The calls that reach cuDNN, on the CPU with its operators replaced; nothing is kept of a weight."""
    for text in ("padding=1", "padding=1,groups=2"):
        tail = make_tail(Problem.parse(f"n=2,h=8,w=8,c=16,k=16,{text}"), "integers")
        tail = tail._replace(residual=tail.x)
        assert torch.equal(run(tail).double(), reference(tail.to(torch.float64)))
        tail.conv.weight[3, 2, 1, 0] += 1
        assert torch.equal(run(tail).double(), reference(tail.to(torch.float64)))
    check_tail(run, Problem.parse("n=2,h=8,w=8,c=16,k=16,padding=1,proj=8"))
    check_tail(run, Problem.parse("n=2,h=8,w=8,c=16,k=16,padding=1,bias=1,residual=0"))
    assert calls


CONVS = {
    f"{'bias-' if bias else ''}{affine}": (bias, affine)
    for bias in (False, True)
    for affine in ("both", "gamma", "beta", "none", "no-bn")
}


def conv_bn(bias: bool, affine: str, dtype: torch.dtype, norm_dtype: torch.dtype) -> ConvBN:
    g = torch.Generator().manual_seed(0)
    conv = ConvBN(
        torch.randn(8, 5, 3, 3, generator=g).to(dtype), torch.randn(8, generator=g).to(dtype) if bias else None
    )
    if affine == "no-bn":
        return conv
    vectors = torch.randn(4, 8, generator=g).to(norm_dtype)
    return conv._replace(
        bn_weight=vectors[0] if affine in ("both", "gamma") else None,
        bn_bias=vectors[1] if affine in ("both", "beta") else None,
        running_mean=vectors[2], running_var=vectors[3].abs(),
    )  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", CONVS)
def test_fold_rounds_once(kind: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Against the definition in float64, rounded: to the bit, whatever BN's dtype and the weight's strides."""
    for norm_dtype in (torch.float32, dtype, torch.float64):
        conv = conv_bn(*CONVS[kind], dtype, norm_dtype)
        conv = conv._replace(weight=conv.weight.contiguous(memory_format=layout).requires_grad_())
        scale, shift = scale_shift(conv, torch.float64)
        expected = conv.weight if scale is None else conv.weight.double() * scale[:, None, None, None]
        for wanted in (torch.contiguous_format, torch.channels_last):
            weight, bias = cudnn.fold(conv, wanted)
            assert weight.is_contiguous(memory_format=wanted)
            assert weight.dtype is dtype
            assert torch.equal(weight, expected.to(dtype))
            assert (bias is None) == (shift is None)
            if bias is not None and shift is not None:
                assert bias.dtype is dtype
                # the order of the additions differs: a few roundings of float64
                close = torch.finfo(torch.float64).eps * 8 if dtype is torch.float64 else torch.finfo(dtype).eps / 2
                torch.testing.assert_close(bias.double(), shift, rtol=close, atol=1e-14)


@pytest.mark.parametrize("kind", CONVS)
def test_fold_takes_seven_kernels_at_most(kind: str) -> None:
    bias, affine = CONVS[kind]
    for dtype, norm_dtype in itertools.product((torch.float32, torch.float16), repeat=2):
        conv = conv_bn(bias, affine, dtype, norm_dtype)
        with Operators() as operators:
            cudnn.fold(conv, torch.channels_last)
        most = 1 if affine == "no-bn" else 6 + bias + (affine in ("gamma", "none") and not bias)
        assert len(operators.kernels) <= most, operators.kernels


TAILS = ("residual=1", "residual=1,bias=1", "residual=0", "residual=1,bn=0", "proj=8x16x16x2", "residual=1,groups=2")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("text", TAILS)
def test_nothing_waits_for_the_device(
    text: str, dtype: str, calls: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole call on tensors of a device that has no values: nothing is read, nothing copied to another device."""
    monkeypatch.setattr(cudnn, "_share_memory", lambda a, b: a.untyped_storage()._cdata == b.untyped_storage()._cdata)
    problem = Problem.parse(f"n=2,h=8,w=8,c=16,k=16,padding=1,dtype={dtype},{text}")
    tail = make_tail(problem)
    with FakeTensorMode() as mode:
        fake = on_fake_device(tail, mode, "cuda")
        with Operators() as operators:
            y = BACKEND.run(dataclasses.replace(problem, device_type="cuda"), fake)
    assert y.device.type == "cuda"
    assert operators.devices == {"cuda"}
    assert not SYNCHRONISING.intersection(operators.names)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", PROBLEMS, ids=[case.name for case in PROBLEMS])
def test_numerical_bar(case: Case, dtype: torch.dtype) -> None:
    problem = dataclasses.replace(in_dtype(case.problem, dtype), device_type="cuda")
    why_not = BACKEND.can_run(problem)
    if why_not is not None or not problem.n:
        pytest.skip(str(why_not))
    check_tail(run, problem, kinds=("random",), device="cuda")


@pytest.mark.gpu
def test_residual_may_be_x_itself() -> None:
    tail = make_tail(Problem.parse("n=2,h=8,w=8,c=32,k=32,padding=1,dtype=float16"), device="cuda")
    assert torch.equal(run(tail._replace(residual=tail.x)), run(tail._replace(residual=tail.x.clone())))
