"""The C++ kernels of bfloat16 activations: one rounding, at the store, on every instruction set that has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_resnet import backends, functional
from fused_resnet.backends import cpu_rule
from fused_resnet.backends.cpu_fused import ACTIVATION_CODES, FewChannels, FusedConvolution
from fused_resnet.backends.cpu_rule import BF16_DIRECT, Algorithm
from fused_resnet.core import extensions
from fused_resnet.core.packed_weights import PackedWeights
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import ACTIVATIONS, TailArguments, reference
from fused_resnet.testing import PROBLEMS, assert_bitexact, assert_within_bar, call_arguments, in_dtype, make_tail
from tests.cpu.test_cpu_kernels import name_of
from tests.cpu.test_cpu_stem import STEMS
from tests.support.conv_problems import DIRECT_PROBLEMS, REAL, WINOGRAD_PROBLEMS, assert_threads_change_nothing
from tests.support.instruction_sets import BF16, need

if extensions.cpu() is None:
    pytest.skip(str(extensions.why_not_cpu()), allow_module_level=True)

OPS = torch.ops.fused_resnet_C
F2 = [Algorithm(2), Algorithm(2, "fresh")]
F4 = [Algorithm(4), Algorithm(4, "fresh")]
EXACT = [BF16_DIRECT, *F2]
ALGORITHMS = [*EXACT, *F4]
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=name_of)
#: Chunks of 32 channels, of one and two channels beyond them, and fewer than one.
DEPTHS = [f"n=1,h=6,w=7,c={c},k=35,r={r},padding={r // 2},residual=1" for c in (31, 32, 33, 64, 65, 96) for r in (1, 3)]


@pytest.fixture(params=BF16)
def isa(request: pytest.FixtureRequest) -> str:
    return need(request.param)


def best() -> str:
    """The best instruction set here that has products of bfloat16."""
    there = extensions.cpu().build_info()["cpu_isas"]  # type: ignore[union-attr]
    return next(isa for isa in BF16 if isa in there)


def tail_of(text: str, kind: str = "random") -> TailArguments:
    return make_tail(in_dtype(Problem.parse(text), torch.bfloat16), kind)  # type: ignore[arg-type]


def run(tail: TailArguments, algorithm: Algorithm, isa: str = "") -> Tensor:
    conv, (m, weights), isa = tail.conv, algorithm, isa or best()
    packed = OPS.conv_pack(conv.weight.float(), m, isa, weights)
    return OPS.conv_fused(
        tail.x, packed, [conv.weight.shape[0], *conv.weight.shape[2:]], m, isa, tail.stride, tail.padding,
        tail.dilation, *conv[1:], tail.residual, ACTIVATION_CODES[tail.activation], weights,
    )  # fmt: skip


@pytest.mark.parametrize("text", [*DIRECT_PROBLEMS, *DEPTHS])
def test_direct_rounds_once(text: str, isa: str) -> None:
    tail = tail_of(text, "integers")
    assert_bitexact(run(tail, BF16_DIRECT, isa), reference(tail.to(torch.float64)), text)


@pytest.mark.parametrize("algorithm", F2, ids=name_of)
@pytest.mark.parametrize("text", WINOGRAD_PROBLEMS)
def test_f2_rounds_once(text: str, algorithm: Algorithm, isa: str) -> None:
    tail = tail_of(text, "integers")
    assert_bitexact(run(tail, algorithm, isa), reference(tail.to(torch.float64)), text)


@algorithms
@pytest.mark.parametrize("text", [*WINOGRAD_PROBLEMS, *REAL])
def test_the_bar(text: str, algorithm: Algorithm) -> None:
    """F(4x4) too: what it rounds in float32 is far below the rounding of the output."""
    tail = tail_of(text)
    exact = reference(tail.to(torch.float64))
    eager = float((reference(tail).double() - exact).abs().max())
    y = run(tail, algorithm)
    assert_within_bar(y, eager, exact, text)
    differ = y != exact.to(torch.bfloat16)  # by its last bit, where the exact value is near the middle of two
    assert float(differ.double().mean()) < 0.01


@algorithms
def test_nan_and_infinity(algorithm: Algorithm, isa: str) -> None:
    """As eager has them; but in F(4x4) they spread, and an infinity may become NaN in Winograd."""
    tail = tail_of("n=1,h=13,w=12,c=40,k=40,padding=1,residual=1,activation=none")
    for value in (torch.nan, torch.inf):
        x = tail.x.clone(memory_format=torch.channels_last)
        x[0, 31, 5, 6] = value
        y, expected = run(tail._replace(x=x), algorithm, isa), reference(tail._replace(x=x))
        assert not bool(y[~expected.isfinite()].isfinite().any())
        if algorithm.m != 4:
            assert torch.equal(y.isfinite(), expected.isfinite())
        if algorithm.m == 0:
            assert torch.equal(y.isnan(), expected.isnan())


@algorithms
def test_the_activation_keeps_nan_and_negative_zero(algorithm: Algorithm, isa: str) -> None:
    tail = tail_of("n=2,h=9,w=11,c=20,k=21,padding=1,residual=1,activation=none")
    assert tail.conv.bn_weight is not None
    assert tail.conv.bn_bias is not None
    assert tail.conv.running_mean is not None
    assert tail.residual is not None
    tail.conv.weight[::3] = 0
    tail.conv.bn_weight[:] = -tail.conv.bn_weight.abs() * 8
    tail.conv.bn_bias[::3] = -0.0
    tail.conv.running_mean[::3] = 0
    tail.residual[:, ::3] = -0.0
    tail.x[1, 2, 3, 4] = torch.nan
    before = run(tail, algorithm, isa)
    for kind in ((before == 0) & before.signbit(), before.isnan(), before < 0, before > 6):
        assert bool(kind.any())
    for name in ("relu", "relu6"):
        after, expected = run(tail._replace(activation=name), algorithm, isa), ACTIVATIONS[name](before)
        assert torch.equal(after.isnan(), expected.isnan())
        there = ~expected.isnan()
        assert torch.equal(after[there].view(torch.int16), expected[there].view(torch.int16))


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("text", "pool"), STEMS, ids=[text for text, _ in STEMS])
def test_a_stem_is_kernel_and_pool_to_the_bit(
    text: str, pool: tuple[object, object, object], threads: int, activation: str, isa: str
) -> None:
    tail = tail_of(text)._replace(activation=activation)
    tail.x[0, 0, 3, 3] = torch.nan
    conv = tail.conv
    packed = OPS.conv_pack(conv.weight.float(), 0, isa, "bf16")
    sizes = [n for pair in pool for n in (pair if isinstance(pair, tuple) else (pair, pair))]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pooled = OPS.conv_max_pool(
            tail.x, packed, [conv.weight.shape[0], *conv.weight.shape[2:]], isa, tail.stride, tail.padding,
            tail.dilation, *conv[1:], ACTIVATION_CODES[activation], sizes, "bf16",
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    expected = torch.nn.functional.max_pool2d(run(tail, BF16_DIRECT, isa), *pool)
    assert pooled.dtype is torch.bfloat16
    assert torch.equal(pooled.isnan(), expected.isnan())
    assert torch.equal(pooled.nan_to_num(), expected.nan_to_num())
    assert not bool((pooled.signbit() & (pooled == 0)).any()) or activation == "none"


@algorithms
def test_threads_do_not_change_a_bit(algorithm: Algorithm) -> None:
    tails = [tail_of(text) for text in (REAL[3], DIRECT_PROBLEMS[6], DIRECT_PROBLEMS[2])]
    assert_threads_change_nothing(lambda: [run(tail, algorithm) for tail in tails])


def test_x_may_begin_at_any_address() -> None:
    for text in (DIRECT_PROBLEMS[3], DIRECT_PROBLEMS[12], DIRECT_PROBLEMS[14], DEPTHS[1]):
        tail = tail_of(text, "integers")
        odd = torch.zeros(tail.x.numel() + 1, dtype=torch.bfloat16)[1:].view(tail.x.permute(0, 2, 3, 1).shape)
        odd.copy_(tail.x.permute(0, 2, 3, 1))
        x = odd.permute(0, 3, 1, 2)
        assert x.data_ptr() % 4 == 2
        assert torch.equal(run(tail._replace(x=x), BF16_DIRECT), run(tail, BF16_DIRECT)), text


@pytest.mark.parametrize(
    ("weights", "residual", "message"),
    [
        ("whole", torch.bfloat16, 'weights: expected a kind that this kernel has, got "whole" for m = 0 and bfloat16'),
        ("bf16x3", torch.bfloat16, "weights: expected a kind that this kernel has"),
        ("bf16", torch.float32, "residual: expected the dtype of x"),
    ],
)
def test_refusals(weights: str, residual: torch.dtype, message: str) -> None:
    tail = tail_of("n=1,h=4,w=4,c=8,k=8,padding=1,residual=1")
    assert tail.residual is not None
    packed = OPS.conv_pack(tail.conv.weight.float(), 0, best(), "bf16")
    with pytest.raises((RuntimeError, ValueError), match=message):
        OPS.conv_fused(
            tail.x, packed, [8, 3, 3], 0, best(), (1, 1), (1, 1), (1, 1), *tail.conv[1:], tail.residual.to(residual),
            1, weights,
        )  # fmt: skip


def test_float32_has_no_kernel_for_bfloat16_weights() -> None:
    tail = make_tail(Problem.parse("n=1,h=4,w=4,c=8,k=8,padding=1"))
    packed = OPS.conv_pack(tail.conv.weight, 0, best(), "bf16")
    with pytest.raises((RuntimeError, ValueError), match="a kind that this kernel has"):
        OPS.conv_fused(tail.x, packed, [8, 3, 3], 0, best(), (1, 1), (1, 1), (1, 1), *tail.conv[1:], None, 1, "bf16")


# ---- the backend and its rule ---------------------------------------------------------------------------------

CASES = [case.problem for case in PROBLEMS if case.problem.n and case.problem.groups == 1]


def test_which_processors_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with AVX512_BF16 and no matrix tiles; elsewhere there is a reason, and oneDNN."""
    backend = backends.get("cpu")
    for reason in (None, "a reason"):
        monkeypatch.setattr("fused_resnet.backends.cpu.why_not_bf16", lambda reason=reason: reason)
        for problem in CASES:
            tail = make_tail(in_dtype(problem, torch.bfloat16), packed_weights=PackedWeights())
            runner = backend.bind(Problem.from_tail(tail), tail)
            assert isinstance(runner, (FusedConvolution, FewChannels)) == (reason is None)
            if isinstance(runner, FusedConvolution):
                assert runner.algorithm.weights in ("bf16", "whole", "fresh")
                assert runner.algorithm.m or runner.algorithm == BF16_DIRECT
                assert problem.projection is None or runner.projection == BF16_DIRECT


