"""A fused model against its original: errors against float64, per block and end to end, beside eager's own.

Each block is judged by itself: all three sides (eager, fused, float64) get the block's input as eager computes it,
so that an error is charged to the block that makes it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.problem import dtype_name
from ..core.timing import first_tensor
from ..surgery import explain
from ..testing.tolerances import FORWARD_FACTOR, ROUNDING, WINOGRAD_F4_RMS_FACTOR

__all__ = ["Row", "Verification", "block_inputs", "verify"]


@dataclass(frozen=True)
class Row:
    """One block, or the whole model (``name`` empty). Errors are relative to the largest exact value."""

    name: str
    kind: str
    eager_max: float
    fused_max: float
    eager_rms: float
    fused_rms: float
    passed: bool
    rule: str  # the rule that decided

    @property
    def ratio(self) -> float:
        """Fused error over eager's, in the measure of the rule."""
        fused, eager = (self.fused_rms, self.eager_rms) if "rms" in self.rule else (self.fused_max, self.eager_max)
        return fused / eager if eager > 0 else (0.0 if fused == 0 else float("inf"))


@dataclass(frozen=True)
class Verification:
    rows: tuple[Row, ...]  # blocks in the model's order, the whole model last
    same_top1: int  # images whose largest logit is the same one as eager's
    images: int
    dtype: torch.dtype

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    @property
    def end_to_end(self) -> Row:
        return self.rows[-1]


def block_inputs(model: nn.Module, names: Iterable[str], *inputs: Tensor) -> dict[str, Tensor]:
    """The input that each named submodule gets when ``model`` runs on ``inputs``."""
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...]) -> None:
            if name not in seen and args and isinstance(args[0], Tensor):
                seen[name] = args[0].detach().clone()  # blocks may change their input in place

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(remember(name)) for name in names]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _row(name: str, kind: str, eager: Tensor, fused: Tensor, exact: Tensor, winograd: bool) -> Row:
    exact64 = exact.double()
    scale = float(exact64.abs().max()) or 1.0
    eager_error, fused_error = ((t.double() - exact64).abs() / scale for t in (eager, fused))
    eager_max, fused_max = float(eager_error.max()), float(fused_error.max())
    eager_rms, fused_rms = (float(e.square().mean().sqrt()) for e in (eager_error, fused_error))
    one_rounding = ROUNDING[fused.dtype]
    rule = f"max error <= {FORWARD_FACTOR:g} x eager's"
    passed = fused_max <= FORWARD_FACTOR * eager_max + one_rounding
    if not passed and winograd:
        rule = f"rms error <= {WINOGRAD_F4_RMS_FACTOR:g} x eager's (Winograd)"
        passed = fused_rms <= WINOGRAD_F4_RMS_FACTOR * eager_rms + one_rounding
    return Row(name, kind, eager_max, fused_max, eager_rms, fused_rms, passed, rule)


def _outputs(sides: tuple[nn.Module, ...], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each side's output on its own copy of ``x``, since blocks may change their input in place."""
    eager, fused, exact = sides
    return first_tensor(eager(x.clone())), first_tensor(fused(x.clone())), first_tensor(exact(x.double()))


def verify(model: nn.Module, fused: nn.Module, x: Tensor, *, winograd: bool | None = None) -> Verification:
    """Compare ``fused`` (made from ``model`` by :func:`fused_resnet.fuse`) with ``model`` in eval mode on input ``x``.

    A row passes by the project's numerical bar: the fused result's largest error against float64 is at most twice
    eager's own plus one rounding. All sides run in channels_last, the layout that ``fuse`` gives the weights, since
    eager's error differs between the layouts. Where Winograd may run (``winograd``; by default: float32 on the CPU)
    a row may pass by Winograd's own bound on the rms error instead, and says so. ValueError when nothing is fused.
    """
    model, fused = copy.deepcopy(model).eval().to(memory_format=torch.channels_last), fused.eval()
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    if winograd is None:
        winograd = x.device.type == "cpu" and x.dtype == torch.float32
    exact_model = copy.deepcopy(model).double()
    fused_entries = [entry for entry in explain(fused).fused if entry.name]
    if not fused_entries and not explain(fused).fused:
        raise ValueError("verify: nothing in this model is fused; explain(model) gives the reasons")
    rows = []
    inputs = block_inputs(model, [entry.name for entry in fused_entries], x)
    with torch.no_grad():
        for entry in fused_entries:
            if entry.name not in inputs:
                continue  # never called by this model's forward
            block_x = inputs[entry.name]
            sides = tuple(m.get_submodule(entry.name) for m in (model, fused, exact_model))
            rows.append(_row(entry.name, entry.kind, *_outputs(sides, block_x), winograd))
        eager_y, fused_y, exact_y = _outputs((model, fused, exact_model), x)
    rows.append(_row("", type(model).__name__, eager_y, fused_y, exact_y, winograd))
    same = 0
    if eager_y.dim() > 1:  # [images, classes], or a map of classes for segmentation
        equal = eager_y.argmax(1) == fused_y.argmax(1)
        same = int(equal.reshape(len(equal), -1).all(1).sum())
    return Verification(tuple(rows), same, x.shape[0], x.dtype)


def to_dict(result: Verification) -> dict[str, object]:
    """The same as plain data, for JSON."""
    rows = [{**row.__dict__, "ratio": row.ratio} for row in result.rows]
    return {
        "passed": result.passed, "dtype": dtype_name(result.dtype), "images": result.images,
        "same_top1": result.same_top1, "rows": rows,
    }  # fmt: skip
