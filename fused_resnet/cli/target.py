"""MODEL and ``--weights``: from what the user typed to a module that is ready to run."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import first_line
from .common import UserError, errors, user_errors


@dataclass
class Target:
    """A model and what is known about its input and its classes."""

    model: nn.Module
    name: str
    classes: list[str] | None = None
    in_channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    size: int | None = None
    weights: str | None = None

    def example(
        self,
        batch: int,
        size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Tensor:
        """A random input. UserError for a model whose forward takes anything but one batch of images."""
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, self.in_channels, size, size, generator=g).to(device, dtype)
        with user_errors(TypeError, prefix=f"MODEL: expected a forward of one batch of images, got {self.name}'s: "):
            inspect.signature(self.model.forward).bind(x)
        return x


@dataclass
class Checkpoint:
    """The weights in a file, and what else the file says."""

    state: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)


def load_target(spec: str, weights: str | None = None) -> Target:
    """The model called ``spec`` in eval mode, with ``weights`` in it."""
    file, checkpoint = None, None
    if weights is not None and (Path(weights).suffix or Path(weights).exists()):
        file = weights
        checkpoint = read_checkpoint(Path(weights))
    if ":" in spec and spec.partition(":")[0] not in _LIBRARIES:
        if weights is not None and checkpoint is None:
            raise UserError(f"--weights: {weights!r} is not a file")
        model, name = _instance(attribute_of(spec), spec), spec.rpartition(":")[2]
    else:
        model, name = _by_name(spec, None if file else weights, checkpoint), spec
    if checkpoint is not None:
        _load_state(model, checkpoint.state, file or "")
    target = Target(model.eval(), name, weights=weights)
    _describe(target, checkpoint.meta if checkpoint else {})
    return target


def _describe(target: Target, meta: Mapping[str, Any]) -> None:
    """Fill in channels, normalisation and classes from the checkpoint, the model or its library."""
    model = target.model
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None:
        target.in_channels = first.in_channels
    config = getattr(model, "pretrained_cfg", None)  # timm's description of the weights
    if isinstance(config, Mapping) and config.get("mean") and config.get("std"):
        target.mean, target.std = tuple(config["mean"]), tuple(config["std"])
    if "mean" in meta and "std" in meta:
        target.mean, target.std = tuple(map(float, meta["mean"])), tuple(map(float, meta["std"]))
    elif target.in_channels != len(target.mean):
        target.mean, target.std = (0.5,) * target.in_channels, (0.5,) * target.in_channels
    if meta.get("size"):
        target.size = int(meta["size"])
    classes = meta.get("classes")
    target.classes = [str(c) for c in classes] if classes else None


# ---- models --------------------------------------------------------------------------------------------------


#: Prefixes that say where a model's name is from.
_LIBRARIES = ("torchvision", "timm", "fused_resnet")


def attribute_of(spec: str) -> Any:
    """The object of ``file.py:object``, or of ``package.module:object`` of something installed."""
    text, _, attribute = spec.rpartition(":")
    path = Path(text)
    if path.suffix == ".py":
        module = _run_file(path, spec)
    else:
        try:
            module = importlib.import_module(text)
        except ImportError as error:
            raise UserError(f"MODEL: expected a name or file.py:object, got {spec!r} ({error})") from error
    if not hasattr(module, attribute):
        names = [n for n, v in vars(module).items() if _could_be_model(v, module.__name__)]
        hint = f"; it defines {', '.join(names)}" if names else ""
        raise UserError(f"MODEL: {text} has no {attribute!r}{hint}")
    return getattr(module, attribute)


def _run_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise UserError(f"MODEL: no file {str(path)!r} (from {spec!r})")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[path.stem] = module  # so that classes defined there can be pickled and deep-copied
    sys.path.insert(0, str(path.parent.resolve()))  # the file may import its neighbours
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"MODEL: {path} does not run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module


def _could_be_model(value: Any, module: str) -> bool:
    if isinstance(value, nn.Module):
        return True
    return callable(value) and getattr(value, "__module__", None) == module


def _instance(thing: Any, spec: str) -> nn.Module:
    """A module, or what a class or factory without arguments makes."""
    if not isinstance(thing, nn.Module) and callable(thing):
        try:
            inspect.signature(thing).bind()
        except TypeError as error:
            raise UserError(f"MODEL: {spec} must be callable without arguments: {error}") from error
        try:
            thing = thing()
        except Exception as error:
            raise UserError(f"MODEL: {spec}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(thing, nn.Module):
        raise UserError(f"MODEL: {spec} must be or make a torch.nn.Module, got a {type(thing).__name__}")
    return thing


def _by_name(spec: str, weights_name: str | None, checkpoint: Checkpoint | None) -> nn.Module:
    """A model of this package (where the checkpoint says so), torchvision or timm."""
    library, _, name = spec.rpartition(":")
    options: dict[str, Any] = {}
    if checkpoint is not None:
        options = _options_of(checkpoint)
    if library in ("", "fused_resnet"):
        own = _own_model(name, options, wanted=library == "fused_resnet")
        if own is not None:
            return own
    options = {key: value for key, value in options.items() if key == "num_classes"}
    if library in ("", "torchvision"):
        model = _torchvision_model(name, weights_name, options)
        if model is not None:
            return model
    if library in ("", "timm"):
        model = _timm_model(name, weights_name, options)
        if model is not None:
            return model
    asked = [library] if library else ["torchvision", "timm"]
    missing = [package for package in asked if importlib.util.find_spec(package) is None]
    where = " or ".join(asked)
    if missing == asked:
        raise UserError(f"MODEL: {spec!r} needs {where}: pip install {missing[0]}")
    raise UserError(f"MODEL: {spec!r} is no model of {where}{_similar(name)}")


def _options_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Constructor arguments that the shapes of the weights tell: classes, input channels, stem."""
    matrices = [t for key, t in checkpoint.state.items() if t.dim() == 2 and key.endswith("weight")]
    options: dict[str, Any] = {"num_classes": matrices[-1].shape[0]} if matrices else {}
    stem = checkpoint.state.get("conv1.weight")
    if stem is not None and stem.dim() == 4 and stem.shape[-1] == 3:
        options["stem"] = "cifar"
    if stem is not None and stem.dim() == 4 and stem.shape[1] != 3:
        options["in_channels"] = stem.shape[1]
    return options


