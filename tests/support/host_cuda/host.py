"""Build the kernels of csrc/cuda for the host, and run them on CPU tensors.

The sources are copied to a cache folder with `cuda/primitives.cuh` replaced by the twin of this folder, and each
kernel becomes its own shared object, built when it is first used and kept by the hash of all that went in: a test
pays only for the kernels it runs, and a mutant only for the one that must catch it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import struct
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fused_resnet.aot.cuda import build_module
from fused_resnet.aot.launch_json import Dim3, Launch
from fused_resnet.aot.planner import Entry, Planner, cache_directory, planner, sources_key
from fused_resnet.aot.training import TrainingKernel, TrainingPlanner
from fused_resnet.core.reference import TailArguments
from tests.support.launch_harness import Memory

# Compiled artefacts are kept between runs, but not among the user's.
os.environ.setdefault("FUSED_RESNET_CACHE", str(Path(tempfile.gettempdir()) / f"fused_resnet-tests-{os.getuid()}"))

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
RUNTIME = ("runtime.cpp", "fibers.cpp", "traffic.cpp", "runner.cpp")
TWIN = ("primitives.cuh", "runtime.h", "fibers.h", "traffic.h", *RUNTIME, "probes.cpp")


class HostCudaError(RuntimeError):
    """The kernel did something a GPU would not have forgiven; the message says what and where."""


class Order(IntEnum):
    """In which order blocks, and the warps of a block between two barriers, run."""

    ASCENDING = 0
    DESCENDING = 1
    RANDOM = 2


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time builds `path`; the others wait and find it there."""
    with open(f"{path}.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@lru_cache
def machine() -> str:
    """What -march=native stands for here: part of the key, since caches travel between CI machines."""
    done = subprocess.run(["g++", "-march=native", "-Q", "--help=target"], capture_output=True, text=True, check=True)
    version = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True, check=True)
    return done.stdout + version.stdout


@dataclass
class Statistics:
    """Counters of one launch. Keys of `load` and `store`: (tensor, phase); phase 0 is the main loop, 1 the epilogue."""

    load: dict[tuple[str, int], tuple[int, int, int]] = field(default_factory=dict)  # requests, sectors, bytes
    store: dict[tuple[str, int], tuple[int, int, int]] = field(default_factory=dict)
    shared: dict[int, tuple[int, int]] = field(default_factory=dict)  # wavefronts without conflict, conflicts
    mma: int = 0

    def total(self, kind: str, tensor: str) -> tuple[int, int, int]:
        table = self.load if kind == "load" else self.store
        rows = [v for (name, _), v in table.items() if name == tensor] or [(0, 0, 0)]
        requests, sectors, size = (sum(column) for column in zip(*rows, strict=True))
        return requests, sectors, size

    @classmethod
    def parse(cls, text: str) -> Statistics:
        result = cls()
        for line in text.splitlines():
            kind, *rest = line.split()
            if kind == "mma":
                result.mma = int(rest[0])
            elif kind == "shared":
                result.shared[int(rest[0])] = (int(rest[1]), int(rest[2]))
            else:
                requests, sectors, size = map(int, rest[2:])
                getattr(result, kind)[rest[0], int(rest[1])] = (requests, sectors, size)
        return result


