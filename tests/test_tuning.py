"""The search: wrong, crashing and tying candidates, interrupts, resuming; with an injected clock."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tuning_fakes import CPU, PROBLEM, Configuration, call_for, clock, install, raising, right, store_in

from fused_resnet.problem import Problem
from fused_resnet.reference import Tail, reference
from fused_resnet.testing import PROBLEMS, RESNET_TAILS, in_dtype, make_tail
from fused_resnet.tuning import rule, verify
from fused_resnet.tuning.calls import Call
from fused_resnet.tuning.candidates import Candidate, Turns, by_name, every
from fused_resnet.tuning.search import FINALISTS, LIMIT, TIE, tune_call

# ---- verification --------------------------------------------------------------------------------------------


def _shifted(tail: Tail) -> Tensor:
    return torch.roll(right(tail), 1, 3)


def _last_image(tail: Tail) -> Tensor:
    y = right(tail)
    y[-1, -1, -1, -1] += 1
    return y


def _residual_after_relu(tail: Tail) -> Tensor:
    return right(tail._replace(residual=None)) + tail.residual


def _nan(tail: Tail) -> Tensor:
    y = right(tail)
    y[0, 0, 0, 0] = torch.nan
    return y


WRONG = {
    "shifted": _shifted,
    "one_output": _last_image,
    "add_after_relu": _residual_after_relu,
    "no_eps": lambda tail: right(tail._replace(conv=tail.conv._replace(eps=0.0))),
    "nan": _nan,
    "coarse": lambda tail: right(tail) * (1 + 1e-3),
    "half": lambda tail: right(tail).half(),
    "shape": lambda tail: right(tail)[:, :-1],
    "zeros": lambda tail: torch.zeros_like(right(tail)),
}


@pytest.mark.parametrize("run", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_candidate_is_found_out(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    install(monkeypatch, Configuration("a", run))
    assert verify.mismatch(Candidate("fake", Configuration("a", run)), call_for(), CPU) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["odd", "projection_odd", "no_bn", "relu6", "asymmetric", "1x1_pixel", "many_images"])
def test_a_right_candidate_passes(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    install(monkeypatch, Configuration("a"))
    problem = in_dtype(next(case.problem for case in PROBLEMS if case.name == name), dtype)
    assert verify.mismatch(Candidate("fake", Configuration("a")), call_for(problem), CPU) is None


def test_eager_itself_meets_the_bar() -> None:
    for dtype in (torch.float32, torch.float16):
        assert verify.mismatch(Candidate("eager"), call_for(in_dtype(PROBLEM, dtype)), CPU) is None


def test_images_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong image is found wherever the parts are cut, and the reference never sees more than a part."""
    problem = dataclasses.replace(PROBLEM, n=7)
    monkeypatch.setattr(verify, "_CHUNK_BYTES", 8 * 2 * (4 + 8) * 6 * 5)  # two images at a time
    seen: list[int] = []

    def counting(tail: Tail) -> Tensor:
        seen.append(tail.x.shape[0])
        return reference(tail.to(torch.float64))

    monkeypatch.setattr(verify, "_exact", counting)
    install(monkeypatch, Configuration("last", _last_image), Configuration("right"))
    assert verify.mismatch(Candidate("fake", Configuration("right")), call_for(problem), CPU) is None
    assert set(seen) == {1, 2}
    assert verify.mismatch(Candidate("fake", Configuration("last", _last_image)), call_for(problem), CPU) is not None


# ---- tensors like those of a call ----------------------------------------------------------------------------


