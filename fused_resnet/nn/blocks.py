"""ResNet blocks that run their tails fused: drop-in for torchvision's, with the same names, state_dict and gradients.

A BasicBlock is two launches, a Bottleneck three, their projection included. With batch statistics (training mode)
a block convolves, then normalises, adds and applies ReLU in one step; what mode a batch norm is in is read at
each call, so frozen and live ones may be mixed freely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..core.packed_weights import PackedWeights
from . import parts, pristine, tail
from .onlookers import watched

__all__ = ["FusedBasicBlock", "FusedBottleneck", "FusedConvBNReLU"]

Norm = Callable[..., nn.Module]


def _conv(inplanes: int, planes: int, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(inplanes, planes, kernel, stride, padding=padding, dilation=dilation, groups=groups, bias=False)


def _why_not_understood(role: str, module: nn.Module) -> str | None:
    """None, or why a tail's operator does not compute what ``module`` does in its role, a name like ``bn1``."""
    name = type(module).__name__
    if role.startswith("conv") or role.endswith(".0"):
        if parts.is_plain_conv(module):
            return parts.why_not_fusable(module)  # type: ignore[arg-type]
        return f"is a {name}, which does not compute what nn.Conv2d does"
    if role.startswith("bn") or role.endswith(".1"):
        if parts.is_plain_batch_norm(module) or parts.is_torchvisions_frozen_batch_norm(module):
            return None
        return f"is a {name}, not a batch norm"
    if role == "relu":
        return None if parts.is_plain_relu(module) else f"is a {name}, not nn.ReLU"
    return None if type(module) is nn.Sequential else f"is a {name} with a forward of its own"


def why_not_bypassed(modules: Iterable[tuple[str, nn.Module | None]]) -> str | None:
    """None when a fused forward may stand for calls of these, by name, else one sentence that says why it may not."""
    if torch_module._has_any_global_hook():
        return "a hook for all modules is registered"
    for name, module in modules:
        if module is None:
            if not name.endswith(".1"):
                return f"{name} is None"
        else:
            why_not = parts.why_not_bypassed(module) or _why_not_understood(name, module)
            if why_not is not None:
                return f"{name} {why_not}"
    return pristine.why_not()


# What follows is for blocks of torchvision's layout, whether they are of this file's classes or of torchvision's.


def projection_of(block: Any) -> tuple[nn.Conv2d, nn.Module | None] | None:
    """The 1x1 convolution and BN of ``downsample``, where it is that and nothing else."""
    down = block.downsample
    if not isinstance(down, nn.Sequential) or type(down).forward is not nn.Sequential.forward:
        return None
    if not 1 <= len(down) <= 2:
        return None
    conv = down[0]
    bn = down[1] if len(down) == 2 else None
    if not isinstance(conv, nn.Conv2d) or not parts.is_projection(conv):
        return None
    if bn is not None and not (parts.is_plain_batch_norm(bn) or parts.is_frozen_batch_norm(bn)):
        return None
    return conv, bn


def bypassed_of(block: Any, names: Iterable[str]) -> Iterator[tuple[str, nn.Module | None]]:
    """Everything whose call the block's fused forward replaces: the submodules ``names``, and the projection."""
    for name in names:
        yield name, block._modules.get(name)
    projection = projection_of(block)
    if projection is not None:
        yield "downsample", block.downsample
        yield "downsample.0", projection[0]
        yield "downsample.1", projection[1]


def run_basic_block(block: Any, x: Any, options: tail.Options) -> Any:
    """The forward of a BasicBlock in tails, from a :class:`fused_resnet.nn.tail.Value` to another."""
    h = tail.conv_bn_act(block.conv1, block.bn1, x, None, "relu", options)
    return _last_tail(block, block.conv2, block.bn2, h, x, options)


