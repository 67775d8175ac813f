"""The tail operators: dispatch to a backend, fake kernels and gradients.

``conv_bn_add_relu`` and ``conv_bn_proj_add_relu`` share everything below: both are turned into a ``TailArguments`` and
handled by the same three functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.cpu_fused import with_max_pool
from ..core.convolution import convolution, convolution_backward
from ..core.layout import empty_output, output_memory_format
from ..core.packed_weights import by_number
from ..core.reference import ConvBN, TailArguments
from ..selection import plans
from .checks import refuse_forward_mode
from .schemas import LIBRARY, NAMESPACE

# ---- arguments -> TailArguments --------------------------------------------------------------------------


def _tail_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, bn_weight: Tensor | None, bn_bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, eps: float, residual: Tensor | None,
    stride: Any, padding: Any, dilation: Any, groups: int,
    activation: str = "relu", backend: str = "auto", packed_weights: int = 0, winograd: str = "auto",
) -> tuple[TailArguments, str]:  # fmt: skip
    conv = ConvBN(weight, bias, bn_weight, bn_bias, running_mean, running_var, eps)
    tail = TailArguments(
        x, conv, residual, tuple(stride), tuple(padding), tuple(dilation), groups, activation,
        None, None, (1, 1), None, winograd,
    )  # fmt: skip
    return tail, backend


def _tail_projection(
    x: Tensor, weight: Tensor, bias: Tensor | None, bn_weight: Tensor | None, bn_bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, eps: float,
    stride: Any, padding: Any, dilation: Any, groups: int,
    proj_x: Tensor, proj_weight: Tensor, proj_bias: Tensor | None,
    proj_bn_weight: Tensor | None, proj_bn_bias: Tensor | None,
    proj_running_mean: Tensor | None, proj_running_var: Tensor | None, proj_eps: float, proj_stride: Any,
    activation: str = "relu", backend: str = "auto", packed_weights: int = 0, winograd: str = "auto",
) -> tuple[TailArguments, str]:  # fmt: skip
    conv = ConvBN(weight, bias, bn_weight, bn_bias, running_mean, running_var, eps)
    proj = ConvBN(proj_weight, proj_bias, proj_bn_weight, proj_bn_bias, proj_running_mean, proj_running_var, proj_eps)
    tail = TailArguments(
        x, conv, None, tuple(stride), tuple(padding), tuple(dilation), groups, activation,
        proj_x, proj, tuple(proj_stride), None, winograd,
    )  # fmt: skip
    return tail, backend


def _tail_max_pool(*args: Any, **kwargs: Any) -> tuple[TailArguments, str]:
    """The tail before the max pool."""
    before, after = args[:POOL], args[POOL + 3 :]
    return _tail_residual(*before[:8], None, *before[8:], *after, **kwargs)  # type: ignore[call-arg]


#: The place of the max pool's window among the arguments; its stride and padding follow.
POOL = 12

_TO_TAIL: dict[str, Callable[..., tuple[TailArguments, str]]] = {
    "conv_bn_add_relu": _tail_residual,
    "conv_bn_proj_add_relu": _tail_projection,
    "conv_bn_add_relu_max_pool": _tail_max_pool,
}


def call_arguments(name: str, *args: Any, **kwargs: Any) -> tuple[TailArguments, str]:
    """As :func:`to_tail`, but without the packed weights, whose number may be symbolic."""
    return _TO_TAIL[name](*args, **kwargs)


def to_tail(name: str, *args: Any, **kwargs: Any) -> tuple[TailArguments, str]:
    """The call of the operator ``name`` with these arguments, and the backend it asks for."""
    tail, backend = call_arguments(name, *args, **kwargs)
    place = _arguments(name).index("packed_weights")
    number = kwargs.get("packed_weights", args[place] if len(args) > place else 0)
    return tail._replace(packed_weights=by_number(number)), backend


@functools.cache
def _arguments(name: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.fused_resnet, name).default._schema.arguments]


# ---- the real kernel ---------------------------------------------------------------------------------------


def run(tail: TailArguments, backend: str = "auto") -> Tensor:
    """Run the call by its plan."""
    refuse_forward_mode(tail.x)
    return plans.find(tail, backend)(tail)


def _empty(tail: TailArguments, shape: Any, dtype: torch.dtype) -> Tensor:
    return empty_output(shape, dtype, tail.x.device, output_memory_format(tail.x, tail.conv.weight))


# ---- fake kernel -------------------------------------------------------------------------------------------


def fake_output_shape(x: Tensor, weight: Tensor, geometry: tuple[Any, Any, Any, Any]) -> tuple[Any, ...]:
    """``[N, K, P, Q]`` of a convolution with this stride, padding, dilation and groups; sizes may be symbolic."""
    stride, padding, dilation, groups = geometry
    torch._check(x.dim() == 4, lambda: f"x: expected 4 dimensions, got {x.dim()}")
    torch._check(weight.dim() == 4, lambda: f"weight: expected 4 dimensions, got {weight.dim()}")
    torch._check(
        weight.shape[1] * groups == x.shape[1],
        lambda: f"weight: expected [K, C / groups, R, S], got {list(weight.shape)} for {list(x.shape)}",
    )
    sizes = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    return x.shape[0], weight.shape[0], sizes[0], sizes[1]


def _fake(tail: TailArguments) -> Tensor:
    x, weight = tail.x, tail.conv.weight
    shape = fake_output_shape(x, weight, (tail.stride, tail.padding, tail.dilation, tail.groups))
    dtype = x.dtype
    if tail.residual is not None:
        residual = tail.residual
        torch._check(residual.dim() == 4, lambda: f"residual: expected 4 dimensions, got {residual.dim()}")
        for i in range(4):
            torch._check(
                residual.shape[i] == shape[i],
                lambda: f"residual: expected shape {list(shape)}, got {list(residual.shape)}",
            )
        dtype = torch.promote_types(dtype, residual.dtype)
    return _empty(tail, shape, dtype)


# ---- gradients (BN with running statistics: "frozen BN") ---------------------------------------------------


def _activation_gradient(grad: Tensor, y: Tensor, activation: str) -> Tensor:
    # `not (y <= 0)` rather than `y > 0`: eager's ReLU hands a gradient through where the output is NaN
    if activation == "relu":
        return torch.where(y <= 0, 0, grad)
    if activation == "relu6":
        return torch.where((y <= 0) | (y >= 6), 0, grad)
    return grad


def _conv_bn_gradients(
    dz: Tensor, x: Tensor, conv: ConvBN, geometry: tuple[Any, Any, Any, int], needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of ``z = BN(conv2d(x))`` for x, weight, bias, gamma and beta, from ``dz``.

    Written in differentiable operators of the inputs alone, so that double backward is right. The convolution is
    computed again only where gamma needs a gradient.
    """
    need_x, need_weight, need_bias, need_gamma, need_beta = needs
    stride, padding, dilation, groups = geometry
    grads: list[Tensor | None] = [None] * 5
    per_channel = (0, 2, 3)
    # BN's arithmetic in at least float32, as torch's own batch_norm kernels do
    wide = torch.promote_types(x.dtype, torch.float32)
    dconv = dz
    if conv.running_mean is not None and conv.running_var is not None:
        invstd = torch.rsqrt(conv.running_var.to(wide) + conv.eps)
        scale = invstd if conv.bn_weight is None else invstd * conv.bn_weight.to(wide)
        dz_wide = dz.to(wide)
        dconv = (dz_wide * scale[:, None, None]).to(x.dtype)
        if need_gamma and conv.bn_weight is not None:
            y = convolution(x, conv.weight, conv.bias, stride, padding, dilation, groups)
            xhat = (y.to(wide) - conv.running_mean.to(wide)[:, None, None]) * invstd[:, None, None]
            grads[3] = (dz_wide * xhat).sum(per_channel).to(conv.bn_weight.dtype)
        if need_beta and conv.bn_bias is not None:
            grads[4] = dz_wide.sum(per_channel).to(conv.bn_bias.dtype)
    need_bias = need_bias and conv.bias is not None
    if need_x or need_weight or need_bias:
        grads[0], grads[1], grads[2] = convolution_backward(
            dconv.to(x.dtype), x, conv.weight, conv.bias is not None, stride, padding, dilation, groups,
            [need_x, need_weight, need_bias],
        )  # fmt: skip
    return grads


