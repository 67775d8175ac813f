"""The bar itself: it accepts the exact answer and rejects every classic mistake, naming the problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import functional, testing
from fused_resnet.core.reference import TailArguments, conv_bn, reference
from fused_resnet.testing import (
    PROBLEMS,
    Case,
    Kind,
    assert_bitexact,
    assert_gradients,
    check_tail,
    in_dtype,
    in_one_accumulator,
    make_tail,
    round_to_tf32,
)

BY_NAME = {case.name: case.problem for case in PROBLEMS}


def _eps_forgotten(tail: TailArguments) -> Tensor:
    return reference(tail._replace(conv=tail.conv._replace(eps=1e-300)))  # torch 2.11 takes no zero


def _add_after_activation(tail: TailArguments) -> Tensor:
    y = conv_bn(tail.x, tail.conv, tail.stride, tail.padding, tail.dilation, tail.groups)
    assert tail.residual is not None
    return F.relu(y) + tail.residual


def _residual_forgotten(tail: TailArguments) -> Tensor:
    return reference(tail._replace(residual=None))


def _gamma_made_positive(tail: TailArguments) -> Tensor:
    gamma = tail.conv.bn_weight
    assert gamma is not None
    return reference(tail._replace(conv=tail.conv._replace(bn_weight=gamma.abs())))


def _axes_swapped(tail: TailArguments) -> Tensor:
    return reference(tail._replace(conv=tail.conv._replace(weight=tail.conv.weight.transpose(2, 3))))


def _last_channel_dropped(tail: TailArguments) -> Tensor:
    x = tail.x.clone()
    x[:, -1] = 0
    return reference(tail._replace(x=x))


def _one_output_wrong(tail: TailArguments) -> Tensor:
    y = reference(tail)
    y[-1, -1, -1, -1] += 0.5
    return y


def _half_precision_sum(tail: TailArguments) -> Tensor:
    return reference(tail.to(torch.bfloat16)).to(tail.x.dtype)


BOTH: tuple[Kind, ...] = ("integers", "random")
#: each mistake with the kinds of tensors that can show it
MISTAKES: list[tuple[Callable[[TailArguments], Tensor], tuple[Kind, ...]]] = [
    (_eps_forgotten, ("integers",)),  # eps = 1 there; 1e-5 beside a variance of 0.25 is within float32's bar
    (_add_after_activation, BOTH),
    (_residual_forgotten, BOTH),
    (_gamma_made_positive, BOTH),
    (_axes_swapped, BOTH),
    (_last_channel_dropped, BOTH),
    (_one_output_wrong, BOTH),
    (_half_precision_sum, ("random",)),
]


@pytest.mark.parametrize(
    ("mistake", "kind"), [(m, kind) for m, kinds in MISTAKES for kind in kinds], ids=lambda v: getattr(v, "__name__", v)
)
def test_each_mistake_is_caught(mistake: Callable[[TailArguments], Tensor], kind: Kind) -> None:
    with pytest.raises(AssertionError, match="n=2,h=9,w=7,c=33,k=37"):
        check_tail(mistake, BY_NAME["odd"], kinds=(kind,))


@pytest.mark.parametrize("case", PROBLEMS, ids=[case.name for case in PROBLEMS])
def test_the_exact_answer_rounded_once_passes(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_tail(lambda tail: reference(tail.to(torch.float64)).to(tail.x.dtype), in_dtype(case.problem, dtype))


@pytest.mark.parametrize("case", PROBLEMS, ids=[case.name for case in PROBLEMS])
def test_one_accumulator_computes_the_tail(case: Case) -> None:
    tail = make_tail(case.problem, "integers")
    assert_bitexact(in_one_accumulator(tail), reference(tail.to(torch.float64)), case.name)


def test_one_accumulator_is_allowed_for_wherever_eager_is_nearly_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor for which the library has better kernels. Only where the order of the sums is a library's."""
    monkeypatch.setattr(testing, "eager_output", lambda tail, tf32: reference(tail.to(torch.float64)).to(tail.x.dtype))
    deep = BY_NAME["7x7_pixels"]
    check_tail(in_one_accumulator, deep, any_order=True)
    with pytest.raises(AssertionError, match="c=96,k=128"):
        check_tail(in_one_accumulator, deep)


def _weights_of_tf32(tail: TailArguments) -> Tensor:
    return in_one_accumulator(tail._replace(conv=tail.conv._replace(weight=round_to_tf32(tail.conv.weight))))


def _sixteen_bits_of_each_factor(tail: TailArguments) -> Tensor:
    """What two bfloat16 parts of each factor give: the third would hold the last eight bits."""

    def two_parts(t: Tensor) -> Tensor:
        first = t.bfloat16().float()
        return first + (t - first).bfloat16().float()

    return in_one_accumulator(
        tail._replace(x=two_parts(tail.x), conv=tail.conv._replace(weight=two_parts(tail.conv.weight)))
    )


@pytest.mark.parametrize("mistake", [_weights_of_tf32, _sixteen_bits_of_each_factor, _half_precision_sum])
@pytest.mark.parametrize("name", ["odd", "7x7_pixels"])
def test_lost_bits_are_caught_in_any_order(mistake: Callable[[TailArguments], Tensor], name: str) -> None:
    with pytest.raises(AssertionError, match="outputs fail"):
        check_tail(mistake, BY_NAME[name], kinds=("random",), any_order=True)


def _mask_forgotten(**arguments: Any) -> Tensor:
    """Right forward; the gradient passes as if there were no ReLU."""
    z = functional.conv_bn_add_relu(**(arguments | {"activation": "none"}), backend="eager")
    return z + (z.relu() - z).detach()


def _residual_gradient_doubled(**arguments: Any) -> Tensor:
    residual = arguments["residual"]
    return functional.conv_bn_add_relu(**(arguments | {"residual": 2 * residual - residual.detach()}), backend="eager")


@pytest.mark.parametrize("mistake", [_mask_forgotten, _residual_gradient_doubled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mistakes_of_the_gradient_are_caught(mistake: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Leaving out the outputs at the activation's corner leaves out nothing else."""
    with pytest.raises(AssertionError, match="gradient of"):
        assert_gradients(mistake, in_dtype(BY_NAME["odd"], dtype))


def test_nan_is_an_error_not_a_pass() -> None:
    with pytest.raises(AssertionError, match="inf"):
        check_tail(lambda tail: reference(tail) * torch.nan, BY_NAME["no_relu"], kinds=("random",))


def test_integers_cannot_round_in_float32() -> None:
    """The claim behind the bit-exact check: float32 eager equals float64 on the integer tensors."""
    for case in PROBLEMS:
        tail = make_tail(case.problem, "integers")
        assert torch.equal(reference(tail).to(torch.float64), reference(tail.to(torch.float64))), case.name


def test_the_list_has_a_reason_for_each_problem_and_no_twins() -> None:
    assert all(len(case.reason) > 10 for case in PROBLEMS)
    assert len({case.name for case in PROBLEMS}) == len({case.problem for case in PROBLEMS}) == len(PROBLEMS)


def test_round_to_tf32_keeps_ten_bits() -> None:
    ulp = 2.0**-10
    values = torch.tensor([1.0, 1.0 + ulp, 1.0 + ulp / 2, 1.0 + ulp / 4, -1.0 - ulp / 2, torch.inf])
    expected = torch.tensor([1.0, 1.0 + ulp, 1.0 + ulp, 1.0, -1.0 - ulp, torch.inf])
    assert torch.equal(round_to_tf32(values), expected)
