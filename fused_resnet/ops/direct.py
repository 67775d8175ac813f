"""The direct path: a repeated call without gradients goes to its plan, past the dispatcher.

PyTorch's dispatcher takes 5.6 microseconds to hand 17 arguments to a kernel written in Python, half of a small
fused launch. Where it would do nothing else (no gradients, autocast, tracing, modes, subclasses or transforms)
this module finds the plan in about one. Anything that is not exactly the call seen before takes the dispatcher.

On the CPU the extension finds such calls of ``conv_bn_add_relu`` and runs them itself (:data:`repeat`,
csrc/repeat.cpp), by the same comparisons.

The comparison of the tensors is dynamo's ``TensorGuards``: one C++ call that compares type, dispatch keys (those of
the thread included: autocast, functorch, tracing and inference mode show there), dtype, device, sizes and strides.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter

from .. import _extension
from ..backends import cpu, packing
from ..reference import Tail
from . import plans

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # a torch without them: every call takes the dispatcher, nothing else changes
    TensorGuards = None  # type: ignore[assignment, misc]


class _Entry(NamedTuple):
    same_tensors: Any  # the check of a TensorGuards
    options: tuple[Any, ...]
    run: plans.Runner


#: By weight and input size, one entry: a layer sees the same sizes again, mostly. Identity is only the way to find
#: an entry; whether it fits is decided by comparing everything, so a reused id does no harm.
_entries: dict[Any, _Entry] = {}
_ENTRIES_KEPT = 4096
plans.derived.append(_entries)

#: Stand for absent tensors in the comparison, one per place, since it wants its tensors distinct; no argument has
#: this shape.
_ABSENT = tuple(torch.empty(0, device="cpu") for _ in range(15))


#: ``repeat(x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual, *options)``: the result of a
#: call like one that the extension remembers, or None. The options are those of ``conv_bn_add_relu`` from eps on.
#: None until it remembers one: on a GPU it never does.
repeat: Callable[..., Tensor | None] | None = None


class _Repeats:
    """What the extension remembers, as one of the caches that end with the plans."""

    def clear(self) -> None:
        extension = _extension.cpu()
        if extension is not None:
            extension.forget_repeats()


_repeats = _Repeats()
plans.derived.append(_repeats)

_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_mode = torch._C._is_torch_function_mode_enabled

#: What :func:`quiet` asks, for the extension: functions that say no, and variables that have these values.
_SILENT = (_grad_enabled, _dispatch_modes, _function_mode)
_IDLE = ((forward_ad.__dict__, "_current_level", -1), (profiler.__dict__, "_is_profiler_enabled", False))


def quiet() -> bool:
    """Whether nothing of torch's wants to see this call: gradients, tangents, modes or the profiler."""
    return not (
        _grad_enabled()
        or forward_ad._current_level >= 0
        or _dispatch_modes()
        or _function_mode()
        or profiler._is_profiler_enabled
    )


def _tensors(tail: Tail) -> tuple[Tensor, ...]:
    # written out: a loop over the fields takes three times as long
    x, (weight, bias, gamma, beta, mean, var, _), residual, _, _, _, _, _, proj_x, proj, _, _, _ = tail
    absent = _ABSENT
    found = (
        x,
        weight,
        absent[2] if bias is None else bias,
        absent[3] if gamma is None else gamma,
        absent[4] if beta is None else beta,
        absent[5] if mean is None else mean,
        absent[6] if var is None else var,
        absent[7] if residual is None else residual,
    )
    if proj is None:
        return found
    weight, bias, gamma, beta, mean, var, _ = proj
    return (
        *found,
        absent[8] if proj_x is None else proj_x,
        weight,
        absent[10] if bias is None else bias,
        absent[11] if gamma is None else gamma,
        absent[12] if beta is None else beta,
        absent[13] if mean is None else mean,
        absent[14] if var is None else var,
    )


def _options(tail: Tail, backend: str) -> tuple[Any, ...]:
    eps = tail.conv.eps if tail.proj is None else (tail.conv.eps, tail.proj.eps)
    return (backend, tail[3:8], tail[10:], eps, plans.switches(tail.x))


