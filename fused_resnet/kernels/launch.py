"""Launching the Triton tail: tensors to kernel arguments, and a fast path around Triton's own launcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from ..core.layout import empty_output, output_memory_format
from ..core.problem import Problem
from ..core.reference import ConvBN, TailArguments
from .arguments import BatchNorm
from .config import SHARED_LIMIT, TailConfig, candidates
from .conv_bn_add_relu import conv_bn_add_relu_kernel
from .conv_bn_add_relu_tma import conv_bn_add_relu_tma_kernel
from .plan import Descriptor, TailPlan, plan
from .workspace import workspace

#: TRITON_INTERPRET=1 was set when Triton was imported: kernels run in its interpreter, on tensors of any device.
INTERPRETING = not isinstance(conv_bn_add_relu_kernel, triton.JITFunction)


def capability(device: torch.device) -> int:
    """Compute capability of a device as one number; in the interpreter one with all features."""
    if INTERPRETING:
        return 90
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return int(triton.runtime.driver.active.get_current_target().arch)


def sm_count(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if INTERPRETING:
        return 4  # few, so that small test problems also have several tiles per SM
    return int(triton.runtime.driver.active.utils.get_device_properties(0)["multiprocessor_count"])


def preferred(problem: Problem, device: torch.device) -> list[TailConfig]:
    """The configurations for `problem` on `device`, the expected best first."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return candidates(problem, capability(device), sm_count(device), deterministic)


def channels_last(t: Tensor) -> Tensor:
    return t if t.is_contiguous(memory_format=torch.channels_last) else t.contiguous(memory_format=torch.channels_last)


def vector(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def batch_norm(conv: ConvBN) -> BatchNorm:
    return BatchNorm(
        vector(conv.bias),
        vector(conv.bn_weight),
        vector(conv.bn_bias),
        vector(conv.running_mean),
        vector(conv.running_var),
        conv.eps,
    )


def _hooked() -> bool:
    """Whether a profiler wants to see launches. Before Triton 3.7 the hook is None or a function, then a chain."""
    hook = knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


def described(t: Tensor, descriptor: Descriptor) -> TensorDescriptor:
    """``t`` as the kernel's tensor descriptor, which wants its memory aligned to 16 bytes."""
    if t.data_ptr() % 16:
        t = t.clone(memory_format=torch.preserve_format)
    return TensorDescriptor(t, list(descriptor.shape), list(descriptor.strides), list(descriptor.box))


def persistent_programs(problem: Problem, config: TailConfig, device: torch.device) -> int:
    """Programs of `config` that the device runs at once."""
    shared = config.shared_bytes(problem.dtype.itemsize)
    resident = max(1, min(2, SHARED_LIMIT.get(capability(device), 99 << 10) // shared))
    return sm_count(device) * resident


class BoundTail:
    """The tail for tensors of one signature: planned once, then only pointers change.

    The first call goes through Triton's launcher, which compiles and specialises on alignment to 16 bytes. Later
    calls whose pointers are all so aligned hand the compiled kernel its arguments directly.
    """

    def __init__(self, problem: Problem, tail: TailArguments, config: TailConfig | None = None) -> None:
        self.device = tail.x.device
        if config is None:
            config = preferred(problem, self.device)[0]
        self.problem = problem
        self.config = config
        self.plan: TailPlan = plan(problem, config, persistent_programs(problem, config, self.device), INTERPRETING)
        self.output_shape = problem.output_shape
        self.output_dtype = problem.output_dtype
        self.memory_format = output_memory_format(tail.x, tail.conv.weight)
        dense = self.memory_format is torch.channels_last or problem.k == 1 or problem.p * problem.q == 1
        self.writes_output = dense  # the kernel's NHWC order is the output's own
        self.launch_options = {"num_warps": config.warps, "num_stages": config.stages}
        self.kernel = conv_bn_add_relu_tma_kernel if config.tma else conv_bn_add_relu_kernel
        self.compiled: Any = None
        self.constants = (*self.plan.sizes, self.plan.conv, self.plan.proj_conv, self.plan.tile)
        self.get_stream: Callable[[int], int] = lambda index: 0
        if self.device.type == "cuda":
            self.get_stream = triton.runtime.driver.active.get_current_stream

    def __call__(self, tail: TailArguments) -> Tensor:
        y = empty_output(self.output_shape, self.output_dtype, self.device, self.memory_format)
        if y.numel() == 0:
            return y
        if self.device.type == "cuda" and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self._launch(tail, y)
        return self._launch(tail, y)

    def _described(self, index: int, t: Tensor) -> Any:
        """`t`, or its tensor descriptor where this configuration loads through one."""
        return described(t, self.plan.descriptors[index]) if self.config.tma else t

    def _launch(self, tail: TailArguments, y: Tensor) -> Tensor:
        x, weight = channels_last(tail.x), channels_last(tail.conv.weight)
        out = y if self.writes_output else torch.empty_like(y, memory_format=torch.channels_last)
        residual = None if tail.residual is None else channels_last(tail.residual)
        bn = batch_norm(tail.conv)
        pointers = x.data_ptr() | weight.data_ptr() | out.data_ptr()
        if residual is not None:
            pointers |= residual.data_ptr()
        for v in bn[:5]:
            if v is not None:
                pointers |= v.data_ptr()
        proj: tuple[Any, Any, BatchNorm | None] = (None, None, None)
        if tail.proj is not None and tail.proj_x is not None:
            proj_x, proj_weight = channels_last(tail.proj_x), channels_last(tail.proj.weight)
            proj_bn = batch_norm(tail.proj)
            pointers |= proj_x.data_ptr() | proj_weight.data_ptr()
            for v in proj_bn[:5]:
                if v is not None:
                    pointers |= v.data_ptr()
            proj = (self._described(2, proj_x), self._described(3, proj_weight), proj_bn)
        x, weight = self._described(0, x), self._described(1, weight)
        stream = self.get_stream(self.device.index or 0)
        scratch = None
        if self.plan.workspace_bytes:
            words = self.plan.workspace_bytes // 4
            # partial sums in a fixed order leave garbage where the atomic ones expect zeros
            kind, zeros = ("ordered", self.plan.tiles) if self.config.ordered else ("atomic", words)
            scratch = workspace(kind, words, zeros, self.device, stream)
        arguments = (x, weight, out, residual, bn, *proj, scratch, *self.constants)
        grid = self.plan.grid
        compiled = self.compiled
        if compiled is not None and not pointers & 15 and not _hooked():
            compiled.run(
                grid[0], grid[1], 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments
            )
        else:
            compiled = self.kernel[grid](*arguments, **self.launch_options)
            if not INTERPRETING and not pointers & 15:
                self.compiled = compiled
        return y if self.writes_output else y.copy_(out)
