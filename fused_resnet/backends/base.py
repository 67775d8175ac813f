"""What a backend of the tail is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.problem import Problem
from ..core.reference import TailArguments


class Backend(ABC):
    """One way to compute the tail."""

    name: str

    @abstractmethod
    def can_run(self, problem: Problem) -> str | None:
        """None when this backend can run ``problem`` here and now, else one sentence that says why not."""

    @abstractmethod
    def run(self, problem: Problem, tail: TailArguments) -> Tensor:
        """Compute the tail. The arguments have been checked; any tensor may have any strides.

        The output has the memory format ``layout.output_memory_format(x, weight)`` and never shares memory
        with an argument.
        """

    def candidates(self, problem: Problem, device: torch.device) -> Sequence[Any]:
        """The configurations that compute ``problem`` on ``device``, the backend's own preference first.

        ``str(configuration)`` names one on disk and in tables, so it is unique among them, and stable as long as the
        configuration compiles to the same code. None stands for a backend that has nothing to choose.
        """
        return (None,)

    def bind(
        self, problem: Problem, tail: TailArguments, configuration: Any = None
    ) -> Callable[[TailArguments], Tensor]:
        """A function for calls like ``tail``, whose tensors agree with its in shape, strides, dtype and device.

        ``configuration`` is one of :meth:`candidates`, or None for the preferred one. Everything that depends on
        the signature alone is decided here, once; data pointers (their alignment too) differ from call to call.
        """
        return partial(self.run, problem)
