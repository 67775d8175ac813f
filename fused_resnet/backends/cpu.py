"""Backend ``cpu``: our own fused convolutions, and oneDNN's where there is none.

Three ways, decided once per signature:

``fused``
    float32, one group, weights that may be kept (``cache_weights``): our kernels, direct or Winograd, scale, shift,
    residual and activation applied on the way out of the registers, BN live. :func:`.cpu_rule.fastest` chooses.
``pass``
    other float32 convolutions: eager's (oneDNN), then one pass of our own over its output with scale, shift, residual
    and activation. BN live.
``folded``
    16-bit types, grouped convolutions without activation, and installs without the extension: scale folded into the
    weights, oneDNN adds bias and residual before its only rounding, the activation follows in place.

Why the activation is never oneDNN's: its ReLU turns NaN into 0, and a model that has diverged would look healthy.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _extension
from ..layout import output_memory_format
from ..problem import Problem, Projection, dtype_name
from ..reference import ConvBN, Tail, scale_shift
from . import Backend, packing
from .chain import ADDED, INPUT, NOTHING, Link, is_dense, operands
from .chain import program as chain_program
from .cpu_rule import DIRECT, Algorithm, fastest, stem, winograd_choice

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ACTIVATION_CODES = {"none": 0, "relu": 1, "relu6": 2}  # enum Activation in csrc/cpu/activation.h

#: Below this, gathering the inputs of our direct kernel costs too much: oneDNN has kernels of its own for that.
_LEAST_CHANNELS = 16


def _onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in ``dtype`` here (bfloat16: AVX-512 on x86; float16: AVX-512 FP16)."""
    if dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype is not torch.float16 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _onednn_is_wrong(problem: Problem) -> bool:
    """Whether oneDNN 3.12's 16-bit convolution gives wrong values: one column of output under a stride of 2 or more.

    Seen with AMX (``brg_conv_fwd:avx10_1_512_amx``) in channels_last, torch's own ``conv2d`` included: 48 of 80 outputs
    wrong for a 9 x 1 image, 5 x 5 filter, stride (1, 2), padding (0, 2).
    """
    return problem.q == 1 and problem.p > 1 and problem.stride[1] > 1


class CpuBackend(Backend):
    name = "cpu"

    def can_run(self, problem: Problem) -> str | None:
        if problem.device_type != "cpu":
            return f"cpu: device must be cpu, got {problem.device_type}"
        for dtype in {problem.dtype, problem.output_dtype}:
            if dtype not in _DTYPES:
                return f"cpu: dtype must be float32, bfloat16 or float16, got {dtype_name(dtype)}"
        if not torch.backends.mkldnn.is_available():
            return "cpu: torch must be built with oneDNN, got a build without"
        if not _onednn_has(problem.output_dtype):
            return f"cpu: dtype must be one that oneDNN has on this CPU, got {dtype_name(problem.output_dtype)}"
        return None

    def run(self, problem: Problem, tail: Tail) -> Tensor:
        return self.bind(problem, tail)(tail)

    def bind(self, problem: Problem, tail: Tail, configuration: Any = None) -> Callable[[Tail], Tensor]:
        if problem.output_dtype is not problem.dtype:
            # float16 x with a float32 residual, say: exact in the wider type, and rare
            return partial(_run_widened, self, problem.output_dtype)
        if problem.dtype is not torch.float32 and _onednn_is_wrong(problem):
            return partial(_run_widened, self, torch.float32)
        memory_format = output_memory_format(tail.x, tail.conv.weight)
        if problem.dtype is not torch.float32 or _extension.cpu() is None:
            return partial(_run_folded, memory_format)
        otherwise = partial(_run_folded if problem.activation == "none" else _run_pass, memory_format)
        if problem.groups != 1:
            return otherwise
        choice = winograd_choice(tail.winograd)
        if problem.c < _LEAST_CHANNELS:
            return partial(_run_few_channels, memory_format, stem(problem, choice), otherwise)
        algorithm, projection = fastest(problem, choice), DIRECT
        if problem.projection is not None:
            projection = fastest(_projection(problem, problem.projection), choice)
        return partial(
            _run_fused, memory_format, algorithm, projection, otherwise, _call_of(algorithm, projection, tail)
        )


