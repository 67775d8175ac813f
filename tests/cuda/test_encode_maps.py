"""Tensor maps of the Hopper family (csrc/cuda/encode_maps.cpp), above a driver that counts (host_cuda/map_driver.cpp).

That the maps say the right thing is for test_ptx_wgmma.py to show, and test_launch_path_of_hopper.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import struct
import subprocess
import threading
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from tests.support.toolchain import why_not

if reason := why_not("_C", "g++", "nvcc"):  # of nvcc only the headers
    pytest.skip(reason, allow_module_level=True)

from fused_resnet.aot.cuda import build_module
from fused_resnet.aot.planner import cache_directory, planner, source_directory, sources_key
from fused_resnet.core.problem import Problem
from tests.support.host_cuda.host import locked

PROBLEM = Problem.parse("n=2,h=9,w=8,c=16,k=72,padding=1,stride=2,dtype=float16,residual=1,device=cuda")
PROJECTED = dataclasses.replace(Problem.parse("n=2,h=5,w=4,c=16,k=72,padding=1,dtype=float16,proj=8x9x7x2,device=cuda"))
X, WEIGHT, PROJ_X, PROJ_WEIGHT = 0, 1, 7, 8  # TensorSlot


@lru_cache
def library(csrc: Path) -> Path:
    driver = Path(__file__).parents[1] / "support/host_cuda/map_driver.cpp"
    key = f"{sources_key(csrc, '.cpp')}-{hashlib.sha256(driver.read_bytes()).hexdigest()[:16]}"
    out = cache_directory() / f"maps-{key}.so"
    with locked(out):
        if not out.exists():
            build = build_module(csrc)
            includes = [f"-I{d}" for d in (*build.find_toolkit().include_dirs, csrc)]
            sources = [*build.PLANNER, csrc / "cuda" / "encode_maps.cpp", driver]
            command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-pthread", *includes, *map(str, sources)]
            subprocess.run([*command, "-Wl,-Bsymbolic", "-o", f"{out}.tmp"], check=True)
            Path(f"{out}.tmp").rename(out)
    return out


class Maps:
    """The maps of one process: a fresh copy of the library, with nothing kept from another test."""

    def __init__(self, csrc: Path, folder: Path) -> None:
        copy = folder / "maps.so"
        copy.write_bytes(library(csrc).read_bytes())
        self.lib = ctypes.CDLL(str(copy))
        self.lib.test_encoded.restype = ctypes.c_long

    def encoded(self) -> int:
        return int(self.lib.test_encoded())

    def of(self, problem: Problem, **addresses: int) -> list[tuple[int, ...]]:
        """The 16 words of each map that a launch gets."""
        fields = planner().request(problem, torch.float32, 1e-5, 1e-5, 16)
        request = planner().extension.plan_request(**fields, family=planner().extension.FAMILIES["wgmma"])
        slots = {"x": X, "weight": WEIGHT, "proj_x": PROJ_X, "proj_weight": PROJ_WEIGHT}
        table = (ctypes.c_void_p * 32)()
        for name, address in addresses.items():
            table[slots[name]] = address
        storage = ctypes.create_string_buffer(5 * 128)
        start = -ctypes.addressof(storage) % 128
        error = ctypes.create_string_buffer(256)
        at = ctypes.byref(storage, start)
        if self.lib.test_maps(request, table, at, error, len(error)):
            raise RuntimeError(error.value.decode())
        return [struct.unpack_from("<16Q", storage, start + 128 * i) for i in range(4)]


@pytest.fixture
def maps(tmp_path: Path) -> Maps:
    return Maps(source_directory(), tmp_path)


def test_a_map_is_encoded_once_for_an_address(maps: Maps) -> None:
    x, weight, absent, _ = first = maps.of(PROBLEM, x=4096, weight=8192)
    assert x[:8] == (4096, 4, 6, 1, 16, 8, 9, 2)
    assert x[12:] == (1, 2, 2, 1), "the convolution's stride"
    assert weight[:7] == (8192, 3, 6, 0, 16, 9, 72)
    assert not any(absent)
    assert maps.encoded() == 2
    assert maps.of(PROBLEM, x=4096, weight=8192) == first
    assert maps.encoded() == 2
    other = maps.of(PROBLEM, x=65536, weight=8192)
    assert (other[0][0], other[1]) == (65536, weight)
    assert maps.encoded() == 3


def test_memory_that_holds_another_tensor_gets_another_map(maps: Maps) -> None:
    """An allocator gives an address out again: the tensor there may have another shape, dtype or stride."""
    maps.of(PROBLEM, x=4096, weight=8192)
    for change in ({"n": 3}, {"h": 11}, {"stride": (1, 1)}, {"dtype": torch.bfloat16, "residual": torch.bfloat16}):
        problem = dataclasses.replace(PROBLEM, **change)  # type: ignore[arg-type]
        x = maps.of(problem, x=4096, weight=8192)[0]
        dtype = 6 if problem.dtype == torch.float16 else 9
        assert x[:8] == (4096, 4, dtype, 1, 16, problem.w, problem.h, problem.n)
        assert x[13:15] == problem.stride[::-1]


def test_projection(maps: Maps) -> None:
    found = maps.of(PROJECTED, x=4096, weight=8192, proj_x=4096 * 3, proj_weight=4096 * 4)
    assert [m[0] for m in found] == [4096, 8192, 4096 * 3, 4096 * 4]
    assert found[2][4:8] == (8, 7, 9, 2)
    assert found[2][12:] == (1, 2, 2, 1)
    assert found[3][4:7] == (8, 1, 72)


def test_many_addresses_and_threads(maps: Maps) -> None:
    """More than are kept: every launch still gets the maps of its own addresses."""
    wrong = []

    def launches(first: int) -> None:
        for turn in range(2):
            for i in range(first, first + 600):
                x, weight, *_ = maps.of(PROBLEM, x=16 * (i + 1), weight=16 * (i + 7919))
                if (x[0], weight[0]) != (16 * (i + 1), 16 * (i + 7919)):
                    wrong.append((turn, i))

    threads = [threading.Thread(target=launches, args=(300 * number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_the_driver_refuses_is_a_sentence_every_time(maps: Maps) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cuda: the tensor map of weight: the driver answered 1"):
            maps.of(PROBLEM, x=4096, weight=8200)


def test_a_driver_without_tensor_maps(maps: Maps) -> None:
    """query_device() then says that the family does not run, and the planner leaves it alone."""
    maps.lib.test_driver(0)
    assert maps.lib.test_can_encode() == 0
    with pytest.raises(RuntimeError, match="the tensor map of x: the driver answered"):
        maps.of(PROBLEM, x=4096, weight=8192)
