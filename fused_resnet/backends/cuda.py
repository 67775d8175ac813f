"""Backend ``cuda``: the C++/CUDA extension. One launch for the whole tail, no JIT, BN read live.

Needs dense channels_last tensors; anything else is copied once per call (`explain` says so). The planner
(csrc/cuda/plan.h) chooses tile and split-K; :meth:`CudaBackend.candidates` lists what the tuner may try instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import extensions
from ..core.layout import output_memory_format
from ..core.problem import Problem, dtype_name
from ..core.reference import ConvBN, TailArguments
from .base import Backend

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: By whether there is a weight, and a bias.
_AFFINE = {(False, False): "none", (True, True): "both", (True, False): "weight", (False, True): "bias"}
_NONE = ConvBN(weight=None)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Configuration:
    """One way to run a problem: the tile, and how many blocks share one tile's sum. Zeros: the planner's choice.

    ``wgmma``: a tile of the Hopper family, not one of those on mma.sync.
    """

    tile_m: int = 0
    tile_n: int = 0
    splits: int = 0
    wgmma: bool = False

    def __str__(self) -> str:
        tile = f"{self.tile_m}x{self.tile_n}" if self.tile_m else "auto"
        if self.wgmma:
            return f"wgmma {tile}"
        return f"{tile} splitk={self.splits}" if self.splits else tile


AUTO = Configuration()


class CudaBackend(Backend):
    name = "cuda"

    def can_run(self, problem: Problem) -> str | None:
        if problem.device_type != "cuda":
            return f"cuda: device must be cuda, got {problem.device_type}"
        for dtype in {problem.dtype, problem.output_dtype}:
            if dtype not in _DTYPES:
                return f"cuda: dtype must be float16, bfloat16 or float32, got {dtype_name(dtype)}"
        if problem.groups != 1:
            return f"cuda: groups must be 1, got {problem.groups}"
        if (reason := why_not_loaded()) is not None:
            return reason
        return _refusal(problem, torch.cuda.current_device())

    def run(self, problem: Problem, tail: TailArguments) -> Tensor:
        return self.bind(problem, tail)(tail)

    def bind(
        self, problem: Problem, tail: TailArguments, configuration: Any = None
    ) -> Callable[[TailArguments], Tensor]:
        chosen: Configuration = configuration or AUTO
        if _readable(tail):
            return _Direct(problem, tail, chosen)
        return _General(problem, tail, chosen)

    def candidates(self, problem: Problem, device: torch.device) -> Sequence[Configuration]:
        properties = _properties(device.index if device.index is not None else torch.cuda.current_device())
        catalogue = _loaded().catalogue()
        tiles = {(k["tile_m"], k["tile_n"]) for k in catalogue if k["load"] != "tensor_map"}
        found: dict[Configuration, None] = {AUTO: None}
        for tile_m, tile_n in sorted({(k["tile_m"], k["tile_n"]) for k in catalogue if k["load"] == "tensor_map"}):
            on_wgmma = Configuration(tile_m, tile_n, wgmma=True)
            try:
                _plan(problem, properties, on_wgmma)
            except ValueError:  # another GPU, or a problem that tensor maps cannot describe
                continue
            found[on_wgmma] = None
        for tile_m, tile_n in sorted(tiles):
            for splits in (1, 2, 3, 4, 6, 8, 12, 16):
                try:
                    plan = _plan(problem, properties, Configuration(tile_m, tile_n, splits))
                except ValueError:  # no such tile for this dtype, or too much shared memory
                    break
                if splits > 1 and (plan.grid[0] * splits > 4 * properties["sm_count"] or splits > plan.steps):
                    break
                found[Configuration(tile_m, tile_n, splits)] = None
        return tuple(found)


class _General:
    """Through the extension's operator, which takes any strides and alignment and copies what it must."""

    def __init__(self, problem: Problem, tail: TailArguments, chosen: Configuration) -> None:
        self._op = torch.ops.fused_resnet_C.cuda_conv_bn_add_relu.default
        self._convert = output_memory_format(tail.x, tail.conv.weight) is torch.contiguous_format
        self._widen = any(map(_several_dtypes, (tail.conv, tail.proj)))
        activation = _loaded().ACTIVATIONS[problem.activation]
        family = _loaded().FAMILIES["wgmma" if chosen.wgmma else "any"]
        self._options = (activation, problem.tf32, chosen.tile_m, chosen.tile_n, chosen.splits, family)

    def __call__(self, tail: TailArguments) -> Tensor:
        conv, proj = tail.conv, tail.proj or _NONE
        if self._widen:
            conv, proj = _float_norm(conv), _float_norm(proj)
        y: Tensor = self._op(
            tail.x, *conv, tail.residual, tail.stride, tail.padding, tail.dilation, tail.groups,
            tail.proj_x, *proj, tail.proj_stride, *self._options,
        )  # fmt: skip
        return y.contiguous() if self._convert else y