def _own_model(name: str, options: dict[str, Any], wanted: bool) -> nn.Module | None:
    """This package's ResNet: when asked for, or for a checkpoint whose stem torchvision does not have."""
    if not wanted and not ({"stem", "in_channels"} & options.keys()):
        return None
    from .. import models

    factory = getattr(models, name, None) if name.startswith("resnet") else None
    if factory is None:
        if wanted:
            raise UserError(f"MODEL: fused_resnet.models has no {name!r}")
        return None
    built: nn.Module = factory(**options)
    return built


def _torchvision_model(name: str, weights_name: str | None, options: dict[str, Any]) -> nn.Module | None:
    try:
        import torchvision
    except ImportError:
        return None
    if name not in torchvision.models.list_models():
        return None
    builder = torchvision.models.get_model_builder(name)
    accepted = inspect.signature(builder).parameters
    kwargs: dict[str, Any] = {"weights": None, **options}
    if "weights_backbone" in accepted:
        kwargs["weights_backbone"] = None  # its default downloads
    if weights_name is not None:
        try:
            kwargs = {"weights": torchvision.models.get_model_weights(name)[weights_name]}
        except KeyError:
            known = ", ".join(w.name for w in torchvision.models.get_model_weights(name))
            raise UserError(f"--weights: expected a file or one of {known}, got {weights_name!r}") from None
    with warnings.catch_warnings(), user_errors(OSError, prefix=f"--weights {weights_name}: "):
        warnings.simplefilter("ignore")  # torchvision warns about its own weight initialisation
        return builder(**kwargs)


def _timm_model(name: str, weights_name: str | None, options: dict[str, Any]) -> nn.Module | None:
    try:
        import timm
    except ImportError:
        return None
    if not timm.is_model(name.partition(".")[0]):
        return None
    if weights_name is not None:
        raise UserError(f"--weights: {weights_name!r} is not a file; download timm's weights and give the file")
    return timm.create_model(name, pretrained=False, **options)


def _similar(name: str) -> str:
    import difflib

    known: list[str] = []
    try:
        import torchvision

        known += torchvision.models.list_models()
        import timm

        known += timm.list_models()
    except ImportError:
        pass
    close = difflib.get_close_matches(name, sorted(set(known)), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else "; for your own model give file.py:object"


# ---- weights -------------------------------------------------------------------------------------------------

#: Where checkpoints keep the weights, when not at top level.
_STATE_KEYS = ("model", "state_dict", "model_state_dict", "model_state", "module")
#: Prefixes that wrappers (DataParallel, DistributedDataParallel, torch.compile) put before every name.
_WRAPPERS = ("module.", "_orig_mod.")


def read_checkpoint(path: Path) -> Checkpoint:
    """The tensors of a checkpoint, read without executing anything in it."""
    if not path.is_file():
        raise UserError(f"--weights: no file {str(path)!r}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        with user_errors(SafetensorError, OSError, prefix=f"--weights {path}: "), safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping, has no __iter__)
            text = file.metadata() or {}
        return Checkpoint(_unwrapped(state), {key: _from_json(value) for key, value in text.items()})
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip, EOF and runtime errors here
        raise UserError(
            f"--weights: {path} cannot be read as a checkpoint of tensors ({first_line(error)}); save "
            f"model.state_dict(), not the model"
        ) from error
    meta: dict[str, Any] = {}
    for key in _STATE_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            meta = {k: v for k, v in content.items() if k != key}
            inner = meta.pop("meta", None)
            meta |= inner if isinstance(inner, Mapping) else {}
            content = content[key]
            break
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise UserError(
            f"--weights: {path} holds no state_dict (looked at top level and under {', '.join(_STATE_KEYS)})"
        )
    return Checkpoint(_unwrapped({k: v for k, v in content.items() if isinstance(v, Tensor)}), meta)


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without the wrappers' prefixes, whatever wrapped what; a line on stderr says what was taken off."""
    taken = ""
    while state and (prefix := next((p for p in _WRAPPERS if all(key.startswith(p) for key in state)), None)):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        taken += prefix
    if taken:
        errors.print(f"[yellow]note:[/] the weights' names begin with {taken}, which was taken off", highlight=False)
    return state


def _load_state(model: nn.Module, state: dict[str, Tensor], path: str) -> None:
    own = model.state_dict()
    problems = [
        f"{key} has shape {list(state[key].shape)}, expected {list(own[key].shape)}"
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    ]
    # torch itself counts batches from 0 where a checkpoint does not say.
    counters = {key: own[key] for key in own.keys() - state.keys() if key.endswith("num_batches_tracked")}
    state = {**state, **counters}
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    if missing:
        problems.append(f"{len(missing)} tensors are missing, first {missing[0]}")
    if extra:
        problems.append(f"{len(extra)} are not in the model, first {extra[0]}")
    if problems:
        raise UserError(f"--weights: {path} does not fit {type(model).__name__}: {'; '.join(problems[:4])}")
    model.load_state_dict(state)
