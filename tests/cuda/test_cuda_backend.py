"""Backend ``cuda`` as far as it goes without a GPU: refusals, plans, candidates, and which way a call takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from fused_resnet import backends
from fused_resnet.backends import cuda
from fused_resnet.core import extensions
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import ConvBN, TailArguments

A100 = {"sm_count": 108, "capability": 80, "shared_bytes_per_block": 166912, "shared_bytes_per_sm": 167936}
RTX_5090 = {"sm_count": 170, "capability": 120, "shared_bytes_per_block": 101376, "shared_bytes_per_sm": 102400}
TAIL = "h=14,w=14,c=64,k=64,padding=1,dtype=float16,residual=1,device=cuda"

needs_extension = pytest.mark.skipif(extensions.cuda() is None, reason=str(extensions.why_not_cuda()))


def refusal(text: str) -> str | None:
    return backends.get("cuda").can_run(Problem.parse(text))


def test_refusals_that_need_no_gpu() -> None:
    assert refusal("h=14,w=14,c=64,k=64") == "cuda: device must be cuda, got cpu"
    assert refusal(f"{TAIL},groups=32") == "cuda: groups must be 1, got 32"
    assert refusal("h=14,w=14,c=64,k=64,dtype=float64,device=cuda") == (
        "cuda: dtype must be float16, bfloat16 or float32, got float64"
    )
    if not torch.cuda.is_available():
        reason = extensions.why_not_cuda()
        assert refusal(TAIL) == (f"cuda: {reason}" if reason else "cuda: torch sees no GPU")


@pytest.fixture
def a100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch and the extension as they look beside an A100, up to the first launch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 0))
    monkeypatch.setattr(cuda, "_properties", lambda index: A100)
    caches = (cuda._refusal, cuda._too_old)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:  # what was said of a GPU that is not there
        cache.cache_clear()


@needs_extension
def test_what_an_a100_runs(a100: None) -> None:
    assert refusal(TAIL) is None
    assert refusal("h=3,w=3,c=3,k=5,r=2,s=1,dtype=bfloat16,device=cuda") is None
    too_many = refusal("n=70000,h=128,w=128,c=1,k=1,padding=1,dtype=float16,device=cuda")
    assert too_many == "cuda: batch times output pixels must be at most 2^30, got 1146880000"


@needs_extension
@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 2)])
def test_older_gpus_are_refused(a100: None, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    assert refusal(TAIL) == f"cuda: needs sm_75 or newer, got sm_{capability[0]}{capability[1]}"


@needs_extension
@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("sm_75 sm_80 compute_80", (7, 5), True),
        ("sm_80 compute_80", (7, 5), False),
        ("sm_75 compute_75", (7, 5), True),
        ("sm_75 compute_75", (8, 6), False),  # the driver would compile Turing's kernels for it
        ("sm_75 sm_80 compute_80", (8, 6), True),
        ("sm_90 compute_90", (8, 6), False),
    ],
)
def test_a_module_runs_where_it_was_built_for(
    a100: None, monkeypatch: pytest.MonkeyPatch, built: str, capability: tuple[int, int], runs: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    monkeypatch.setattr(cuda._loaded(), "build_info", lambda: {"architectures": built})
    said = f"cuda: the extension was built for {built}, got sm_{capability[0]}{capability[1]}"
    assert refusal(TAIL) == (None if runs else said)


@needs_extension
def test_turing(a100: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 on its tensor cores, float32 on the FMA units even where tf32 is allowed; bfloat16 is refused."""
    t4 = {"sm_count": 40, "capability": 75, "shared_bytes_per_block": 65536, "shared_bytes_per_sm": 65536}
    monkeypatch.setattr(cuda, "_properties", lambda index: t4)
    monkeypatch.setattr(cuda, "_too_old", lambda index: None)
    assert refusal(TAIL) is None
    assert refusal(TAIL.replace("float16", "float32") + ",tf32=1") is None
    assert refusal(TAIL.replace("float16", "bfloat16")) == "cuda: bfloat16 needs sm_80 or newer, got sm_75"
    found = backends.get("cuda").candidates(Problem.parse(TAIL), torch.device("cuda", 0))
    assert {str(c).split()[0] for c in found} == {"auto", "32x32", "64x64", "128x64", "64x128"}


@needs_extension
def test_candidates_begin_with_the_planners_choice_and_fit(a100: None) -> None:
    problem = Problem.parse(TAIL)
    found = backends.get("cuda").candidates(problem, torch.device("cuda", 0))
    assert found[0] == cuda.AUTO
    assert len({str(c) for c in found}) == len(found)
    assert {"32x32 splitk=1", "32x32 splitk=4", "64x64 splitk=1", "256x128 splitk=1"} <= {str(c) for c in found}
    # nine steps of 64 elements: twelve blocks a tile would leave three idle
    assert max(c.splits for c in found if (c.tile_m, c.tile_n) == (64, 64)) == 8
    projection = Problem.parse("h=14,w=14,c=64,k=64,padding=1,dtype=float16,proj=32,device=cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_properties", lambda index: RTX_5090)
        tiles = {(c.tile_m, c.tile_n) for c in backends.get("cuda").candidates(projection, torch.device("cuda", 0))}
    assert (64, 64) in tiles
    assert (128, 128) not in tiles  # with the parked sum it needs 130 KiB of shared memory, the device has 99


