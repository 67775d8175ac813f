"""Keras residual blocks in PyTorch: the arrays of one block onto fused modules.

What differs between the two, and is taken care of here: kernels are ``[R, S, C, K]`` (ours ``[K, C, R, S]``);
convolutions have biases; BN has epsilon 1e-3 and counts its momentum from the other end (0.99 is 0.01 here);
``padding="same"`` with a stride puts the odd pixel at the bottom and right, which no symmetric padding can say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import FusedModule, tail

if TYPE_CHECKING:
    import numpy as np

_SHORTCUT = re.compile(r"shortcut|projection|proj|downsample|(^|_)0_(conv|bn)$", re.IGNORECASE)


class KerasBlock(FusedModule):
    """A residual block as it is written in Keras, every convolution with ``padding="same"``.

    ``relu(bn_n(conv_n(... relu(bn1(conv1(x))))) + shortcut(x))``; submodules ``conv1, bn1, conv2, bn2, ...`` and
    ``shortcut`` (``Sequential(conv)``, ``Sequential(conv, bn)``, or empty). A BN may be missing (None).
    Input is NCHW as everywhere in PyTorch; channels_last memory is Keras's own layout.
    """

    def __init__(self, convs: list[nn.Conv2d], bns: list[nn.Module | None], shortcut: nn.Sequential) -> None:
        super().__init__()
        self.depth = len(convs)
        for i, (conv, bn) in enumerate(zip(convs, bns, strict=True), start=1):
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", bn)
        self.shortcut = shortcut

    def _bypassed(self) -> Iterator[tuple[str, nn.Module | None]]:
        yield from self.named_children()
        for i, module in enumerate(self.shortcut):
            yield f"shortcut.{i}", module

    def _main(self) -> list[tuple[Any, Any]]:
        return [(getattr(self, f"conv{i}"), getattr(self, f"bn{i}")) for i in range(1, self.depth + 1)]

    def _run(self, x: Any) -> Any:
        *body, (conv, bn) = self._main()
        h = x
        for body_conv, body_bn in body:
            h = tail.conv_bn_act(body_conv, body_bn, _same_pad_value(h, body_conv), None, "relu", self.options)
        h = _same_pad_value(h, conv)
        if len(self.shortcut) == 0:
            return tail.conv_bn_act(conv, bn, h, x, "relu", self.options)
        proj: Any = self.shortcut[0]
        proj_bn = self.shortcut[1] if len(self.shortcut) > 1 else None
        return tail.conv_bn_proj_act(conv, bn, h, proj, proj_bn, x, "relu", self.options)

    def _forward_unfused(self, x: Tensor) -> Tensor:
        h = x
        for i, (conv, bn) in enumerate(self._main()):
            h = conv(same_pad(h if i == 0 else F.relu(h), conv))
            h = h if bn is None else bn(h)
        return F.relu(h + self.shortcut(x))


def same_pad(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """``x`` padded as Keras's ``padding="same"`` does for ``conv``; the odd pixel goes to the bottom and right.

    Stride-1 convolutions of odd kernels carry their (symmetric) padding themselves.
    """
    if conv.stride == (1, 1):
        return x
    pads: list[int] = []
    for size, kernel, stride in ((x.shape[3], conv.kernel_size[1], conv.stride[1]),
                                 (x.shape[2], conv.kernel_size[0], conv.stride[0])):  # fmt: skip
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads) if any(pads) else x


def _same_pad_value(x: Any, conv: nn.Conv2d) -> Any:
    return x if conv.stride == (1, 1) else tail.apply(lambda image: same_pad(image, conv), x)


def _layers(weights: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """``{"conv2d/kernel:0": array}`` by layer: ``{"conv2d": {"kernel": array}}``, layers in their natural order."""
    import numpy as np

    layers: dict[str, dict[str, np.ndarray]] = {}
    for key, value in weights.items():
        layer, _, variable = key.rpartition("/")
        if not layer:
            raise ValueError(f"weights: expected keys of the form 'layer/variable', got {key!r}")
        layers.setdefault(layer, {})[variable.split(":")[0]] = np.asarray(value)

    def natural(name: str) -> list[Any]:
        # "conv2d" comes before "conv2d_1", and "conv2d_2" before "conv2d_10"
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    return {name: layers[name] for name in sorted(layers, key=natural)}


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy(order="C"))


def _conv(arrays: Mapping[str, np.ndarray], name: str, stride: int) -> nn.Conv2d:
    kernel = arrays["kernel"]
    if kernel.ndim != 4:
        raise ValueError(f"weights: {name}/kernel: expected [R, S, C, K], got {list(kernel.shape)}")
    r, s, c, k = kernel.shape
    if stride == 1 and (r % 2 == 0 or s % 2 == 0):
        raise ValueError(f"weights: {name}/kernel: expected an odd kernel size, got {r}x{s}")
    padding = (r // 2, s // 2) if stride == 1 else (0, 0)  # with a stride: same_pad
    conv = nn.Conv2d(c, k, (r, s), stride, padding, bias="bias" in arrays)
    with torch.no_grad():
        conv.weight.copy_(_tensor(kernel.transpose(3, 2, 0, 1)))
        if conv.bias is not None:
            conv.bias.copy_(_tensor(arrays["bias"]))
    return conv


def _bn(arrays: Mapping[str, np.ndarray], name: str, epsilon: float, momentum: float) -> nn.BatchNorm2d:
    for needed in ("moving_mean", "moving_variance"):
        if needed not in arrays:
            raise ValueError(f"weights: expected {name}/{needed}, got only {', '.join(sorted(arrays))}")
    bn = nn.BatchNorm2d(arrays["moving_mean"].shape[0], eps=epsilon, momentum=1 - momentum)
    with torch.no_grad():
        # Keras leaves gamma out with scale=False and beta with center=False: 1 and 0, the values BN starts with.
        for ours, theirs in (("weight", "gamma"), ("bias", "beta"),
                             ("running_mean", "moving_mean"), ("running_var", "moving_variance")):  # fmt: skip
            if theirs in arrays:
                getattr(bn, ours).copy_(_tensor(arrays[theirs]))
    return bn


def from_keras(
    weights: Mapping[str, Any], *, stride: int = 1, epsilon: float = 1e-3, momentum: float = 0.99
) -> KerasBlock:
    """A fused PyTorch block with the weights of one Keras residual block.

    Args:
        weights: the block's arrays by ``"layer/variable"``, e.g. ``{f"{l.name}/{w.name}": w for l in layers for w in
            l.weights}``: ``kernel`` and ``bias`` of the convolutions; ``gamma``, ``beta``, ``moving_mean`` and
            ``moving_variance`` of the batch norms. Layers are taken in their natural order (``conv2d, conv2d_1,
            ...``). The projection is the convolution whose layer is called shortcut, projection, downsample or
            ``..._0_conv``, else the 1x1 convolution that does not fit the main path.
        stride: of the block: of its first convolution and its projection (weights do not tell it).
        epsilon, momentum: of the block's BatchNormalization layers; Keras's defaults.

    Returns:
        The block in training mode, as every new module.

    Raises:
        ValueError: the arrays are not those of a residual block; the message says which.
    """
    layers = _layers(weights)
    kernels = {name: a for name, a in layers.items() if "kernel" in a}
    norms = {name: a for name, a in layers.items() if "kernel" not in a}
    if len(kernels) < 2:
        raise ValueError(f"weights: expected at least two convolutions, got {', '.join(kernels) or 'none'}")
    projection = _projection(kernels)
    main = [name for name in kernels if name != projection]
    first, last = kernels[main[0]]["kernel"].shape, kernels[main[-1]]["kernel"].shape
    if projection is None and (first[2] != last[3] or stride != 1):
        raise ValueError(
            f"weights: expected a projection (a 1x1 convolution of {first[2]} to {last[3]} channels) "
            f"for stride {stride}, got none"
        )
    shortcut_norms = [name for name in norms if _SHORTCUT.search(name)]
    main_norms = [name for name in norms if name not in shortcut_norms]
    if projection is not None and not shortcut_norms and len(main_norms) == len(main) + 1:
        shortcut_norms = [main_norms.pop()]  # built last, as convolution and BN of the main path come first
    if (main_norms and len(main_norms) != len(main)) or len(shortcut_norms) > 1:
        raise ValueError(
            f"weights: expected a batch norm after each of the {len(main)} convolutions or after none, "
            f"got {', '.join(norms)}"
        )
    convs = [_conv(kernels[name], name, stride if i == 0 else 1) for i, name in enumerate(main)]
    bns: list[nn.Module | None] = [_bn(norms[name], name, epsilon, momentum) for name in main_norms]
    shortcut = nn.Sequential()
    if projection is not None:
        conv = _conv(kernels[projection], projection, stride)
        if conv.kernel_size != (1, 1):
            raise ValueError(f"weights: {projection}/kernel: expected a 1x1 projection, got {conv.kernel_size}")
        shortcut.append(conv)
        if shortcut_norms:
            shortcut.append(_bn(norms[shortcut_norms[0]], shortcut_norms[0], epsilon, momentum))
    return KerasBlock(convs, bns or [None] * len(convs), shortcut)


def _projection(kernels: Mapping[str, Mapping[str, np.ndarray]]) -> str | None:
    """The name of the projection's layer: by its name, else the last 1x1 that does not continue the main path."""
    named = [name for name in kernels if _SHORTCUT.search(name)]
    if named:
        return named[0]
    names = list(kernels)
    shapes = [kernels[name]["kernel"].shape for name in names]
    block_input = shapes[0][2]
    for i in range(len(names) - 1, 1, -1):
        continues = shapes[i][2] == shapes[i - 1][3] and shapes[i][2] != block_input
        if shapes[i][:2] == (1, 1) and shapes[i][2] == block_input and not continues:
            return names[i]
    return None
