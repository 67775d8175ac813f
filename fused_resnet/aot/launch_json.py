"""``launch.json``: all that a stranger needs to launch a compiled kernel with the CUDA driver API.

::

    {"kernel": symbol, "arch": "sm_80", "grid": [x, y, z], "block": [x, y, z], "cluster": [x, y, z],
     "dynamic_shared_bytes": 49216, "workspace_bytes": 0, "arguments": [...], "tensors": {name: {...}},
     "problem": "n=1,h=14,...", "eps": 1e-05, "proj_eps": 1e-05, "workspace_initial": null}

``arguments`` lists every kernel parameter in order: ``{"type": "pointer", "tensor": name or null}``,
``{"type": "int32" | "int64" | "float32", "value": v}``, a struct by value ``{"type": "bytes", "hex": "...",
"pointers": [{"offset": o, "tensor": name}]}`` (the eight bytes at ``offset`` are zero and become the tensor's
address), or ``{"type": "tensormap", "tensor": name, "mode": "tiled" | "im2col", ...}`` with every parameter of
cuTensorMapEncodeTiled, or of cuTensorMapEncodeIm2col: then ``box`` is [channelsPerPixel, pixelsPerColumn], and
``lower_corner`` and ``upper_corner`` are there, for W and H. A tensormap parameter is aligned to 128 bytes.

``tensors`` gives, for each tensor that an argument names, ``dtype``, ``shape`` and ``strides`` (in elements, in
torch's order of dimensions: ``x`` is [N, C, H, W], ``weight`` [K, C, R, S], ``y`` [N, K, P, Q], vectors [K]), and
``alignment``, the bytes its address must be a multiple of.

The last four keys are ours. ``problem`` (the text of `fused_resnet.core.problem.Problem`) and the two eps say what
the kernel computes. ``workspace_initial`` is ``"zeros"`` where the workspace must be all zeros before the first
launch (every launch leaves what it needs zeroed zeroed), ``null`` where its content does not matter.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..core.problem import DTYPES, Problem, dtype_name

#: The names a tensor may have in a launch.json.
TENSOR_NAMES = (
    "x", "weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var", "residual",
    "proj_x", "proj_weight", "proj_bias", "proj_bn_weight", "proj_bn_bias", "proj_running_mean", "proj_running_var",
    "workspace", "y",
    # of the training passes, where y is an input
    "mean", "invstd", "mean_dz", "mean_dz_xhat", "var", "proj_y", "proj_mean", "proj_invstd", "proj_mean_dz",
    "proj_mean_dz_xhat", "grad_out", "out", "mask", "d_y", "d_second", "sum_dz", "sum_dz_xhat", "proj_sum_dz_xhat",
)  # fmt: skip

#: What a tensor of launch.json may hold: numbers, words of a mask, bytes of a workspace.
TENSOR_DTYPES = {**DTYPES, "int32": torch.int32, "uint8": torch.uint8}

_SCALARS = ("int32", "int64", "float32")
_KEYS = (
    "kernel", "arch", "grid", "block", "cluster", "dynamic_shared_bytes", "workspace_bytes", "arguments", "tensors",
)  # fmt: skip
_TENSORMAP_KEYS = ("data_type", "dims", "strides_bytes", "box", "element_strides", "interleave", "swizzle",
                   "l2_promotion", "oob_fill")  # fmt: skip
_IM2COL_KEYS = ("lower_corner", "upper_corner")

Dim3 = tuple[int, int, int]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: shape and strides in torch's order of dimensions, strides in elements, alignment in bytes."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    alignment: int

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last one."""
        if 0 in self.shape:
            return 0
        item = TENSOR_DTYPES[self.dtype].itemsize
        return item * (1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)))


def pointer(tensor: str | None) -> dict[str, Any]:
    return {"type": "pointer", "tensor": tensor}


def scalar(kind: Literal["int32", "int64", "float32"], value: int | float) -> dict[str, Any]:
    return {"type": kind, "value": value}


