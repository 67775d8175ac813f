"""The C++ convolution kernels themselves, for every instruction set that this processor has."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet.backends.cpu_rule import BF16X3_DIRECT, DIRECT, FRESH_BF16X3_DIRECT, Algorithm, has_tiles
from fused_resnet.core import extensions
from fused_resnet.core.reference import ConvBN, TailArguments, reference
from fused_resnet.testing import assert_bitexact, assert_within_bar, make_tail
from fused_resnet.testing.problems import Problem
from fused_resnet.testing.tolerances import WINOGRAD_F4_RMS_FACTOR
from tests.support.conv_problems import DIRECT_PROBLEMS, REAL, WINOGRAD_PROBLEMS, assert_threads_change_nothing
from tests.support.instruction_sets import ALL, TILES, need

if extensions.cpu() is None:
    pytest.skip(str(extensions.why_not_cpu()), allow_module_level=True)

OPS = torch.ops.fused_resnet_C
CODES = {"none": 0, "relu": 1, "relu6": 2}
F2 = [Algorithm(2), Algorithm(2, "fresh"), Algorithm(2, "bf16x3")]
F4 = [Algorithm(4), Algorithm(4, "fresh"), Algorithm(4, "bf16x3")]
BF16X3 = [BF16X3_DIRECT, FRESH_BF16X3_DIRECT]
EXACT = [DIRECT, *BF16X3, *F2]
ALGORITHMS = [*EXACT, *F4]


def name_of(value: object) -> str | None:
    """An algorithm's name in test ids."""
    if not isinstance(value, Algorithm):
        return None
    return f"{f'f{value.m}' if value.m else 'direct'}-{value.weights}"


algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=name_of)


@pytest.fixture(params=ALL)
def isa(request: pytest.FixtureRequest) -> str:
    return need(request.param)


def run(tail: TailArguments, algorithm: Algorithm, isa: str = "") -> Tensor:
    """The kernel's result; on matrix tiles in plain C++ where the processor has none and ``isa`` names none."""
    conv, (m, weights) = tail.conv, algorithm
    if "bf16x3" in weights and isa not in TILES:
        if isa:
            pytest.skip(f"{isa} has no matrix tiles")
        isa = "amx" if has_tiles() else "portable"
    packed = OPS.conv_pack(conv.weight, m, isa, weights)
    x = tail.x if tail.x.stride(1) == 1 else tail.x.contiguous(memory_format=torch.channels_last)
    return OPS.conv_fused(
        x, packed, [conv.weight.shape[0], *conv.weight.shape[2:]], m, isa, tail.stride, tail.padding, tail.dilation,
        *conv[1:], tail.residual, CODES[tail.activation], weights,
    )  # fmt: skip


def problem(text: str) -> Problem:
    return Problem.parse(text)


@pytest.mark.parametrize("algorithm", F2, ids=name_of)
@pytest.mark.parametrize("text", WINOGRAD_PROBLEMS)
def test_f2_is_bit_exact_on_integers(text: str, algorithm: Algorithm, isa: str) -> None:
    tail = make_tail(problem(text), "integers")
    assert_bitexact(run(tail, algorithm, isa), reference(tail.to(torch.float64)), text)


@pytest.mark.parametrize("algorithm", [DIRECT, *BF16X3], ids=name_of)
@pytest.mark.parametrize("text", DIRECT_PROBLEMS)
def test_direct_is_bit_exact_on_integers(text: str, algorithm: Algorithm, isa: str) -> None:
    tail = make_tail(problem(text), "integers")
    assert_bitexact(run(tail, algorithm, isa), reference(tail.to(torch.float64)), text)


def test_large_weights_lie_in_pages_of_their_own() -> None:
    huge_page = 2 << 20
    packed = OPS.conv_pack(torch.randn(256, 256, 3, 3), 0, "")
    assert packed.data_ptr() % huge_page == 0
    assert packed.untyped_storage().nbytes() >= packed.nbytes + packed.data_ptr() - packed.untyped_storage().data_ptr()
    small = OPS.conv_pack(torch.randn(32, 32, 3, 3), 0, "")
    assert small.untyped_storage().nbytes() == small.nbytes