def find(tail: Tail, backend: str) -> plans.Runner | None:
    """The plan of a call that repeats an earlier one, or None. To be asked only where it is :func:`quiet`."""
    x = tail[0]
    if type(x) is not Tensor:
        return None
    entry = _entries.get((id(tail[1][0]), x.shape))
    if entry is None or entry.options != _options(tail, backend) or not entry.same_tensors(*_tensors(tail)):
        return None
    return entry.run


def find_with_max_pool(tail: Tail, backend: str, pool: cpu.Pool) -> plans.Runner | None:
    """As :func:`find`, with the max pool of the result in the same pass; None as well where that has no kernel."""
    run = find(tail, backend)
    return None if run is None else cpu.with_max_pool(run, pool)


def remember(tail: Tail, backend: str) -> None:
    """Make the next call like ``tail`` direct. Only from the second call of a signature on: most never come again."""
    plan = plans.known(tail, backend)
    if plan is None or plan.calls < 2:
        return
    same_tensors = guard(_tensors(tail))
    if same_tensors is None:
        return
    if len(_entries) >= _ENTRIES_KEPT:
        _entries.clear()
        _repeats.clear()
    key = (id(tail.conv.weight), tail.x.shape)
    _entries[key] = _Entry(same_tensors, _options(tail, backend), plan.run)
    _remember_in_extension(tail, backend, same_tensors, plan.run)


def _remember_in_extension(tail: Tail, backend: str, same_tensors: Callable[..., bool], run: plans.Runner) -> None:
    global repeat
    extension, convolution = _extension.cpu(), cpu.one_convolution(run, tail)
    if extension is None or convolution is None or type(plans.backend_variable()[0]) is not dict:
        return
    weight = tail.conv.weight
    options = (tail.conv.eps, *tail[3:8], backend, tail.cache_weights, tail.winograd)
    variables = (*_IDLE, plans.backend_variable())
    extension.remember_repeat(
        weight, options, _SILENT, variables, _ABSENT[:8], same_tensors, packing.copies(weight), *convolution
    )
    repeat = extension.repeat


def guard(tensors: tuple[Tensor, ...]) -> Callable[..., bool] | None:
    """The comparison of later tensors with these, also of the thread's state with that of now.

    None where these are not distinct and plain, or the state is one in which the dispatcher has something to do.
    """
    plain = TensorGuards is not None and all(type(t) is Tensor or type(t) is Parameter for t in tensors)
    if not plain or len(set(map(id, tensors))) < len(tensors) or not _dispatches_plainly(tensors):
        return None
    check: Callable[..., bool] = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    return check


# ---- what a plain call looks like to the dispatcher --------------------------------------------------------


def _thread_keys() -> tuple[int, int]:
    """The dispatch keys that this thread adds to and takes from every call."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return included.raw_repr(), excluded.raw_repr()


def _keys(t: Tensor) -> int:
    return torch._C._dispatch_keys(t).raw_repr()


@functools.cache
def _plain_thread_keys() -> frozenset[tuple[int, int]]:
    """Those of a new thread, where no autocast, transform or trace is active, in no_grad and in inference_mode."""
    seen: list[tuple[int, int]] = []

    def look() -> None:
        seen.append(_thread_keys())
        with torch.inference_mode():
            seen.append(_thread_keys())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return frozenset(seen)


@functools.cache
def _plain_keys(device_type: str) -> frozenset[int]:
    """The dispatch keys of ordinary tensors: a conjugate, negative, wrapped or lazy one has others."""
    with torch.inference_mode(False):
        normal = _keys(torch.empty(0, device=device_type))
    with torch.inference_mode():
        return frozenset((normal, _keys(torch.empty(0, device=device_type))))


def _dispatches_plainly(tensors: tuple[Tensor, ...]) -> bool:
    device_types = {t.device.type for t in tensors}
    if not device_types <= {"cpu", "cuda"} or _thread_keys() not in _plain_thread_keys():
        return False
    return all(_keys(t) in _plain_keys(t.device.type) for t in tensors)
