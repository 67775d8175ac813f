"""The four training ops: schemas, fake kernels, gradients of their own, argument checks, the mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_resnet.backends.training import dispatch as training_dispatch
from fused_resnet.backends.training.eager import pack_mask, unpack_mask
from fused_resnet.core.training_call import mask_words
from fused_resnet.ops import SCHEMAS

OPS = torch.ops.fused_resnet
RUNNABLE = [name for name, why in training_dispatch.reasons(torch.zeros(1, 1, 1, 1)).items() if why is None]


def tensors(
    shape: tuple[int, ...] = (2, 5, 3, 4), dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Arguments of bn_apply_add_relu with a residual, and a second branch under ``proj_`` names."""
    g = torch.Generator().manual_seed(seed)
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def activation() -> Tensor:
        t = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        return t.contiguous(memory_format=torch.channels_last)

    def vector() -> Tensor:
        return torch.randn(shape[1], generator=g, dtype=torch.float64).to(acc)

    named = {"y": activation(), "residual": activation(), "grad_out": activation()}
    for p in ("", "proj_"):
        named |= {
            p + "mean": vector(),
            p + "invstd": vector().abs() + 0.1,
            p + "weight": vector(),
            p + "bias": vector(),
        }
    named["proj_y"] = activation()
    return named


def apply_arguments(t: dict[str, Tensor], kind: str) -> tuple[Tensor | None, ...]:
    proj = [
        t[n] if kind == "projection" else None
        for n in ("proj_y", "proj_mean", "proj_invstd", "proj_weight", "proj_bias")
    ]
    return (
        t["y"],
        t["mean"],
        t["invstd"],
        t["weight"],
        t["bias"],
        t["residual"] if kind == "residual" else None,
        *proj,
    )


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("kind", ["plain", "residual", "projection"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend: str, kind: str, dtype: torch.dtype) -> None:
    t = tensors(dtype=dtype)
    for name in ("y", "residual", "proj_y", "weight", "bias"):
        t[name].requires_grad_()
    args = apply_arguments(t, kind)
    torch.library.opcheck(OPS.bn_stats.default, (t["y"], backend))
    torch.library.opcheck(OPS.bn_apply_add_relu.default, (*args, "relu", True, backend))
    t = {name: value.detach() for name, value in t.items()}
    mask = OPS.bn_apply_add_relu(*apply_arguments(t, kind), "relu", True, backend)[1]
    proj = apply_arguments(t, kind)[6:]
    torch.library.opcheck(
        OPS.bn_backward_reduce.default,
        (t["grad_out"], mask, t["y"], t["mean"], t["invstd"], *proj[:3], backend),
    )
    sums = (t["weight"], t["bias"])
    torch.library.opcheck(
        OPS.bn_backward_apply.default,
        (
            t["grad_out"], mask, t["y"], t["mean"], t["invstd"], t["weight"], *sums, *proj[:4],
            *(sums if kind == "projection" else (None, None)), dtype if kind == "residual" else None, backend,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "residual", "projection"])
@pytest.mark.parametrize("activation", ["relu", "relu6", "none"])
def test_each_op_has_right_gradients_of_its_own(kind: str, activation: str) -> None:
    t = tensors(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda y: OPS.bn_stats(y), (t["y"].requires_grad_(),))
    args = [None if a is None else (a.detach() * 2).requires_grad_() for a in apply_arguments(t, kind)]
    assert torch.autograd.gradcheck(lambda *a: OPS.bn_apply_add_relu(*a, activation)[0], args)


def test_backward_ops_refuse_a_second_derivative() -> None:
    t = tensors(dtype=torch.float64)
    y = t["y"].requires_grad_()
    args = (y, *apply_arguments(t, "residual")[1:])
    out = OPS.bn_apply_add_relu(*args)[0]
    (grad,) = torch.autograd.grad(out.square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated: double backward.*unfuse"):
        grad.sum().backward()


def test_gradient_without_a_mask_is_refused() -> None:
    t = tensors()
    out = OPS.bn_apply_add_relu(t["y"].requires_grad_(), *apply_arguments(t, "plain")[1:], "relu", False)[0]
    with pytest.raises(RuntimeError, match="with_mask: expected True"):
        out.sum().backward()


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 32, 2, 2), (1, 1, 1, 1), (3, 64, 5, 7), (2, 33, 4, 4)])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_mask_is_the_sign_of_the_output_with_zero_tail(backend: str, shape: tuple[int, ...]) -> None:
    t = tensors(shape)
    out, mask = OPS.bn_apply_add_relu(*apply_arguments(t, "residual"), "relu", True, backend)
    assert mask.dtype == torch.int32
    assert mask.shape == (mask_words(out.numel()),)
    # Rebuilding the words from the outputs checks every bit, the zero tail included.
    torch.testing.assert_close(mask, pack_mask(out > 0), rtol=0, atol=0)
    torch.testing.assert_close(unpack_mask(mask, out.shape), out > 0)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_mask_of_relu6_has_both_corners(backend: str) -> None:
    t = tensors((2, 8, 6, 6))
    t["bias"] = t["bias"] + 4
    out, mask = OPS.bn_apply_add_relu(*apply_arguments(t, "residual"), "relu6", True, backend)
    assert (out == 6).any()
    assert (out == 0).any()
    torch.testing.assert_close(unpack_mask(mask, out.shape), (out > 0) & (out < 6))