@pytest.mark.parametrize("isa", ["amx", "avx512_bf16", "avx512", "avx2", "portable"])
def test_the_reason_names_the_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Extension:
        @staticmethod
        def build_info() -> dict[str, str]:
            return {"cpu_isa": isa}

    monkeypatch.setattr(extensions, "cpu", Extension)
    cpu_rule.why_not_bf16.cache_clear()
    try:
        why_not = cpu_rule.why_not_bf16()
    finally:
        cpu_rule.why_not_bf16.cache_clear()
    assert (why_not is None) == (isa == "avx512_bf16")
    assert why_not is None or (isa in why_not or "matrix tiles" in why_not)


@pytest.mark.parametrize(
    ("text", "algorithm"),
    [
        ("n=1,h=56,w=56,c=64,k=64,padding=1", (4, "whole")),
        ("n=1,h=28,w=28,c=128,k=128,padding=1", (4, "whole")),
        ("n=1,h=7,w=7,c=512,k=512,padding=1", (0, "bf16")),
        ("n=1,h=56,w=56,c=64,k=128,stride=2,padding=1", (0, "bf16")),
        ("n=1,h=56,w=56,c=64,k=256,r=1", (0, "bf16")),
    ],
)
def test_the_rule(text: str, algorithm: tuple[int, str]) -> None:
    problem = in_dtype(Problem.parse(text), torch.bfloat16)
    for tiles in (False, True):
        assert cpu_rule.fastest(problem, tiles=tiles) == algorithm
        assert cpu_rule.fastest(problem, "off", tiles=tiles) == BF16_DIRECT
        assert cpu_rule.fastest(problem, "f2", tiles=tiles).m != 4