def run_bottleneck(block: Any, x: Any, options: tail.Options) -> Any:
    """The forward of a Bottleneck in tails, from a :class:`fused_resnet.nn.tail.Value` to another."""
    h = tail.conv_bn_act(block.conv1, block.bn1, x, None, "relu", options)
    h = tail.conv_bn_act(block.conv2, block.bn2, h, None, "relu", options)
    return _last_tail(block, block.conv3, block.bn3, h, x, options)


def _last_tail(block: Any, conv: nn.Conv2d, bn: nn.Module, h: Any, x: Any, options: tail.Options) -> Any:
    projection = projection_of(block)
    if projection is not None:
        return tail.conv_bn_proj_act(conv, bn, h, *projection, x, "relu", options)
    identity = x if block.downsample is None else tail.call(block.downsample, x)
    return tail.conv_bn_act(conv, bn, h, identity, "relu", options)


class FusedModule(nn.Module):
    """What the fused modules share: the backend to use, and when their own submodules must be called instead."""

    backend: str = "auto"
    winograd: str = "auto"

    def __init__(self) -> None:
        super().__init__()
        self.packed_weights = PackedWeights()

    @property
    def options(self) -> tail.Options:
        return tail.Options(self.backend, self.winograd, self.packed_weights)

    __jit_unused_properties__ = ("options",)

    @tail.runs_inside
    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # which then does not look at the rest
            return self._forward_unfused(x)
        else:
            if watched(x) or self.why_not_fused() is not None:
                return self._forward_unfused(x)
            return tail.leave(self._run(tail.enter(x)))

    def run_inside(self, x: Any) -> Any:
        """What the forward makes of ``x`` for :func:`.tail.call`; NotImplemented where it runs unfused."""
        return self._run(x) if self.why_not_fused() is None else NotImplemented

    def _run(self, x: Any) -> Any:
        """The forward in tails, from a :class:`fused_resnet.nn.tail.Value` to another."""
        raise NotImplementedError

    def _forward_unfused(self, x: Tensor) -> Tensor:
        """The forward as torchvision writes it."""
        raise NotImplementedError

    def _bypassed(self) -> Iterator[tuple[str, nn.Module | None]]:
        """Name and module of everything whose call the fused forward replaces."""
        raise NotImplementedError

    def why_not_fused(self) -> str | None:
        """None when the forward runs fused now, else one sentence that says why it does not.

        Hooks, parametrizations and norms other than batch norm are looked at on each call, because they may come
        and go after construction.
        """
        return why_not_bypassed(self._bypassed())


class _FusedBlock(FusedModule):
    """A residual block of torchvision's layout: ``conv1, bn1, conv2, bn2(, conv3, bn3), relu, downsample``."""

    expansion: int
    _convs: int
    _names: tuple[str, ...]
    if TYPE_CHECKING:  # torch.jit.script takes no such annotation
        relu: nn.Module
        downsample: nn.Module | None

    @classmethod
    def from_block(cls, block: nn.Module) -> Any:
        """The fused twin of a torchvision block, built of the *same* submodules, with their Parameters and mode.

        Raises TypeError when ``block`` does not have exactly the attributes of torchvision's block.
        """
        expected = list(cls._names)
        children = dict(block.named_children())
        missing = [name for name in expected if name not in children]
        extra = sorted(set(children) - {*expected, "downsample"})
        if missing or extra:
            raise TypeError(
                f"block: expected the submodules of torchvision's block ({', '.join(expected)}, downsample), "
                f"got a {type(block).__name__} "
                f"with {', '.join(missing) or 'none'} missing and {', '.join(extra) or 'none'} extra"
            )
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.packed_weights = PackedWeights()
        for name, child in children.items():  # in the block's own order, which is that of its state_dict
            new.add_module(name, child)
        if "downsample" not in children:
            new.downsample = None
        stride: Any = getattr(block, "stride", 1)
        new.stride = stride
        new.training = block.training
        return new

    def _bypassed(self) -> Iterator[tuple[str, nn.Module | None]]:
        return bypassed_of(self, self._names)