def _tails() -> dict[str, Tail]:
    tail = make_tail(PROBLEM)
    unaligned = torch.empty(1 + tail.x.numel())[1:].as_strided(tail.x.shape, tail.x.stride()).copy_(tail.x)
    return {
        "dense": tail,
        "nchw_residual": tail._replace(residual=tail.residual.contiguous()),
        "strided_x": tail._replace(x=torch.zeros(2, 8, 6, 5)[:, ::2]),
        "expanded_residual": tail._replace(residual=torch.zeros(1, 8, 1, 1).expand(2, 8, 6, 5)),
        "unaligned_x": tail._replace(x=unaligned),
        "plain_bn": tail._replace(conv=tail.conv._replace(bn_weight=None, bn_bias=None)),
        "strided_bn": tail._replace(conv=tail.conv._replace(running_mean=torch.zeros(16)[::2])),
        "half_bn": make_tail(in_dtype(PROBLEM, torch.float16))._replace(
            conv=make_tail(in_dtype(PROBLEM, torch.float16)).conv.to(torch.float16)
        ),
        "projection": make_tail(Problem.parse("n=1,h=3,w=4,c=3,k=4,padding=1,proj=2x5x7x2,proj_bias=1")),
    }


@pytest.mark.parametrize("name", _tails().keys())
def test_synthesised_tensors_are_like_the_calls(name: str) -> None:
    tail = _tails()[name]
    call = Call.of(Problem.from_tail(tail), tail)
    for kind in ("integers", "random"):
        made = call.tail(kind, 0, CPU)  # type: ignore[arg-type]
        assert Call.of(Problem.from_tail(made), made) == call
        assert torch.isfinite(right(made)).all()


def test_keys_tell_calls_apart_and_stay_readable() -> None:
    keys = {name: Call.of(Problem.from_tail(tail), tail).key for name, tail in _tails().items()}
    assert len(set(keys.values())) == len(keys)
    assert keys["dense"] == str(PROBLEM)
    assert keys["nchw_residual"] == f"{PROBLEM}|residual:nchw"


@pytest.mark.parametrize("name", _tails().keys())
def test_a_call_survives_json(name: str) -> None:
    tail = _tails()[name]
    call = Call.of(Problem.from_tail(tail), tail)
    assert Call.from_json(call.as_json()) == call


# ---- the search ----------------------------------------------------------------------------------------------


def test_the_fastest_right_candidate_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(
        monkeypatch,
        Configuration("slow", seconds=3.0),
        Configuration("wrong", _shifted, seconds=0.1),
        Configuration("fast", seconds=1.0),
        Configuration("broken", raising(ValueError("too much shared memory")), seconds=0.1),
    )
    store = store_in(tmp_path)
    with caplog.at_level(logging.INFO, "fused_resnet"):
        result = tune_call(call_for(), CPU, store, timer=clock)
    assert result.winner == "fake fast"
    assert "fake wrong" not in result.medians
    assert result.rejected["fake wrong"].startswith("wrong:")
    assert result.rejected["fake broken"] == "failed: ValueError: too much shared memory"
    assert "fake wrong is left out" in caplog.text
    assert "fake broken is left out" in caplog.text
    assert store_in(tmp_path).times(call_for().key) == result.medians  # and it is on disk


def test_ties_go_to_the_backends_preference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(
        monkeypatch,
        Configuration("first", seconds=1.0 + TIE / 2),
        Configuration("second", seconds=1.0),
        Configuration("third", seconds=1.0 + 2 * TIE),
    )
    result = tune_call(call_for(), CPU, store_in(tmp_path), timer=clock)
    assert list(result.medians)[:3] == ["fake first", "fake second", "fake third"]