@pytest.mark.parametrize("algorithm", BF16X3, ids=name_of)
@pytest.mark.parametrize("isa", TILES)
def test_bf16x3_products_have_all_their_bits(algorithm: Algorithm, isa: str) -> None:
    """One product per output, of factors with 12 bits each: exact only with all six products of parts."""
    need(isa)
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(2**11, 2**12, shape, generator=g).float() for shape in ((1, 1, 6, 7), (40, 1, 1, 1)))
    tail = TailArguments(x.contiguous(memory_format=torch.channels_last), ConvBN(weight), activation="none")
    assert torch.equal(run(tail, algorithm, isa), x * weight.view(1, 40, 1, 1))
    # 24 bits against 1: all three parts of either factor
    for factors in ((x * 4096 + x.flip(2), weight.sign()), (x.sign(), weight * 4096 + weight.flip(0))):
        x24, weight24 = factors
        tail = TailArguments(x24.contiguous(memory_format=torch.channels_last), ConvBN(weight24), activation="none")
        assert torch.equal(run(tail, algorithm, isa), x24 * weight24.view(1, 40, 1, 1))


def errors(tail: TailArguments, y: Tensor) -> tuple[float, float, Tensor]:
    """Root mean square error of ``y``, of eager, and the exact result."""
    exact = reference(tail.to(torch.float64))
    rms = [float((t.double() - exact).pow(2).mean().sqrt()) for t in (y, reference(tail))]
    return rms[0], rms[1], exact


