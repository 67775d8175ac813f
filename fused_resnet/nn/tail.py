"""The tail, computed from the modules of its convolution and its batch norm.

``nn`` and ``surgery`` both run their blocks through these functions. Everything is read from the modules at each call
(parameters, buffers, ``training``, geometry), so that ``load_state_dict``, ``train()``, ``bn.eval()``, an optimizer
step or an EMA copy need no notice.

Between tails an activation is a :class:`.value.Value`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..core.layout import looks_channels_last, looks_contiguous, sum_order
from ..core.packed_weights import PackedWeights
from ..core.reference import ACTIVATIONS
from . import between
from .parts import batch_norm_eps, geometry, is_plain_max_pool, uses_batch_statistics, why_not_bypassed
from .pristine import is_torchs_own
from .value import MODULE_CALL, Recorded, Value, apply, enter, leave

__all__ = ["MODULE_CALL", "Recorded", "Value", "apply", "enter", "leave"]


class Options(NamedTuple):
    """How a module's tails run: see :func:`fused_resnet.fuse`."""

    backend: str = "auto"
    winograd: str = "auto"
    packed_weights: PackedWeights | None = None
    expands: bool = True
    """Whether a residual of another shape is added by eager; else the operator refuses it."""


_DEFAULTS = Options()


def call(module: nn.Module, x: Any) -> Any:
    """``module(x)``, from a :class:`Value` to a :class:`Value` where ``module`` is made of tails and nobody looks.

    So is what is the same in any layout (:func:`.between.is_free`): a pool between two tails of a container. A hook on
    the module, or a forward of its own, sees and returns what it would in eager.
    """
    if isinstance(x, Recorded):
        return x.call(module)
    if isinstance(x, Value) and between.is_free(module):
        return between.run(module, x)
    if may_go_inside(module):
        if type(module) is nn.Sequential:
            for child in module._modules.values():
                assert child is not None
                x = call(child, x)
            return x
        if type(module) is nn.Identity:
            return x
        if isinstance(x, (Value, Tensor)):
            run: Any = module
            y = run.run_inside(x)
            if y is not NotImplemented:
                return y
    return enter(module(leave(x)))


def may_go_inside(module: nn.Module) -> bool:
    """Whether ``module`` is a container, or made of tails, whose call does nothing but what its class's forward does.

    That forward must be one marked by :func:`runs_inside`: a subclass, or whoever patches a class, may have written
    another.
    """
    cls = type(module)
    if not _is_modules_own(cls.__call__) or why_not_bypassed(module) is not None:
        return False
    forward: Any = cls.forward
    return cls is nn.Sequential or cls is nn.Identity or getattr(forward, "_runs_inside", None) is forward


def _is_modules_own(call: Any) -> bool:
    if call is MODULE_CALL:
        return True
    return call is nn.Module.__call__ and is_torchs_own(call)  # torch.export puts a function of its own there


def runs_inside(forward: Any) -> Any:
    """Mark a forward that computes what the ``run_inside`` of its class does."""
    forward._runs_inside = forward  # itself: functools.wraps copies the mark to others
    return forward


# ---- reading the modules -----------------------------------------------------------------------------------

_BNTensors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def bn_tensors(bn: Any) -> _BNTensors:
    """Gamma, beta, mean and variance."""
    if bn is None:
        return None, None, None, None
    return bn.weight, bn.bias, bn.running_mean, bn.running_var


def bn_eps(bn: Any) -> float:
    """The eps of a batch norm; any value without one."""
    return 1e-5 if bn is None else batch_norm_eps(bn)


