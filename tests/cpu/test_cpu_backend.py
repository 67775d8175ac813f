"""Backend ``cpu``: the numerical bar on every problem, memory formats, traps, threads, and the rule that chooses."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from torch import Tensor

from fused_resnet import backends, functional
from fused_resnet.backends import cpu, cpu_fused, cpu_rule
from fused_resnet.core import extensions
from fused_resnet.core.layout import output_memory_format
from fused_resnet.core.packed_weights import PackedWeights
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import TailArguments, reference
from fused_resnet.testing import (
    PROBLEMS,
    RESNET_TAILS,
    Case,
    assert_bitexact,
    call_arguments,
    check_tail,
    in_dtype,
    make_tail,
)

BACKEND = backends.get("cpu")
CASES = [case for case in PROBLEMS if case.problem.n]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAST, FIRST = torch.channels_last, torch.contiguous_format
needs_extension = pytest.mark.skipif(extensions.cpu() is None, reason=str(extensions.why_not_cpu()))


@pytest.fixture(params=["extension", "python"])
def install(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled extension, and as a pure-Python install."""
    if request.param == "extension" and extensions.cpu() is None:
        pytest.skip(str(extensions.why_not_cpu()))
    if request.param == "python":
        monkeypatch.setattr(cpu.extensions, "cpu", lambda: None)
    return request.param


def run(tail: TailArguments) -> Tensor:
    return BACKEND.run(Problem.from_tail(tail), tail)


def need(problem: Problem) -> Problem:
    """``problem``, where the backend has its dtype on this processor; else the test is skipped, saying why."""
    why_not = BACKEND.can_run(problem)
    if why_not is not None:
        pytest.skip(why_not)
    return problem


def any_order(problem: Problem, cached: bool, install: str) -> bool:
    """Whether oneDNN adds up the products: wherever there is no kernel of ours."""
    ours = cached and install == "extension" and problem.groups == 1 and problem.c >= cpu._LEAST_CHANNELS
    return not ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_numerical_bar(case: Case, dtype: torch.dtype, install: str) -> None:
    """2 x eager's error on random values, bit-exact on integers, with weights kept and not."""
    problem = need(in_dtype(case.problem, dtype))
    for cached in (False, True):
        check_tail(
            run, problem, packed_weights=PackedWeights() if cached else None, winograd="f2", label=f"cached={cached}",
            any_order=any_order(problem, cached, install),
        )  # fmt: skip


@pytest.mark.parametrize("tail", RESNET_TAILS, ids=[f"{t.network}.{t.stage}" for t in RESNET_TAILS])
def test_numerical_bar_on_the_real_tails(tail: object) -> None:
    """Every ResNet-18/50 tail as a model runs it; F(4x4) has a bound of its own, in test_cpu_kernels."""
    problem: Problem = tail.problem  # type: ignore[attr-defined]
    by_library = extensions.cpu() is None
    check_tail(run, problem, kinds=("random",), any_order=by_library, packed_weights=PackedWeights(), winograd="f2")


