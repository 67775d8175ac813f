"""A ``Problem``: everything static about one call of the tail, and the check of a call's arguments.

Letters are cuDNN's: input ``N H W C``, filter ``K R S``, output ``P Q``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layout import output_memory_format
from .reference import ACTIVATIONS, ConvBN, TailArguments

DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float16`` -> ``"float16"``."""
    return str(dtype).removeprefix("torch.")


def tf32_allowed() -> bool:
    """Whether torch allows tf32 in convolutions on CUDA.

    ``fp32_precision`` is read first: once any of the new switches has been set, reading the old
    ``allow_tf32`` raises. torch itself keeps the two in step.
    """
    precision = getattr(getattr(torch.backends.cudnn, "conv", None), "fp32_precision", None)
    return bool(torch.backends.cudnn.allow_tf32) if precision is None else precision == "tf32"


def _out(size: int, window: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (window - 1) - 1) // stride + 1


@dataclass(frozen=True)
class Projection:
    """The 1x1 convolution (padding 0) of ``proj_x`` [N, c, h, w] that is added instead of a residual."""

    c: int
    h: int
    w: int
    stride: tuple[int, int]
    bias: bool
    bn: bool


@dataclass(frozen=True)
class Problem:
    """Shapes, dtypes and options of one call; hashable, so plans and tuning results are kept by it.

    ``c`` counts all input channels; the weight is ``[k, c // groups, r, s]``. ``residual`` is the residual's
    dtype, or None. ``tf32`` says that float32 products may be rounded to tf32 (CUDA only).
    """

    n: int
    h: int
    w: int
    c: int
    k: int
    r: int
    s: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: torch.dtype = torch.float32
    device_type: str = "cpu"
    residual: torch.dtype | None = None
    bias: bool = False
    bn: bool = True
    activation: str = "relu"
    projection: Projection | None = None
    channels_last: bool = True
    tf32: bool = False

    @property
    def p(self) -> int:
        return _out(self.h, self.r, self.stride[0], self.padding[0], self.dilation[0])

    @property
    def q(self) -> int:
        return _out(self.w, self.s, self.stride[1], self.padding[1], self.dilation[1])

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return (self.n, self.k, self.p, self.q)

    @property
    def output_dtype(self) -> torch.dtype:
        return self.dtype if self.residual is None else torch.promote_types(self.dtype, self.residual)

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiply-add counted as two; the epilogue is left out."""
        depth = self.r * self.s * (self.c // self.groups) + (self.projection.c if self.projection else 0)
        return 2 * self.n * self.p * self.q * self.k * depth

    @property
    def compulsory_bytes(self) -> int:
        """Bytes that any implementation moves: each input read once, the output written once."""
        item = self.dtype.itemsize
        pixels = self.n * self.p * self.q
        total = item * (self.n * self.h * self.w * self.c + self.k * self.r * self.s * self.c // self.groups)
        total += pixels * self.k * self.output_dtype.itemsize
        if self.residual is not None:
            total += pixels * self.k * self.residual.itemsize
        if self.projection is not None:
            # a strided 1x1 convolution reads one pixel in stride*stride
            total += item * (pixels * self.projection.c + self.k * self.projection.c)
        vectors = (4 if self.bn else 0) + int(self.bias)
        if self.projection is not None:
            vectors += (4 if self.projection.bn else 0) + int(self.projection.bias)
        return total + 4 * vectors * self.k

    def __str__(self) -> str:
        """The form that :meth:`parse` reads; fields at their default are left out."""
        parts = [f"{name}={getattr(self, name)}" for name in ("n", "h", "w", "c", "k", "r", "s")]
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
            value = getattr(self, name)
            if value != (default, default):
                parts.append(f"{name}={_pair_text(value)}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        parts.append(f"dtype={dtype_name(self.dtype)}")
        if self.residual is not None:
            parts.append("residual=1" if self.residual == self.dtype else f"residual={dtype_name(self.residual)}")
        parts.append(f"activation={self.activation}")
        parts.append(f"bn={int(self.bn)}")
        if self.bias:
            parts.append("bias=1")
        if self.projection is not None:
            proj = self.projection
            parts.append(f"proj={proj.c}x{proj.h}x{proj.w}x{_pair_text(proj.stride)}")
            parts.append(f"proj_bn={int(proj.bn)}")
            if proj.bias:
                parts.append("proj_bias=1")
        if self.tf32:
            parts.append("tf32=1")
        if self.device_type != "cpu":
            parts.append(f"device={self.device_type}")
        if not self.channels_last:
            parts.append("channels_last=0")
        return ",".join(parts)

    @classmethod
    def parse(cls, text: str) -> Problem:
        """A problem from ``"n=1,h=14,w=14,c=64,k=64,r=3,s=3,stride=1,padding=1,dtype=float16,residual=1,relu=1,bn=1"``.

        ``stride``, ``padding`` and ``dilation`` take ``2`` or ``2:1``; ``dtype=tf32`` means float32 with tf32
        products; ``relu=0|1`` is short for ``activation=none|relu``; ``proj=CxHxWxSTRIDE`` adds a projection, with
        ``proj=C`` or ``proj=CxSTRIDE`` the size of its input is derived. Raises ValueError naming the field.
        """
        fields = _fields(text)
        known = {f.name for f in dataclasses.fields(cls)} - {"projection", "device_type"}
        known |= {"relu", "proj", "proj_bn", "proj_bias", "device"}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"problem: unknown field {unknown[0]!r}, expected one of {sorted(known)}")
        missing = [name for name in ("h", "w", "c", "k") if name not in fields]
        if missing:
            raise ValueError(f"problem: the field {missing[0]!r} is missing in {text!r}")
        integer = _integer_reader(fields)
        dtype_text = fields.get("dtype", "float32")
        tf32 = dtype_text == "tf32" or bool(integer("tf32", 0))
        dtype = torch.float32 if dtype_text == "tf32" else _dtype("dtype", dtype_text)
        residual_text = fields.get("residual", "0")
        residual: torch.dtype | None
        if residual_text in ("0", "1"):
            residual = dtype if residual_text == "1" else None
        else:
            residual = _dtype("residual", residual_text)
        activation = fields.get("activation", "relu" if integer("relu", 1) else "none")
        problem = cls(
            n=integer("n", 1), h=integer("h"), w=integer("w"), c=integer("c"), k=integer("k"),
            r=integer("r", 3), s=integer("s", integer("r", 3)),
            stride=_pair("stride", fields.get("stride", "1")),
            padding=_pair("padding", fields.get("padding", "0")),
            dilation=_pair("dilation", fields.get("dilation", "1")),
            groups=integer("groups", 1), dtype=dtype, device_type=fields.get("device", "cpu"),
            residual=residual, bias=bool(integer("bias", 0)), bn=bool(integer("bn", 1)),
            activation=activation, channels_last=bool(integer("channels_last", 1)), tf32=tf32,
        )  # fmt: skip
        if fields.get("proj", "0") != "0":
            problem = dataclasses.replace(problem, projection=_parse_projection(fields, problem))
        return problem.checked()

    def checked(self) -> Problem:
        """This problem, or a ValueError that names the field that makes it impossible."""
        for name in ("c", "k", "r", "s", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"problem: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("n", "h", "w"):
            if getattr(self, name) < 0:
                raise ValueError(f"problem: {name} must not be negative, got {getattr(self, name)}")
        for name, least in (("stride", 1), ("dilation", 1), ("padding", 0)):
            if min(getattr(self, name)) < least:
                raise ValueError(f"problem: {name} must be at least {least}, got {getattr(self, name)}")
        if self.c % self.groups or self.k % self.groups:
            raise ValueError(f"problem: groups={self.groups} must divide c={self.c} and k={self.k}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {self.activation!r}")
        if self.p < 1 or self.q < 1:
            raise ValueError(
                f"x: {self.h}x{self.w} is too small for a {self.r}x{self.s} filter with padding {self.padding} "
                f"and dilation {self.dilation}"
            )
        if self.projection is not None:
            if self.residual is not None:
                raise ValueError("residual: expected none beside a projection")
            proj = self.projection
            got = tuple(_out(size, 1, step, 0, 1) for size, step in zip((proj.h, proj.w), proj.stride, strict=True))
            if got != (self.p, self.q):
                raise ValueError(f"proj_x: its projection is {got[0]}x{got[1]}, expected {self.p}x{self.q}")
        return self

    @classmethod
    def from_tail(cls, tail: TailArguments) -> Problem:
        """The problem of one call; raises ValueError/TypeError naming the argument where they do not fit."""
        x, weight = tail.x, tail.conv.weight
        _check_4d("x", x)
        _check_4d("weight", weight)
        _check_floating("x", x)
        projection = None
        if tail.proj is not None and tail.proj_x is not None:
            _check_4d("proj_x", tail.proj_x)
            _check_4d("proj_weight", tail.proj.weight)
            projection = Projection(
                c=tail.proj_x.shape[1], h=tail.proj_x.shape[2], w=tail.proj_x.shape[3], stride=tail.proj_stride,
                bias=tail.proj.bias is not None, bn=tail.proj.running_mean is not None,
            )  # fmt: skip
        if tail.groups < 1 or weight.shape[1] * tail.groups != x.shape[1]:
            raise ValueError(
                f"weight: expected [K, {x.shape[1]} / groups, R, S] for x with {x.shape[1]} channels and "
                f"groups={tail.groups}, got {list(weight.shape)}"
            )
        problem = cls(
            n=x.shape[0], h=x.shape[2], w=x.shape[3], c=x.shape[1],
            k=weight.shape[0], r=weight.shape[2], s=weight.shape[3],
            stride=tail.stride, padding=tail.padding, dilation=tail.dilation, groups=tail.groups,
            dtype=x.dtype, device_type=x.device.type,
            residual=None if tail.residual is None else tail.residual.dtype,
            bias=tail.conv.bias is not None, bn=tail.conv.running_mean is not None,
            activation=tail.activation, projection=projection,
            channels_last=output_memory_format(x, weight) is torch.channels_last,
            tf32=x.device.type == "cuda" and x.dtype is torch.float32 and tf32_allowed(),
        ).checked()  # fmt: skip
        _check_conv_bn("", tail.conv, x, problem.k)
        if tail.residual is not None:
            _check_like("residual", tail.residual, x, same_dtype=False)
            if tuple(tail.residual.shape) != problem.output_shape:
                raise ValueError(
                    f"residual: expected shape {list(problem.output_shape)}, that of the convolution's output, got "
                    f"{list(tail.residual.shape)}"
                )
        if tail.proj is not None and tail.proj_x is not None:
            _check_like("proj_x", tail.proj_x, x)
            if tail.proj_x.shape[0] != problem.n:
                raise ValueError(f"proj_x: expected batch size {problem.n}, got {tail.proj_x.shape[0]}")
            expected = (problem.k, tail.proj_x.shape[1], 1, 1)
            if tuple(tail.proj.weight.shape) != expected:
                raise ValueError(f"proj_weight: expected {list(expected)}, got {list(tail.proj.weight.shape)}")
            _check_conv_bn("proj_", tail.proj, x, problem.k)
        return problem


# ---- argument checks -------------------------------------------------------------------------------------


def _check_4d(name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    if t.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions, got {t.dim()} ({list(t.shape)})")


def _check_floating(name: str, t: Tensor) -> None:
    if t.dtype not in DTYPES.values():
        raise TypeError(f"{name}: expected dtype {', '.join(DTYPES)}, got {dtype_name(t.dtype)}")


def _check_like(name: str, t: Tensor, x: Tensor, same_dtype: bool = True) -> None:
    if t.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, that of x, got {t.device}")
    _check_floating(name, t)
    if same_dtype and t.dtype != x.dtype:
        raise TypeError(f"{name}: expected dtype {dtype_name(x.dtype)}, that of x, got {dtype_name(t.dtype)}")


def _check_conv_bn(prefix: str, conv: ConvBN, x: Tensor, k: int) -> None:
    _check_like(prefix + "weight", conv.weight, x)
    if conv.bias is not None:
        _check_like(prefix + "bias", conv.bias, x)
    if (conv.running_mean is None) != (conv.running_var is None):
        raise ValueError(f"{prefix}running_mean and {prefix}running_var: expected both or neither")
    if conv.running_mean is None and (conv.bn_weight is not None or conv.bn_bias is not None):
        raise ValueError(f"{prefix}bn_weight and {prefix}bn_bias: expected None where running_mean is None (no BN)")
    if not conv.eps >= 0:
        raise ValueError(f"{prefix}eps: expected a number >= 0, got {conv.eps}")
    for field in ("bias", "bn_weight", "bn_bias", "running_mean", "running_var"):
        t = getattr(conv, field)
        if t is None:
            continue
        if tuple(t.shape) != (k,):
            raise ValueError(
                f"{prefix}{field}: expected shape [{k}], one value per output channel, got {list(t.shape)}"
            )
        if field != "bias":
            _check_like(prefix + field, t, x, same_dtype=False)
            # Mixed precision keeps BN in float32 beside float16/bfloat16 activations, as torch's own batch_norm does.
            allowed = {x.dtype, torch.float32} if x.dtype.itemsize == 2 else {x.dtype}
            if t.dtype not in allowed:
                names = " or ".join(sorted(dtype_name(dtype) for dtype in allowed))
                raise TypeError(f"{prefix}{field}: expected dtype {names}, got {dtype_name(t.dtype)}")


# ---- text form -------------------------------------------------------------------------------------------


def _pair_text(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}:{pair[1]}"


def _fields(text: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise ValueError(f"problem: expected name=value, got {part!r}")
        if name in fields:
            raise ValueError(f"problem: the field {name!r} stands twice in {text!r}")
        fields[name] = value
    return fields


def _integer_reader(fields: dict[str, str]) -> Any:
    def read(name: str, default: int | None = None) -> int:
        value = fields.get(name, default)
        try:
            return int(value)  # type: ignore[arg-type]
        except ValueError:
            raise ValueError(f"problem: {name}: expected an integer, got {value!r}") from None

    return read


def _pair(name: str, text: str) -> tuple[int, int]:
    try:
        numbers = [int(piece) for piece in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise ValueError(f"problem: {name}: expected an integer or two as '2:1', got {text!r}")
    return numbers[0], numbers[-1]


def _dtype(name: str, text: str) -> torch.dtype:
    if text not in DTYPES:
        raise ValueError(f"problem: {name}: expected one of {', '.join(DTYPES)} or tf32, got {text!r}")
    return DTYPES[text]


def _parse_projection(fields: dict[str, str], problem: Problem) -> Projection:
    text = fields["proj"]
    pieces = text.split("x")
    if len(pieces) not in (1, 2, 4) or not all(piece.isdigit() for piece in pieces[:-1]):
        raise ValueError(f"problem: proj: expected C, CxSTRIDE or CxHxWxSTRIDE, got {text!r}")
    c = _pair("proj", pieces[0])[0]
    stride = _pair("proj", pieces[-1]) if len(pieces) > 1 else problem.stride
    if len(pieces) == 4:
        h, w = int(pieces[1]), int(pieces[2])
    else:
        # the smallest input whose strided 1x1 convolution has the size of the output
        h, w = (problem.p - 1) * stride[0] + 1, (problem.q - 1) * stride[1] + 1
    integer = _integer_reader(fields)
    return Projection(c, h, w, stride, bias=bool(integer("proj_bias", 0)), bn=bool(integer("proj_bn", int(problem.bn))))
