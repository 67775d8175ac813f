"""A ``Call``: a problem together with how its tensors lie in memory, without the tensors.

It names a tuning result or a verdict on disk, it can be written to JSON, and tensors like those of the call can be
made from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.layout import looks_channels_last
from ..core.packed_weights import PackedWeights
from ..core.problem import Problem, dtype_name
from ..core.reference import ConvBN, TailArguments
from ..testing import Kind, make_tail

_CONV = ("weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Layout:
    """How one tensor lies in memory. ``offset`` is its address modulo 16 bytes: kernels differ for unaligned ones."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    offset: int

    @classmethod
    def of(cls, t: Tensor) -> Layout:
        return cls(tuple(t.shape), t.stride(), dtype_name(t.dtype), t.data_ptr() % 16)

    def __str__(self) -> str:
        if len(self.shape) != 4 or looks_channels_last(self.shape, self.stride):
            place = "" if len(self.shape) == 4 or self.stride == (1,) else "x".join(map(str, self.stride))
        elif self.stride == _contiguous(self.shape):
            place = "nchw"
        else:
            place = "x".join(map(str, self.stride))
        return place + (f"+{self.offset}" if self.offset else "")

    def fill(self, kind: Kind, device: torch.device, generator: torch.Generator) -> Tensor:
        """A tensor of this layout with values like those of :func:`fused_resnet.testing.make_tail`."""
        dtype = getattr(torch, self.dtype)
        lead = self.offset // dtype.itemsize
        extent = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        size = lead + (extent if 0 not in self.shape else 0)
        if kind == "integers":
            flat = torch.randint(-3, 4, (size,), generator=generator, device=device).to(dtype)
        else:
            flat = torch.randn(size, generator=generator, device=device).to(dtype)
        return flat.as_strided(self.shape, self.stride, lead)

    def empty(self, device: torch.device) -> Tensor:
        """A tensor of this layout with any values; on ``meta`` it has none, and no address either."""
        dtype = getattr(torch, self.dtype)
        extent = (
            1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if 0 not in self.shape else 0
        )
        lead = self.offset // dtype.itemsize
        return torch.empty(lead + extent, dtype=dtype, device=device).as_strided(self.shape, self.stride, lead)

    def hold(self, values: Tensor, device: torch.device) -> Tensor:
        """``values`` in this layout. Overlapping memory cannot hold arbitrary values; then they are left dense."""
        dtype = getattr(torch, self.dtype)
        values = values.to(device=device, dtype=dtype)
        if any(stride == 0 and n > 1 for n, stride in zip(self.shape, self.stride, strict=True)):
            return values
        lead = self.offset // dtype.itemsize
        extent = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        flat = torch.zeros(lead + extent, dtype=dtype, device=device)
        return flat.as_strided(self.shape, self.stride, lead).copy_(values)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(tuple(shape), device="meta").stride()


def _named(tail: TailArguments) -> dict[str, Tensor | None]:
    tensors: dict[str, Tensor | None] = {"x": tail.x, "residual": tail.residual, "proj_x": tail.proj_x}
    for prefix, conv in (("", tail.conv), ("proj_", tail.proj)):
        if conv is not None:
            tensors |= {prefix + name: getattr(conv, name) for name in _CONV}
    return tensors


@dataclass(frozen=True)
class Call:
    """See the module."""

    problem: Problem
    layouts: tuple[tuple[str, Layout], ...]
    cache_weights: bool = False
    deterministic: bool = False

    @classmethod
    def of(cls, problem: Problem, tail: TailArguments) -> Call:
        layouts = tuple((name, Layout.of(t)) for name, t in _named(tail).items() if t is not None)
        return cls(problem, layouts, tail.packed_weights is not None, torch.are_deterministic_algorithms_enabled())

    @property
    def key(self) -> str:
        """Its name on disk: the problem, and whatever is not the usual case of dense channels_last tensors."""
        parts = [str(self.problem)]
        names = {name for name, _ in self.layouts}
        for name, layout in self.layouts:
            text = str(layout)
            is_bn = name.removeprefix("proj_").startswith(("bn_", "running_"))
            if is_bn and layout.dtype != "float32":
                text += layout.dtype
            if text:
                parts.append(f"{name}:{text}")
        for prefix in ("", "proj_"):
            if f"{prefix}running_mean" in names:
                parts += [f"{prefix}{name}:none" for name in ("bn_weight", "bn_bias") if prefix + name not in names]
        if self.cache_weights:
            parts.append("cached")
        if self.deterministic:
            parts.append("deterministic")
        return "|".join(parts)

    def tail(self, kind: Kind, seed: int, device: torch.device) -> TailArguments:
        """Tensors like the call's. The large ones are drawn on ``device``, the parameters as ``make_tail`` does."""
        layouts = dict(self.layouts)
        generator = torch.Generator(device).manual_seed(seed)
        parameters = make_tail(dataclasses.replace(self.problem, n=0), kind, seed)

        def conv_bn(prefix: str, conv: ConvBN | None) -> ConvBN | None:
            if conv is None:
                return None
            tensors: dict[str, Tensor | None] = {}
            for name in _CONV:
                layout, value = layouts.get(prefix + name), getattr(conv, name)
                tensors[name] = None if layout is None or value is None else layout.hold(value, device)
            return ConvBN(**tensors, eps=conv.eps)  # type: ignore[arg-type]

        def large(name: str) -> Tensor | None:
            layout = layouts.get(name)
            return None if layout is None else layout.fill(kind, device, generator)

        main = conv_bn("", parameters.conv)
        x = large("x")
        assert main is not None
        assert x is not None
        return parameters._replace(
            x=x, conv=main, residual=large("residual"), proj_x=large("proj_x"), proj=conv_bn("proj_", parameters.proj),
            packed_weights=PackedWeights() if self.cache_weights else None,
        )  # fmt: skip

    def empty(self, device: torch.device) -> TailArguments:
        """Tensors like the call's, of any values."""
        layouts = dict(self.layouts)
        options = make_tail(dataclasses.replace(self.problem, n=0))

        def named(name: str) -> Tensor | None:
            return layouts[name].empty(device) if name in layouts else None

        def conv_bn(prefix: str, conv: ConvBN | None) -> ConvBN | None:
            tensors: dict[str, Any] = {name: named(prefix + name) for name in _CONV}
            return None if conv is None else ConvBN(**tensors, eps=conv.eps)

        x, conv = named("x"), conv_bn("", options.conv)
        assert x is not None
        assert conv is not None
        return options._replace(
            x=x, conv=conv, residual=named("residual"), proj_x=named("proj_x"), proj=conv_bn("proj_", options.proj),
            packed_weights=PackedWeights() if self.cache_weights else None,
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        layouts = {name: dataclasses.asdict(layout) for name, layout in self.layouts}
        flags = {"cache_weights": self.cache_weights, "deterministic": self.deterministic}
        return {"problem": str(self.problem), "layouts": layouts, **flags}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Call:
        layouts = tuple(
            (name, Layout(tuple(d["shape"]), tuple(d["stride"]), d["dtype"], d["offset"]))
            for name, d in data["layouts"].items()
        )
        return cls(Problem.parse(data["problem"]), layouts, data["cache_weights"], data["deterministic"])