@needs_extension
@pytest.mark.parametrize(
    "text",
    ["n=1,h=4,w=4,c=128,k=256,stride=2,padding=1", "n=1,h=2,w=2,c=256,k=256,padding=1,residual=1",
     "n=1,h=2,w=2,c=256,k=512,stride=2,padding=1", "n=1,h=7,w=7,c=2048,k=512,r=1"],
)  # fmt: skip
def test_numerical_bar_on_deep_sums_over_tiny_images(text: str) -> None:
    """Where eager's kernels sum in blocks: one accumulator for all the products would be 4 times worse."""
    for seed in range(3):
        check_tail(
            run, Problem.parse(text), kinds=("random",), seed=seed, packed_weights=PackedWeights(), winograd="f2"
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wider_residual_widens_the_result(dtype: torch.dtype) -> None:
    for case in CASES:
        if case.name in ("odd", "1x1", "groups"):
            problem = in_dtype(case.problem, dtype, residual=torch.float32)
            if BACKEND.can_run(problem) is None:
                check_tail(run, problem, packed_weights=PackedWeights())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_format", [LAST, FIRST])
@pytest.mark.parametrize("weight_format", [LAST, FIRST])
@pytest.mark.parametrize("kind", ["3x3", "1x1", "groups", "stride2"])
def test_layouts_in_and_out(
    x_format: torch.memory_format, weight_format: torch.memory_format, dtype: torch.dtype, kind: str
) -> None:
    """Any layout of x, weight and residual gives the same values, in the memory format of eager's convolution."""
    text = {"3x3": "padding=1", "1x1": "r=1", "groups": "padding=1,groups=2", "stride2": "padding=1,stride=2"}[kind]
    problem = need(in_dtype(Problem.parse(f"n=2,h=9,w=8,c=32,k=32,residual=1,{text}"), dtype))
    tail = make_tail(problem, "integers")
    assert tail.residual is not None
    residuals = {
        "channels_last": tail.residual,
        "contiguous": tail.residual.contiguous(),
        "strided": torch.cat([tail.residual, tail.residual], 3)[..., : tail.residual.shape[3]],
        "expanded": tail.residual[:1, :, :1, :1].expand_as(tail.residual),
        "transposed": tail.residual.transpose(0, 2).contiguous().transpose(0, 2),
    }
    x = tail.x.contiguous(memory_format=x_format)
    conv = tail.conv._replace(weight=tail.conv.weight.contiguous(memory_format=weight_format))
    for cached in (False, True):
        for name, residual in residuals.items():
            case = tail._replace(
                x=x, conv=conv, residual=residual, packed_weights=PackedWeights() if cached else None, winograd="f2"
            )
            y, before = run(case), residual.clone()
            assert y.is_contiguous(memory_format=output_memory_format(x, conv.weight)), (name, y.stride())
            exact = reference(case.to(torch.float64))
            assert torch.equal(y, exact.to(dtype)), name
            assert torch.equal(residual, before)
            assert y.data_ptr() != residual.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_live_residual_is_never_written(dtype: torch.dtype, install: str) -> None:
    """In-place sums are how others got this wrong: residual, x and every weight keep every bit."""
    for text in (
        "n=1,h=8,w=8,c=16,k=16,padding=1",
        "n=1,h=8,w=8,c=32,k=32,r=1",
        "n=1,h=8,w=8,c=16,k=16,padding=1,groups=2",
    ):
        tail = make_tail(need(in_dtype(Problem.parse(text), dtype)), "random")
        for cached in (False, True):
            tail = tail._replace(residual=tail.x, packed_weights=PackedWeights() if cached else None)
            tensors = [tail.x, *(t for t in tail.conv if isinstance(t, Tensor))]
            before = [t.clone() for t in tensors]
            y = run(tail)
            z = run(tail._replace(residual=tail.x.clone()))
            assert torch.equal(y, z)
            assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["c=32,k=32,padding=1", "c=32,k=32,padding=1,stride=2", "c=32,k=64,r=1",
                                  "c=3,k=16,r=7,padding=3,stride=2", "c=32,k=32,padding=1,groups=4"])  # fmt: skip
@pytest.mark.parametrize("activation", ["relu", "relu6", "none"])
def test_nan_and_infinity_are_eagers(text: str, dtype: torch.dtype, activation: str, install: str) -> None:
    """With winograd="off". (oneDNN's fused ReLU would turn NaN into 0.)"""
    problem = need(in_dtype(Problem.parse(f"n=1,h=16,w=16,{text},activation={activation}"), dtype))
    tail = make_tail(problem, "random", winograd="off")
    for value in (torch.nan, torch.inf):
        x = tail.x.clone(memory_format=LAST)
        x[0, 1, 6, 7] = value
        for cached in (False, True):
            case = tail._replace(x=x, packed_weights=PackedWeights() if cached else None)
            y, expected = run(case), reference(case)
            assert torch.equal(y.isnan(), expected.isnan())
            assert torch.equal(y.isinf(), expected.isinf())


def test_python_threads_share_weights_and_get_right_answers() -> None:
    tails = [make_tail(Problem.parse(f"n=1,h={h},w=14,c=64,k=64,padding=1,residual=1"), seed=h) for h in range(10, 16)]
    conv = tails[0].conv
    tails = [tail._replace(conv=conv, packed_weights=PackedWeights(), winograd="f2") for tail in tails]
    expected = [run(tail) for tail in tails]
    kept = PackedWeights()
    tails = [tail._replace(packed_weights=kept) for tail in tails]
    wrong: list[int] = []
    barrier = threading.Barrier(len(tails))

    def work(i: int) -> None:
        barrier.wait()
        for round_ in range(20):
            j = (i + round_) % len(tails)
            if not torch.equal(run(tails[j]), expected[j]):
                wrong.append(j)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(tails))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("threads", [1, 2])
