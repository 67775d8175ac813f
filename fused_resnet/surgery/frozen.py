"""A model whose weights are promised not to change: prepared once for each kind of input, then run with no questions.

On the CPU the model's convolutions, with their weights packed, run in one call of the extension from tail to tail
(:mod:`.recorder`); on a GPU the whole network is a CUDA graph.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core import extensions
from ..core.packed_weights import PackedWeights
from ..core.problem import dtype_name
from ..nn import pristine
from ..nn.onlookers import watched
from ..nn.tail import may_go_inside
from .arguments import Frozen, check_dtype, check_options, require_module
from .cuda_graph import CudaGraph
from .live import fuse
from .plan import original_class, runs_tails
from .recorder import NotRecordable, Recorder
from .recording import Recording, map_values

_SHAPES_KEPT = 8


class FrozenModel(Frozen):
    """What :func:`fused_resnet.freeze` returns; called like the model itself.

    It runs a private copy, as the model was when it was frozen (or last refreshed): until :meth:`refresh`, changes of
    the model do not show. Parameters, buffers and the state_dict are those of ``model``, the live model, which also
    runs every call that asks for more than the answer: gradients, autocast, tracing, tensor subclasses; and those for
    which it has been given other tensors, as ``torch.func.functional_call`` does.
    """

    def __init__(
        self, model: nn.Module, backend: str = "auto", winograd: str = "auto", dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        options = {"backend": backend, "winograd": winograd, "dtype": dtype}
        self.__dict__.update(_options=options, _lock=threading.RLock(), dtype=dtype)
        self.training = False
        self.model = model
        self.register_load_state_dict_post_hook(FrozenModel._loaded)

    def refresh(self) -> FrozenModel:
        """Read the live model anew; what was prepared is forgotten. Returns self.

        ValueError where it is in training mode (modules in it may be, and are then run as they are), or where it is to
        be computed in another type and is not in float32.
        """
        if self.model.training:
            raise ValueError("model: expected evaluation mode (model.eval()), got training mode")
        with self._lock:
            self.__dict__["_copy"] = _private_copy(self.model, **self._options)
            self.__dict__["_prepared"] = OrderedDict()
            places = [
                (held, name, tensor)
                for module in self.model.modules()
                for held in (module._parameters, module._buffers)
                for name, tensor in held.items()
            ]
            self.__dict__["_places"] = tuple(zip(*places, strict=True)) or ((), (), ())
        return self

    # -- running --

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args or any(map(watched, args)):
            return self.model(*args, **kwargs)
        if torch.compiler.is_compiling():
            _make_outside()
            return _outside(self, *args, **kwargs)
        if kwargs or self._runs_live(args):
            return self.model(*args, **kwargs)
        with torch.no_grad():
            if self.dtype is None:
                return self._run(args)(*args)
            args = tuple(t.to(self.dtype) if t.is_floating_point() else t for t in args)
            return map_values(self._run(args)(*args), self._widened)

    def _widened(self, value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype is self.dtype else value

    def _runs_live(self, args: tuple[Tensor, ...]) -> bool:
        if self.dtype is not None and any(t.is_floating_point() and t.dtype is not torch.float32 for t in args):
            return True
        kinds = {t.device.type for t in args}
        if len(kinds) > 1 or not kinds <= {"cpu", "cuda"}:
            return True
        holders, names, were = self._places
        if not all(map(operator.is_, map(dict.get, holders, names), were)):  # as by functional_call
            return True
        if pristine.why_not_mode() is not None or any(torch.is_autocast_enabled(kind) for kind in kinds):
            return True
        return torch.is_grad_enabled() and any(t.requires_grad for t in (*args, *self.model.parameters()))

    def _run(self, args: tuple[Tensor, ...]) -> Callable[..., Any]:
        key = tuple((t.shape, t.stride(), t.dtype, t.device) for t in args)
        prepared: OrderedDict[Any, Callable[..., Any]] = self._prepared
        run = prepared.get(key)
        if run is None:
            with self._lock:
                run = prepared.get(key)
                if run is None:
                    run = self._prepare(args)
                    prepared[key] = run
                    if len(prepared) > _SHAPES_KEPT:
                        prepared.popitem(last=False)
        else:
            with contextlib.suppress(KeyError):  # another thread has just put it out
                prepared.move_to_end(key)
        return run

    @torch.inference_mode(False)  # what is made here also serves outside of it
    @torch.no_grad()
    def _prepare(self, args: tuple[Tensor, ...]) -> Callable[..., Any]:
        if args[0].is_cuda:
            return CudaGraph(self._copy, tuple(t.clone() for t in args))
        root: Any = self._copy.__dict__.get("forward")
        recording = root.prepared(args) if isinstance(root, _Piece) else None
        return recording or self._copy  # whose pieces are prepared when something reaches them

    def prepared_for(self) -> Iterator[str]:
        """What has been prepared, a sentence for each frozen part and kind of input."""
        for key, run in list(self._prepared.items()):
            if isinstance(run, CudaGraph):
                yield f"{list(key[0][0])}: {run}"
        for name, module in self._copy.named_modules():
            piece = module.__dict__.get("forward")
            if isinstance(piece, _Piece):
                for (shape, *_), recording in list(piece.recordings.items()):
                    yield f"{name or 'the model'} for {list(shape)}: {recording}"

    # -- the live model's own, as a part of other modules too --

    def train(self, mode: bool = True) -> FrozenModel:
        """RuntimeError: what is frozen is not trained."""
        if mode:
            raise RuntimeError("train: a frozen model cannot be trained; train its live model (.model), then refresh()")
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load into the live model, and refresh."""
        result = self.model.load_state_dict(state_dict, strict=strict, assign=assign)
        self.refresh()
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.model._load_from_state_dict(*args, **kwargs)

    def _loaded(self, _: Any) -> None:
        self.refresh()

    def __prepare_scriptable__(self) -> Any:
        raise TypeError(
            "torch.jit.script: expected a live model, got a frozen one; "
            "script a copy of its live model instead, unfuse(copy.deepcopy(frozen.model))"
        )

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        yield prefix, self
        yield from self.model.named_modules(memo, prefix, remove_duplicate)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model":
            # Whoever walks through this module finds the live model's parameters, buffers and submodules under their
            # own names, since the dictionaries are the live model's.
            shared = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
            self.__dict__.update({"model": value, **{name: value.__dict__[name] for name in shared}})
            self.refresh()
        elif name in self.__dict__ or name == "training":
            object.__setattr__(self, name, value)
        else:
            setattr(self.model, name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenModel:  # to(), half(), cuda() and the like
        self.model._apply(fn, recurse)
        return self.refresh()

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not there yet: unpickling
            raise AttributeError(name)
        return getattr(self.model, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenModel:
        return _frozen(copy.deepcopy(self.model, memo), **self._options)

    def __reduce__(self) -> Any:
        return _frozen, (self.model, *self._options.values())

    def extra_repr(self) -> str:
        computed = "" if self.dtype is None else f" computed in {dtype_name(self.dtype)}"
        return f"{original_class(self.model).__name__}{computed}, {len(self._prepared)} kinds of input prepared"


def _frozen(model: nn.Module, backend: str, winograd: str, dtype: torch.dtype | None = None) -> FrozenModel:
    cls: Any = type(model)
    frozen: FrozenModel = _frozen_class(cls)(model, backend, winograd, dtype)
    return frozen


@functools.cache
def _frozen_class(cls: Any) -> Any:
    """The class of frozen models of a class: its forward has the arguments of theirs, under their names."""

    @functools.wraps(cls.forward)
    def forward(self: FrozenModel, *args: Any, **kwargs: Any) -> Any:
        return FrozenModel.forward(self, *args, **kwargs)

    return type(FrozenModel.__name__, (FrozenModel,), {"__module__": __name__, "forward": forward})


_outside: Any = None


@pristine.constant
def _make_outside() -> None:
    """Make ``_outside``, which is ``FrozenModel.forward`` outside of a compiled graph; its import takes a second."""
    global _outside
    if _outside is None:
        reason = "a frozen model runs as it is; for one full graph compile its live model, .model"
        _outside = torch.compiler.disable(FrozenModel.forward, reason=reason)


class _Piece:
    """The forward of one module of the private copy: its recordings, and its own forward where there is none."""

    def __init__(self, module: nn.Module, kept: PackedWeights) -> None:
        self._module, self._kept = module, kept
        self.recordings: dict[Any, Recording] = {}
        self._refused: set[Any] = set()
        self._lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recording = None if kwargs else self.prepared(args)
        if recording is None:
            return type(self._module).forward(self._module, *args, **kwargs)
        return recording(*args)

    def prepared(self, args: tuple[Any, ...]) -> Recording | None:
        if len(args) != 1 or type(args[0]) is not Tensor or args[0].dim() != 4 or args[0].numel() == 0:
            return None
        x = args[0]
        key = (x.shape, x.stride(), x.dtype)
        if key in self._refused:
            return None
        recording = self.recordings.get(key)
        if recording is None:
            with self._lock:
                recording = self.recordings.get(key)
                if recording is None:
                    recording = self._record(key, x)
        return recording

    def _record(self, key: Any, x: Tensor) -> Recording | None:
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                recording = Recorder(self._kept).record(self._module, x)
        except NotRecordable:
            self._refused.add(key)
            return None
        if len(self.recordings) >= _SHAPES_KEPT:
            self.recordings.pop(next(iter(self.recordings)))
        self.recordings[key] = recording
        return recording


@torch.inference_mode(False)  # what is made here also serves outside of it
def _private_copy(model: nn.Module, backend: str, winograd: str, dtype: torch.dtype | None) -> nn.Module:
    copied = fuse(model, backend=backend, winograd=winograd)
    if any(map(runs_tails, copied.modules())):
        # Around what gains a tail that does not is better one link more than a call with two copies.
        copied = fuse(copied, True, backend=backend, winograd=winograd, everywhere=True)
    copied.requires_grad_(False)
    if dtype is not None:
        _convert(copied, dtype)
    device = next((p.device for p in copied.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        return copied.to(memory_format=torch.channels_last)  # what the kernels read: a graph converts nothing
    if extensions.cpu() is not None:
        kept = PackedWeights(checked=False)
        for module in _pieces(copied):
            module.__dict__["forward"] = _Piece(module, kept)
    return copied


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """``model.to(dtype)``, but for batch norms, which torch and our kernels compute in float32 either way."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for tensor in held.values():
                if tensor is None or not tensor.is_floating_point():
                    continue
                if tensor.dtype not in (torch.float32, dtype):
                    raise ValueError(
                        f"model: expected parameters and buffers in float32 for dtype={dtype}, got {tensor.dtype}"
                    )
                if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                    tensor.data = tensor.data.to(dtype)


def _pieces(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that are made of tails."""
    seen: set[int] = set()

    def walk(m: nn.Module) -> Iterator[nn.Module]:
        if id(m) in seen:
            return
        seen.add(id(m))
        if _is_piece(m):
            yield m
        else:
            for child in m.children():
                yield from walk(child)

    yield from walk(module)


def _is_piece(module: nn.Module) -> bool:
    if not may_go_inside(module):
        return False
    if type(module) is nn.Sequential:
        return any(_is_piece(child) for child in module)
    return runs_tails(module)


def freeze(
    model: nn.Module, example: Tensor | tuple[Tensor, ...] | None = None, *, backend: str = "auto",
    winograd: str = "auto", dtype: torch.dtype | None = None,
) -> FrozenModel:  # fmt: skip
    """``model`` as fast as it gets, on the promise that it does not change: ``fast = fused_resnet.freeze(model)``.

    Weights are packed once. On the CPU the network's convolutions run in one call of the extension, everything between
    them in NHWC; on a GPU the network is a CUDA graph for each kind of input. A kind of input (shape, strides, dtype,
    device) is prepared at its first call, eight of them are kept, and the same input gives the same bits in every call.
    What cannot be frozen runs as it is in between; ``explain(fast)`` says what that is.

    Args:
        model: in evaluation mode; fused where it is not yet (a copy, ``model`` itself is left alone).
        example: an input, or a tuple of inputs, to prepare for at once.
        backend, winograd: as for :func:`fused_resnet.fuse`.
        dtype: ``torch.bfloat16`` or ``torch.float16``: what a model of float32 is computed in, from input to output in
            float32, as ``model.to(dtype)`` would compute it with its batch norms left in float32. The live model stays
            in float32. ``explain(fast)`` says how this device computes the type.

    Returns:
        a module to be called under ``torch.inference_mode()`` or ``torch.no_grad()``. Calls that want gradients, run
        under autocast, or are being exported, traced or transformed go to the live model, ``fast.model``, of which
        those who look see its own forward. ``torch.compile`` calls it as it is. ``fast.refresh()`` reads it anew.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` is in training mode, ``backend``, ``winograd`` or ``dtype`` is unknown, or ``dtype`` is
            given and ``model`` is not in float32.
    """
    require_module(model, "freeze")
    check_options(backend, winograd)
    check_dtype(dtype)
    if isinstance(model, FrozenModel):
        if dtype in (None, model.dtype):
            return model
        model = model.model
    frozen = _frozen(model, backend, winograd, dtype)
    if example is not None:
        args = example if isinstance(example, tuple) else (example,)
        if not args or not all(isinstance(value, Tensor) for value in args):
            raise ValueError(f"example: expected a tensor or a tuple of tensors, got {example!r}")
        with torch.no_grad():
            frozen(*args)
    return frozen
