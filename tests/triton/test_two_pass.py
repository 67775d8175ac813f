"""Backend two_pass: the pass behind an unfused convolution, in Triton's interpreter."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_resnet import backends
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import reference
from fused_resnet.testing import PROBLEMS, Case, assert_within_bar, check_tail, eager_error, in_dtype, make_tail
from tests.support.operators import SYNCHRONISING, Operators, on_fake_device

CASES = [case for case in PROBLEMS if case.problem.n]


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bar(case: Case, dtype: torch.dtype) -> None:
    problem = in_dtype(case.problem, dtype)
    backend = backends.get("two_pass")
    assert backend.can_run(problem) is None
    # the convolution rounds to 16 bits before the pass, so only float32 is exact on integers
    kinds = ("integers", "random") if dtype is torch.float32 else ("random",)
    check_tail(lambda tail: backend.run(problem, tail), problem, kinds=kinds)  # type: ignore[arg-type]


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_residual_is_left_alone_and_the_format_is_eagers(layout: torch.memory_format) -> None:
    problem = Problem.parse(
        f"n=2,h=5,w=4,c=3,k=130,padding=1,residual=1,channels_last={int(layout is torch.channels_last)}"
    )
    tail = make_tail(problem)
    assert tail.residual is not None
    x, residual = tail.x.clone(), tail.residual.clone()
    y = backends.get("two_pass").run(problem, tail)
    assert torch.equal(tail.x, x)
    assert torch.equal(tail.residual, residual)
    assert y.stride() == reference(tail).stride()


@pytest.mark.interpreter
def test_a_float32_residual_beside_float16() -> None:
    problem = in_dtype(Problem.parse("n=2,h=5,w=4,c=16,k=24,padding=1,residual=1"), torch.float16, torch.float32)
    tail = make_tail(problem)
    y = backends.get("two_pass").run(problem, tail)
    assert y.dtype is torch.float32
    assert_within_bar(y, eager_error(problem), reference(tail.to(torch.float64)), "mixed")


@pytest.mark.interpreter
def test_nan_stays_nan() -> None:
    problem = Problem.parse("n=1,h=4,w=4,c=3,k=4,padding=1,residual=1,activation=relu6")
    tail = make_tail(problem)
    assert tail.residual is not None
    tail.residual[0, 1, 2, 3] = torch.nan
    assert backends.get("two_pass").run(problem, tail)[0, 1, 2, 3].isnan()


def test_without_a_gpu_it_says_what_it_needs() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    why_not = backends.get("two_pass").can_run(Problem.parse("h=4,w=4,c=3,k=4,padding=1"))
    assert why_not is not None
    assert why_not.startswith("two_pass: its second pass needs Triton (")


@pytest.mark.parametrize("text", ["residual=1", "residual=0", "proj=8x16x16x2", "residual=1,channels_last=0"])
def test_nothing_waits_for_the_device(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the pass, which is one launch, on tensors of a device that has no values: it can be captured."""
    bn_pass = pytest.importorskip("fused_resnet.kernels.bn_pass")
    passes: list[object] = []
    monkeypatch.setattr(bn_pass, "bn_add_act", lambda *arguments: passes.append(arguments))
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: contextlib.nullcontext())
    problem = Problem.parse(f"n=2,h=8,w=8,c=16,k=16,padding=1,dtype=float16,{text}")
    with FakeTensorMode() as mode:
        tail = on_fake_device(make_tail(problem), mode, "cuda")
        with Operators() as operators:
            y = backends.get("two_pass").run(dataclasses.replace(problem, device_type="cuda"), tail)
    assert len(passes) == 1
    assert y.device.type == "cuda"
    assert operators.devices == {"cuda"}
    assert not SYNCHRONISING.intersection(operators.names)


@pytest.mark.aot
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("projection", [False, True])
def test_it_compiles_without_spills_and_with_wide_loads(arch: int, projection: bool) -> None:
    """Ahead of time, from the same launch: 16-byte loads and stores, no local memory."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fused_resnet.kernels.arguments import BatchNorm
    from fused_resnet.kernels.bn_pass import Pass, bn_add_act_kernel

    half, vector, none = "*fp16", "*fp32", "constexpr"
    bn = BatchNorm(none, vector, vector, vector, vector, "fp32")
    signature = {
        "y_ptr": half, "second_ptr": half, "out_ptr": half, "bn": bn,
        "second_bn": bn if projection else none, "pixels": "i32", "spec": none,
    }  # fmt: skip
    constants: dict[object, object] = {(6,): Pass(64, 32, 64, "relu", "tensor", projection), (3, 0): None}
    constants |= {(4, 0): None} if projection else {(4,): None}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(bn_add_act_kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
    ptx = compiled.asm["ptx"]
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx
    assert ".local" not in ptx
