"""What a forward pass asks of a device: its kernels, with their FLOPs and compulsory bytes.

The pass runs on ``meta`` tensors under a dispatch mode, so any model that PyTorch runs can be counted, fused or
not, at any batch size, in milliseconds and without memory.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import ops as _ops
from ..core.problem import Problem


@dataclass(frozen=True)
class Kernel:
    """One launch: the operator, the module whose forward called it, its work and its traffic."""

    operator: str
    module: str
    flops: int
    bytes: int
    dtype: torch.dtype
    problem: Problem | None = None  # of a fused tail, as on a GPU


def _size(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _tensors(values: Any) -> list[Tensor]:
    """The distinct tensors in arguments or results."""
    found = {id(t): t for t in tree_leaves(values) if isinstance(t, Tensor)}
    return list(found.values())


def _convolution_flops(x: Tensor, weight: Tensor, y: Tensor) -> int:
    return 2 * y.numel() * weight[0].numel()


def _skipped_by_stride(x: Tensor, weight: Tensor, stride: Iterable[int]) -> int:
    """Bytes of ``x`` that a convolution whose stride exceeds its filter never reads."""
    share = 1.0
    for window, step in zip(weight.shape[2:], stride, strict=False):
        share *= min(1.0, window / step)
    return int(_size(x) * (1 - share))


class TrafficMode(TorchDispatchMode):
    """Records every operator that would launch a kernel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self._names = {id(module): name for name, module in model.named_modules()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        if outputs and not self._is_view(func, inputs):
            self._record(func, args, kwargs, inputs, outputs)
        return out

    @staticmethod
    def _is_view(func: Any, inputs: list[Tensor]) -> bool:
        """Whether the operator only gives memory another shape, or makes memory without touching it."""
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        return any(not alias.is_write for alias in aliases) or not inputs or "empty" in func._schema.name

    def _record(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        name = func._schema.name
        if "batch_norm" in name:
            outputs = outputs[:1]  # the statistics that it returns besides are empty in evaluation mode
        traffic = sum(map(_size, inputs)) + sum(map(_size, outputs))
        flops, problem = 0, None
        if name.startswith("fused_resnet::conv_bn") and not name.endswith("stats"):
            tail, _ = _ops.tail.to_tail(name.removeprefix("fused_resnet::"), *args, **kwargs)
            problem = dataclasses.replace(Problem.from_tail(tail), device_type="cuda")
            flops, traffic = problem.flops, problem.compulsory_bytes
        elif name in ("aten::convolution", "aten::_convolution", "fused_resnet::conv_bn_stats"):
            x, weight, stride = args[0], args[1], args[3]
            flops = _convolution_flops(x, weight, outputs[0])
            traffic -= _skipped_by_stride(x, weight, stride)
        elif name in ("aten::addmm", "aten::mm"):
            matrix = args[1] if name == "aten::addmm" else args[0]
            flops = 2 * outputs[0].numel() * matrix.shape[-1]
        self.kernels.append(Kernel(name, _running(self._names), flops, traffic, outputs[0].dtype, problem))


def _running(names: dict[int, str]) -> str:
    """The name of the innermost module of ``names``, by id, whose code is running.

    By the frames of the interpreter, not by hooks or a ``__call__`` of ours: a module that is looked at in these ways
    would rightly not be fused.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if "self" in frame.f_code.co_varnames[:1]:
            name = names.get(id(frame.f_locals.get("self")))
            if name is not None:
                return name
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def count(model: nn.Module, shape: Iterable[int], dtype: torch.dtype = torch.float16) -> list[Kernel]:
    """The kernels of ``model(x)`` in evaluation mode without gradients, ``x`` of ``shape`` in channels_last.

    Works on a copy of the model on the meta device; the model itself is left alone.
    """
    model = copy.deepcopy(model).to(device="meta", dtype=dtype).eval()
    x = torch.empty(tuple(shape), dtype=dtype, device="meta")
    if x.dim() == 4:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    mode = TrafficMode(model)
    with torch.no_grad(), mode:  # inference_mode would leave composite operators whole, whatever they launch
        model(x)
    return mode.kernels
