"""The eager definition of the tail: the only oracle of this project.

Tests, benchmarks, the tuner and ``assert_equivalent`` all compare against :func:`reference`; run on
``tail.to(torch.float64)`` it is the exact answer, run as it is it is what eager PyTorch computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .convolution import conv2d

if TYPE_CHECKING:
    from .packed_weights import PackedWeights

#: Activations by name. Adding one means: here, in each kernel's epilogue, and in ``ops.tail``'s gradient.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "none": lambda z: z,
}


class ConvBN(NamedTuple):
    """One convolution and the BatchNorm after it. BN is absent when ``running_mean`` is None."""

    weight: Tensor
    bias: Tensor | None = None
    bn_weight: Tensor | None = None
    bn_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    eps: float = 1e-5

    def to(self, dtype: torch.dtype) -> ConvBN:
        converted: dict[str, Any] = {name: t.to(dtype) for name, t in self._asdict().items() if isinstance(t, Tensor)}
        return self._replace(**converted)


class TailArguments(NamedTuple):
    """One call of the operator with its tensors: what every backend receives.

    ``y = act(BN(conv(x)) + residual)``, or ``y = act(BN(conv(x)) + BN_p(conv1x1(proj_x)))`` when ``proj`` is
    given (then ``residual`` is None).
    """

    x: Tensor
    conv: ConvBN
    residual: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: str = "relu"
    proj_x: Tensor | None = None
    proj: ConvBN | None = None
    proj_stride: tuple[int, int] = (1, 1)
    #: where packed copies of the weights are kept for later calls; None: nowhere
    packed_weights: PackedWeights | None = None
    #: CPU algorithm for 3x3: "auto", "f2" or "off"
    winograd: str = "auto"

    def to(self, dtype: torch.dtype) -> TailArguments:
        """The same call with every tensor converted to ``dtype``."""
        return self._replace(
            x=self.x.to(dtype),
            conv=self.conv.to(dtype),
            residual=None if self.residual is None else self.residual.to(dtype),
            proj_x=None if self.proj_x is None else self.proj_x.to(dtype),
            proj=None if self.proj is None else self.proj.to(dtype),
            packed_weights=None,
        )


def scale_shift(conv: ConvBN, dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, Tensor | None]:
    """BN (in evaluation mode) and the convolution's bias as ``scale * conv + shift``, per output channel.

    ``scale = gamma / sqrt(running_var + eps)``, ``shift = beta + (bias - running_mean) * scale``. Either is None
    where it would be the identity. ``dtype`` is that of the arithmetic and of the result.
    """

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(dtype)

    bias = cast(conv.bias)
    if conv.running_mean is None or conv.running_var is None:
        return None, bias
    std = torch.sqrt(conv.running_var.to(dtype) + conv.eps)
    gamma, beta = cast(conv.bn_weight), cast(conv.bn_bias)
    scale = 1.0 / std if gamma is None else gamma / std
    centred = -conv.running_mean.to(dtype) if bias is None else bias - conv.running_mean.to(dtype)
    shift = centred * scale
    return scale, shift if beta is None else shift + beta


def conv_bn(
    x: Tensor,
    conv: ConvBN,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    batch_norm: Callable[..., Tensor] = F.batch_norm,
) -> Tensor:
    """``BN(conv2d(x))`` in evaluation mode, by eager PyTorch."""
    geometry = (stride, padding, dilation, groups)
    if conv.running_mean is not None and conv.eps == 0:  # F.batch_norm refuses it in some versions (2.11)
        scale, shift = scale_shift(conv, torch.promote_types(x.dtype, torch.float32))
        assert scale is not None
        assert shift is not None
        y = conv2d(x, conv.weight, None, *geometry)
        return (y * scale[:, None, None] + shift[:, None, None]).to(y.dtype)
    y = conv2d(x, conv.weight, conv.bias, *geometry)
    if conv.running_mean is None:
        return y
    return batch_norm(
        y, conv.running_mean, conv.running_var, conv.bn_weight, conv.bn_bias, training=False, eps=conv.eps
    )


def reference(tail: TailArguments, batch_norm: Callable[..., Tensor] = F.batch_norm) -> Tensor:
    """The tail by eager PyTorch, in the dtypes of its tensors (rounding after every step, as eager does).

    ``batch_norm`` is ``F.batch_norm``, or another function that computes the same.
    """
    y = conv_bn(tail.x, tail.conv, tail.stride, tail.padding, tail.dilation, tail.groups, batch_norm)
    if tail.proj is not None and tail.proj_x is not None:
        y = y + conv_bn(tail.proj_x, tail.proj, tail.proj_stride, (0, 0), (1, 1), 1, batch_norm)
    elif tail.residual is not None:
        y = y + tail.residual
    return ACTIVATIONS[tail.activation](y)