class FusedBasicBlock(_FusedBlock):
    """torchvision's ``BasicBlock`` in two launches: ``relu(bn2(conv2(relu(bn1(conv1(x))))) + identity)``.

    Constructor, attributes and state_dict are those of ``torchvision.models.resnet.BasicBlock``; ``downsample`` of
    the form ``Sequential(1x1 conv, BN)`` joins the second launch. ``norm_layer`` other than a batch norm (live,
    synchronised or frozen) runs unfused.
    """

    expansion = 1
    _convs = 2
    _names = ("conv1", "bn1", "conv2", "bn2", "relu")

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"FusedBasicBlock: expected groups=1 and base_width=64, got groups={groups} and base_width={base_width}"
            )
        if dilation > 1:
            raise NotImplementedError(f"FusedBasicBlock: expected dilation=1, got {dilation}")
        self.conv1 = _conv(inplanes, planes, 3, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def _run(self, x: Any) -> Any:
        return run_basic_block(self, x, self.options)

    def _forward_unfused(self, x: Tensor) -> Tensor:
        identity = x
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        if self.downsample is not None:
            identity = self.downsample(x)
        h += identity
        return self.relu(h)


class FusedBottleneck(_FusedBlock):
    """torchvision's ``Bottleneck`` in three launches; ResNeXt and Wide ResNet through ``groups`` and ``base_width``.

    Constructor, attributes and state_dict are those of ``torchvision.models.resnet.Bottleneck`` (stride on the
    3x3); ``downsample`` of the form ``Sequential(1x1 conv, BN)`` joins the third launch.
    """

    expansion = 4
    _convs = 3
    _names = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "relu")

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = _conv(inplanes, width, 1)
        self.bn1 = norm_layer(width)
        self.conv2 = _conv(width, width, 3, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = _conv(width, planes * self.expansion, 1)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def _run(self, x: Any) -> Any:
        return run_bottleneck(self, x, self.options)

    def _forward_unfused(self, x: Tensor) -> Tensor:
        identity = x
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        if self.downsample is not None:
            identity = self.downsample(x)
        h += identity
        return self.relu(h)


class FusedConvBNReLU(FusedModule):
    """``relu(bn(conv(x)))`` in one launch, or ``relu(bn(conv(x)) + residual)`` when a residual is given.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: as for ``nn.Conv2d``.
        padding: as for ``nn.Conv2d``; None means "the output has the input's size at stride 1".
        norm_layer: the batch norm's class, ``nn.BatchNorm2d`` by default.
        activation: ``"relu"``, ``"relu6"`` or ``"none"``.

    Submodules: ``conv`` and ``bn``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm_layer: Norm | None = None,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if activation not in ("relu", "relu6", "none"):
            raise ValueError(f"activation: expected 'relu', 'relu6' or 'none', got {activation!r}")
        if padding is None:
            padding = dilation * (kernel_size - 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.bn = (norm_layer or nn.BatchNorm2d)(out_channels)
        self.activation = activation

    def _bypassed(self) -> Iterator[tuple[str, nn.Module | None]]:
        yield "conv", self.conv
        yield "bn", self.bn

    @tail.runs_inside
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if torch.jit.is_scripting():
            return self._forward_unfused(x, residual)
        else:
            if watched(x) or self.why_not_fused() is not None:
                return self._forward_unfused(x, residual)
            y = tail.conv_bn_act(self.conv, self.bn, tail.enter(x), residual, self.activation, self.options)
            return tail.leave(y)

    def _forward_unfused(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x))
        if residual is not None:
            y = y + residual
        if self.activation == "relu":
            return F.relu(y)
        if self.activation == "relu6":
            return F.relu6(y)
        return y

    def _run(self, x: Any) -> Any:
        return tail.conv_bn_act(self.conv, self.bn, x, None, self.activation, self.options)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