@pytest.mark.parametrize("backend", RUNNABLE)
def test_nan_passes_output_and_mask(backend: str) -> None:
    t = tensors((1, 8, 4, 4))
    t["y"][0, 3, 1, 2] = float("nan")
    out, mask = OPS.bn_apply_add_relu(*apply_arguments(t, "residual"), "relu", True, backend)
    assert out[0, 3, 1, 2].isnan()
    assert int(out.isnan().sum()) == 1
    assert unpack_mask(mask, out.shape)[0, 3, 1, 2]


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "expanded", "transposed"])
def test_any_strides(backend: str, layout: str) -> None:
    """Every activation argument in every layout gives what the dense one gives."""
    t = tensors((2, 6, 4, 4))
    change = {
        "contiguous": lambda a: a.contiguous(),
        "sliced": lambda a: torch.cat([a, a], dim=1)[:, : a.shape[1]],
        "expanded": lambda a: a[:1].expand(a.shape),
        "transposed": lambda a: a.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]
    for name in ("y", "residual", "proj_y", "grad_out"):
        t[name] = change(t[name])
    dense = {k: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for k, v in t.items()}
    results = []
    for s in (t, dense):
        mean, var = OPS.bn_stats(s["y"], backend)
        out, mask = OPS.bn_apply_add_relu(*apply_arguments(s, "projection"), "relu", True, backend)
        proj = [s[n] for n in ("proj_y", "proj_mean", "proj_invstd")]
        sums = OPS.bn_backward_reduce(s["grad_out"], mask, s["y"], s["mean"], s["invstd"], *proj, backend)
        grads = OPS.bn_backward_apply(
            s["grad_out"], mask, s["y"], s["mean"], s["invstd"], s["weight"], s["mean"], s["bias"], *proj,
            s["proj_weight"], s["mean"], s["bias"], None, backend,
        )  # fmt: skip
        results.append((mean, var, out, mask, *sums, *grads))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_outputs_have_the_memory_format_of_y() -> None:
    t = tensors()
    assert OPS.bn_apply_add_relu(*apply_arguments(t, "residual"))[0].is_contiguous(memory_format=torch.channels_last)
    t["y"] = t["y"].contiguous()
    assert OPS.bn_apply_add_relu(*apply_arguments(t, "residual"))[0].is_contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(2, 5)}, r"y: expected a floating-point \[N, C, H, W\] tensor"),
        (
            {"residual": torch.zeros(2, 5, 3, 3)},
            r"residual: expected the shape of y, \[2, 5, 3, 4\], got \[2, 5, 3, 3\]",
        ),
        ({"mean": torch.zeros(4)}, r"mean: expected shape \[5\], the channels of y, got \[4\]"),
        ({"weight": torch.zeros(5, 1)}, r"weight: expected shape \[5\]"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPS.bn_apply_add_relu(*apply_arguments(tensors() | change, "residual"))


def test_wrong_names_are_named() -> None:
    args = apply_arguments(tensors(), "residual")
    with pytest.raises(ValueError, match="activation: expected one of relu, relu6, none, got 'gelu'"):
        OPS.bn_apply_add_relu(*args, "gelu")
    with pytest.raises(ValueError, match=r"backend: expected 'auto' or one of .*, got 'tpu'"):
        OPS.bn_apply_add_relu(*args, "relu", True, "tpu")
    with pytest.raises(ValueError, match="expected at most one of them, got both"):
        OPS.bn_apply_add_relu(*args[:6], *args[:5])


def test_schemas_are_functional() -> None:
    for name in ("bn_stats", "bn_apply_add_relu", "bn_backward_reduce", "bn_backward_apply"):
        assert name in SCHEMAS
        assert not getattr(OPS, name).default._schema.is_mutable