def _projection(problem: Problem, proj: Projection) -> Problem:
    return replace(
        problem, c=proj.c, h=proj.h, w=proj.w, r=1, s=1, stride=proj.stride, padding=(0, 0), dilation=(1, 1),
        residual=None, projection=None,
    )  # fmt: skip


def _run_widened(backend: CpuBackend, dtype: torch.dtype, tail: Tail) -> Tensor:
    memory_format = output_memory_format(tail.x, tail.conv.weight)
    wide = tail.to(dtype)
    y = backend.run(Problem.from_tail(wide), wide)
    return y.to(Problem.from_tail(tail).output_dtype).contiguous(memory_format=memory_format)


# ---- our kernels ---------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """What the calls of one signature have in common."""

    operator: Callable[..., Tensor | None]
    program: Tensor
    convert_x: bool
    convert_added: bool


def _call_of(algorithm: Algorithm, projection: Algorithm, tail: Tail) -> _Call:
    added = tail.residual if tail.proj_x is None else tail.proj_x
    return _Call(
        torch.ops.fused_resnet_C.conv_chain.default,
        chain_program(_tail_links(algorithm, projection, tail, INPUT, ADDED, 0)),
        # Known from the signature; to ask torch in each call takes as long as all else that Python does there.
        not is_dense(tail.x),
        added is not None and not (added.dtype is torch.float32 and is_dense(added)),
    )


def _run_fused(
    memory_format: torch.memory_format, algorithm: Algorithm, projection: Algorithm,
    otherwise: Callable[[Tail], Tensor], call: _Call, tail: Tail,
) -> Tensor:  # fmt: skip
    if not tail.cache_weights:  # packing or transforming the weights for one call costs more than it saves
        return otherwise(tail)
    x, added = tail.x, tail.residual if tail.proj_x is None else tail.proj_x
    if call.convert_x:
        x = x.contiguous(memory_format=torch.channels_last)
    if call.convert_added and added is not None:
        added = added.to(torch.float32).contiguous(memory_format=torch.channels_last)
    for _ in range(_ATTEMPTS):
        tensors = [] if tail.proj is None else operands(tail.proj, ("fused", projection), _pack)
        tensors += operands(tail.conv, ("fused", algorithm), _pack)
        y = call.operator(x, tensors, call.program, added)
        if y is not None:
            return y if memory_format is torch.channels_last else y.contiguous()
        # A weight was written to in a way that its version does not tell.
        packing.forget(tail.conv.weight, ("fused", algorithm))
        if tail.proj is not None:
            packing.forget(tail.proj.weight, ("fused", projection))
    return otherwise(tail)


def one_convolution(
    run: Callable[[Tail], Tensor], tail: Tail
) -> tuple[Hashable, Callable[..., Tensor | None], Tensor] | None:
    """What ``run`` comes to where it is one call of ``conv_chain`` on tensors as they are, else None: the key of the
    weight's copy, the operator and its program.
    """
    if not isinstance(run, partial) or run.func is not _run_fused or tail.proj is not None or not tail.cache_weights:
        return None
    memory_format, algorithm, _, _, call = run.args
    if memory_format is not torch.channels_last or call.convert_x or call.convert_added:
        return None
    return ("fused", algorithm), call.operator, call.program


#: How often copies of the weights are made before a call goes without: another thread may be writing to them.
_ATTEMPTS = 3


def _run_few_channels(
    memory_format: torch.memory_format, algorithm: Algorithm, otherwise: Callable[[Tail], Tensor], tail: Tail
) -> Tensor:
    """A stem by itself; with its max pool it has a kernel of its own, see :func:`with_max_pool`."""
    return otherwise(tail)


