"""The training passes of the CUDA extension, planned without it: ``bn_stats`` and its three companions.

A :class:`TrainingCall` is to them what a `Problem` is to a convolution, and has a text of its own::

    op=bn_apply_add_relu,n=8,h=14,w=14,c=64,dtype=float16,residual=1
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..backends.cuda import dtype_code
from ..backends.cuda_launch import Device
from ..core.problem import DTYPES, dtype_name
from ..core.reference import ACTIVATIONS
from ..core.training_call import mask_words
from .launch_json import Launch, TensorSpec, by_value, workspace_spec
from .planner import Entry, Planner, device_for, kernel_of, planner

OPS = ("bn_stats", "bn_apply_add_relu", "bn_backward_reduce", "bn_backward_apply")
_MACROS = tuple(f"FUSED_RESNET_BN_{name}_KERNELS" for name in ("STATS", "APPLY", "BACKWARD_REDUCE", "BACKWARD_APPLY"))
_AFFINE = ("none", "both", "weight", "bias")


@dataclass(frozen=True)
class TrainingCall:
    """Everything static about one call of a training pass.

    ``residual`` is the dtype of the residual, or of the gradient wanted for it; ``proj`` that of the projection's
    convolution output. ``affine`` says which of weight and bias the BNs have.
    """

    op: str
    n: int
    h: int
    w: int
    c: int
    dtype: torch.dtype = torch.float32
    residual: torch.dtype | None = None
    proj: torch.dtype | None = None
    activation: str = "relu"
    affine: str = "both"

    @classmethod
    def parse(cls, text: str) -> TrainingCall:
        """From ``"op=bn_stats,n=8,h=14,w=14,c=64,dtype=float16"``; ``residual`` and ``proj`` take 1 or a dtype."""
        fields = dict(part.strip().split("=", 1) for part in text.split(",") if "=" in part)
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ValueError(f"problem: unknown field {name!r} of a training pass, expected one of {known}")
        for name in ("op", "h", "w", "c"):
            if name not in fields:
                raise ValueError(f"problem: the field {name!r} is missing in {text!r}")
        dtype = _dtype("dtype", fields.get("dtype", "float32"), torch.float32)
        sizes = {name: _size(name, fields.get(name, "1")) for name in ("n", "h", "w", "c")}
        return cls(
            fields["op"], **sizes, dtype=dtype or torch.float32,
            residual=_dtype("residual", fields.get("residual", "0"), dtype),
            proj=_dtype("proj", fields.get("proj", "0"), dtype),
            activation=fields.get("activation", "relu"), affine=fields.get("affine", "both"),
        ).checked()  # fmt: skip

    def checked(self) -> TrainingCall:
        """This call, or a ValueError that names the field that makes it impossible."""
        for name, value, expected in (
            ("op", self.op, OPS), ("activation", self.activation, ACTIVATIONS), ("affine", self.affine, _AFFINE),
        ):  # fmt: skip
            if value not in expected:
                raise ValueError(f"problem: {name}: expected one of {', '.join(expected)}, got {value!r}")
        return self

    def __str__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        texts = {k: dtype_name(v) if isinstance(v, torch.dtype) else str(v) for k, v in values.items() if v is not None}
        return ",".join(f"{name}={text}" for name, text in texts.items())

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.n, self.c, self.h, self.w)

    @property
    def numel(self) -> int:
        return self.n * self.c * self.h * self.w

    @property
    def out_dtype(self) -> torch.dtype:
        """That of the activation, so of its gradient."""
        other = self.residual or self.proj
        return self.dtype if other is None else torch.promote_types(self.dtype, other)


def _size(name: str, text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"problem: {name}: expected a number, got {text!r}")
    return int(text)


def _dtype(name: str, text: str, own: torch.dtype | None) -> torch.dtype | None:
    if text in ("0", "1"):
        return own if text == "1" else None
    if text not in DTYPES:
        raise ValueError(f"problem: {name}: expected one of {', '.join(DTYPES)}, got {text!r}")
    return DTYPES[text]


@dataclass(frozen=True)
class TrainingKernel(Entry):
    """One kernel of the training passes; `packet` is the number of elements a thread loads at a time."""

    op: str
    packet: int
    header = "bn_entry.cuh"
    parameters = "BnParams"


class TrainingPlanner:
    """The planner of the training passes in the extension of ``planner``."""

    def __init__(self, planner: Planner) -> None:
        self.extension = planner.extension
        self.kernels = {row["symbol"]: kernel_of(TrainingKernel, row) for row in self.extension.training_catalogue()}

    def all_of(self, op: str) -> Entry:
        """All kernels of one pass as a single unit, as the extension compiles them."""
        kernels = [kernel for kernel in self.kernels.values() if kernel.op == op]
        return dataclasses.replace(
            kernels[0], symbol=f"all_{op}", definition=f"{_MACROS[OPS.index(op)]}(FUSED_RESNET_DEFINE_BN_KERNEL)",
            shared_bytes=max(kernel.shared_bytes for kernel in kernels), packet=0,
        )  # fmt: skip

    def plan(self, call: TrainingCall, arch: str, *, alignment: int = 16, device: Device | None = None) -> Launch:
        """What the extension would launch for dense channels_last tensors at multiples of ``alignment`` bytes."""
        device = device or device_for(arch)
        plan: Any = self.extension.plan_training(device.properties, **self.request(call, alignment))
        return Launch(
            kernel=plan.kernel,
            arch=arch,
            grid=plan.grid,
            block=plan.block,
            dynamic_shared_bytes=plan.dynamic_shared_bytes,
            workspace_bytes=plan.workspace_bytes,
            arguments=[by_value(plan.argument, plan.pointers)],
            tensors={name: _spec(call, name, plan.workspace_bytes, size) for name, size in plan.alignment.items()},
            problem=str(call),
            workspace_initial="zeros" if plan.counter_bytes else None,
            extra={"planned_for": dataclasses.asdict(device)},
        )

    def request(self, call: TrainingCall, alignment: int) -> dict[str, int]:
        """The call as the planner reads it."""
        extension = self.extension

        def code(dtype: torch.dtype | None) -> int:
            return dtype_code(extension, "activations", dtype)

        affine: int = extension.AFFINE[call.affine]
        return {
            "rows": call.n * call.h * call.w, "channels": call.c, "pass": extension.PASSES[call.op],
            "y_dtype": code(call.dtype), "proj_dtype": code(call.proj), "residual_dtype": code(call.residual),
            "out_dtype": code(call.out_dtype), "activation": extension.ACTIVATIONS[call.activation],
            "mask": int(call.activation != "none"), "affine": affine, "proj_affine": affine, "alignment": alignment,
        }  # fmt: skip


def _spec(call: TrainingCall, name: str, workspace_bytes: int, alignment: int) -> TensorSpec:
    if name == "workspace":
        return dataclasses.replace(workspace_spec(workspace_bytes), alignment=alignment)
    if name == "mask":
        return TensorSpec("int32", (mask_words(call.numel),), (1,), alignment)
    dtypes = {
        "y": call.dtype, "d_y": call.dtype, "proj_y": call.proj, "residual": call.residual,
        "d_second": call.proj or call.residual, "out": call.out_dtype, "grad_out": call.out_dtype,
    }  # fmt: skip
    dtype = dtypes.get(name)
    if dtype is None:  # a vector
        return TensorSpec("float32", (call.c,), (1,), alignment)
    strides = (call.h * call.w * call.c, 1, call.w * call.c, call.c)
    return TensorSpec(dtype_name(dtype), call.shape, strides, alignment)


@lru_cache
def training_planner() -> TrainingPlanner:
    """The planner of the sources that belong to this package."""
    return TrainingPlanner(planner())