@pytest.mark.parametrize("algorithm", F4, ids=name_of)
@pytest.mark.parametrize("text", WINOGRAD_PROBLEMS)
def test_f4_finds_every_index(text: str, algorithm: Algorithm, isa: str) -> None:
    """F(4x4) rounds, so it cannot be bit-exact; an index that is wrong is wrong by a thousand times more."""
    tail = make_tail(problem(text), "random")
    exact = reference(tail.to(torch.float64))
    torch.testing.assert_close(run(tail, algorithm, isa).double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("text", REAL)
def test_errors_at_real_sizes(text: str) -> None:
    tail = make_tail(problem(text), "random")
    for algorithm in ALGORITHMS:
        y = run(tail, algorithm)
        rms, eager, exact = errors(tail, y)
        if algorithm.m == 4:
            assert rms <= WINOGRAD_F4_RMS_FACTOR * eager
        else:
            eager_error = float((reference(tail).double() - exact).abs().max())
            assert_within_bar(y, eager_error, exact, f"{algorithm} {text}")
        if algorithm.m == 2:
            assert rms <= eager, "F(2x2) adds fewer terms and should be more accurate than direct convolution"


@algorithms
def test_residual_may_be_x_itself(algorithm: Algorithm) -> None:
    tail = make_tail(problem("n=1,h=9,w=9,c=32,k=32,padding=1"), "random")
    tail = tail._replace(residual=tail.x)
    twin = tail._replace(residual=tail.x.clone())
    before = tail.x.clone()
    assert torch.equal(run(tail, algorithm), run(twin, algorithm))
    assert torch.equal(tail.x, before)


@pytest.mark.parametrize("algorithm", [*F2, *F4], ids=name_of)
def test_strided_and_expanded_operands(algorithm: Algorithm) -> None:
    kind = "integers" if algorithm.m == 2 else "random"
    tail = make_tail(problem("n=2,h=9,w=7,c=20,k=24,padding=1,residual=1"), kind)
    assert tail.residual is not None
    wide = torch.randn(2, 9, 14, 40).permute(0, 3, 1, 2)[:, :20, :, ::2]  # every stride is larger than dense
    wide = wide.copy_(tail.x)
    assert not wide.is_contiguous(memory_format=torch.channels_last)
    expanded = tail.residual[:1, :, :1, :].expand(2, 24, 9, 7)
    strided = tail._replace(x=wide, residual=expanded)
    dense = tail._replace(residual=expanded.contiguous(memory_format=torch.channels_last))
    assert torch.equal(run(strided, algorithm), run(dense, algorithm))


@algorithms
def test_threads_do_not_change_a_bit(algorithm: Algorithm) -> None:
    tails = [make_tail(problem(text), "random") for text in (REAL[3], DIRECT_PROBLEMS[6], DIRECT_PROBLEMS[2])]
    assert_threads_change_nothing(lambda: [run(tail, algorithm) for tail in tails])


def with_pixel(value: float, where: tuple[int, ...] = (0, 2, 6, 6)) -> TailArguments:
    tail = make_tail(problem("n=1,h=16,w=16,c=32,k=32,padding=1,residual=1,activation=relu"), "random")
    x = tail.x.clone(memory_format=torch.channels_last)
    x[where] = value
    return tail._replace(x=x)


@pytest.mark.parametrize("algorithm", EXACT, ids=name_of)
@pytest.mark.parametrize("where", [(0, 2, 6, 6), (0, 0, 0, 0), (0, 31, 15, 7), (0, 5, 8, 9)])
def test_nan_is_exactly_eagers_but_for_f4(algorithm: Algorithm, where: tuple[int, ...]) -> None:
    tail = with_pixel(torch.nan, where)
    assert torch.equal(run(tail, algorithm).isnan(), reference(tail).isnan())


@pytest.mark.parametrize("algorithm", F4, ids=name_of)
def test_nan_in_f4_spreads_within_its_tiles(algorithm: Algorithm) -> None:
    tail = with_pixel(torch.nan, (0, 2, 5, 5))  # inside tile (1, 1) alone: its inputs are rows and columns 3 to 8
    got, expected = run(tail, algorithm).isnan(), reference(tail).isnan()
    assert bool((got | ~expected).all()), "no NaN may be lost"
    assert bool(got[:, :, 4:8, 4:8].all())
    got[:, :, 4:8, 4:8] = False
    assert not bool(got.any())


def test_nan_in_residual_weight_and_bn_reaches_the_output() -> None:
    tail = with_pixel(0.5)
    assert tail.residual is not None
    assert tail.conv.bn_bias is not None
    residual, weight, beta = tail.residual.clone(), tail.conv.weight.clone(), tail.conv.bn_bias.clone()
    residual[0, 3, 2, 2] = torch.nan
    weight[5, 1, 1, 1] = torch.nan
    beta[7] = torch.nan
    for m in ALGORITHMS:
        assert bool(run(tail._replace(residual=residual), m)[0, 3, 2, 2].isnan())
        assert bool(run(tail._replace(conv=tail.conv._replace(weight=weight)), m)[0, 5].isnan().all())
        assert bool(run(tail._replace(conv=tail.conv._replace(bn_bias=beta)), m)[0, 7].isnan().all())


def test_infinity_is_exact_in_direct_and_never_finite_in_winograd() -> None:
    tail = with_pixel(torch.inf)
    expected = reference(tail)
    assert torch.equal(run(tail, DIRECT).isinf(), expected.isinf())
    for algorithm in BF16X3:  # NaN in every output that has part in it
        assert torch.equal(run(tail, algorithm).isnan(), reference(with_pixel(torch.nan)).isnan())
    for algorithm in (*F2, *F4):  # infinity minus infinity: NaN
        assert not bool(run(tail, algorithm)[expected.isinf()].isfinite().any())
    for algorithm in F2:
        f2 = run(tail, algorithm)
        assert bool(f2[expected == 0].eq(0).all()) or bool(f2[expected == 0].isnan().any())


def test_an_outlier_leaks_into_its_tile_in_f4_only() -> None:
    """The documented figures: 1e4 in the input costs neighbours about 1e-2 with F(4x4) and nothing with F(2x2)."""
    clean, dirty = with_pixel(0.5), with_pixel(1e4)
    touched = (reference(clean) != reference(dirty)).any(dim=1, keepdim=True).expand(1, 32, 16, 16)

    def leak(algorithm: Algorithm) -> float:
        return float((run(dirty, algorithm) - run(clean, algorithm)).abs()[~touched].max())

    for algorithm in EXACT:
        assert leak(algorithm) == 0
    for algorithm in F4:
        assert 1e-4 < leak(algorithm) < 1e-1


@pytest.mark.skipif(not has_tiles(), reason="this processor has no matrix tiles")
def test_onednn_finds_the_matrix_tiles_as_it_left_them() -> None:
    """oneDNN computes bfloat16 on the same tiles, and in the same threads."""
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=g).bfloat16() for shape in ((2, 64, 14, 14), (64, 64, 3, 3)))
    tail = make_tail(problem("n=2,h=14,w=14,c=64,k=64,padding=1,residual=1"), "random")
    bfloat16, ours = torch.conv2d(x, weight, padding=1), run(tail, BF16X3_DIRECT)
    for _ in range(3):
        assert torch.equal(torch.conv2d(x, weight, padding=1), bfloat16)
        assert torch.equal(run(tail, BF16X3_DIRECT), ours)


