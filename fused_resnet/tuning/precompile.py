"""Triton's kernels compiled ahead of time: in parallel, and without the GPU that will run them.

Triton keeps what it compiled in the folder ``TRITON_CACHE_DIR``, under a key of the kernel's source, its arguments'
types and alignment, the target and the compiler. A driver that launches nothing, on tensors without memory, makes the
same keys as a launch on a GPU of that kind, so the kernels can be compiled by several processes at once, or on a
machine without a GPU and with the same Triton, and carried (:func:`pack`, :func:`unpack`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..core.problem import Problem
from ..selection.calls import Call
from ..selection.candidates import first_line

logger = logging.getLogger("fused_resnet")

#: The files of a compiled kernel that a later process needs; an archive leaves out the stages in between.
_KEPT = (".json", ".cubin", ".ptx")


def jobs_here() -> int:
    return max(1, min(16, os.cpu_count() or 1))


# ---- one kernel --------------------------------------------------------------------------------------------


def become_compiler(arch: int, sms: int) -> None:
    """Make Triton in this process compile for ``arch`` (90, say) and launch nothing, for good."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    from ..kernels.config import SHARED_LIMIT

    properties = {"max_shared_mem": SHARED_LIMIT.get(arch, 99 << 10), "multiprocessor_count": sms, "warpSize": 32}
    properties["max_num_regs"] = 65536

    class CompileOnly(DriverBase):
        def __init__(self) -> None:
            self.utils = SimpleNamespace(
                get_device_properties=lambda device: properties, unload_module=lambda module: None,
                load_binary=lambda *binary: (None, None, 0, 0, 1024),
            )  # fmt: skip
            self.launcher_cls = lambda source, metadata: lambda *launch, **options: None

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("meta")

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None:
            pass

        def get_current_stream(self, device: int = 0) -> int:
            return 0

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("precompile: nothing is timed")

    triton.runtime.driver.set_active(CompileOnly())


def compile_one(data: dict[str, Any], configuration: str) -> str | None:
    """Compile the configuration called ``configuration`` for a call from JSON; None, or one sentence why not."""
    from ..backends import triton as backend
    from ..kernels import launch

    call = Call.from_json(data)
    torch.use_deterministic_algorithms(call.deterministic)
    try:
        tail = call.empty(torch.device("meta"))
        config = next(c for c in launch.preferred(call.problem, tail.x.device) if str(c) == configuration)
        backend.BACKEND.bind(call.problem, tail, config)(tail)
    except Exception as error:
        return first_line(error)
    return None


# ---- many --------------------------------------------------------------------------------------------------


def wanted(calls: Sequence[Call], arch: int, sms: int, limit: int | None) -> list[tuple[Call, str]]:
    """The calls with the configurations that Triton's backend prefers for them (among them the first with tensor
    descriptors), each call's best first."""
    from ..backends.triton import why_not_problem
    from ..kernels.config import candidates

    found: list[tuple[int, Call, str]] = []
    for call in calls:
        if why_not_problem(call.problem) is None:
            every = candidates(call.problem, arch, sms, call.deterministic)
            configs = dict.fromkeys([*every[:limit], *[c for c in every if c.tma][:1]])
            found += [(rank, call, str(config)) for rank, config in enumerate(configs)]
    return [(call, name) for _, call, name in sorted(found, key=lambda item: item[0])]


