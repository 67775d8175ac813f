"""The training passes of the CUDA extension on a GPU: `pytest -m gpu`. Triton's run as well, for comparison."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fused_resnet.aot.training import OPS
from fused_resnet.backends.training import dispatch as training_dispatch
from fused_resnet.backends.training.base import TrainingBackend
from fused_resnet.core.reference import reference
from fused_resnet.core.training_call import BackwardPass, ConvGeometry, ForwardPass, Gradients, mask_words
from fused_resnet.testing import assert_bitexact, make_tail
from tests.support.conv_stats_cases import cases as conv_cases
from tests.support.conv_stats_cases import check_statistics, symbols
from tests.support.training_calls import Case, Values, branch_of, cases, check, means_of

pytestmark = pytest.mark.gpu
CHANNELS_LAST = torch.channels_last


def backend(name: str, values: Values) -> TrainingBackend:
    chosen = training_dispatch.get(name)
    if reason := chosen.can_run(*(t for t in values.values() if t.dim() == 4)):
        pytest.skip(reason)
    return chosen


def run(name: str, case: Case, values: Values) -> Values:
    call = case.call
    values = {key: t.cuda() for key, t in values.items()}
    ours = backend(name, values)
    bn, proj = branch_of(values, ""), branch_of(values, "proj_")

    def empty(dtype: torch.dtype | None) -> Tensor:
        return torch.empty(call.shape, dtype=dtype, device="cuda", memory_format=CHANNELS_LAST).fill_(torch.nan)

    if call.op == "bn_stats":
        results = dict(zip(("mean", "var"), ours.stats(values["y"]), strict=True))
    elif call.op == "bn_apply_add_relu":
        assert bn is not None
        results = {"out": empty(call.out_dtype)}
        if call.activation != "none":
            results["mask"] = torch.empty(mask_words(call.numel), dtype=torch.int32, device="cuda")
        residual, mask = values.get("residual"), results.get("mask")
        ours.apply(ForwardPass(bn, residual, proj, call.activation, results["out"], mask))
    elif call.op == "bn_backward_reduce":
        assert bn is not None
        names = ("sum_dz", "sum_dz_xhat", "proj_sum_dz_xhat")
        sums = ours.backward_reduce(BackwardPass(values["grad_out"], values.get("mask"), bn, proj))
        results = {key: t for key, t in zip(names, sums, strict=True) if t.numel()}
    else:
        means = means_of(values, "")
        assert bn is not None
        assert means is not None
        second = call.proj or call.residual
        results = {"d_y": empty(call.dtype)} | ({} if second is None else {"d_second": empty(second)})
        ours.backward_apply(
            BackwardPass(values["grad_out"], values.get("mask"), bn, proj),
            Gradients(means, means_of(values, "proj_"), results["d_y"], results.get("d_second")),
        )
    torch.cuda.synchronize()
    return {key: t.cpu() for key, t in results.items()}


@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_pass(op: str, name: str) -> None:
    for case in cases(op):
        check(lambda case, values: run(name, case, values), case)


@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_pass_of_a_real_size(op: str, name: str) -> None:
    for case in cases(op)[:6]:
        large = dataclasses.replace(case.call, n=32, h=56, w=56, c=64)
        check(lambda case, values: run(name, case, values), dataclasses.replace(case, call=large))


@pytest.mark.parametrize("symbol", symbols())
def test_conv_stats(symbol: str) -> None:
    """Every case of every kernel; the tile is the planner's choice."""
    for case in conv_cases(symbol):
        problem = case.problem
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = problem.tf32
        try:
            tail = make_tail(problem, "integers", device="cuda")
            geometry = ConvGeometry(problem.stride, problem.padding, problem.dilation, 1)
            ours = backend("cuda", {"x": tail.x})
            y, mean, var = ours.conv_stats(tail.x, tail.conv.weight, tail.conv.bias, geometry)
        finally:
            torch.backends.cudnn.allow_tf32 = before
        assert_bitexact(y, reference(make_tail(problem, "integers").to(torch.float64)), str(problem))
        check_statistics(y.cpu(), mean.cpu(), var.cpu(), str(problem))


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_statistics_on_a_stream_and_in_a_graph(name: str) -> None:
    """The same bits every time: beside a busy stream, and replayed from a graph."""
    y = torch.randn(16, 256, 14, 14, device="cuda").half().contiguous(memory_format=CHANNELS_LAST)
    ours = backend(name, {"y": y})
    first = ours.stats(y)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = ours.stats(y)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours.stats(y)
    for _ in range(3):
        for t in captured:
            t.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for results in (beside, captured):
            assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))