# ---- autocast -------------------------------------------------------------------------------------------------


def autocast(tail: TailArguments, kept: PackedWeights) -> Tensor:
    call = functional.conv_bn_add_relu if tail.proj is None else functional.conv_bn_proj_add_relu
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return call(**call_arguments(tail), packed_weights=kept)


@pytest.mark.parametrize("text", ["c=20,k=24,padding=1,residual=1", "c=40,k=40,padding=1,proj=16x2"])
def test_autocast_keeps_the_casts_of_weights_that_do_not_change(text: str) -> None:
    tail, kept = make_tail(Problem.parse(f"n=2,h=9,w=8,{text}"), "integers"), PackedWeights()
    for _ in range(2):
        y = autocast(tail, kept)
        assert_bitexact(y, reference(tail.to(torch.float64)), text)
        assert y.dtype is torch.bfloat16
    first = kept.cast(tail.conv.weight, torch.bfloat16)
    assert kept.cast(tail.conv.weight, torch.bfloat16) is first
    bytes_kept = kept.nbytes
    for convolution in (tail.conv, tail.proj):
        if convolution is None:
            continue
        convolution.weight.data[1] = 2.0
        assert_bitexact(autocast(tail, kept), reference(tail.to(torch.float64)), "written through .data")
        convolution.weight.numpy()[2] = 1.0
        assert_bitexact(autocast(tail, kept), reference(tail.to(torch.float64)), "written through NumPy")
    assert kept.cast(tail.conv.weight, torch.bfloat16) is not first
    assert bytes_kept > 0
    for _ in range(200):  # copies of casts that are no more are forgotten
        autocast(tail, kept)
    assert kept.nbytes <= 2 * bytes_kept
    kept.clear()
    assert kept.nbytes == 0


def test_autocast_with_gradients_casts_in_each_call() -> None:
    tail, kept = make_tail(Problem.parse("n=1,h=6,w=6,c=8,k=8,padding=1")), PackedWeights()
    tail.conv.weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.conv_bn_add_relu(**call_arguments(tail), packed_weights=kept)
    y.float().sum().backward()
    assert tail.conv.weight.grad is not None
    assert tail.conv.weight.grad.dtype is torch.float32
    assert kept.nbytes == 0