class _Direct:
    """Straight to the launch, for dense channels_last tensors: all is planned, addresses are all that changes."""

    def __init__(self, problem: Problem, tail: TailArguments, chosen: Configuration) -> None:
        extension = _loaded()
        self._device = tail.x.device
        self._index = index = self._device.index or 0
        plan = _plan(problem, _properties(index), chosen, tail)
        self._launch = extension.Launcher(plan, index).launch
        self._shape, self._dtype = problem.output_shape, problem.output_dtype
        self._format = output_memory_format(tail.x, tail.conv.weight)
        self._general = _General(problem, tail, chosen)

    def __call__(self, tail: TailArguments) -> Tensor:
        x, conv, residual, *_ = tail
        weight, bias, bn_weight, bn_bias, running_mean, running_var, _ = conv
        proj_x, proj = tail.proj_x, tail.proj or _NONE
        index = self._index
        if index != _current_device():
            return self._general(tail)  # has the device guard
        y = torch.empty(self._shape, dtype=self._dtype, device=self._device, memory_format=torch.channels_last)
        launched = self._launch(
            x.data_ptr(), weight.data_ptr(), _address(bias), _address(bn_weight), _address(bn_bias),
            _address(running_mean), _address(running_var), _address(proj_x), _address(proj.weight),
            _address(proj.bias), _address(proj.bn_weight), _address(proj.bn_bias), _address(proj.running_mean),
            _address(proj.running_var), _address(residual), y.data_ptr(), _stream(index),
        )  # fmt: skip
        if not launched:  # an address is less aligned than planned: a view into something
            return self._general(tail)
        return y if self._format is torch.channels_last else y.contiguous()


def _current_device() -> int:
    return torch.cuda.current_device()


def _stream(index: int) -> int:
    """The address of torch's current stream on this device."""
    stream: int = torch.cuda.current_stream(index).cuda_stream
    return stream


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _readable(tail: TailArguments) -> bool:
    """Whether the kernel reads every tensor as it is: images and filters with dense, innermost channels."""
    convs = [conv for conv in (tail.conv, tail.proj) if conv is not None]
    images = [t for t in (tail.x, tail.residual, tail.proj_x, *(conv.weight for conv in convs)) if t is not None]
    vectors = [t for conv in convs for t in conv[1:6] if t is not None]
    return (
        all(t.is_contiguous(memory_format=torch.channels_last) for t in images)
        and all(t.is_contiguous() for t in vectors)
        and not any(map(_several_dtypes, convs))
    )


def _loaded() -> ModuleType:
    extension = extensions.cuda()
    if extension is None:
        raise RuntimeError(f"cuda: {extensions.why_not_cuda()}")
    return extension


def why_not_loaded() -> str | None:
    """One sentence why the extension cannot be used at all, or None."""
    if (missing := extensions.why_not_cuda()) is not None:
        return f"cuda: {missing}"
    return None if torch.cuda.is_available() else "cuda: torch sees no GPU"