def links(
    run: Callable[[Tail], Tensor], tail: Tail, source: int, residual: int, number: int, pool: Pool | None = None
) -> list[Link] | None:
    """The convolutions that ``run``, of :meth:`CpuBackend.bind`, makes of ``tail``, the first of them link ``number``.

    ``source`` and ``residual`` say where x and what is added come from (with a projection: its input), ``pool`` what
    max pool follows. None where ``run`` does anything else, a conversion of its output included.
    """
    pooled = None if pool is None else with_max_pool(run, pool)
    run = pooled or run
    if not isinstance(run, partial) or (pool is not None and pooled is None) or not tail.cache_weights:
        return None
    if run.func not in (_run_fused, _run_max_pool) or run.args[0] is not torch.channels_last:
        return None
    if run.func is _run_max_pool:
        (link,) = _tail_links(run.args[2], DIRECT, tail, source, NOTHING, number)
        return [link._replace(pool=sum(run.args[1], ()))]
    _, algorithm, projection, *_ = run.args
    return _tail_links(algorithm, projection, tail, source, residual, number)


def _tail_links(
    algorithm: Algorithm, projection: Algorithm, tail: Tail, source: int, residual: int, number: int
) -> list[Link]:
    found = []
    if tail.proj is not None:
        found.append(_link(projection, tail.proj, residual, NOTHING, tail.proj_stride, (0, 0), (1, 1), "none"))
        residual = number
    elif tail.residual is None:
        residual = NOTHING
    geometry = (tail.stride, tail.padding, tail.dilation)
    return [*found, _link(algorithm, tail.conv, source, residual, *geometry, tail.activation)]


def _link(
    algorithm: Algorithm, conv: ConvBN, source: int, residual: int, stride: Any, padding: Any, dilation: Any,
    activation: str,
) -> Link:  # fmt: skip
    return Link(
        source, residual, *algorithm, conv, stride, padding, dilation, _ACTIVATION_CODES[activation],
        ("fused", algorithm), _pack,
    )  # fmt: skip


#: Window, stride and padding of a max pool, two numbers each.
Pool = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

_LARGEST_WINDOW = 8  # kMaxWindow in csrc/cpu/conv.h


def with_max_pool(run: Callable[[Tail], Tensor], pool: Pool) -> Callable[[Tail], Tensor] | None:
    """What :meth:`CpuBackend.bind` returned, with the max pool of its result in the same pass; None if it cannot be."""
    (height, width), _, padding = pool
    possible = height <= _LARGEST_WINDOW and 2 * padding[0] <= height and 2 * padding[1] <= width
    if not possible or not isinstance(run, partial):
        return None
    if run.func is _run_few_channels:
        memory_format, algorithm, otherwise = run.args
    elif run.func is _run_fused and run.args[1].m == 0:
        memory_format, _, _, otherwise, *_ = run.args
        algorithm = DIRECT
    else:
        return None
    return partial(_run_max_pool, memory_format, pool, algorithm, otherwise)


def _run_max_pool(
    memory_format: torch.memory_format, pool: Pool, algorithm: Algorithm, otherwise: Callable[[Tail], Tensor],
    tail: Tail,
) -> Tensor:  # fmt: skip
    if not tail.cache_weights:
        return F.max_pool2d(otherwise(tail), *pool)
    conv = tail.conv
    k, _, r, s = conv.weight.shape
    packed = _packed(conv.weight, algorithm)
    y: Tensor = torch.ops.fused_resnet_C.conv_max_pool.default(
        tail.x.contiguous(memory_format=torch.channels_last), packed, (k, r, s), "", tail.stride, tail.padding,
        tail.dilation, *conv[1:], _ACTIVATION_CODES[tail.activation], (*pool[0], *pool[1], *pool[2]),
        algorithm.weights,
    )  # fmt: skip
    return y if memory_format is torch.channels_last else y.contiguous()


def _packed(weight: Tensor, algorithm: Algorithm) -> Tensor:
    """The kept copy of ``weight`` in the order in which ``algorithm`` reads it."""
    key = ("fused", algorithm)
    return packing.get(weight, key, packing.NO_VECTORS, partial(_pack, weight, key))


def _pack(weight: Tensor, key: tuple[str, Algorithm]) -> Tensor:
    algorithm = key[1]
    return torch.ops.fused_resnet_C.conv_pack.default(weight.detach(), algorithm.m, "", algorithm.weights)


