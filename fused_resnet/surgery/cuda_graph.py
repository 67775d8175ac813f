"""A model's forward for inputs of one kind as a CUDA graph."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

#: Runs before the capture: kernels are chosen, verified, compiled and their workspaces allocated in these.
_WARM_UP = 3


class CudaGraph:
    """``model(*args)`` for inputs like ``args``: copied into the graph's own, replayed, the outputs copied out."""

    def __init__(self, model: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._lock = threading.Lock()  # the graph's inputs and outputs are shared by all threads
        device = args[0].device
        with torch.cuda.device(device), torch.no_grad():
            inputs = tuple(t.clone() for t in args)  # clone keeps dense strides: channels_last stays
            # On a side stream, as torch.cuda.graph wants it. Here, and not in the capture, each kernel is verified.
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    model(*inputs)
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = model(*inputs)
        self._graph, self._inputs, self._output = graph, inputs, output
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(device))

    def __call__(self, *args: Tensor) -> Any:
        stream = torch.cuda.current_stream(self._inputs[0].device)
        with self._lock:
            stream.wait_event(self._done)  # the last call may have come on another stream
            for own, given in zip(self._inputs, args, strict=True):
                own.copy_(given, non_blocking=True)
            self._graph.replay()
            output = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, self._output)
            self._done.record(stream)
        return output

    def __str__(self) -> str:
        return "one CUDA graph"
