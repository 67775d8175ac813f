"""A machine with an H200, as far as Python can tell: what the dry run of :mod:`benchmarks.gpu_day` runs on.

    PTXI_HOME=... python -m benchmarks.gpu_stand_in -m benchmarks.gpu_speed ...     # as python -m benchmarks.gpu_speed
    PTXI_HOME=... python -m pytest -p benchmarks.gpu_stand_in -m gpu tests

Tensors "on cuda" say so and lie in host memory. Triton compiles for sm_90 and the PTX interpreter of PTXI_HOME runs
what it compiled; the extension is the one of tests/cuda/test_cuda_operator.py, above the interpreter's CUDA runtime;
cuDNN is torch's CPU convolution. Events read the host's clock: no time from here means anything.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_resnet.kernels import workspace

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="stand-in for an H200", major=9, minor=0, multi_processor_count=132, total_memory=8 << 30,
    L2_cache_size=1 << 20,
)  # fmt: skip


class _Tensors(TorchFunctionMode):
    """What is asked for on a GPU is made in host memory, and every tensor says that it is on the GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _GETTERS:  # inside this method the mode is off
            on_host = args[0].device.type == "cpu"
            return _GETTERS[func] if on_host else func(*args)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.device or isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            return func(*args, **(kwargs or {}))  # to our operators "cuda" is a backend
        if func is torch.conv2d and args[0].dtype is torch.float32 and torch.backends.cudnn.allow_tf32:
            from fused_resnet.testing import round_to_tf32

            args = (round_to_tf32(args[0]), round_to_tf32(args[1]), *args[2:])
        return func(*map(_on_host, args), **{name: _on_host(value) for name, value in (kwargs or {}).items()})


#: What a tensor in host memory answers.
_GETTERS = {torch.Tensor.device.__get__: CUDA, torch.Tensor.is_cuda.__get__: True, torch.Tensor.is_cpu.__get__: False}