def test_noise_does_not_decide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A lower median that the rounds do not bear out leaves the preferred candidate in front; a real lead does not."""
    install(monkeypatch, Configuration("preferred", seconds=1.0), Configuration("other", seconds=2.0))
    rounds = dict.fromkeys((1.0, 2.0, 10.0), 0)

    def noisy(lead: float) -> Any:
        def timer(fn: Any, arguments: Any) -> Any:
            which = getattr(fn, "seconds", 10.0)
            rounds[which] += 1
            wave = 1.0 + 0.2 * ((rounds[which] * (7 if which == 1.0 else 5)) % 11) / 11
            return {1.0: 1.0, 2.0: 1.0 - lead, 10.0: 10.0}[which] * wave, fn(*arguments)

        return timer

    call = call_for()
    assert tune_call(call, CPU, store_in(tmp_path), timer=noisy(0.02)).winner == "fake preferred"
    assert tune_call(call, CPU, store_in(tmp_path), timer=noisy(0.3), force=True).winner == "fake other"


def test_candidates_take_turns_and_the_slow_ones_drop_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = [Configuration(f"c{i}", seconds=1.0 + 0.04 * i) for i in range(12)]
    backend = install(monkeypatch, *names, Configuration("far", seconds=5.0))
    order: list[str] = []

    def recording(fn: Any, arguments: Any) -> Any:
        seconds, output = clock(fn, arguments)
        order.append(backend.ran[-1] if hasattr(fn, "seconds") else "eager")
        return seconds, output

    result = tune_call(call_for(), CPU, store_in(tmp_path), timer=recording, rounds=20, limit=None)
    assert len(result.medians) == FINALISTS
    assert "fake far" not in result.medians
    assert order.count("far") == 5
    final = order[5 * 14 :]
    assert len(final) == 20 * FINALISTS
    for i in range(0, len(final), FINALISTS):  # each round holds each finalist once, and starts with another one
        assert sorted(final[i : i + FINALISTS]) == sorted(f"c{j}" for j in range(FINALISTS))
    assert len({final[i] for i in range(0, len(final), FINALISTS)}) == FINALISTS


def test_one_that_fails_while_it_is_timed_is_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, Configuration("flaky", seconds=0.5), Configuration("steady", seconds=1.0))
    count = 0

    def failing(fn: Any, arguments: Any) -> Any:
        nonlocal count
        if getattr(fn, "seconds", 0) == 0.5:
            count += 1
            if count > 3:
                raise RuntimeError("launch failed")
        return clock(fn, arguments)

    store = store_in(tmp_path)
    result = tune_call(call_for(), CPU, store, timer=failing)
    assert result.winner == "fake steady"
    assert result.rejected["fake flaky"] == "failed: RuntimeError: launch failed"
    assert store.verdict(call_for().key, "fake flaky") == "failed: RuntimeError: launch failed"


def test_out_of_memory_says_nothing_about_a_candidate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, Configuration("big", raising(torch.OutOfMemoryError("no memory left"))))
    store = store_in(tmp_path)
    result = tune_call(call_for(), CPU, store, timer=clock)
    assert result.winner == "eager"
    assert store.verdict(call_for().key, "fake big") is None


def test_an_interrupt_keeps_what_is_done_and_the_next_run_resumes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = call_for(), call_for(dataclasses.replace(PROBLEM, n=3))
    backend = install(monkeypatch, Configuration("a"), Configuration("b", seconds=0.5))
    tune_call(first, CPU, store_in(tmp_path), timer=clock)

    install(monkeypatch, Configuration("a"), Configuration("b", raising(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        tune_call(second, CPU, store_in(tmp_path), timer=clock)
    left = store_in(tmp_path)
    assert left.times(first.key)
    assert left.verdict(second.key, "fake a") == "ok"
    assert left.verdict(second.key, "fake b") is None, "the user's interrupt is not the candidate's fault"

    backend = install(monkeypatch, Configuration("a"), Configuration("b", seconds=0.5))
    again = tune_call(first, CPU, store_in(tmp_path), timer=clock)
    assert again.resumed
    assert backend.ran == []
    assert tune_call(second, CPU, store_in(tmp_path), timer=clock).winner == "fake b"
    assert tune_call(first, CPU, store_in(tmp_path), timer=clock, force=True).resumed is False


def test_limit_takes_what_each_backend_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *(Configuration(str(i)) for i in range(5)))
    assert [c.name for c in every(PROBLEM, CPU, limit=2)] == ["fake 0", "fake 1", "eager"]


def test_six_of_each_backend_unless_asked_for_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, *(Configuration(f"{i}") for i in range(9)))
    found = [tune_call(call_for(), CPU, store_in(tmp_path / str(i)), timer=clock, rounds=1, **options)
             for i, options in enumerate(({}, {"limit": None}, {"backends": ["eager"]}))]  # fmt: skip
    assert [len(result.medians) for result in found] == [LIMIT + 1, 10, 1]
    assert LIMIT == 6


class CompilationError(Exception):
    """Named and placed like Triton's, which need not be installed."""


