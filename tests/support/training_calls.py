"""Calls of the training passes for the CUDA legs: the list of odd ones, their tensors, and what must come out.

A pass is run by a function from (call, values) to its outputs by launch.json's names; the eager training backend, in
the same dtype and in float64, says what they must be.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fused_resnet.aot.training import OPS, TrainingCall
from fused_resnet.backends.cuda_launch import Device
from fused_resnet.backends.training.eager import BACKEND as EAGER
from fused_resnet.backends.training.eager import pack_mask, unpack_mask
from fused_resnet.core.training_call import BackwardPass, BatchNorm, ForwardPass, Gradients, GradMeans, mask_words
from fused_resnet.testing.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, ROUNDING

Values = dict[str, Tensor]
Run = Callable[["Case", Values], Values]
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16

#: One SM, so that a few thousand elements make the loops go round; and one that a small tensor does not fill.
SMALL, LARGE = Device(1, 80, 99 << 10, 100 << 10), Device(132, 90, 227 << 10, 228 << 10)


@dataclass(frozen=True)
class Case:
    call: TrainingCall
    device: Device
    alignment: int
    seed: int

    def __str__(self) -> str:
        return f"{self.call} alignment={self.alignment} sm_count={self.device.sm_count}"


#: [N, C, H, W]: one pixel; one element; words of the mask that straddle pixels; a last packet of one element; columns
#: that are full, one, and several with a partial last one; several parts in each.
SHAPES = (
    (1, 8, 1, 1), (1, 1, 1, 1), (2, 64, 9, 8), (3, 37, 7, 5), (2, 12, 5, 3), (1, 200, 5, 7), (4, 16, 11, 9),
    (1, 3, 13, 11), (2, 24, 9, 7), (1, 130, 3, 3), (5, 40, 8, 6), (1, 32, 17, 19),
)  # fmt: skip
#: y with the residual or the projection's y.
DTYPES = ((HALF, HALF), (FLOAT, FLOAT), (BRAIN, BRAIN), (BRAIN, FLOAT), (HALF, FLOAT), (FLOAT, BRAIN), (HALF, BRAIN))


@lru_cache
def cases(op: str) -> tuple[Case, ...]:
    """Every shape with every dtype of it somewhere, each kind of second branch, activation and affine set."""
    rng = random.Random(op)
    result = []
    for i, (n, c, h, w) in enumerate(SHAPES * 2):
        dtype, second = DTYPES[(i + i // len(SHAPES)) % len(DTYPES)]
        kind = ("residual", "projection", "none")[(i // 2) % 3]
        call = TrainingCall(
            op, n, h, w, c, dtype, residual=second if kind == "residual" else None,
            proj=second if kind == "projection" else None, activation=("relu", "relu6", "relu", "none")[i % 4],
            affine=("both", "both", "none", "weight", "bias")[i % 5],
        )  # fmt: skip
        if op == "bn_stats":
            call = dataclasses.replace(call, residual=None, proj=None)
        smallest = min(t.itemsize for t in (dtype, second))
        alignment = smallest if i % 5 == 4 else 16
        device = SMALL if i < len(SHAPES) or i % 2 else LARGE
        result.append(Case(call.checked(), device, alignment, rng.randrange(1 << 16)))
    return tuple(result)


# ---- the tensors of a call


def values_of(call: TrainingCall, kind: str, seed: int) -> Values:
    """The inputs by name. Kind "integers": nothing can be rounded before the store; "random": the usual numbers."""
    g = torch.Generator().manual_seed(seed)

    def activation(dtype: torch.dtype, spread: float = 1.0, offset: float = 0.0) -> Tensor:
        if kind == "integers":
            t = torch.randint(-3, 4, call.shape, generator=g)
        else:
            t = torch.randn(call.shape, generator=g, dtype=torch.float64) * spread + offset
        return t.to(dtype).contiguous(memory_format=torch.channels_last)

    def vector(positive: bool = False) -> Tensor:
        if kind == "integers":
            v = torch.tensor([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0])[torch.randint(0, 6, (call.c,), generator=g)]
        else:
            v = torch.randn(call.c, generator=g)
        return v.abs() + (0.0 if kind == "integers" else 0.2) if positive else v

    values = {"y": activation(call.dtype, 2.0, 0.5)}
    if call.op == "bn_stats":
        return values
    branches = [""] if call.proj is None else ["", "proj_"]
    for p in branches:
        values |= {p + "mean": vector(), p + "invstd": vector(positive=True)}
        if call.affine in ("both", "weight") and call.op != "bn_backward_reduce":
            values[p + "weight"] = vector()
        if call.affine in ("both", "bias") and call.op == "bn_apply_add_relu":
            values[p + "bias"] = vector() + (3.0 if call.activation == "relu6" else 0.0)
        if call.op == "bn_backward_apply":
            values |= {p + "mean_dz": vector(), p + "mean_dz_xhat": vector()}
    if call.proj is not None:
        values["proj_y"] = activation(call.proj)
    if call.op == "bn_apply_add_relu":
        return values | ({} if call.residual is None else {"residual": activation(call.residual)})
    values["grad_out"] = activation(call.out_dtype)
    if call.activation != "none":
        keep = torch.rand(call.shape, generator=g) < 0.6
        values["mask"] = pack_mask(keep.contiguous(memory_format=torch.channels_last))
    return values


def branch_of(values: Values, prefix: str) -> BatchNorm | None:
    if prefix + "y" not in values:
        return None
    return BatchNorm(*(values.get(prefix + name) for name in BatchNorm._fields))  # type: ignore[arg-type]


def means_of(values: Values, prefix: str) -> GradMeans | None:
    if prefix + "mean_dz" not in values:
        return None
    return GradMeans(values[prefix + "mean_dz"], values[prefix + "mean_dz_xhat"])


def eager(call: TrainingCall, values: Values, exact: bool) -> Values:
    """The eager backend's outputs: in the call's dtypes, or all in float64."""
    if exact:
        values = {name: t.double() if t.is_floating_point() else t for name, t in values.items()}
    bn, proj = branch_of(values, ""), branch_of(values, "proj_")
    if call.op == "bn_stats":
        mean, var = EAGER.stats(values["y"])
        return {"mean": mean, "var": var}
    assert bn is not None

    def empty(dtype: torch.dtype | None) -> Tensor:
        return torch.empty(call.shape, dtype=torch.float64 if exact else dtype, memory_format=torch.channels_last)

    if call.op == "bn_apply_add_relu":
        out = empty(call.out_dtype)
        mask = None if call.activation == "none" else torch.empty(mask_words(call.numel), dtype=torch.int32)
        EAGER.apply(ForwardPass(bn, values.get("residual"), proj, call.activation, out, mask))
        return {"out": out} | ({} if mask is None else {"mask": mask})
    backward = BackwardPass(values["grad_out"], values.get("mask"), bn, proj)
    if call.op == "bn_backward_reduce":
        sums = EAGER.backward_reduce(backward)
        return {n: s for n, s in zip(("sum_dz", "sum_dz_xhat", "proj_sum_dz_xhat"), sums, strict=True) if s.numel()}
    d_y, second = empty(call.dtype), call.proj or call.residual
    d_second = None if second is None else empty(second)
    means = means_of(values, "")
    assert means is not None
    EAGER.backward_apply(backward, Gradients(means, means_of(values, "proj_"), d_y, d_second))
    return {"d_y": d_y} | ({} if d_second is None else {"d_second": d_second})


# ---- the bars


def check(run: Run, case: Case, kinds: tuple[str, ...] = ("integers", "random")) -> None:
    """Bit-exact where nothing can be rounded before the store, else within the factors of the table of tolerances."""
    call = case.call
    for kind in kinds:
        values = values_of(call, kind, case.seed)
        got, exact = run(case, values), eager(call, values, exact=True)
        assert set(got) == set(exact), f"{case}: {sorted(got)}"
        # Means of integers are rounded by their division, so that statistics are compared by the bar.
        if kind == "integers" and call.op != "bn_stats":
            for name, t in got.items():
                assert torch.equal(t, exact[name].to(t.dtype)), f"{case}: {kind}: {name} differs"
            continue
        own = eager(call, values, exact=False)
        factor = FORWARD_FACTOR if call.op in OPS[:2] else GRADIENT_FACTOR
        for name, t in got.items():
            if name == "mask":
                _check_mask(case, t, exact["out"])
                continue
            assert not t.isnan().any(), f"{case}: {kind}: {name} has NaN"
            error = float((t.double() - exact[name]).abs().max())
            allowed = float((own[name].double() - exact[name]).abs().max()) * factor
            # Eager's own error may be zero by luck on a few numbers; a few roundings are everyone's. Those of a mean
            # are relative to the numbers it is a mean of.
            size = float((values["y"] if name == "mean" else exact[name]).abs().max())
            allowed += size * (ROUNDING[t.dtype] + 4 * ROUNDING[torch.float32])
            assert error <= allowed, f"{case}: {kind}: {name}: error {error:.3g}, allowed {allowed:.3g}"


def _check_mask(case: Case, mask: Tensor, out: Tensor) -> None:
    """Bits of the exact output, but for outputs within a rounding of a corner; the bits behind the last are zero."""
    bits = unpack_mask(mask, out.shape)
    assert torch.equal(pack_mask(bits), mask), f"{case}: bits behind the last element"
    keep = (out > 0) & (out < 6) if case.call.activation == "relu6" else out > 0
    near = (out.abs() < 1e-5) | ((out - 6).abs() < 1e-5)
    assert not ((bits != keep) & ~near).any(), f"{case}: mask"