def pool_sizes(pool: Any) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Window, stride and padding of a max pool as they are now, two numbers each."""
    stride = pool.kernel_size if pool.stride is None else pool.stride
    return functional.max_pool_numbers(pool.kernel_size, stride, pool.padding)


def _kept(conv: nn.Conv2d, options: Options) -> PackedWeights | None:
    # The weights of a convolution in training change at each call.
    return None if conv.training else options.packed_weights


# ---- running the tail --------------------------------------------------------------------------------------


def conv_bn_act(
    conv: nn.Conv2d, bn: Any, x: Any, residual: Any = None, activation: str = "relu", options: Options = _DEFAULTS,
    *, residual_first: bool = False,
) -> Any:  # fmt: skip
    """``act(bn(conv(x)) + residual)`` from the modules ``conv`` and ``bn`` (or None); one launch where BN is fixed.

    ``residual_first`` is for ``residual + bn(conv(x))``, which eager lays out as its first operand.
    """
    if isinstance(x, Recorded):
        return x.tail(conv, bn, residual, None, None, activation, options, residual_first)
    image, added = _tensor(enter(x)), _tensor(enter(residual))
    sizes = geometry(conv)
    if added is not None and options.expands and broadcasts(conv, sizes, image, added):
        y = leave(conv_bn_act(conv, bn, x, None, "none", options))
        added = leave(residual)
        return enter(ACTIVATIONS[activation](added + y if residual_first else y + added))
    if uses_batch_statistics(bn):
        y = batch_statistics_tail(conv, bn, image, added, activation, options.winograd)
    else:
        weight, bias, mean, var = bn_tensors(bn)
        y = functional.conv_bn_add_relu(
            image, conv.weight, conv.bias, weight, bias, mean, var,
            eps=bn_eps(bn), residual=added, activation=activation, backend=options.backend,
            winograd=options.winograd, packed_weights=_kept(conv, options), **sizes,
        )  # fmt: skip
    value = _value(y, x, conv)
    return _laid_out_as(residual, value) if residual_first else value


def broadcasts(conv: nn.Conv2d, sizes: dict[str, Any], image: Any, added: Any) -> bool:
    """Whether eager would have to expand the residual, or the convolution's output: no operator of ours does.

    ``sizes`` is the :func:`geometry` of ``conv``.
    """
    if not isinstance(added, Tensor) or not isinstance(image, Tensor) or image.dim() != 4:
        return False
    if added.dim() != 4 or added.shape[0] != image.shape[0] or added.shape[1] != conv.out_channels:
        return True
    (u, v), (a, b), (d, e) = sizes["stride"], sizes["padding"], sizes["dilation"]
    r, s = conv.weight.shape[2:]
    p = (image.shape[2] + 2 * a - d * (r - 1) - 1) // u + 1
    q = (image.shape[3] + 2 * b - e * (s - 1) - 1) // v + 1
    return bool(added.shape[2] != p or added.shape[3] != q)


def _laid_out_as(first: Any, y: Value) -> Any:
    """``y``, a sum, in the layout of its first operand; a tensor where that is neither NCHW nor NHWC."""
    if isinstance(first, Value):
        if first.original is None:
            return Value(y.tensor, first.channels_last)
        first = first.original
    shape, stride = first.shape, first.stride()
    if looks_channels_last(shape, stride) or looks_contiguous(shape, stride):
        return Value(y.tensor, looks_channels_last(shape, stride))
    order = sum_order(first, torch.channels_last if y.channels_last else torch.contiguous_format, y.tensor.shape)
    dense = y.tensor.permute(order).contiguous()
    return dense.permute([order.index(d) for d in range(4)])


def _tensor(x: Any) -> Any:
    # Anything but an image goes to the operator as it is: its error says what was expected.
    return x.tensor if isinstance(x, Value) else x


def _value(y: Tensor, x: Any, conv: nn.Conv2d) -> Value:
    """The result ``y`` for the input ``x``: eager's convolution is in channels_last where its input or weight is."""
    image = x.tensor if isinstance(x, Value) else x
    inherited = x.channels_last if isinstance(x, Value) else looks_channels_last(image.shape, image.stride())
    return Value(y, inherited or looks_channels_last(conv.weight.shape, conv.weight.stride()))


