"""Arrival counters across streams, threads and captures (csrc/cuda/counters.cpp), above host_cuda/capture.cpp."""

from __future__ import annotations

import ctypes
import random
import subprocess
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from tests.support.toolchain import why_not

if reason := why_not("g++", "nvcc"):  # of nvcc only the runtime's header
    pytest.skip(reason, allow_module_level=True)

from fused_resnet.aot.cuda import build_module
from fused_resnet.aot.planner import cache_directory, source_directory, sources_key
from tests.support.host_cuda.host import locked

SUPPORT = Path(__file__).parents[1] / "support"
STREAM, OTHER = 0x10, 0x20
LEGACY = 0


@lru_cache
def library(csrc: Path) -> Path:
    stand_in = SUPPORT / "host_cuda" / "capture.cpp"
    out = cache_directory() / f"counters-{sources_key(csrc, '.cpp')}-{hash_of(stand_in)}.so"
    with locked(out):
        if not out.exists():
            includes = [f"-I{d}" for d in (*build_module(csrc).find_toolkit().include_dirs, csrc)]
            sources = [csrc / "cuda" / "counters.cpp", stand_in]
            command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-pthread", *includes, *map(str, sources)]
            subprocess.run([*command, "-Wl,-Bsymbolic", "-o", f"{out}.tmp"], check=True)
            Path(f"{out}.tmp").rename(out)
    return out


def hash_of(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


class Runtime:
    """The counters of one process: a fresh copy of the library, so that nothing is left from another test."""

    def __init__(self, csrc: Path, folder: Path) -> None:
        copy = folder / "counters.so"
        copy.write_bytes(library(csrc).read_bytes())
        self.lib = ctypes.CDLL(str(copy))
        for name in ("test_mallocs", "test_captured_memsets", "test_unfinished_memsets"):
            getattr(self.lib, name).restype = ctypes.c_long
        self.lib.test_end_capture.restype = ctypes.c_void_p
        self.lib.test_counters.restype = ctypes.c_void_p

    def counters(self, stream: int = STREAM, size: int = 256, device: int = 0) -> int:
        error = ctypes.create_string_buffer(256)
        address = self.lib.test_counters(ctypes.c_long(size), device, ctypes.c_void_p(stream), error, len(error))
        if address is None:
            raise RuntimeError(error.value.decode())
        assert self.lib.test_unfinished_memsets() == 0, "handed out before it was zeroed"
        assert not any(ctypes.string_at(address, size)), "not zero"
        return int(address)

    def begin(self, stream: int = STREAM, blocking: bool = False) -> None:
        self.lib.test_begin_capture(ctypes.c_void_p(stream), int(blocking))

    def end(self, stream: int = STREAM) -> Any:
        graph = self.lib.test_end_capture(ctypes.c_void_p(stream))
        assert graph, "the capture was invalidated"
        return ctypes.c_void_p(graph)

    def destroy(self, graph: Any) -> None:
        self.lib.test_destroy_graph(graph)


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime(source_directory(), tmp_path)


def test_launches_on_one_stream_share_theirs(runtime: Runtime) -> None:
    first = runtime.counters()
    assert [runtime.counters(size=size) for size in (4, 256, 100)] == [first] * 3
    assert runtime.counters(OTHER) != first
    assert runtime.counters(device=1) != first
    larger = runtime.counters(size=1000)
    assert larger != first
    assert runtime.counters() == larger
    assert runtime.counters(0x30) != first  # launches may still count in the smaller ones
    assert runtime.lib.test_mallocs() == 3  # 256 bytes on two devices, and a kilobyte


def test_a_new_stream_with_an_old_handle_gets_its_own(runtime: Runtime) -> None:
    first = runtime.counters()
    runtime.lib.test_recreate_stream(ctypes.c_void_p(STREAM))
    assert runtime.counters() != first


def test_each_captured_launch_gets_its_own_until_the_graph_is_gone(runtime: Runtime) -> None:
    """The first allocation falls into the capture: allowed, on another stream, and nothing but launches is captured."""
    runtime.begin()
    captured = {runtime.counters() for _ in range(3)}
    assert len(captured) == 3
    graph = runtime.end()
    assert runtime.lib.test_captured_memsets() == 0
    eager = runtime.counters()
    runtime.begin(OTHER)
    others = {runtime.counters(OTHER) for _ in range(3)}
    other = runtime.end(OTHER)
    assert len(captured | others | {eager}) == 7, "graphs may be replayed beside each other and beside launches"
    runtime.destroy(graph)
    runtime.begin()
    assert {runtime.counters() for _ in range(3)} == captured
    runtime.destroy(runtime.end())
    runtime.destroy(other)
    assert runtime.lib.test_mallocs() == 1


def test_captures_come_and_go_in_bounded_memory(runtime: Runtime) -> None:
    for _ in range(500):
        runtime.begin()
        for size in (256, 4096):
            runtime.counters(size=size)
        runtime.destroy(runtime.end())
    assert runtime.lib.test_mallocs() == 2


def test_allocating_does_not_spoil_the_capture_of_another_thread(runtime: Runtime) -> None:
    runtime.begin(OTHER)
    runtime.counters(STREAM, size=1 << 20)
    runtime.end(OTHER)


def test_what_fails_is_a_sentence_and_costs_nothing(runtime: Runtime) -> None:
    runtime.lib.test_fail(1)
    with pytest.raises(RuntimeError, match="cuda: arrival counters: out of memory"):
        runtime.counters()
    runtime.begin()
    first = runtime.counters()
    runtime.lib.test_fail(1)
    with pytest.raises(RuntimeError, match="cuda: arrival counters: out of memory"):
        runtime.counters()
    all_of_them = {runtime.counters() for _ in range(255)} | {first}
    assert len(all_of_them) == 256
    assert runtime.lib.test_mallocs() == 1, "what the failed call took has come back"
    assert runtime.counters() not in all_of_them
    assert runtime.lib.test_mallocs() == 2
    runtime.end()
    runtime.begin(OTHER, blocking=True)
    with pytest.raises(RuntimeError, match="cuda: arrival counters: an implicit dependency on a capture"):
        runtime.counters(LEGACY)
    runtime.end(OTHER)
    runtime.begin(OTHER)
    runtime.counters(LEGACY)


def test_threads_never_meet(runtime: Runtime) -> None:
    """Threads that launch, capture and drop graphs, each on its own stream: no address is in two hands at once."""
    held: dict[int, int] = {}
    faults: list[str] = []
    lock = threading.Lock()

    def claim(addresses: list[int], stream: int) -> None:
        with lock:
            for address in addresses:
                if held.setdefault(address, stream) != stream:
                    faults.append(f"{address:#x} is in the hands of {held[address]:#x} and {stream:#x}")

    def work(stream: int) -> None:
        rng = random.Random(stream)
        for _ in range(200):
            if rng.random() < 0.5:
                claim([runtime.counters(stream, rng.choice([4, 300]))], stream)
                continue
            runtime.begin(stream)
            mine = [runtime.counters(stream, rng.choice([4, 300])) for _ in range(rng.randint(1, 4))]
            claim(mine, stream)
            if len(set(mine)) < len(mine):
                faults.append("two launches of one graph share counters")
            graph = runtime.end(stream)
            with lock:
                for address in mine:
                    held.pop(address, None)
            runtime.destroy(graph)

    threads = [threading.Thread(target=work, args=(0x100 + i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults[0]
