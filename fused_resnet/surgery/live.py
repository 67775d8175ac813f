"""Fusing a model so that it stays live: :func:`fuse`, :func:`unfuse` and :func:`refresh`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor, nn

from ..nn import FusedModule
from .arguments import check_options, require_module
from .discovery import discover, replan
from .gain import on_cpu
from .plan import ATTRIBUTE, Fusion, attach, carry_modes, detach, is_fused

M = TypeVar("M", bound=nn.Module)


def fuse(
    model: M, inplace: bool = False, *, backend: str = "auto", winograd: str = "auto", check: bool = True,
    everywhere: bool = False,
) -> M:  # fmt: skip
    """Run the residual blocks of ``model``, and its stem, with one launch for each conv -> BN (-> add) -> ReLU.

    Names, attributes, Parameters and the state_dict stay what they are: only the forward of each understood block
    is replaced (by a subclass of the block's own class). Before a
    block is replaced, its rewritten forward is compared with the original on randomised float64 copies, in training
    and eval mode, outputs and gradients. What is not understood stays as it was; :func:`explain` says why.

    The fused forward looks at its submodules at each call: in training mode batch statistics are used and updated
    as always, ``load_state_dict``, optimizer steps, frozen or synchronised batch norms are seen, and hooks or
    parametrizations on a submodule make the block run its own forward. Whoever exports, traces or transforms
    the model (``torch.export``, ONNX, ``torch.jit``, ``make_fx``, ``torch.func``) sees its own forward and standard
    operators; ``torch.compile`` sees the fused ones.

    Args:
        model: any module; torchvision's and timm's ResNets, detection and segmentation backbones, or your own.
        inplace: change ``model`` itself (an optimizer that holds its Parameters goes on working); else a deep
            copy is fused and returned.
        backend: ``"auto"`` or a name from :func:`fused_resnet.backends.names`.
        winograd: ``"auto"``, ``"f2"`` or ``"off"``; see :func:`fused_resnet.functional.conv_bn_add_relu`.
        check: compare before replacing. Without it a rewritten forward is trusted as it is.
        everywhere: also where no gain is expected. Outside of residual blocks a model on the CPU is fused only where
            that pays for a launch: from one large 3x3 convolution of stride 1 on, in NCHW from a chain with one. What
            is left as it is, is told by :func:`explain`; fuse again after moving the model to a GPU, where every launch
            pays.

    Returns:
        The fused model. Fusing a fused model again only sets the options and fuses what is new in it.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``backend`` or ``winograd`` is unknown.
        RuntimeError: ``model`` cannot be copied, because it holds tensors computed from others; fuse it in place.
    """
    require_module(model, "fuse")
    check_options(backend, winograd)
    if not inplace:
        model = _copied(model)
    for module in list(model.modules()):
        if is_fused(module) and module.__dict__[ATTRIBUTE].left and (everywhere or not on_cpu(module)):
            detach(module)  # its plan goes around what is planned now
    for found in discover(model, check, everywhere).planned:
        assert found.plan is not None
        attach(found.module, Fusion(found.plan, partly=found.reason, left=found.left))
    for module in model.modules():
        if is_fused(module):
            fusion = module.__dict__[ATTRIBUTE]
            fusion.backend, fusion.winograd = backend, winograd
        elif isinstance(module, FusedModule):
            module.backend, module.winograd = backend, winograd
    return model


def _copied(model: M) -> M:
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        computed = next(_computed_tensors(model), None)
        if computed is None:
            raise
        raise RuntimeError(
            f"fuse: model: cannot be copied, because {computed} is computed from other tensors (as after prune or "
            "weight_norm); fuse it in place (inplace=True), or make it permanent first"
        ) from error
    carry_modes(model, copied)
    return copied


def _computed_tensors(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        for attribute, value in (*module.__dict__.items(), *module._buffers.items()):
            if isinstance(value, Tensor) and not value.is_leaf:
                yield f"{name}.{attribute}" if name else attribute


def unfuse(model: M) -> M:
    """Undo :func:`fuse`, in place: every module has its own class and forward again.

    Returns ``model``. A model that is not fused is returned as it is.
    """
    require_module(model, "unfuse")
    for module in list(model.modules()):
        if is_fused(module):
            detach(module)
    return model


def refresh(model: M) -> M:
    """Take notice of changes that a fused model cannot see: returns ``model``.

    Plans each fused block again from its code, after its structure or configuration was changed: it may then run fused
    where it ran unfused before. Weights need no notice.
    """
    require_module(model, "refresh")
    for module in model.modules():
        if is_fused(module):
            replan(module)
    return model
