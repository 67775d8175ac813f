"""Launch a kernel from its launch.json alone, as a stranger would: on the host build or in the PTX interpreter.

Nothing here knows how the kernels work: shapes, strides, alignment, grid and argument bytes come from the `Launch`,
the numbers from `TailArguments`. Each buffer has exactly the size that the shape and strides imply, and an address that
is a multiple of the promised alignment and of nothing more.
"""

from __future__ import annotations

import importlib.metadata
import os
import struct
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_resnet.aot.launch_json import TENSOR_DTYPES, Launch
from fused_resnet.core.reference import TailArguments

WRITABLE = ("y", "workspace")  # of a tail; of any launch: what is not given a value
Values = dict[str, Tensor]


def named_tensors(tail: TailArguments) -> Values:
    """The tensors of one call under the names that launch.json uses."""
    tensors = {"x": tail.x, "residual": tail.residual, "proj_x": tail.proj_x}
    for prefix, conv in (("", tail.conv), ("proj_", tail.proj)):
        if conv is not None:
            tensors |= {prefix + name: value for name, value in conv._asdict().items()}
    return {name: t for name, t in tensors.items() if isinstance(t, Tensor)}


@dataclass
class Buffer:
    storage: Tensor  # keeps the memory alive
    address: int
    size: int


class Memory:
    """The buffers of one launch, filled from a tail or from named tensors; what has no value is written by the kernel
    and starts as NaN, the workspace as launch.json says.

    `alignment` places every buffer at a multiple of that many bytes instead, as an allocator would.
    """

    def __init__(self, launch: Launch, tail: TailArguments | Values, alignment: int = 0) -> None:
        self.launch = launch
        self.buffers: dict[str, Buffer] = {}
        values = named_tensors(tail) if isinstance(tail, TailArguments) else dict(tail)
        self.writable = set(launch.tensors) - set(values)
        for name, spec in launch.tensors.items():
            storage = torch.full((spec.span + 4 * max(alignment, spec.alignment),), 0xFF, dtype=torch.uint8)
            start = -storage.data_ptr() % (alignment or 2 * spec.alignment) + (0 if alignment else spec.alignment)
            buffer = storage[start : start + spec.span]
            self.buffers[name] = Buffer(storage, storage.data_ptr() + start, spec.span)
            if name == "workspace":
                if launch.workspace_initial == "zeros":
                    buffer.zero_()
            elif name not in self.writable:
                value = values.pop(name)
                assert tuple(value.shape) == spec.shape, f"{name}: {tuple(value.shape)} is not {spec.shape}"
                assert value.dtype == TENSOR_DTYPES[spec.dtype], f"{name}: {value.dtype} is not {spec.dtype}"
                self.tensor(name).copy_(value)
        assert not values, f"launch.json names no {sorted(values)}"

    def _bytes(self, name: str) -> Tensor:
        buffer = self.buffers[name]
        start = buffer.address - buffer.storage.data_ptr()
        return buffer.storage[start : start + buffer.size]

    def tensor(self, name: str) -> Tensor:
        spec = self.launch.tensors[name]
        if 0 in spec.shape:
            return torch.empty(spec.shape, dtype=TENSOR_DTYPES[spec.dtype])
        return self._bytes(name).view(TENSOR_DTYPES[spec.dtype]).as_strided(spec.shape, spec.strides)

    @property
    def y(self) -> Tensor:
        return self.tensor("y")

    def content(self, name: str) -> bytes:
        return self._bytes(name).numpy().tobytes()

    def replace(self, name: str, content: bytes) -> None:
        if content:
            self._bytes(name).copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))

    def arguments(self) -> list[bytes]:
        """The bytes of every kernel parameter."""
        return [self._argument(argument) for argument in self.launch.arguments]

    def _argument(self, argument: dict[str, Any]) -> bytes:
        kind = argument["type"]
        if kind == "pointer":
            return struct.pack("<Q", self.buffers[argument["tensor"]].address if argument["tensor"] else 0)
        if kind == "bytes":
            data = bytearray.fromhex(argument["hex"])
            for entry in argument["pointers"]:
                struct.pack_into("<Q", data, entry["offset"], self.buffers[entry["tensor"]].address)
            return bytes(data)
        if kind == "tensormap":
            return _tensormap(argument, self.buffers[argument["tensor"]].address)
        return struct.pack({"int32": "<i", "int64": "<q", "float32": "<f"}[kind], argument["value"])

    def ranges(self) -> list[tuple[int, int, bool, str]]:
        return [(b.address, b.size, name in self.writable, name) for name, b in self.buffers.items()]


def _tensormap(argument: dict[str, Any], address: int) -> bytes:
    ptxi = interpreter()
    assert argument["interleave"] == 0, "beyond the interpreter"
    # launch.json has CUtensorMapDataType's numbers, the interpreter those of tensormap.replace
    data_type = {8: 9, 9: 10, 10: 8}.get(argument["data_type"], argument["data_type"])
    where = address, data_type, argument["dims"], argument["strides_bytes"]
    what = argument["swizzle"], argument["oob_fill"], argument["element_strides"]
    if argument.get("mode") == "im2col":
        made = ptxi.encode_im2col(*where, argument["lower_corner"], argument["upper_corner"], *argument["box"], *what)
    else:
        made = ptxi.encode_tiled(*where, argument["box"], *what)
    return bytes(made)


def _triton_without_the_fence() -> bool:
    """Before 3.7 Triton emits no fence.proxy.async between cp.async and the wgmma that reads what it copied."""
    try:
        return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2]) < (3, 7)
    except importlib.metadata.PackageNotFoundError:
        return False


def interpreter() -> Any:
    """The PTX interpreter (tests that call this carry the `ptx` marker, which needs PTXI_HOME)."""
    home = os.environ["PTXI_HOME"]
    if home not in sys.path:
        sys.path.insert(0, home)
    if _triton_without_the_fence():
        os.environ["PTXI_ALLOW_MISSING_PROXY_FENCE"] = "1"
    import ptxi

    return ptxi


def triton_device(capability: int) -> Any:
    """Triton compiles for this capability and launches in the interpreter: blocks at random, races reported."""
    interpreter()
    import triton_device as stand_in

    return stand_in.activate(capability, mode=2, seed=7, race=1, global_race=1, block_order=2, resident=3, strict=1)


def run_ptx(launch: Launch, ptx: str, tail: TailArguments, *, seed: int = 0, memory: Memory | None = None) -> Tensor:
    """y of one launch in the interpreter: warps and blocks in random order and interleaved, races reported."""
    module = interpreter().load(ptx)
    return run_module(launch, module, tail, seed=seed, memory=memory)


def run_module(
    launch: Launch,
    module: Any,
    tail: TailArguments,
    *,
    seed: int = 0,
    memory: Memory | None = None,
    lanes: bool = False,
) -> Tensor:
    memory = memory or Memory(launch, tail)
    interpret(launch, module, memory, seed, lanes)
    return memory.y


def interpret(launch: Launch, module: Any, memory: Memory, seed: int, lanes: bool = False) -> None:
    """`lanes`: report races between the lanes of a warp as well."""
    interpreter().raw_launch(
        module, launch.kernel, launch.grid, launch.block, memory.arguments(), memory.ranges(),
        dyn=launch.dynamic_shared_bytes, mode=2, seed=seed, race=1, global_race=1, block_order=2,
        resident=1 + seed % 3, strict=1, warp_race=int(lanes),
    )  # fmt: skip
