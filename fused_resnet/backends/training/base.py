"""What a training backend is, and which one runs.

The four passes of a training tail see canonical tensors only: activations that are dense in channels_last,
statistics and BN parameters contiguous in the accumulation dtype (float32, or float64 for float64 input).
``fused_resnet.ops.training`` brings them into this form. The convolution sees its tensors as the caller has them;
a backend that computes it itself says so by ``why_not_conv_stats``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.convolution import convolution, convolution_backward
from ...core.training_call import BackwardPass, ConvGeometry, ForwardPass, Gradients


class TrainingBackend:
    """The convolution and the four passes on one kind of hardware."""

    name: str

    def can_run(self, y: Tensor, *others: Tensor | None) -> str | None:
        """None, or one sentence why ``y`` and the other activations of the call cannot be handled."""
        raise NotImplementedError

    def with_winograd(self, winograd: str) -> TrainingBackend:
        """This backend with the choice of algorithm for 3 x 3 convolutions ("auto", "f2", "off"), if it has one."""
        return self

    def why_not_conv_stats(self, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> str | None:
        """None where :meth:`conv_stats` is this backend's own kernel, else one sentence why torch's is taken."""
        return f"{self.name}: no convolution with statistics in its epilogue"

    def conv_stats(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``y = conv2d(x)`` in eager's dtype and memory format, and :meth:`stats` of ``y`` as it was rounded.

        ``y`` has at least one element.
        """
        y = convolution(x, weight, bias, *geometry)
        return y, *self.stats(y.contiguous(memory_format=torch.channels_last))

    def conv_backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        weight: Tensor,
        has_bias: bool,
        geometry: ConvGeometry,
        output_mask: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, weight and bias, in their dtypes; None where ``output_mask`` does not ask for one."""
        return convolution_backward(grad_y, x, weight, has_bias, *geometry, output_mask)

    def stats(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of every channel."""
        raise NotImplementedError

    def apply(self, forward: ForwardPass) -> None:
        """See :class:`ForwardPass`."""
        raise NotImplementedError

    def backward_reduce(self, backward: BackwardPass) -> tuple[Tensor, Tensor, Tensor]:
        """``sum(dz)``, ``sum(dz * xhat)`` and the projection's ``sum(dz * xhat)`` (empty without one)."""
        raise NotImplementedError

    def backward_apply(self, backward: BackwardPass, gradients: Gradients) -> None:
        """See :class:`Gradients`."""
        raise NotImplementedError