class HostCuda:
    """The host build of one source tree. `flags` extends the compiler's command line."""

    def __init__(self, csrc: Path = CSRC, flags: tuple[str, ...] = ("-O2",)) -> None:
        # Unique symbols (static variables of templates) would be shared by all source trees in the process, so that
        # the kernels of one would count in the runtime of another.
        self.csrc, self.flags = csrc, (*flags, "-std=c++17", "-march=native", "-fPIC", "-w", "-fno-gnu-unique")
        self._entries: dict[str, ctypes._CFuncPtr] = {}

    @cached_property
    def folder(self) -> Path:
        """The copied sources; its name is the hash of all that decides what the compiler makes of them."""
        sources = sorted([*self.csrc.glob("*.h"), *self.csrc.glob("cuda/*.cuh"), *self.csrc.glob("cuda/*.h")])
        key = hashlib.sha256(f"{self.flags}{machine()}".encode())
        for path in [*sources, *(HERE / name for name in TWIN), Path(__file__)]:
            key.update(path.name.encode() + b"\0" + path.read_bytes())
        folder = cache_directory() / f"host-{key.hexdigest()[:16]}"
        with locked(folder):
            if not (folder / "done").exists():
                for path in sources:
                    target = folder / path.relative_to(self.csrc)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(path.read_bytes())
                (folder / "cuda" / "primitives.cuh").write_text('#include "host_cuda/primitives.cuh"\n')
                (folder / "host_cuda").mkdir(exist_ok=True)
                for name in TWIN:
                    (folder / "host_cuda" / name).write_bytes((HERE / name).read_bytes())
                (folder / "done").touch()
        return folder

    def _build(self, name: str, sources: list[Path], extra: tuple[str, ...] = ()) -> Path:
        out = self.folder / name
        with locked(out):
            if not out.exists():
                temporary = out.with_suffix(".tmp")
                command = ["g++", *self.flags, "-shared", f"-I{self.folder}", "-o", str(temporary), *map(str, sources)]
                done = subprocess.run([*command, *extra], capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(f"{name}: g++ failed:\n{done.stderr[-4000:]}")
                temporary.rename(out)
        return out

    @cached_property
    def runtime(self) -> ctypes.CDLL:
        twin = self.folder / "host_cuda"
        # The loader tells libraries apart by name alone, and a process may hold the builds of several source trees.
        name = f"libruntime-{self.folder.name}.so"
        path = self._build(name, [twin / source for source in RUNTIME], (f"-Wl,-soname,{name}",))
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
        library.host_cuda_launch.restype = library.host_cuda_statistics.restype = ctypes.c_char_p
        library.host_cuda_tensor.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int]
        library.host_cuda_launch.argtypes = [
            ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint),
            ctypes.c_uint64, ctypes.c_int, ctypes.c_uint64,
        ]  # fmt: skip
        return library

    @cached_property
    def planner(self) -> Planner:
        """The extension's, or that of a source tree whose planner is another."""
        if sources_key(self.csrc, ".cpp") == sources_key(CSRC, ".cpp"):
            return planner()
        sources = [*build_module(self.csrc).PLANNER, self.csrc / "bindings_planner.cpp", HERE / "planner_module.cpp"]
        include_dirs = (self.csrc, Path(sysconfig.get_paths()["include"]))
        name = f"planner_{sources_key(self.csrc, '.cpp')}"
        flags = ("-O1", "-fvisibility=hidden", f"-DMUTATED_PLANNER={name}", *(f"-I{path}" for path in include_dirs))
        path = self._build(f"{name}.so", sources, flags)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return Planner(module)

    @cached_property
    def training(self) -> TrainingPlanner:
        return TrainingPlanner(self.planner)

    def build_kernel(self, kernel: Entry) -> Path:
        """The shared object of one kernel, or of all kernels of a training pass: they are small."""
        unit, symbols = kernel, [kernel.symbol]
        if isinstance(kernel, TrainingKernel):
            unit = self.training.all_of(kernel.op)
            symbols = [other.symbol for other in self.training.kernels.values() if other.op == kernel.op]
        source = self.folder / f"{unit.symbol}.cpp"
        text = f'#include "cuda/{unit.header}"\n{unit.definition}\n' + "".join(
            f'extern "C" __attribute__((visibility("default"))) void host_{symbol}(const void* parameters) {{\n'
            f"  {symbol}(*static_cast<const fused_resnet::{unit.parameters}*>(parameters));\n}}\n"
            for symbol in symbols
        )
        with locked(source):
            if not source.exists():
                source.write_text(text)
        return self._build_entry(f"{unit.symbol}.so", source)

    def _build_entry(self, name: str, source: Path) -> Path:
        assert self.runtime  # built first: the kernel links against it
        where = (f"-L{self.folder}", f"-l:libruntime-{self.folder.name}.so", f"-Wl,-rpath,{self.folder}")
        return self._build(name, [source], where)

    def entry(self, kernel: Entry) -> ctypes._CFuncPtr:
        if kernel.symbol not in self._entries:
            library = ctypes.CDLL(str(self.build_kernel(kernel)))
            self._entries[kernel.symbol] = getattr(library, f"host_{kernel.symbol}")
        return self._entries[kernel.symbol]

    def run(
        self,
        launch: Launch,
        tail: TailArguments,
        order: Order = Order.RANDOM,
        seed: int = 1,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Statistics]:
        """y and the counters of one launch; HostCudaError where the kernel misbehaved."""
        memory = memory or Memory(launch, tail)
        return memory.y, self.execute(launch, memory, order, seed)

    def execute(self, launch: Launch, memory: Memory, order: Order = Order.RANDOM, seed: int = 1) -> Statistics:
        """One launch on these buffers; its counters."""
        (parameters,) = memory.arguments()
        kernels: dict[str, Entry] = {**self.planner.kernels, **self.training.kernels}
        return self._launch(
            self.entry(kernels[launch.kernel]), parameters, launch.grid, launch.block, launch.dynamic_shared_bytes,
            memory.ranges(), order, seed,
        )  # fmt: skip

    def probe(self, which: int, order: Order = Order.ASCENDING) -> tuple[Tensor, Statistics]:
        """y and the counters of probe number `which` of probes.cpp, with x = 0, 1, ... 63."""
        source = self.folder / "host_cuda" / "probes.cpp"
        entry = ctypes.CDLL(str(self._build_entry("probes.so", source))).host_entry
        x, y = torch.arange(64.0), torch.full((64,), torch.nan)
        parameters = struct.pack("<QQi4x", x.data_ptr(), y.data_ptr(), which)
        ranges = [(x.data_ptr(), 256, False, "x"), (y.data_ptr(), 256, True, "y")]
        return y, self._launch(entry, parameters, (1, 1, 1), (64, 1, 1), 256, ranges, order, 1)

    def _launch(
        self,
        entry: ctypes._CFuncPtr,
        parameters: bytes,
        grid: Dim3,
        block: Dim3,
        dynamic_shared: int,
        ranges: list[tuple[int, int, bool, str]],
        order: Order,
        seed: int,
    ) -> Statistics:
        library = self.runtime
        library.host_cuda_clear()
        for address, size, writable, name in ranges:
            library.host_cuda_tensor(name.encode(), address, size, int(writable))
        three = ctypes.c_uint * 3
        error = library.host_cuda_launch(
            ctypes.cast(entry, ctypes.c_void_p), parameters, three(*grid), three(*block), dynamic_shared, order, seed
        )
        if error:
            raise HostCudaError(error.decode())
        return Statistics.parse(library.host_cuda_statistics().decode())