def make_tail(channels_last: bool = True, **changes: object) -> tuple[Problem, TailArguments]:
    form = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(1, 64, 14, 14, dtype=torch.float16).contiguous(memory_format=form)
    weight = torch.randn(64, 64, 3, 3, dtype=torch.float16).contiguous(memory_format=form)
    conv = ConvBN(weight, None, torch.ones(64), torch.zeros(64), torch.zeros(64), torch.ones(64))
    tail = TailArguments(x, conv._replace(**changes), x, (1, 1), (1, 1), (1, 1))  # type: ignore[arg-type]
    return dataclasses.replace(Problem.from_tail(tail), device_type="cuda"), tail


@needs_extension
def test_only_what_the_kernel_reads_as_it_is_goes_straight_to_the_launch() -> None:
    _, tail = make_tail()
    assert cuda._readable(tail)
    assert not cuda._readable(make_tail(channels_last=False)[1])
    expanded = tail.x[:, :, :1].expand_as(tail.x)
    assert not cuda._readable(tail._replace(residual=expanded))
    assert not cuda._readable(tail._replace(x=tail.x[:, :, ::2]))
    assert not cuda._readable(make_tail(bn_bias=torch.zeros(128)[::2])[1])
    assert not cuda._readable(make_tail(bn_bias=torch.zeros(64, dtype=torch.float16))[1])  # BN of two dtypes


@needs_extension
@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({}, {"bias"}),
        ({"bn_weight": None}, {"bias", "bn_weight"}),
        ({"bn_bias": None}, {"bias", "bn_bias"}),
        ({"bn_weight": None, "bn_bias": None}, {"bias", "bn_weight", "bn_bias"}),
        ({"bias": torch.zeros(64, dtype=torch.float16)}, set()),
        (
            {"bn_weight": None, "bn_bias": None, "running_mean": None, "running_var": None},
            {"bias", "bn_weight", "bn_bias", "running_mean", "running_var"},
        ),
    ],
)
def test_a_plan_names_exactly_the_tensors_of_the_call(changes: dict[str, object], absent: set[str]) -> None:
    problem, tail = make_tail(**changes)
    plan = cuda._plan(problem, A100, cuda.AUTO, tail)
    names = {"x", "weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var", "residual", "y"}
    assert set(plan.alignment) - {"workspace"} == names - absent
    assert set(plan.pointers.values()) == set(plan.alignment)
    for offset in plan.pointers:
        assert plan.argument[offset : offset + 8] == bytes(8)


@needs_extension
def test_forced_tile_and_splits() -> None:
    problem = Problem.parse(TAIL)
    plan = cuda._plan(problem, A100, cuda.Configuration(64, 128, 5))
    assert plan.configuration["tile"] == "64x128"
    assert plan.grid == (4, 5, 1)  # 196 pixels in tiles of 64, 64 channels in one of 128
    # counters, then one fp32 partial tile for each of the 4 * 5 blocks
    assert plan.workspace_bytes == plan.counter_bytes + 4 * 5 * 64 * 128 * 4
    with pytest.raises(ValueError, match=r"cuda: tile must be one of 32x32, .*, got 48x48"):
        cuda._plan(problem, A100, cuda.Configuration(48, 48))
    with pytest.raises(TypeError, match="plan: unknown argument colour"):
        cuda._loaded().plan(A100, colour=1)


@needs_extension
def test_split_k_fills_an_idle_device_and_nothing_else() -> None:
    small = cuda._plan(Problem.parse("h=7,w=7,c=512,k=512,padding=1,dtype=float16,device=cuda"), A100)
    assert small.splits > 1
    assert small.grid[0] * small.splits <= 4 * A100["sm_count"]
    large = cuda._plan(Problem.parse("n=256,h=56,w=56,c=64,k=64,padding=1,dtype=float16,device=cuda"), A100)
    assert large.splits == 1
    assert large.workspace_bytes == 0


@needs_extension
def test_catalogue_and_build_info() -> None:
    extension = cuda._loaded()
    kernels = extension.catalogue()
    assert len({k["symbol"] for k in kernels}) == len(kernels)
    tiles = {m: {k["tile"] for k in kernels if k["math"] == m and k["load"] == "vector"} for m in ("float16", "tf32")}
    assert tiles["float16"] == tiles["tf32"] == {"32x32", "64x64", "128x64", "64x128", "128x128", "256x128"}
    for math in ("float16", "bfloat16", "tf32", "float32"):  # every tile takes any alignment
        vector, gather = (
            {k["tile"] for k in kernels if k["math"] == math and k["load"] == load} for load in ("vector", "gather")
        )
        assert vector == gather
    info = extension.build_info()
    assert info["kernels"] == len(kernels)
    assert info["cudart"] in ("static", "shared")
    with pytest.raises(ValueError, match="nonsense: expected the name of a tensor of the plan"):
        extension.launch(cuda._plan(Problem.parse(TAIL), A100), {"nonsense": 0})
    with pytest.raises(ValueError, match="weight: expected an address that is a multiple of 16, got 0x8"):
        extension.launch(cuda._plan(Problem.parse(TAIL), A100), {"x": 16, "weight": 8})
