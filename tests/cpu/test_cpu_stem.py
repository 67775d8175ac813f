"""The stem: convolution of few channels, BN, activation and max pool in one pass on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet import functional
from fused_resnet.backends import cpu_fused, cpu_rule
from fused_resnet.core import extensions
from fused_resnet.core.packed_weights import PackedWeights
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import reference
from fused_resnet.selection import plans
from fused_resnet.testing import assert_within_bar, call_arguments, make_tail

# ---- the stem: convolution, epilogue and max pool in one pass -------------------------------------------------
STEMS = [  # problem, window, stride and padding of the pool
    ("n=2,h=37,w=41,c=3,k=24,r=7,s=7,stride=2,padding=3", (3, 2, 1)),
    ("n=1,h=32,w=32,c=3,k=64,r=3,s=3,padding=1", (3, 2, 1)),
    ("n=1,h=33,w=20,c=3,k=40,r=3,s=3,stride=3:1,padding=2:1,dilation=2:1", (3, 2, 1)),
    ("n=3,h=9,w=11,c=5,k=17,r=3,s=3,padding=0,activation=relu6", (2, 2, 0)),
    ("n=1,h=7,w=6,c=16,k=33,r=1,s=1,activation=none", ((3, 2), (1, 3), (1, 0))),
    ("n=1,h=40,w=8,c=1,k=5,r=5,s=5,stride=2:1,padding=2", ((8, 1), (5, 1), (4, 0))),
]


def _stem(
    text: str, pool: tuple[object, object, object], kind: str = "random", x: Tensor | None = None
) -> list[Tensor]:
    """The stem in one pass; and the direct kernel, then torch's max pool: the same sums in the same order."""
    tail = make_tail(Problem.parse(text), kind)
    arguments = call_arguments(tail) | {"packed_weights": PackedWeights(), "backend": "cpu"}
    arguments.pop("residual")
    if x is not None:
        arguments["x"] = x
    window, stride, padding = pool
    with torch.inference_mode():
        pooled = functional.conv_bn_add_relu_max_pool(
            **arguments, window=window, pool_stride=stride, pool_padding=padding
        )
        k, _, r, s = tail.conv.weight.shape
        y = torch.ops.fused_resnet_C.conv_fused(
            arguments["x"].contiguous(memory_format=torch.channels_last),
            torch.ops.fused_resnet_C.conv_pack(tail.conv.weight, 0, ""), (k, r, s), 0, "",
            tail.stride, tail.padding, tail.dilation, *tail.conv[1:], None, cpu_fused.ACTIVATION_CODES[tail.activation],
        )  # fmt: skip
        two = torch.nn.functional.max_pool2d(functional.conv_bn_add_relu(**arguments), *pool)
        assert pooled.stride() == two.stride()
        return [pooled, torch.nn.functional.max_pool2d(y, *pool)]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each stem that is run in one pass."""
    if extensions.cpu() is None:
        pytest.skip(str(extensions.why_not_cpu()))
    plans.clear()  # made under the choice of another test
    seen: list[int] = []
    links = cpu_fused.FusedConvolution.links

    def noted(self: cpu_fused.FusedConvolution, *args: Any) -> Any:
        if self.pool is not None:
            seen.append(1)
        return links(self, *args)

    monkeypatch.setattr(cpu_fused.FusedConvolution, "links", noted)
    return seen


# Matrix tiles, which "auto" takes where there are any, add in another order: to the bit on integers alone.
@pytest.mark.parametrize(("winograd", "kind"), [("off", "random"), ("auto", "integers")])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("text", "pool"), STEMS, ids=[text for text, _ in STEMS])
def test_stem_in_one_pass_is_kernel_and_pool_to_the_bit(
    text: str, pool: tuple[object, object, object], threads: int, winograd: str, kind: str, passes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("FUSED_RESNET_WINOGRAD", winograd)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pooled, expected = _stem(text, pool, kind)
    finally:
        torch.set_num_threads(before)
    assert passes, "the pass was not taken"
    assert torch.equal(pooled, expected)


def test_stem_hands_nan_and_infinity_through(passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_RESNET_WINOGRAD", "off")
    text, pool = STEMS[0]
    x = make_tail(Problem.parse(text)).x.clone(memory_format=torch.channels_last)
    x[0, 1, 8, 8], x[1, 2, 30, 3] = torch.nan, -torch.inf
    pooled, expected = _stem(text, pool, x=x)
    assert passes
    assert torch.equal(pooled.isnan(), expected.isnan())
    assert bool(expected.isnan().any())
    assert torch.equal(pooled.nan_to_num(), expected.nan_to_num())


def test_stem_on_matrix_tiles_is_within_the_bar(passes: list[int]) -> None:
    """And an infinity becomes NaN, in the outputs where a NaN would."""
    if not cpu_rule.has_tiles():
        pytest.skip("this processor has no matrix tiles")
    text, pool = STEMS[0]
    tail = make_tail(Problem.parse(text), "random")
    pooled, _ = _stem(text, pool)
    exact, eager = (torch.nn.functional.max_pool2d(reference(t), *pool) for t in (tail.to(torch.float64), tail))
    assert_within_bar(pooled, float((eager.double() - exact).abs().max()), exact, text)
    x = tail.x.clone(memory_format=torch.channels_last)
    x[0, 1, 8, 8] = torch.nan
    with_nan = _stem(text, pool, x=x)[0].isnan()
    x[0, 1, 8, 8] = torch.inf
    assert torch.equal(_stem(text, pool, x=x)[0].isnan(), with_nan)
    assert bool(with_nan.any())
    assert not bool(with_nan.all())


@pytest.mark.parametrize("pool", [((9, 9), 1, 4), (3, 1, 0)], ids=["too tall", "with gradients"])
def test_stem_without_a_kernel_is_two_functions(pool: tuple[object, object, object], passes: list[int]) -> None:
    tail = make_tail(Problem.parse("n=1,h=20,w=20,c=3,k=8,padding=1"))
    arguments = call_arguments(tail) | {"packed_weights": PackedWeights()}
    arguments.pop("residual")
    arguments["x"] = tail.x.clone().requires_grad_(pool[0] == 3)
    with torch.set_grad_enabled(pool[0] == 3):
        for _ in range(3):
            pooled = functional.conv_bn_add_relu_max_pool(
                **arguments, window=pool[0], pool_stride=pool[1], pool_padding=pool[2]
            )
        expected = torch.nn.functional.max_pool2d(functional.conv_bn_add_relu(**arguments), *pool)
    assert not passes
    assert torch.equal(pooled, expected)
    assert pooled.requires_grad == (pool[0] == 3)