def test_set_num_threads_is_respected_and_changes_nothing(threads: int) -> None:
    before = torch.get_num_threads()
    tail = make_tail(Problem.parse("n=2,h=28,w=28,c=64,k=64,padding=1,residual=1"), packed_weights=PackedWeights())
    expected = run(tail)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(run(tail), expected)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_the_functional_form_and_gradients_through_kept_weights() -> None:
    tail = make_tail(Problem.parse("n=1,h=12,w=12,c=32,k=32,padding=1,residual=1"))
    tail.x.requires_grad_()
    tail.conv.weight.requires_grad_()
    grads = []
    for backend in ("cpu", "eager"):
        y = functional.conv_bn_add_relu(
            **call_arguments(tail), backend=backend, packed_weights=PackedWeights(), winograd="f2"
        )
        grads.append(torch.autograd.grad(y.square().sum(), [tail.x, tail.conv.weight]))
    for ours, eager in zip(*grads, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("dtype=float64", "cpu: dtype must be float32, bfloat16 or float16, got float64"),
        ("device=cuda", "cpu: device must be cpu, got cuda"),
    ],
)
def test_refusals(text: str, sentence: str) -> None:
    assert BACKEND.can_run(Problem.parse(f"h=8,w=8,c=16,k=16,padding=1,{text}")) == sentence