def by_value(data: bytes, pointers: dict[int, str]) -> dict[str, Any]:
    """A struct passed by value; ``pointers`` maps byte offsets to the tensors whose addresses belong there."""
    return {
        "type": "bytes",
        "hex": data.hex(),
        "pointers": [{"offset": offset, "tensor": name} for offset, name in sorted(pointers.items())],
    }


def tensormap(tensor: str, **parameters: Any) -> dict[str, Any]:
    """A TMA descriptor; ``parameters`` are those of the driver's function, innermost dimension first."""
    return {"type": "tensormap", "tensor": tensor, **parameters}


@dataclass(frozen=True)
class Launch:
    """The content of one ``launch.json``."""

    kernel: str
    arch: str
    grid: Dim3
    block: Dim3
    dynamic_shared_bytes: int
    workspace_bytes: int
    arguments: list[dict[str, Any]]
    tensors: dict[str, TensorSpec]
    cluster: Dim3 = (1, 1, 1)
    problem: str = ""
    eps: float = 1e-5
    proj_eps: float = 1e-5
    workspace_initial: Literal["zeros"] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("grid", "block", "cluster"):
            value = getattr(self, name)
            if len(value) != 3 or min(value) < (0 if name == "grid" else 1):
                raise ValueError(f"{name}: expected three positive integers, got {value}")
        named: set[str] = set()
        for index, argument in enumerate(self.arguments):
            named |= _check_argument(f"arguments[{index}]", argument)
        if named != set(self.tensors):
            raise ValueError(f"tensors: expected {sorted(named)}, those the arguments name, got {sorted(self.tensors)}")
        unknown = named - set(TENSOR_NAMES)
        if unknown:
            raise ValueError(f"tensors: expected names out of {TENSOR_NAMES}, got {sorted(unknown)}")
        if ("workspace" in named) != (self.workspace_bytes > 0):
            raise ValueError(f"workspace_bytes: got {self.workspace_bytes}, but the arguments name {sorted(named)}")

    def to_json(self) -> str:
        record = dataclasses.asdict(self)
        record |= record.pop("extra")
        # the keys of the format first, ours after them
        record = {key: record[key] for key in _KEYS} | record
        return "{\n" + ",\n".join(f" {json.dumps(key)}: {_value(value)}" for key, value in record.items()) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Launch:
        record = json.loads(text)
        missing = [key for key in _KEYS if key not in record]
        if missing:
            raise ValueError(f"launch.json: the key {missing[0]!r} is missing")
        tensors = {
            name: TensorSpec(t["dtype"], tuple(t["shape"]), tuple(t["strides"]), t["alignment"])
            for name, t in record.pop("tensors").items()
        }
        for name in ("grid", "block", "cluster"):
            record[name] = tuple(record[name])
        fields = {f.name for f in dataclasses.fields(cls)}
        extra = {key: record.pop(key) for key in list(record) if key not in fields}
        return cls(**record, tensors=tensors, extra=extra)