CompilationError.__module__ = "triton.compiler.errors"


def test_one_that_does_not_compile_ends_its_backends_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One attempt and one warning for each backend, where there were one for each configuration."""
    monkeypatch.setattr(Turns, "_warned", set())
    broken = raising(CompilationError("'int' object has no attribute 'type'"))
    backend = install(monkeypatch, *(Configuration(f"{i}", broken) for i in range(5)))
    for number in range(2):
        call = call_for(dataclasses.replace(PROBLEM, n=1 + number))
        result = tune_call(call, CPU, store_in(tmp_path), timer=clock, rounds=1)
        assert list(result.medians) == ["eager"]
        assert result.rejected == {
            "fake 0": "failed to compile: CompilationError: 'int' object has no attribute 'type'"
        }
    assert backend.ran == ["0", "0"]
    assert [record.message.count("does not compile here") for record in caplog.records] == [1]


def test_too_large_a_tile_ends_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(
        monkeypatch, Configuration("large", raising(RuntimeError("out of resource: shared memory"))), Configuration("b")
    )
    result = tune_call(call_for(), CPU, store_in(tmp_path), timer=clock, rounds=1)
    assert list(result.medians) == ["fake b", "eager"]


def test_a_backend_that_cannot_list_its_candidates_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = install(monkeypatch, Configuration("a"))
    monkeypatch.setattr(backend, "candidates", raising(ImportError("libcuda.so.1")))
    assert [c.name for c in every(PROBLEM, CPU)] == ["eager"]
    assert "backend fake offers no candidates" in caplog.text


def test_names_on_disk_that_no_longer_exist_are_ignored() -> None:
    offered = [Candidate("fake", Configuration(name)) for name in "abc"]
    assert [c.name for c in by_name(offered, ["fake c", "fake removed", "fake a"])] == ["fake c", "fake a"]


# ---- the rule without measurements ---------------------------------------------------------------------------


def _best(text: str, device: str) -> list[str]:
    from fused_resnet import devices

    candidates = [Candidate(name) for name in ("eager", "two_pass", "cudnn", "triton", "cuda")]
    problem = Problem.parse(text + ",device=cuda")
    return [c.backend for c in rule.order(candidates, problem, devices.find(device))]


def test_the_rule_prefers_fusion_where_memory_binds() -> None:
    bottleneck = "n=256,h=56,w=56,c=64,k=256,r=1,dtype=float16,residual=1"
    for device in ("A100", "RTX 4090"):
        order = _best(bottleneck, device)
        assert order[0] == "cuda"
        assert order[-1] == "eager"
    projected = "n=256,h=56,w=56,c=64,k=256,r=1,dtype=float16,proj=64x56x56x1"  # two launches and a z that travels
    order = _best(projected, "H200")
    assert set(order[:2]) == {"cuda", "triton"}
    assert order[-1] == "eager"


def test_the_rule_leaves_mma_sync_where_hoppers_tensor_cores_bind() -> None:
    deep = "n=256,h=14,w=14,c=256,k=256,padding=1,dtype=float16,residual=1"
    order = _best(deep, "H200")
    assert order.index("cuda") > order.index("triton")
    assert order.index("two_pass") < order.index("eager")


def test_the_rule_counts_launches_where_nothing_else_binds() -> None:
    small = "n=1,h=7,w=7,c=512,k=512,padding=1,dtype=float16,residual=1"
    order = _best(small, "H200")
    assert order[0] == "cuda"
    assert order.index("cudnn") > order.index("two_pass")  # a fold on each call is ten launches more


def test_the_rule_knows_what_gathering_costs() -> None:
    from fused_resnet import devices

    stem = "n=256,h=224,w=224,c=3,k=64,r=7,stride=2,padding=3,dtype=float16"
    assert _best(stem, "H200")[0] == "cudnn"
    wider = stem.replace("c=3", "c=8")  # 2.7 times the products, by loads of 16 bytes
    narrow_s, wide_s = (rule.seconds("cuda", Problem.parse(text), devices.find("H200")) for text in (stem, wider))
    assert wide_s < 0.7 * narrow_s


#: Microseconds by the model's own table, ResNet-50 in fp16 at batch 256 on an H200: mma.sync, Triton, cuDNN, eager.
MODELLED = {
    "h=224,w=224,c=3,k=64,r=7,stride=2,padding=3": (1010, 507, 358, 812),
    "h=56,w=56,c=256,k=64,r=1": (148, 149, 143, 260),
    "h=56,w=56,c=64,k=64,padding=1": (198, 179, 147, 263),
    "h=56,w=56,c=64,k=256,r=1,residual=1": (265, 265, 256, 936),
    "h=56,w=56,c=64,k=256,r=1,proj=64x56x56x1": (242, 244, 399, 1306),
    "h=28,w=28,c=128,k=128,padding=1": (139, 122, 103, 163),
    "h=14,w=14,c=256,k=1024,r=1,residual=1": (89, 85, 94, 269),
    "h=7,w=7,c=512,k=512,padding=1": (137, 116, 101, 120),
}


@pytest.mark.parametrize("text", MODELLED)
def test_the_model_gives_the_figures_that_were_worked_out_by_hand(text: str) -> None:
    from fused_resnet import devices, gpu_model

    problem = Problem.parse(f"n=256,{text},dtype=float16,device=cuda")
    h200 = devices.find("H200")
    folds = gpu_model.FOLD_OPERATORS * gpu_model.FOLD_DEVICE * (2 if problem.projection else 1)
    found = [1e6 * gpu_model.device_seconds(name, problem, h200) for name in ("cuda", "triton", "cudnn", "eager")]
    found[2] -= 1e6 * folds
    assert found == pytest.approx(MODELLED[text], rel=0.03)


def test_memory_bound_tiles_leave_room_for_a_second_program() -> None:
    """One 256x128 tile a multiprocessor idles through its loads; where arithmetic is the limit it is still first."""
    from fused_resnet.kernels.config import SHARED_LIMIT, candidates

    for tail in RESNET_TAILS:
        problem = in_dtype(tail.problem, torch.float16, n=256, device_type="cuda")
        first = candidates(problem, 90, 132, False)[0]
        if tail.network == "resnet50" and tail.stage in ("layer1", "layer1.0"):
            assert 2 * first.shared_bytes(2) <= SHARED_LIMIT[90], f"{first} for {problem}"
    deep = Problem.parse("n=256,h=28,w=28,c=512,k=512,padding=1,dtype=float16")
    assert candidates(deep, 90, 132, False)[0].m * candidates(deep, 90, 132, False)[0].n == 256 * 128


@pytest.mark.parametrize("device", ["A100", "H100", "H200", "RTX 4090", "L4", "B200"])
def test_the_rules_first_is_never_expected_to_be_slower_than_eager(device: str) -> None:
    from fused_resnet import devices

    for tail in RESNET_TAILS:
        for n in (1, 8, 256):
            problem = in_dtype(tail.problem, torch.float16, n=n, device_type="cuda")
            first = rule.order([Candidate(name) for name in rule.PREFERENCE], problem, devices.find(device))[0]
            chosen, eager = (rule.seconds(name, problem, devices.find(device)) for name in (first.backend, "eager"))
            assert chosen <= eager