def conv_bn_act_max_pool(
    conv: nn.Conv2d, bn: Any, pool: nn.MaxPool2d, x: Any, activation: str = "relu", options: Options = _DEFAULTS
) -> Any:
    """``pool(act(bn(conv(x))))``, a network's stem; one pass on the CPU where BN is fixed."""
    if uses_batch_statistics(bn) or not is_plain_max_pool(pool):
        return call(pool, conv_bn_act(conv, bn, x, None, activation, options))
    if isinstance(x, Recorded):
        return x.tail(conv, bn, None, None, pool, activation, options)
    weight, bias, mean, var = bn_tensors(bn)
    window, stride, padding = pool_sizes(pool)
    y = functional.conv_bn_add_relu_max_pool(
        _tensor(enter(x)), conv.weight, conv.bias, weight, bias, mean, var,
        window=window, pool_stride=stride, pool_padding=padding,
        eps=bn_eps(bn), activation=activation, backend=options.backend, winograd=options.winograd,
        packed_weights=_kept(conv, options), **geometry(conv),
    )  # fmt: skip
    return _value(y, x, conv)


def conv_bn_proj_act(
    conv: nn.Conv2d,
    bn: Any,
    x: Any,
    proj_conv: nn.Conv2d,
    proj_bn: Any,
    proj_x: Any,
    activation: str = "relu",
    options: Options = _DEFAULTS,
    *,
    residual_first: bool = False,
) -> Any:
    """``act(bn(conv(x)) + proj_bn(proj_conv(proj_x)))``, in one launch where both BNs are fixed."""
    main_batch, proj_batch = uses_batch_statistics(bn), uses_batch_statistics(proj_bn)
    if main_batch != proj_batch:  # one of the two BNs is frozen: the projection by itself, then the tail
        identity = conv_bn_act(proj_conv, proj_bn, proj_x, None, "none", options)
        return conv_bn_act(conv, bn, x, identity, activation, options, residual_first=residual_first)
    if isinstance(x, Recorded):
        return x.tail(conv, bn, proj_x, (proj_conv, proj_bn), None, activation, options, residual_first)
    first = (proj_x, proj_conv) if residual_first else (x, conv)
    image, proj_image = _tensor(enter(x)), _tensor(enter(proj_x))
    if main_batch:
        branch = functional.conv_bn_branch(
            proj_image, **_training_arguments(proj_conv, proj_bn, proj_image), winograd=options.winograd
        )
        return _value(batch_statistics_tail(conv, bn, image, branch, activation, options.winograd), *first)
    weight, bias, mean, var = bn_tensors(bn)
    p_weight, p_bias, p_mean, p_var = bn_tensors(proj_bn)
    y = functional.conv_bn_proj_add_relu(
        image, conv.weight, conv.bias, weight, bias, mean, var,
        proj_x=proj_image, proj_weight=proj_conv.weight, proj_bias=proj_conv.bias,
        proj_bn_weight=p_weight, proj_bn_bias=p_bias, proj_running_mean=p_mean, proj_running_var=p_var,
        proj_stride=geometry(proj_conv)["stride"], eps=bn_eps(bn), proj_eps=bn_eps(proj_bn),
        activation=activation, backend=options.backend, winograd=options.winograd,
        packed_weights=_kept(conv, options), **geometry(conv),
    )  # fmt: skip
    return _value(y, *first)


# ---- batch statistics: the one place where a training tail is computed -------------------------------------


def _training_arguments(conv: nn.Conv2d, bn: Any, x: Tensor) -> dict[str, Any]:
    """A convolution and its batch norm as the training functions take them; counts the batch as ``bn`` would.

    Not before the convolution has taken ``x``: what eager's convolution refuses is not counted.
    """
    if 0 in x.shape[1:]:
        F.conv2d(x, conv.weight, conv.bias, **geometry(conv))
    bn_arguments = functional.batch_norm_arguments(bn)._asdict()
    return {"weight": conv.weight, "bias": conv.bias, **bn_arguments, **geometry(conv)}


def batch_statistics_tail(
    conv: nn.Conv2d,
    bn: Any,
    x: Tensor,
    residual: Tensor | functional.BatchNormBranch | None,
    activation: str,
    winograd: str = "auto",
) -> Tensor:
    """``act(bn(conv(x)) + residual)`` with the statistics of the batch; updates the running ones as ``bn`` would."""
    arguments = _training_arguments(conv, bn, x)
    return functional.conv_bn_add_relu_train(
        x, **arguments, residual=residual, activation=activation, winograd=winograd
    )
