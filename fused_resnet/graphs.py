"""CUDA graphs of a whole network: one launch for all its kernels, where launches cost more than the work."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

logger = logging.getLogger("fused_resnet")

#: Runs before the capture: kernels are chosen, verified, compiled and their workspaces allocated in these.
_WARM_UP = 3


class GraphedModel:
    """A model whose forward is replayed from a CUDA graph, for inputs like the example.

    Calling it copies the inputs into the graph's own, replays, and returns copies of the outputs (``copy=False``:
    the graph's own outputs, overwritten by the next call). Inputs of another shape, dtype or device run the model
    itself, ungraphed.

    The kernels with live BN read all parameters where they lie, so in-place changes (``load_state_dict``, an
    optimizer) show at once. Call :meth:`capture` again after anything else: other tensors in their place, another
    structure, or any change of weights where the backend folds them (``cudnn``).

    ``why_not`` is None, or the sentence why there is no graph and the model simply runs.
    """

    def __init__(self, model: nn.Module, example: tuple[Any, ...], copy: bool = True) -> None:
        self.model = model
        self.copy = copy
        self._example = example
        self._graph: Any = None
        self._inputs: tuple[Any, ...] = ()
        self._output: Any = None
        self.why_not = _why_not(model, example)
        if self.why_not is None:
            self.capture()
        else:
            logger.info("fused_resnet: %s", self.why_not)

    def capture(self) -> None:
        """Capture the model as it is now (again)."""
        device = next(t.device for t in self._example if isinstance(t, Tensor))
        with torch.cuda.device(device), torch.inference_mode():
            inputs = tuple(_own(value) for value in self._example)
            # On a side stream, as torch.cuda.graph wants it. Here, and not in the capture, each kernel is verified.
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self.model(*inputs)
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self.model(*inputs)
        self._graph, self._inputs, self._output = graph, inputs, output

    def __call__(self, *args: Any) -> Any:
        if self._graph is None or not self._fits(args):
            with torch.inference_mode():
                return self.model(*args)
        with torch.inference_mode():
            for own, given in zip(self._inputs, args, strict=True):
                if isinstance(own, Tensor):
                    own.copy_(given, non_blocking=True)
            self._graph.replay()
            return tree_map(_copy, self._output) if self.copy else self._output

    def _fits(self, args: tuple[Any, ...]) -> bool:
        return len(args) == len(self._inputs) and all(_alike(a, b) for a, b in zip(args, self._inputs, strict=True))

    def __repr__(self) -> str:
        state = "CUDA graph" if self.why_not is None else self.why_not
        return f"GraphedModel({type(self.model).__name__}, {state})"


def graph(model: nn.Module, example: Tensor | tuple[Any, ...], *, copy: bool = True) -> Callable[..., Any]:
    """The whole network as one CUDA graph: ``fast = fused_resnet.graph(fused_resnet.fuse(model), example)``.

    Worth it where launches cost more than the work: small batches. The model must be in evaluation mode and do the
    same for every input of the example's shape (no branches on values, no host synchronisation).

    Args:
        model: on a CUDA device, in evaluation mode.
        example: an input of the shape, dtype and device to come, or a tuple of inputs.
        copy: return copies of the outputs. Without, the next call overwrites what this one returned.

    Returns:
        a callable with the model's signature. Where no graph can be had (on the CPU) it runs the model and its
        attribute ``why_not`` is one sentence.

    Raises:
        ValueError: the model is in training mode, or the example holds no tensor.
    """
    return GraphedModel(model, example if isinstance(example, tuple) else (example,), copy)


def _why_not(model: nn.Module, example: tuple[Any, ...]) -> str | None:
    tensors = [value for value in example if isinstance(value, Tensor)]
    if not tensors:
        raise ValueError(f"example: expected a tensor or a tuple with one, got {example!r}")
    if model.training:
        raise ValueError("model: expected evaluation mode (model.eval()), got training mode")
    kinds = {t.device.type for t in tensors} | {p.device.type for p in model.parameters()}
    if kinds != {"cuda"}:
        return f"no CUDA graph: the model and its example must be on a CUDA device, got {', '.join(sorted(kinds))}"
    return None


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value  # clone keeps dense strides: channels_last stays


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _alike(given: Any, own: Any) -> bool:
    if isinstance(own, Tensor):
        return (
            isinstance(given, Tensor)
            and given.shape == own.shape
            and given.dtype == own.dtype
            and given.device == own.device
        )
    return bool(given == own)