@needs_extension
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_type_that_onednn_lacks_is_computed_in_float32(
    dtype: torch.dtype, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And rounded once; the float32 copy of a weight is kept with its packed ones."""
    monkeypatch.setattr(cpu, "_onednn_has", lambda _: False)
    monkeypatch.setattr(cpu, "why_not_bf16", lambda: "a reason")
    problem = in_dtype(Problem.parse("n=2,h=9,w=8,c=32,k=32,padding=1,proj=16x2"), dtype)
    weights = PackedWeights() if kept else None
    check_tail(run, problem, packed_weights=weights, winograd="f2")
    tail = make_tail(problem, "integers", packed_weights=weights, winograd="f2")
    assert tail.proj is not None
    for weight in (tail.conv.weight, tail.proj.weight):
        for _ in range(2):
            assert_bitexact(run(tail), reference(tail.to(torch.float64)), "as it is now")
        weight.data[1] = 2.0
    if weights is not None:
        assert weights.cast(tail.conv.weight, torch.float32) is weights.cast(tail.conv.weight, torch.float32)


@pytest.mark.parametrize(
    ("text", "algorithm"),
    [
        ("n=1,h=56,w=56,c=64,k=64", (4, "whole")),
        ("n=1,h=28,w=28,c=128,k=128", (4, "whole")),
        ("n=1,h=14,w=14,c=256,k=256", (4, "fresh")),
        ("n=8,h=14,w=14,c=256,k=256", (4, "whole")),
        ("n=1,h=7,w=7,c=512,k=512", (2, "fresh")),
        ("n=8,h=7,w=7,c=512,k=512", (4, "fresh")),
        ("n=64,h=7,w=7,c=512,k=512", (4, "whole")),
        ("n=1,h=2,w=2,c=512,k=512", (0, "whole")),
        ("n=64,h=1,w=1,c=64,k=64", (0, "whole")),
        ("n=1,h=32,w=32,c=1,k=64", (0, "whole")),
        ("n=1,h=56,w=56,c=64,k=128,stride=2", (0, "whole")),
    ],
)
def test_the_rule_that_chooses(text: str, algorithm: tuple[int, str]) -> None:
    problem = Problem.parse(text + ",padding=1")
    assert cpu_rule.fastest(problem, tiles=False) == algorithm
    assert cpu_rule.fastest(problem, "f2", tiles=False).m != 4


@pytest.mark.parametrize(
    ("text", "algorithm"),
    [
        ("n=1,h=56,w=56,c=64,k=64", (4, "bf16x3")),
        ("n=1,h=28,w=28,c=128,k=128", (4, "whole")),
        ("n=8,h=56,w=56,c=64,k=64", (4, "bf16x3")),
        ("n=8,h=28,w=28,c=128,k=128", (4, "whole")),  # in bf16x3 they do not stay in the cache
        ("n=1,h=14,w=14,c=256,k=256", (0, "bf16x3")),
        ("n=8,h=14,w=14,c=256,k=256", (0, "bf16x3")),
        ("n=1,h=7,w=7,c=512,k=512", (0, "fresh bf16x3")),  # its weights come from memory
        ("n=8,h=7,w=7,c=512,k=512", (0, "bf16x3")),
        ("n=1,h=56,w=56,c=64,k=128,stride=2", (0, "bf16x3")),
        ("n=1,h=14,w=14,c=512,k=512,stride=2", (0, "fresh bf16x3")),
        ("n=1,h=56,w=56,c=64,k=256,r=1,padding=0", (0, "bf16x3")),
        ("n=1,h=7,w=7,c=512,k=2048,r=1,padding=0", (0, "fresh bf16x3")),
        ("n=1,h=32,w=32,c=1,k=64", (0, "whole")),  # a chunk of 32 channels would be empty but for one
    ],
)
def test_the_rule_with_matrix_tiles(text: str, algorithm: tuple[int, str]) -> None:
    problem = Problem.parse(text if "padding" in text else text + ",padding=1")
    assert cpu_rule.fastest(problem, tiles=True) == algorithm
    assert cpu_rule.fastest(problem, "f2", tiles=True).m != 4
    assert cpu_rule.fastest(problem, "off", tiles=True) == cpu_rule.DIRECT


@pytest.mark.parametrize(("choice", "m"), [("auto", 4), ("f2", 2), ("off", 0)])
def test_winograd_is_the_callers_choice(choice: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if extensions.cpu() is None:
        pytest.skip(str(extensions.why_not_cpu()))
    problem = Problem.parse("n=1,h=28,w=28,c=64,k=64,padding=1")
    monkeypatch.setattr(cpu_rule, "has_tiles", lambda: False)  # on which direct convolution may be faster
    used: list[int] = []
    operands = cpu_fused._operands
    monkeypatch.setattr(cpu_fused, "_operands", lambda conv, how, kept: used.append(how.m) or operands(conv, how, kept))
    run(make_tail(problem, winograd=choice, packed_weights=PackedWeights()))
    monkeypatch.setenv("FUSED_RESNET_WINOGRAD", choice)
    run(make_tail(problem, packed_weights=PackedWeights()))
    assert used == [m, m]
    used.clear()
    run(make_tail(problem, winograd=choice, packed_weights=None))
    assert not used, "weights that may not be kept are not transformed"


def test_other_strides_of_the_same_memory_are_noticed() -> None:
    problem = Problem.parse("n=1,h=9,w=9,c=32,k=32,padding=1,residual=1")
    tail = make_tail(problem, "integers", packed_weights=PackedWeights(), winograd="f2")
    tail.conv.weight.zero_()
    for _ in range(3):
        run(tail)
    tail.conv.weight.data = tail.conv.weight.data.transpose(0, 1)
    for written in (torch.tensor(0.0), torch.randint(-3, 4, (32, 3, 3)).float()):
        tail.conv.weight.data[3] = written
        assert_bitexact(run(tail), reference(tail.to(torch.float64)), "transposed")


@needs_extension
def test_changes_of_batch_and_size_reuse_the_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_rule, "has_tiles", lambda: False)  # where the small ones would be direct
    tail = make_tail(Problem.parse("n=1,h=28,w=28,c=64,k=64,padding=1"), packed_weights=PackedWeights())
    for n, h in ((1, 28), (2, 20), (4, 17)):
        run(tail._replace(x=torch.randn(n, 64, h, h)))
    assert tail.packed_weights is not None
    assert tail.packed_weights.nbytes == 36 * 64 * 64 * 4


def test_projection_in_one_call_equals_two() -> None:
    problem = Problem.parse("n=2,h=9,w=9,c=24,k=32,padding=1,proj=16x17x17x2")
    for dtype in DTYPES:
        if BACKEND.can_run(dataclasses.replace(problem, dtype=dtype)) is not None:
            continue
        if dtype.itemsize == 2 and not cpu._onednn_has(dtype) and not cpu._have_kernels(dtype):
            continue  # in float32 as a whole: the projection is not rounded in between
        tail = make_tail(dataclasses.replace(problem, dtype=dtype), packed_weights=PackedWeights(), winograd="f2")
        assert tail.proj is not None
        assert tail.proj_x is not None
        shortcut = TailArguments(
            tail.proj_x, tail.proj, stride=tail.proj_stride, activation="none", packed_weights=PackedWeights()
        )
        two = run(tail._replace(proj=None, proj_x=None, residual=run(shortcut)))
        assert torch.equal(run(tail), two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "text",
    [
        "n=1,h=9,w=1,c=16,k=16,r=5,s=5,stride=1:2,padding=0:2,residual=1",
        "n=2,h=9,w=4,c=16,k=16,stride=1:2,residual=1,activation=none",
        "n=1,h=9,w=2,c=1,k=1,r=5,s=5,stride=2,padding=2,bn=0",
    ],
)
def test_one_column_of_output_under_a_stride(text: str, dtype: torch.dtype) -> None:
    """oneDNN 3.12 with AMX gives wrong values there, for torch's own conv2d too."""
    problem = need(in_dtype(Problem.parse(text), dtype))
    for cached in (False, True):
        check_tail(run, problem, kinds=("integers",), packed_weights=PackedWeights() if cached else None)
