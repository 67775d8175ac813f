"""Exporting a model with the fused operators in the program: :func:`export`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ..core.packed_weights import OF_THE_PROCESS
from ..nn.onlookers import shown_fused
from .arguments import require_module
from .frozen import FrozenModel
from .live import fuse
from .plan import ATTRIBUTE, is_fused, runs_tails


def export(model: nn.Module, example: Any, **options: Any) -> ExportedProgram:
    """Export ``model`` with its fused operators: ``program = fused_resnet.export(model, example)``.

    ``torch.export.export`` of a fused model gives its own forward, in standard operators, which every runtime knows.
    This program holds ``fused_resnet::conv_bn_add_relu`` and its like instead, and so the kernels: whoever loads it
    has imported ``fused_resnet``. ``program.run_decompositions(fused_resnet.decompositions())`` turns it into core
    ATen, which ``torch.onnx.export`` takes.

    Args:
        model: in evaluation mode; fused where nothing in it is yet (a copy, ``model`` itself is left alone). Of a
            frozen model its live one is exported.
        example: an input, or a tuple of inputs.
        options: for ``torch.export.export``: ``kwargs``, ``dynamic_shapes``, ``strict`` and so on.

    Returns:
        the program, for inference. Packed copies of its weights are kept by the process that runs it.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` is in training mode.
        Whatever ``torch.export.export`` raises.
    """
    if isinstance(model, FrozenModel):
        model = model.model
    require_module(model, "export")
    if model.training:
        raise ValueError(
            "export: model: expected evaluation mode (model.eval()), got training mode; "
            "torch.export.export exports its own forward, which can be trained"
        )
    if not any(map(runs_tails, model.modules())):
        model = fuse(model)
    args = example if isinstance(example, tuple) else (example,)
    with shown_fused(), torch.no_grad(), _packed_by_the_process(model):
        return torch.export.export(model, args, **options)


@contextmanager
def _packed_by_the_process(model: nn.Module) -> Iterator[None]:
    """The number of a module's own packed weights means nothing to whoever loads the program."""
    owners = [
        module.__dict__[ATTRIBUTE] if is_fused(module) else module for module in model.modules() if runs_tails(module)
    ]
    own = [owner.packed_weights for owner in owners]
    try:
        for owner in owners:
            owner.packed_weights = OF_THE_PROCESS
        yield
    finally:
        for owner, packed in zip(owners, own, strict=True):
            owner.packed_weights = packed