def with_environment(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import torch; from fused_resnet.core import extensions; {code}"],
        env=os.environ | {"FUSED_RESNET_CPU_ISA": isa}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_environment_names_the_best_instruction_set(isa: str) -> None:
    """All better ones are hidden then, as on a processor without them; the lesser ones are there."""
    ran = with_environment(isa, "info = extensions.cpu().build_info(); print(info['cpu_isa'], *info['cpu_isas'])")
    there = [lesser for lesser in ALL[ALL.index(isa) :] if lesser in extensions.cpu().build_info()["cpu_isas"]]
    assert ran.stdout.split() == [isa, *there], ran.stderr
    if isa != ALL[0]:
        better = ALL[ALL.index(isa) - 1]
        pack = f"extensions.cpu(); torch.ops.fused_resnet_C.conv_pack(torch.zeros(1, 1, 3, 3), 0, '{better}')"
        assert f"isa: expected an instruction set of this CPU, got {better}" in with_environment(isa, pack).stderr


def test_an_unknown_instruction_set_is_refused() -> None:
    ran = with_environment("mmx", "extensions.cpu().build_info()")
    assert (
        "FUSED_RESNET_CPU_ISA: expected amx, avx512_bf16, avx512, avx2 or portable, as this CPU has it, got mmx"
        in ran.stderr
    )


def test_relu6_and_none() -> None:
    for name in CODES:
        tail = make_tail(problem(f"n=1,h=9,w=9,c=16,k=20,padding=1,residual=1,activation={name}"), "integers")
        exact = reference(tail.to(torch.float64))
        for algorithm in EXACT:
            assert_bitexact(run(tail, algorithm), exact, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": 3}, "m: expected 0, 2 or 4, got 3"),
        (
            {"weights": "halved"},
            "weights: expected whole, fresh, bf16x3, fresh bf16x3, bf16x3 stem or bf16, got halved",
        ),
        ({"weights": "fresh"}, 'weights: expected a kind that this kernel has, got "fresh" for m = 0 with '),
        ({"weights": "bf16x3", "isa": "portable"}, "packed: expected what conv_pack made for this filter"),
        ({"isa": "mmx"}, "isa: expected an instruction set of this CPU, got mmx"),
        ({"filter": [8, 3]}, "filter: expected K, R and S, got 2 numbers"),
        ({"stride": [2, 2], "m": 2}, "m: expected 0 unless stride and dilation are 1, got 2"),
        (
            {"filter": [8, 5, 3], "stride": [2, 2]},
            "x: 2x2 is too small for a 5x3 filter with padding \\(1, 1\\) and dilation \\(1, 1\\)",
        ),
        ({"dilation": [0, 1]}, "dilation: expected positive numbers, got 0, 1"),
        ({"padding": [1, -1]}, "padding: expected no negative numbers, got 1, -1"),
        ({"filter": [40, 3, 3]}, "packed: expected what conv_pack made for this filter"),
        ({"x": torch.zeros(1, 4, 2, 2)}, "x: expected channels innermost, got channel stride 4"),
        ({"residual": torch.zeros(1, 8, 2, 3)}, "residual: expected the shape of the output, got \\[1, 8, 2, 3\\]"),
        ({"activation": 7}, "activation: expected 0 \\(none\\), 1 \\(relu\\) or 2 \\(relu6\\), got 7"),
        ({"running_mean": torch.zeros(5)}, "running_mean: expected one value per output channel, got \\[5\\]"),
    ],
)
def test_refusals_are_sentences(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(1, 4, 2, 2).contiguous(memory_format=torch.channels_last),
        "packed": None, "filter": [8, 3, 3], "m": 0, "isa": "", "stride": [1, 1], "padding": [1, 1],
        "dilation": [1, 1], "bias": None, "bn_weight": None, "bn_bias": None, "running_mean": torch.zeros(8),
        "running_var": torch.ones(8), "eps": 1e-5, "residual": None, "activation": 1, "weights": "whole",
    }  # fmt: skip
    m = change.get("m", 0)
    arguments["packed"] = OPS.conv_pack(torch.zeros(8, 4, 3, 3), m if m in (0, 2, 4) else 0, "")
    arguments |= change
    with pytest.raises((RuntimeError, ValueError), match=message):
        OPS.conv_fused(**arguments)