# ---- eager's convolution, then our pass --------------------------------------------------------------------


def _run_pass(memory_format: torch.memory_format, tail: Tail) -> Tensor:
    conv = tail.conv
    x = tail.x.contiguous(memory_format=memory_format)
    y = F.conv2d(x, conv.weight, None, tail.stride, tail.padding, tail.dilation, tail.groups)
    y = y.contiguous(memory_format=memory_format)
    torch.ops.fused_resnet_C.scale_shift_add_act_.default(
        y, *conv[1:], _residual(tail, memory_format), _ACTIVATION_CODES[tail.activation]
    )
    return y


# ---- folded, all of it oneDNN's ----------------------------------------------------------------------------


def fold(conv: ConvBN) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the one convolution that does the work of ``conv`` and its BN.

    Scaled in float64 and rounded once. The bias has the dtype of the weight, as oneDNN wants it.
    """
    scale, shift = scale_shift(conv, torch.float64)
    weight = conv.weight.detach()
    if scale is not None:
        weight = (weight * scale.detach()[:, None, None, None]).to(weight.dtype)
    return weight, None if shift is None else shift.detach().to(weight.dtype)


def _run_folded(memory_format: torch.memory_format, tail: Tail) -> Tensor:
    residual = _residual(tail, torch.channels_last)
    y = _folded_conv(tail, tail.x, tail.conv, tail.stride, tail.padding, tail.dilation, tail.groups, residual)
    if tail.activation == "relu":
        y = y.relu_()
    elif tail.activation == "relu6":
        y = y.clamp_(0, 6)
    return y.contiguous(memory_format=memory_format)


def _folded_conv(
    tail: Tail, x: Tensor, conv: ConvBN, stride: Any, padding: Any, dilation: Any, groups: int, residual: Tensor | None
) -> Tensor:
    """``BN(conv2d(x)) + residual`` by one oneDNN primitive, channels_last, rounded once.

    Always in channels_last, and grouped convolutions with oneDNN's in-place sum on a copy of the residual: its other
    combinations round bfloat16 before they add (seen in oneDNN 3.12 with plain NCHW, and with groups of 16 channels).
    """
    x = x.contiguous(memory_format=torch.channels_last)
    geometry = (stride, padding, dilation, groups)
    if tail.cache_weights:
        weight, bias = packing.get(
            conv.weight, ("folded", conv.eps, *geometry), conv[1:6], partial(_fold_and_reorder, conv, geometry, x)
        )
    else:
        weight, bias = fold(conv)
        weight = weight.contiguous(memory_format=torch.channels_last)
    arguments = (weight, bias, padding, stride, dilation, groups)
    if residual is None:
        y = torch.ops.mkldnn._convolution_pointwise.default(x, *arguments, "none", [], None)
    elif groups == 1:
        y = torch.ops.mkldnn._convolution_pointwise.binary(x, residual, *arguments, "add", 1.0, None, [], None)
    else:
        y = torch.ops.mkldnn._convolution_pointwise_.binary(residual.clone(), x, *arguments, "add", 1.0, None, [], None)
    return y.contiguous(memory_format=torch.channels_last)


def _fold_and_reorder(conv: ConvBN, geometry: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    stride, padding, dilation, groups = geometry
    weight, bias = fold(conv)
    weight = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, list(x.shape))
    return weight, bias


# ---- what is added -----------------------------------------------------------------------------------------


def _residual(tail: Tail, memory_format: torch.memory_format) -> Tensor | None:
    """What is added, dense in ``memory_format`` and of x's dtype: the residual or the projection's output."""
    if tail.proj is not None and tail.proj_x is not None:
        y = _folded_conv(tail, tail.proj_x, tail.proj, tail.proj_stride, (0, 0), (1, 1), 1, None)
        return y.contiguous(memory_format=memory_format)
    if tail.residual is None:
        return None
    return tail.residual.to(tail.x.dtype).contiguous(memory_format=memory_format)


BACKEND = CpuBackend()
