"""What a training run does: the model, the optimizer and its schedule, as its configuration asks for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import checkpoint
from .config import ConfigError, FinetuneConfig, TrainConfig
from .data import Data


def build_model(config: TrainConfig, data: Data) -> nn.Module:
    """The model of ``config`` with as many classes and input channels as the data has."""
    if not isinstance(config.model, str):
        return config.model(len(data.classes), data.channels)
    from .. import models

    factory = getattr(models, config.model, None) if config.model.startswith("resnet") else None
    if factory is None:
        names = ", ".join(name for name in dir(models) if name.startswith("resnet"))
        raise ConfigError(f"model: expected one of {names}, got {config.model!r}")
    model: nn.Module = factory(num_classes=len(data.classes), in_channels=data.channels, stem=config.stem)
    return model if config.fused else _plain_twin(model, config.model, config.stem)


def _plain_twin(model: nn.Module, name: str, stem: str) -> nn.Module:
    """torchvision's model of the same name with the same weights, for comparison with plain PyTorch."""
    try:
        import torchvision
    except ImportError:
        raise ConfigError("training without fused blocks needs torchvision; install fused_resnet[demo]") from None
    conv1: nn.Conv2d = model.get_submodule("conv1")  # type: ignore[assignment]
    classes = model.get_parameter("fc.weight").shape[0]
    twin: nn.Module = getattr(torchvision.models, name)(weights=None, num_classes=classes)
    twin.conv1 = nn.Conv2d(conv1.in_channels, 64, conv1.kernel_size, conv1.stride, conv1.padding, bias=False)  # type: ignore[arg-type]
    if stem == "cifar":
        twin.maxpool = nn.Identity()
    twin.load_state_dict(model.state_dict())
    return twin


def load_pretrained(model: nn.Module, config: FinetuneConfig, data: Data) -> None:
    """Everything but the classifier from ``config.weights``."""
    if config.num_classes is not None and config.num_classes != len(data.classes):
        raise ConfigError(
            f"num_classes: expected {len(data.classes)}, the classes of {config.data}, got {config.num_classes}"
        )
    state, _ = checkpoint.read_weights(config.weights)
    own = model.state_dict()
    classifier = [name for name in own if name.startswith(("fc.", "classifier.", "head."))]
    for name, tensor in own.items():
        if name in classifier:
            state[name] = tensor
        elif name not in state:
            raise ConfigError(f"weights: {config.weights} has no {name}, which {config.model} needs")
        elif state[name].shape != tensor.shape:
            raise ConfigError(
                f"weights: {config.weights} has {name} of shape {list(state[name].shape)}, "
                f"{config.model} needs {list(tensor.shape)}"
            )
    model.load_state_dict({name: state[name] for name in own})


def frozen_modules(model: nn.Module, until: str) -> list[nn.Module]:
    """The children of ``model`` before the one called ``until``, in the order they were defined."""
    names = [name for name, _ in model.named_children()]
    if until not in names:
        raise ConfigError(f"freeze_until: expected one of {', '.join(names)}, got {until!r}")
    return [module for name, module in model.named_children()][: names.index(until)]


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum, or Adam, over the parameters that are not frozen."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "adam":
        lr = 1e-3 if config.lr is None else config.lr
        return torch.optim.Adam(parameters, lr, weight_decay=config.weight_decay)
    lr = 0.1 if config.lr is None else config.lr
    return torch.optim.SGD(parameters, lr, momentum=config.momentum, weight_decay=config.weight_decay)


def make_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Stepped once an epoch: cosine to zero, or a tenth at one half and again at three quarters."""
    if config.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    milestones = [config.epochs // 2, config.epochs * 3 // 4] if config.schedule == "step" else []
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)


def make_average(model: nn.Module, decay: float | None) -> Any:
    """The exponential moving average of weights and buffers, or None."""
    if decay is None:
        return None
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