def precompile(
    calls: Sequence[Call],
    arch: int,
    sms: int,
    *,
    limit: int | None = None,
    jobs: int | None = None,
    seconds: float | None = None,
    report: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> dict[str, str]:
    """Fill Triton's cache with the kernels of ``calls`` for a GPU with ``sms`` SMs, in ``jobs`` processes.

    What could not be compiled, by configuration and problem, with the reason. A configuration that fails ends the
    turn of all that were not begun: a compiler that cannot compile one kernel can none.
    """
    todo = wanted(calls, arch, sms, limit)
    failed: dict[str, str] = {}
    if not todo:
        return failed
    end = None if seconds is None else time.monotonic() + seconds
    context = get_context("spawn")  # a forked child would inherit the parent's CUDA context
    workers = min(jobs or jobs_here(), len(todo))
    running: dict[Future[str | None], str] = {}
    done = 0
    with ProcessPoolExecutor(workers, context, become_compiler, (arch, sms)) as pool:
        queue = iter(todo)
        exhausted = False
        while running or not exhausted:
            while not exhausted and len(running) < workers:
                item = next(queue, None)
                if item is None or failed or (end is not None and time.monotonic() > end):
                    exhausted = True
                else:
                    running[pool.submit(compile_one, item[0].as_json(), item[1])] = f"{item[1]} on {item[0].problem}"
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                name, done = running.pop(future), done + 1
                if (why := future.result()) is not None:
                    failed[name] = why
                report(done, len(todo), f"compiled {name}")
    if failed:
        name, why = next(iter(failed.items()))
        logger.warning("fused_resnet: triton's kernels do not compile here, the first %s: %s", name, why)
    return failed


def on_device(calls: Sequence[Call], device: torch.device, **options: Any) -> dict[str, str]:
    """:func:`precompile` for the GPU ``device``; nothing where Triton cannot run."""
    from ..backends.triton import interpreting, why_not_device, why_not_triton

    if device.type != "cuda" or interpreting() or why_not_triton() or why_not_device():
        return {}
    major, minor = torch.cuda.get_device_capability(device)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return precompile(calls, 10 * major + minor, sms, **options)


def network_calls(model: torch.nn.Module, shape: Sequence[int], dtype: torch.dtype) -> list[Call]:
    """The calls of a network on a GPU, found on tensors without memory."""
    import copy

    from ..surgery import fuse
    from .collect import calls_of

    fused = copy.deepcopy(fuse(model.eval())).to(device="meta", dtype=dtype).to(memory_format=torch.channels_last)
    x = torch.empty(tuple(shape), dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    return [
        dataclasses.replace(call, problem=dataclasses.replace(call.problem, device_type="cuda"))
        for call in calls_of(fused, x)
    ]


def tail_call(problem: Problem) -> Call:
    """The call of a problem alone, with dense tensors in its layout."""
    from ..testing import make_tail

    one = make_tail(dataclasses.replace(problem, n=1))  # its parameters; activations of a whole batch are not drawn
    call = Call.of(dataclasses.replace(problem, device_type="cuda"), one)
    layouts = tuple(
        (name, dataclasses.replace(layout, shape=(problem.n, *layout.shape[1:]), offset=0))
        if name in ("x", "residual", "proj_x") else (name, dataclasses.replace(layout, offset=0))
        for name, layout in call.layouts
    )  # fmt: skip
    return dataclasses.replace(call, layouts=layouts)


# ---- carrying ----------------------------------------------------------------------------------------------


def pack(cache: Path, archive: Path) -> int:
    """The kernels of a cache folder as a .tar.gz; their number."""
    kernels = 0
    with tarfile.open(archive, "w:gz") as out:
        for path in sorted(cache.glob("*/*")):
            if path.suffix in _KEPT and path.is_file():
                out.add(path, str(path.relative_to(cache)))
                kernels += path.suffix == ".cubin"
    return kernels


def unpack(archive: Path, cache: Path) -> int:
    """Put the kernels of an archive into a cache folder, wherever that lies; their number."""
    kernels = 0
    with tarfile.open(archive) as source:
        for member in source.getmembers():
            target = cache / member.name
            stream = source.extractfile(member)
            if stream is None or cache.resolve() not in target.resolve().parents or target.exists():
                continue
            data = stream.read()
            if target.name.startswith("__grp__"):  # it lists the files of a kernel by their full paths, and wants all
                group = json.loads(data)
                names = [name for name in group["child_paths"] if Path(name).suffix in _KEPT]
                paths = {name: str(target.parent / name) for name in names}
                data = json.dumps(group | {"child_paths": paths}).encode()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            kernels += target.suffix == ".cubin"
    return kernels
