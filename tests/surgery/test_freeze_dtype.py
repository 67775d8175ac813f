"""``freeze(model, dtype=...)``: computed in 16 bits, from float32 to float32, while the live model stays in float32."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_resnet import explain, freeze
from fused_resnet.backends import cpu, cpu_rule
from fused_resnet.surgery.frozen import FrozenModel
from fused_resnet.testing.tolerances import FORWARD_FACTOR, ROUNDING
from tests.support.frozen_models import MODELS, build, flat, image, needs_extension

DTYPES = (torch.bfloat16, torch.float16)


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Eager's ``model.to(dtype)``, its batch norms in float32 as mixed precision has them."""
    model = copy.deepcopy(model).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return model


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_as_accurate_as_eager_in_that_type_and_float32_outside(name: str, dtype: torch.dtype) -> None:
    model, x = build(name), image(name)
    fast = freeze(model, dtype=dtype)
    with torch.inference_mode():
        got = fast(x)
        assert type(got) is type(model(x))
        exact = flat(copy.deepcopy(model).double()(x.double()))
        eager = flat(in_dtype(model, dtype)(x.to(dtype)))
        for ours, theirs, value in zip(flat(got), eager, exact, strict=True):
            assert ours.dtype is torch.float32
            allowed = FORWARD_FACTOR * relative_error(theirs, value) + ROUNDING[dtype]
            assert relative_error(ours, value) <= allowed
        assert all(torch.equal(a, b) for a, b in zip(flat(fast(x)), flat(got), strict=True))
    assert {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()} == {torch.float32}
    assert all(a is b for a, b in zip(fast.parameters(), fast.model.parameters(), strict=True))


class Mixed(nn.Module):
    """Other inputs and outputs than float32."""

    def __init__(self) -> None:
        super().__init__()
        self.block = build("block")

    def forward(self, x: Tensor, index: Tensor) -> dict[str, Any]:
        y = self.block(x)
        return {"y": y[index], "others": (y.flatten(1).argmax(1), y.double(), "text", None)}


def test_only_values_of_that_type_become_float32() -> None:
    fast = freeze(Mixed().eval(), dtype=torch.bfloat16)
    index = torch.tensor([1, 0])
    with torch.inference_mode():
        out = fast(image("block"), index)
    assert out["y"].dtype is torch.float32
    assert out["others"][0].dtype is torch.int64
    assert out["others"][1].dtype is torch.float64
    assert out["others"][2:] == ("text", None)


@needs_extension
def test_on_kernels_of_our_own_a_network_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu_rule.why_not_bf16() is not None:
        pytest.skip(str(cpu_rule.why_not_bf16()))
    text = str(explain(freeze(build("resnet"), image("resnet"), dtype=torch.bfloat16)))
    assert "12 convolutions in one call" in text
    assert "computed in bfloat16, from float32 to float32" in text
    assert "oneDNN" not in text


@pytest.mark.parametrize("dtype", DTYPES)
def test_explain_says_how_this_processor_computes_the_type(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("block")
    for has, word in ((True, "oneDNN's convolutions"), (False, "computed in float32 and rounded once")):
        monkeypatch.setattr(cpu, "_onednn_has", lambda _, has=has: has)
        monkeypatch.setattr(cpu, "why_not_bf16", lambda: "a reason")
        for shown in (freeze(model, dtype=dtype), freeze(copy.deepcopy(model).to(dtype))):
            assert word in str(explain(shown))
        assert word not in str(explain(freeze(model)))


def test_calls_that_it_does_not_take_go_to_the_live_model() -> None:
    model, x = build("block"), image("block")
    fast = freeze(model, dtype=torch.bfloat16)
    seen: list[torch.dtype] = []
    fast.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.no_grad():
        fast(x)
        assert seen == []
        with pytest.raises(TypeError, match="weight: expected dtype float64, that of x, got float32"):
            fast(x.double())
    assert torch.equal(fast(x.clone().requires_grad_()), fast.model(x))
    assert seen[:2] == [torch.float64, torch.float32]


def test_it_keeps_its_type_when_copied_pickled_refreshed_and_frozen_again() -> None:
    model, x = build("block"), image("block")
    fast = freeze(model, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = fast(x)
        for other in (
            copy.deepcopy(fast),
            pickle.loads(pickle.dumps(fast)),
            fast.refresh(),
            freeze(model, dtype=fast.dtype),
        ):
            assert other.dtype is torch.bfloat16
            assert torch.equal(other(x), expected)
    assert "computed in bfloat16" in repr(fast)
    assert freeze(fast) is fast
    assert freeze(fast, dtype=torch.bfloat16) is fast
    other_type = freeze(fast, dtype=torch.float16)
    assert isinstance(other_type, FrozenModel)
    assert other_type.dtype is torch.float16
    assert other_type.model is fast.model


def test_refusals() -> None:
    model = build("block")
    for dtype in (torch.float64, torch.float32, "bfloat16"):
        with pytest.raises(ValueError, match="dtype: expected None"):
            freeze(model, dtype=dtype)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model: expected parameters and buffers in float32 for dtype"):
        freeze(copy.deepcopy(model).double(), dtype=torch.bfloat16)