def why_not_device(device: torch.device) -> str | None:
    """One sentence why the extension's kernels do not run on ``device``, or None."""
    if (reason := why_not_loaded()) is not None:
        return reason
    return _too_old(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache
def _too_old(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    capability = major * 10 + minor
    if capability < 75:  # before the planner, which would have to ask the driver
        return f"cuda: needs sm_75 or newer, got sm_{capability}"
    built = _loaded().build_info()["architectures"].split()
    # Turing has code of its own, which newer GPUs do not run, nor it theirs.
    shared = int(built[-1].removeprefix("compute_"))
    runs = f"sm_{capability}" in built if capability < 80 else 80 <= shared <= capability
    return None if runs else f"cuda: the extension was built for {' '.join(built)}, got sm_{capability}"


def properties(index: int) -> dict[str, int] | None:
    """What the planner is told of this machine's GPU; None where the extension does not run on it."""
    return None if (why_not_loaded() or _too_old(index)) is not None else _properties(index)


@lru_cache
def _properties(index: int) -> dict[str, int]:
    properties: dict[str, int] = _loaded().device_properties(index)
    return properties


@lru_cache(maxsize=4096)
def _refusal(problem: Problem, index: int) -> str | None:
    if (reason := _too_old(index)) is not None:
        return reason
    try:
        _plan(problem, _properties(index))
    except ValueError as refused:
        return str(refused)
    return None


def _plan(
    problem: Problem, properties: dict[str, int], chosen: Configuration = AUTO, tail: TailArguments | None = None
) -> Any:
    """The planner's answer for aligned tensors; ValueError with its sentence where it refuses."""
    extension = _loaded()
    request = request_of(extension, problem, tail)
    request |= {"tile_m": chosen.tile_m, "tile_n": chosen.tile_n, "splits": chosen.splits}
    request |= {"family": extension.FAMILIES["wgmma" if chosen.wgmma else "any"]}
    return extension.plan(properties, **request)


def request_of(extension: ModuleType, problem: Problem, tail: TailArguments | None = None) -> dict[str, int | float]:
    """The problem as `plan` takes it, without ``tail`` with an affine BN in float32: that matters to no tile."""
    proj = problem.projection
    return plan_request(
        extension, problem,
        _norm_request(problem.dtype, problem.bias, problem.bn, tail and tail.conv),
        _norm_request(problem.dtype, proj.bias, proj.bn, tail and tail.proj) if proj else NormRequest(),
    )  # fmt: skip


class NormRequest(NamedTuple):
    """Bias and BN of one convolution, as the planner asks for them; None: there are no such tensors."""

    bias: torch.dtype | None = None
    bn: torch.dtype | None = None
    affine: str = "both"
    eps: float = 0.0


def _norm_request(dtype: torch.dtype, bias: bool, bn: bool, conv: ConvBN | None) -> NormRequest:
    request = NormRequest(dtype if bias else None, torch.float32 if bn else None, eps=conv.eps if conv else 0.0)
    if conv is None or conv.running_mean is None:
        return request
    affine = _AFFINE[conv.bn_weight is not None, conv.bn_bias is not None]
    return request._replace(bn=conv.running_mean.dtype, affine=affine)


def dtype_code(extension: ModuleType, name: str, dtype: torch.dtype | None) -> int:
    """The planner's number of a dtype; ValueError that says of what where it has none."""
    if dtype is None:
        return int(extension.ABSENT)
    if dtype not in _DTYPES:
        raise ValueError(f"cuda: {name} must be float16, bfloat16 or float32, got {dtype_name(dtype)}")
    return int(extension.DTYPES[dtype_name(dtype)])


def plan_request(
    extension: ModuleType, problem: Problem, norm: NormRequest, proj_norm: NormRequest
) -> dict[str, int | float]:
    """The problem as `plan` of ``extension`` takes it: ``_C_cuda``, or ``_C``, which has the planner alone."""

    def code(dtype: torch.dtype | None) -> int:
        return dtype_code(extension, "dtype", dtype)

    def of(norm: NormRequest, prefix: str) -> dict[str, int | float]:
        affine: int = extension.AFFINE[norm.affine]
        request = {"bias_dtype": code(norm.bias), "norm_dtype": code(norm.bn), "affine": affine, "eps": norm.eps}
        return {prefix + name: value for name, value in request.items()}

    request: dict[str, int | float] = {
        **{name: getattr(problem, name) for name in ("n", "h", "w", "c", "k", "r", "s", "groups")},
        **_pair("stride", problem.stride), **_pair("padding", problem.padding), **_pair("dilation", problem.dilation),
        "dtype": code(problem.dtype), "tf32": int(problem.tf32), "residual_dtype": code(problem.residual),
        "activation": extension.ACTIVATIONS[problem.activation], **of(norm, ""), **of(proj_norm, "proj_"),
    }  # fmt: skip
    if (proj := problem.projection) is not None:
        request |= {"projection": 1, "proj_c": proj.c, "proj_h": proj.h, "proj_w": proj.w}
        request |= _pair("proj_stride", proj.stride)
    return request


def _pair(name: str, values: tuple[int, int]) -> dict[str, int]:
    return {f"{name}_h": values[0], f"{name}_w": values[1]}


def _several_dtypes(conv: ConvBN | None) -> bool:
    """Whether the BN tensors differ in dtype; the kernel reads one."""
    return conv is not None and len({t.dtype for t in conv[2:6] if t is not None}) > 1


def _float_norm(conv: ConvBN) -> ConvBN:
    """BN in float32, which holds every dtype it may have exactly."""
    weight, bias, mean, var = (None if t is None else t.float() for t in conv[2:6])
    return conv._replace(bn_weight=weight, bn_bias=bias, running_mean=mean, running_var=var)


BACKEND = CudaBackend()