def _on_host(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")) else value


def _seen_from_inside(register: Any) -> Any:
    """``Library.impl`` for our operators: torch has left the mode when it calls a kernel written in Python."""

    @functools.wraps(register)
    def impl(library: Any, name: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        @functools.wraps(function)
        def inside(*arguments: Any, **options: Any) -> Any:
            with _Tensors():
                return function(*arguments, **options)

        ours = callable(function) and library.ns == "fused_resnet"
        return register(library, name, inside if ours else function, *args, **kwargs)

    return impl


class _Threads(ThreadPoolExecutor):
    """Modes are each thread's own."""

    def submit(self, function: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        def inside() -> Any:
            with _Tensors():
                return function(*args, **kwargs)

        return super().submit(inside)


# ---- torch.cuda --------------------------------------------------------------------------------------------


class _Event:
    def __init__(self, **options: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: _Event) -> float:
        return 1e3 * (other.at - self.at)

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass

    wait = synchronize


class _Stream:
    cuda_stream = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Graph(TorchDispatchMode):
    """Records operators and launches, and replays by calling them again, into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Any] = []
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._inside, kwargs = True, kwargs or {}
        try:
            out = func(*args, **kwargs)
        finally:
            self._inside = False
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        made = [t for t in _tensors(out) if t.untyped_storage().data_ptr() not in given]
        if "empty" not in func._schema.name:  # what others write is not for this step to put back
            self.steps.append(lambda: [t.copy_(new) for t, new in zip(made, _tensors(func(*args, **kwargs)))])  # noqa: B905
        return out

    def launched(self, again: Any) -> None:
        if not self._inside:  # else the operator that launches is the step
            self.steps.append(again)

    def replay(self) -> None:
        with torch.inference_mode():
            for step in self.steps:
                step()


def _tensors(values: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


_capturing: list[_Graph] = []


def _launch(call: Any, *args: Any) -> Any:
    """Launch a kernel, and again whenever a graph that is being captured is replayed."""
    if _capturing:
        _capturing[-1].launched(functools.partial(call, *args))
    return call(*args)


@contextlib.contextmanager
def _graph(graph: _Graph, **options: Any) -> Iterator[None]:
    _capturing.append(graph)
    try:
        with graph:
            yield
    finally:
        _capturing.pop()


@contextlib.contextmanager
def _nothing(*args: Any, **options: Any) -> Iterator[None]:
    yield


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")


def _uncompiled(model: Any, **options: Any) -> Any:
    return model


def _patch_torch() -> None:
    stream = _Stream()
    cuda = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "device": _nothing,
        "get_device_capability": lambda device=None: (9, 0), "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_name": lambda device=None: PROPERTIES.name, "synchronize": lambda device=None: None,
        "empty_cache": lambda: None, "is_current_stream_capturing": lambda: bool(_capturing), "device_of": _nothing,
        "Event": _Event, "Stream": _Stream, "stream": _nothing, "CUDAGraph": _Graph, "graph": _graph,
        "current_stream": lambda device=None: stream, "_sleep": lambda cycles: None,
        "mem_get_info": lambda device=None: (8 << 30, 8 << 30),
    }  # fmt: skip
    for name, value in cuda.items():
        mock.patch.object(torch.cuda, name, value).start()
    mock.patch.object(torch.Tensor, "record_stream").start()  # torch would refuse a stream that is none of its own
    mock.patch.object(torch.cuda.profiler, "start").start()
    mock.patch.object(torch.cuda.profiler, "stop").start()
    mock.patch.object(torch.backends.cudnn, "is_available", return_value=True).start()
    mock.patch.object(torch, "Generator", _Generator).start()
    mock.patch.object(torch, "compile", _uncompiled).start()
    mock.patch.object(torch.library.Library, "impl", _seen_from_inside(torch.library.Library.impl)).start()
    mock.patch.object(workspace, "ThreadPoolExecutor", _Threads).start()
    _patch_torch.aten = aten = torch.library.Library("aten", "IMPL")  # type: ignore[attr-defined]

    def convolution(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Any:
        wide = (x.float(), weight.float(), None if bias is None else bias.float())
        return torch.conv2d(*wide, stride, padding, dilation, groups)

    def add_relu(x: Any, weight: Any, z: Any, alpha: Any, bias: Any, *geometry: Any) -> Any:
        return torch.relu(convolution(x, weight, bias, *geometry) + alpha * z.float()).to(x.dtype)

    def relu(x: Any, weight: Any, bias: Any, *geometry: Any) -> Any:
        return torch.relu(convolution(x, weight, bias, *geometry)).to(x.dtype)

    aten.impl("cudnn_convolution_add_relu", add_relu, "CPU")
    aten.impl("cudnn_convolution_relu", relu, "CPU")


# ---- kernels -----------------------------------------------------------------------------------------------


def _patch_triton() -> None:
    from tests.support.launch_harness import interpreter

    interpreter()  # found, and told what this Triton leaves out
    import triton_device

    device = triton_device.activate(90)
    launch = device.launcher_cls.__call__

    def on_host(*args: Any) -> Any:
        with torch._C.DisableTorchFunction():  # the interpreter wants tensors of the CPU, and these are
            return launch(*args)

    device.launcher_cls.__call__ = lambda *args: _launch(on_host, *args)


def _patch_extension() -> None:
    """The module of tests/cuda/test_cuda_operator.py in place of ``_C_cuda``, built when it is first wanted."""
    from fused_resnet.core import extensions
    from fused_resnet.nn import pristine

    mock.patch.object(pristine, "why_not_mode", return_value=None).start()  # _Tensors is no mode of a user's
    load = extensions._load

    def stand_in(name: str) -> Any:
        if name == "_C_cuda" and name not in extensions._modules:
            try:
                extensions._modules[name] = extension()
            except Exception as error:
                extensions._modules[name] = f"the stand-in for _C_cuda cannot be had: {error}"
        return load(name)

    mock.patch.object(extensions, "_load", stand_in).start()


def extension() -> Any:
    """The built stand-in, loaded; built if need be, which takes minutes."""
    sys.path[:0] = [str(ROOT), os.environ["PTXI_HOME"] + "/fake_cudart"]
    import fake_cudart

    from tests.cuda import test_cuda_operator
    from tests.support.cuda_operator import checks

    os.environ |= {"PTXI_ARCH": "90", "PTXI_CUOBJDUMP": fake_cudart.cuobjdump()}
    with torch._C.DisableTorchFunction():
        module, _ = checks.load(str(test_cuda_operator.module()))
    module.Launcher = functools.partial(_Launcher, module.Launcher)
    return module


class _Launcher:
    def __init__(self, real: Any, *args: Any) -> None:
        self.launch = functools.partial(_launch, real(*args).launch)


def activate() -> None:
    if "PTXI_HOME" not in os.environ:
        raise SystemExit("gpu_stand_in: PTXI_HOME must name the folder of the PTX interpreter")
    _patch_torch()
    _patch_triton()
    _patch_extension()
    mode = _Tensors()
    mode.__enter__()


def pytest_configure(config: Any) -> None:
    activate()


def ncu(arguments: list[str]) -> int:
    """As ncu does: runs the command, then prints the CSV of the kernels between the marks, here of none."""
    names = ("ID", "Kernel Name", "Grid Size", "Section Name", "Metric Name", "Metric Unit", "Metric Value")
    status = subprocess.call(arguments[arguments.index(sys.executable) :])
    writer = csv.writer(sys.stdout, quoting=csv.QUOTE_ALL)
    rows = (("Duration", "us", "0"), ("DRAM Throughput", "%", "0"))
    writer.writerow(names)
    writer.writerows(("0", "stand_in", "(1, 1, 1)", "GPU Speed Of Light Throughput", *row) for row in rows)
    return status


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--ncu"]:
        sys.exit(ncu(arguments))
    if arguments[:1] == ["--build"]:
        activate()
        print(extension().build_info())
        return
    if arguments[:1] != ["-m"] or len(arguments) < 2:
        raise SystemExit("gpu_stand_in: expected -m MODULE [ARGUMENTS] or --build")
    activate()
    sys.modules[__spec__.name] = sys.modules["__main__"]  # so that the module can tell where it runs
    sys.argv = arguments[1:]
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