def _register_autograd(name: str) -> None:
    to_tail = _TO_TAIL[name]
    arguments = getattr(torch.ops.fused_resnet, name).default._schema.arguments
    position = {argument.name: i for i, argument in enumerate(arguments)}
    tensors = [i for i, argument in enumerate(arguments) if str(argument.type) in ("Tensor", "Optional[Tensor]")]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        # Of the residual only the dtype is needed, of the output nothing where there is no activation: eager keeps
        # neither, and lets both be written to in place afterwards.
        saved = [inputs[i] for i in tensors]
        residual = position.get("residual")
        if residual is not None and inputs[residual] is not None:
            saved[tensors.index(residual)] = inputs[residual].new_empty(0)
        y = output.new_empty(0) if inputs[position["activation"]] == "none" else output
        ctx.save_for_backward(*saved, y)
        ctx.others = {i: value for i, value in enumerate(inputs) if i not in tensors}

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, y = ctx.saved_tensors
        full: list[Any] = [None] * len(arguments)
        for i, value in zip(tensors, saved, strict=True):
            full[i] = value
        for i, value in ctx.others.items():
            full[i] = value
        tail, _ = to_tail(*full)
        needs = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(arguments)
        dz = _activation_gradient(grad, y, tail.activation)
        if tail.residual is not None and needs[position["residual"]]:
            grads[position["residual"]] = dz.to(tail.residual.dtype)
        dz = dz.to(tail.x.dtype)
        branches = [("", "x", tail.x, tail.conv, (tail.stride, tail.padding, tail.dilation, tail.groups))]
        if tail.proj is not None and tail.proj_x is not None:
            branches.append(("proj_", "proj_x", tail.proj_x, tail.proj, (tail.proj_stride, (0, 0), (1, 1), 1)))
        for prefix, x_name, x, conv, geometry in branches:
            names = [x_name, *(prefix + field for field in ("weight", "bias", "bn_weight", "bn_bias"))]
            places = [position[argument] for argument in names]
            found = _conv_bn_gradients(dz, x, conv, geometry, [needs[place] for place in places])
            for place, value in zip(places, found, strict=True):
                grads[place] = value
        # Arguments left at their defaults are not passed through autograd, so they get no gradient either.
        return tuple(grads[: len(needs)])

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def _register_autograd_of_max_pool(name: str) -> None:
    """For exported programs; :mod:`..functional` calls the convolution and the pool one after the other instead."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensors))
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        args = list(ctx.others)
        for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            args[i] = tensor
        wanted = [i for i in ctx.tensors if ctx.needs_input_grad[i]]
        with torch.enable_grad():
            before, pool, after = args[:POOL], args[POOL : POOL + 3], args[POOL + 3 :]
            y = torch.ops.fused_resnet.conv_bn_add_relu(*before[:8], None, *before[8:], *after)
            pooled = F.max_pool2d(y, *pool)
        create_graph = torch.is_grad_enabled()
        found = torch.autograd.grad(pooled, [args[i] for i in wanted], grad, create_graph=create_graph)
        grads: list[Tensor | None] = [None] * len(args)
        for i, value in zip(wanted, found, strict=True):
            grads[i] = value
        return tuple(grads)

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def _register(name: str) -> None:
    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        return run(*to_tail(name, *args, **kwargs))

    def max_pool_kernel(*args: Any, **kwargs: Any) -> Tensor:
        tail, backend = to_tail(name, *args, **kwargs)
        pool = tuple(tuple(pair) for pair in args[POOL : POOL + 3])
        return with_max_pool(plans.find(tail, backend), pool)(tail)  # type: ignore[arg-type]

    def fake(*args: Any, **kwargs: Any) -> Tensor:
        return _fake(call_arguments(name, *args, **kwargs)[0])

    def max_pool_fake(*args: Any, **kwargs: Any) -> Tensor:
        return F.max_pool2d(fake(*args, **kwargs), *args[POOL : POOL + 3])

    with_pool = name == "conv_bn_add_relu_max_pool"
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, max_pool_kernel if with_pool else kernel, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", max_pool_fake if with_pool else fake, lib=LIBRARY)
    (_register_autograd_of_max_pool if with_pool else _register_autograd)(name)


for _name in _TO_TAIL:
    _register(_name)