def test_the_epilogue_pass_on_every_layout_and_type() -> None:
    """y = act(scale y + shift + residual), bit-exact on integers: exactly one rounding."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for channels in (1, 3, 16, 21, 40):
            for memory_format in (torch.channels_last, torch.contiguous_format):
                for name in CODES:
                    g = torch.Generator().manual_seed(channels)
                    shape = (2, channels, 5, 7)
                    y, residual = (torch.randint(-9, 10, shape, generator=g).to(dtype) for _ in range(2))
                    y, residual = (t.contiguous(memory_format=memory_format) for t in (y, residual))
                    gamma = torch.tensor([-2.0, 1.0, 0.5])[torch.randint(0, 3, (channels,), generator=g)]
                    mean = torch.randint(-3, 4, (channels,), generator=g).float()
                    var = torch.tensor([0.0, 3.0])[torch.randint(0, 2, (channels,), generator=g)]
                    bn = (gamma, mean + 1, mean, var)
                    kernel = torch.eye(channels, dtype=torch.float64)[:, :, None, None]
                    conv = ConvBN(kernel, None, *(t.double() for t in bn), 1.0)
                    expected = reference(TailArguments(y.double(), conv, residual.double(), activation=name))
                    OPS.scale_shift_add_act_(y, None, *bn, 1.0, residual, CODES[name])
                    assert_bitexact(y, expected, f"{dtype} {channels} {memory_format} {name}")


def test_rounding_to_sixteen_bits_is_torchs() -> None:
    """The pass rounds to nearest even and keeps NaN, infinity and subnormals: 65,536 random bit patterns."""
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (65536,), generator=g).to(torch.int32)
    for dtype in (torch.bfloat16, torch.float16):
        values = bits.view(torch.float32).to(dtype)  # every kind of value of the type
        y = values.clone()[:, None, None, None]
        scale = torch.full((1,), 1.1)
        OPS.scale_shift_add_act_(y, None, scale, None, torch.zeros(1), torch.ones(1), 0.0, None, 0)
        expected = (values.float() * 1.1).to(dtype)
        got = y.flatten()
        assert bool(((got == expected) | (got.isnan() & expected.isnan())).all())