def _value(value: Any) -> str:
    """JSON with one argument or tensor a line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n  " + ",\n  ".join(json.dumps(item) for item in value) + "\n ]"
    if isinstance(value, dict) and value and isinstance(next(iter(value.values())), dict):
        return "{\n  " + ",\n  ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n }"
    return json.dumps(value)


def _check_argument(where: str, argument: dict[str, Any]) -> set[str]:
    """The tensors that one argument names; ValueError where it is not of the format."""
    kind = argument.get("type")
    if kind == "pointer":
        return {argument["tensor"]} - {None}
    if kind in _SCALARS:
        expected = float if kind == "float32" else int
        if not isinstance(argument["value"], expected):
            raise ValueError(f"{where}: expected {expected.__name__} for {kind}, got {argument['value']!r}")
        return set()
    if kind == "bytes":
        data = bytes.fromhex(argument["hex"])
        for entry in argument["pointers"]:
            address = data[entry["offset"] : entry["offset"] + 8]
            if entry["offset"] % 8 or address != bytes(8):
                raise ValueError(f"{where}: expected 8 zero bytes at offset {entry['offset']}, got {address.hex()}")
        return {entry["tensor"] for entry in argument["pointers"]}
    if kind == "tensormap":
        mode = argument.get("mode", "tiled")
        if mode not in ("tiled", "im2col"):
            raise ValueError(f"{where}: expected the tensormap's mode to be tiled or im2col, got {mode!r}")
        wanted = _TENSORMAP_KEYS + (_IM2COL_KEYS if mode == "im2col" else ())
        missing = [key for key in wanted if key not in argument]
        if missing:
            raise ValueError(f"{where}: expected the tensormap parameter {missing[0]!r}, got {sorted(argument)}")
        return {argument["tensor"]}
    raise ValueError(f"{where}: expected type pointer, bytes, tensormap or one of {_SCALARS}, got {kind!r}")


def default_bn_dtype(problem: Problem) -> torch.dtype:
    """float32 beside 16-bit activations, as mixed precision keeps it; else that of the activations."""
    return torch.float32 if problem.dtype.itemsize == 2 else problem.dtype


def tensor_specs(
    problem: Problem, alignment: dict[str, int] | int, bn_dtype: torch.dtype | None = None
) -> dict[str, TensorSpec]:
    """Every tensor of ``problem`` as the kernels want it: activations and weights channels_last and dense.

    ``alignment`` is one number, or one per tensor (missing: the size of an element). BN vectors are float32 unless
    ``bn_dtype`` says otherwise, as in mixed precision; the convolution's bias has the dtype of x.
    """
    bn = bn_dtype or default_bn_dtype(problem)

    def spec(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorSpec:
        aligned = alignment if isinstance(alignment, int) else alignment.get(name, dtype.itemsize)
        if len(shape) == 1:
            strides: tuple[int, ...] = (1,)
        else:
            _, c, h, w = shape
            strides = (h * w * c, 1, w * c, c)
        return TensorSpec(dtype_name(dtype), shape, strides, max(aligned, dtype.itemsize))

    k = problem.k
    specs = {
        "x": spec("x", problem.dtype, (problem.n, problem.c, problem.h, problem.w)),
        "weight": spec("weight", problem.dtype, (k, problem.c // problem.groups, problem.r, problem.s)),
    }

    def vectors(prefix: str, bias: bool, has_bn: bool) -> None:
        if bias:
            specs[prefix + "bias"] = spec(prefix + "bias", problem.dtype, (k,))
        if has_bn:
            for name in ("bn_weight", "bn_bias", "running_mean", "running_var"):
                specs[prefix + name] = spec(prefix + name, bn, (k,))

    vectors("", problem.bias, problem.bn)
    if problem.residual is not None:
        specs["residual"] = spec("residual", problem.residual, problem.output_shape)
    if (proj := problem.projection) is not None:
        specs["proj_x"] = spec("proj_x", problem.dtype, (problem.n, proj.c, proj.h, proj.w))
        specs["proj_weight"] = spec("proj_weight", problem.dtype, (k, proj.c, 1, 1))
        vectors("proj_", proj.bias, proj.bn)
    specs["y"] = spec("y", problem.output_dtype, problem.output_shape)
    return specs


def workspace_spec(size: int, alignment: int = 256) -> TensorSpec:
    return TensorSpec("uint8", (size,), (1,), alignment)


def write(directory: Path, launch: Launch, ptx: str | bytes, cubin: bytes) -> None:
    """``kernel.ptx``, ``kernel.cubin`` and ``launch.json`` in ``directory``, which is made if need be."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "kernel.ptx").write_bytes(ptx.encode() if isinstance(ptx, str) else ptx)
    (directory / "kernel.cubin").write_bytes(cubin)
    (directory / "launch.json").write_text(launch.to_json())
