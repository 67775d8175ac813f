"""The architecture gate: what ptxas made of every kernel, read from its machine code and held to its bounds.

Every kernel for sm_80 and sm_90; for the other architectures a set in which each tile, each type of arithmetic and
each loader meets each architecture. `make static` compiles everything and writes the table.
"""

from __future__ import annotations

import dataclasses

import pytest

from tests.support.toolchain import why_not, why_not_disassembled

if reason := why_not("_C", "g++", "nvcc", "cuobjdump"):
    pytest.skip(reason, allow_module_level=True)

import tests.support.host_cuda.host  # noqa: F401  (names the cache of compiled artefacts)
from benchmarks.static import gate, sass, table
from fused_resnet.aot.planner import Kernel, planner

pytestmark = pytest.mark.aot

KERNELS = planner().kernels
OTHERS = tuple(arch for arch in gate.ARCHS if arch not in ("sm_80", "sm_90"))


def _check(symbol: str, arch: str) -> None:
    if reason := why_not_disassembled(arch):
        pytest.skip(reason)
    broken = gate.violations(gate.read(KERNELS[symbol], arch))
    assert not broken, "\n".join(broken)


# The last first: the PTX tests, which share the cache of compiled kernels, begin at the other end.
@pytest.mark.parametrize(
    ("symbol", "arch"),
    [(s, arch) for s in reversed(KERNELS) for arch in ("sm_90", "sm_80") if KERNELS[s].runs_on(arch)],
)
def test_main_architectures(symbol: str, arch: str) -> None:
    _check(symbol, arch)


@pytest.mark.parametrize("symbol", [symbol for symbol, kernel in KERNELS.items() if kernel.family == "wgmma"])
def test_products_and_copies_of_hopper_are_asynchronous(symbol: str) -> None:
    """Where ptxas cannot follow the sums it waits after each product; then its loop has a wait for each of them."""
    kernel = KERNELS[symbol]
    (found,) = sass.read_cubin(gate.assemble_kernel(kernel, "sm_90"))
    assert len(found.main_loops) == 1 + kernel.projection, "one, and one for the projection"
    for loop in found.main_loops:
        opcodes = [i.opcode for i in loop.instructions]
        assert sum(opcode.startswith("HGMMA") for opcode in opcodes) == int(kernel.tile.split("x")[0]) // 128 * 4
        assert sum(opcode.startswith("WARPGROUP.ARRIVE") for opcode in opcodes) == 1
        assert sum(opcode.startswith("WARPGROUP.DEPBAR") for opcode in opcodes) == 1
        assert not any(opcode.startswith(("LDS", "LDG", "STS", "BAR")) for opcode in opcodes)
    copying = [loop for loop in found.loops if any(i.base == "UTMALDG" for i in loop.instructions)]
    steps = min(copying, key=lambda loop: len(loop.instructions))
    opcodes = [i.opcode for i in steps.instructions]
    assert [opcode for opcode in opcodes if opcode.startswith("UTMALDG")] == ["UTMALDG.4D.IM2COL", "UTMALDG.3D"]
    assert len(opcodes) < 100


def _features(kernel: Kernel) -> set[str]:
    return {kernel.tile, kernel.math, kernel.load, kernel.epilogue}


def _subset(arch: str) -> list[str]:
    """Few kernels that have every feature between them, other ones for each architecture."""
    shift = 11 * OTHERS.index(arch)
    kernels = [kernel for kernel in KERNELS.values() if kernel.runs_on(arch)]
    kernels = kernels[shift:] + kernels[:shift]
    missing = set().union(*map(_features, kernels))
    chosen = []
    while missing:
        best = max(kernels, key=lambda kernel: len(_features(kernel) & missing))
        chosen.append(best.symbol)
        missing -= _features(best)
    return chosen


@pytest.mark.parametrize(("arch", "symbol"), [(arch, symbol) for arch in OTHERS for symbol in _subset(arch)])
def test_other_architectures(arch: str, symbol: str) -> None:
    _check(symbol, arch)


# ---- the reader itself


def test_the_gate_can_fail() -> None:
    row = gate.read(KERNELS["conv_f16_64x64"], "sm_80")
    assert gate.violations(row) == []
    loop = row.loop
    assert loop is not None
    bad = {
        "no spill": {"spill_instructions": 4},
        "no local memory": {"stack": 16},
        "16-byte copies by LDGSTS.16B": {"loads": {"LDGSTS.8B": 4}},
        "16-byte copies alone": {"loads": {"LDGSTS.16B": 4, "LDGSTS.4B": 1}},
        "HMMA.16816.F32 alone": {"mma_opcodes": {"HMMA.16816.F16": 32}},
        "expected a main loop": {"loop": None},
        "instructions per HMMA": {"loop": table.LoopReport(300, 32, 0, 9.375, 0.85, 16, 1)},
        "expected 1 barriers": {"loop": table.LoopReport(122, 32, 0, 3.8, 2.1, 16, 2)},
        "no division": {"loop": dataclasses.replace(loop, divisions=3)},
        "no block fits": {"blocks_per_sm": 0},
    }
    for sentence, change in bad.items():
        found = gate.violations(dataclasses.replace(row, **change))
        assert any(sentence in line for line in found), (sentence, found)


def test_the_gate_of_hopper_can_fail() -> None:
    row = gate.read(KERNELS["conv_wgmma_f16_128x64"], "sm_90")
    assert gate.violations(row) == []
    loop = row.loop
    assert loop is not None
    bad = {
        "no spill": {"spill_instructions": 4},
        "no local memory": {"stack": 16},
        "at most 168 registers": {"registers": 170},
        "one block on an SM": {"blocks_per_sm": 0},
        "HGMMA.64x64x16.F32 alone": {"mma_opcodes": {"HMMA.16816.F32": 32}},
        "two copies by tensor map": {"loads": {"STG.16B": 4}},
        "no copies by threads": {"loads": {"UTMALDG": 2, "LDGSTS.16B": 1}},
        "16-byte stores alone": {"loads": {"UTMALDG": 2, "STG.4B": 1}},
        "expected a main loop": {"loop": None},
        "no division": {"loop": dataclasses.replace(loop, divisions=1)},
        "math ratio of 1.5": {"loop": dataclasses.replace(loop, math_ratio=1.2)},
    }
    for sentence, change in bad.items():
        found = gate.violations(dataclasses.replace(row, **change))
        assert any(sentence in line for line in found), (sentence, found)


SASS = """
 Function loops:
  REG:40 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:376 TEXTURE:0 SURFACE:0 SAMPLER:0

\t.target\tsm_80
\t\tFunction : loops
        /*0000*/                   S2R R3, SR_TID.X ;
        /*0010*/              @!P0 BRA 0x90 ;
        /*0020*/                   IADD3 R16, R16, 0x1, RZ ;
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R4], [R2.64] ;
        /*0040*/                   HMMA.16816.F32 R8, R8, R14, RZ ;
        /*0050*/               @P1 BRA 0x40 ;
        /*0060*/                   STL.64 [R1], R2 ;
        /*0070*/               @P2 BRA 0x20 ;
        /*0080*/                   STG.E.64 [R2.64], R8 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
        /*00b0*/                   NOP;
"""


def test_the_reader_finds_loops_and_loads() -> None:
    (kernel,) = sass._parse(SASS)
    assert (kernel.name, kernel.arch, kernel.registers, kernel.stack) == ("loops", 80, 40, 8)
    assert [(loop.head, len(loop.instructions)) for loop in kernel.loops] == [(0x20, 6), (0x40, 2)]
    assert [loop.head for loop in kernel.main_loops] == [0x40], "the innermost one, and not the branch to itself"
    row = table.report(kernel, threads=256, dynamic_shared=48 * 1024)
    assert row.loads == {"LDGSTS.16B": 1, "STG.8B": 1}
    assert row.spill_instructions == 1
    assert row.loop is not None
    assert row.loop.instructions_per_mma == 2
    assert row.loop.math_ratio == 4  # 8 cycles of a tensor core on two issue slots


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "blocks"),
    [
        (80, 32, 1024, 0, 2),  # threads: 2048 of an SM
        (80, 128, 128, 0, 4),  # 65536 registers / (128 x 128)
        (80, 255, 128, 0, 2),
        (80, 16, 32, 0, 32),  # no more than 32 blocks
        (80, 16, 128, 50 * 1024, 3),  # 164 KiB of shared memory, 1 KiB kept for each block
        (90, 16, 128, 50 * 1024, 4),
        (86, 16, 128, 50 * 1024, 1),
        (120, 16, 128, 101 * 1024, 0),
    ],
)
def test_occupancy(arch: int, registers: int, threads: int, shared: int, blocks: int) -> None:
    assert table.blocks_per_sm(arch, registers, threads, shared) == blocks


def test_rates_of_tensor_instructions() -> None:
    def busy(opcode: str, arch: int) -> float:
        return sass.Loop(0, (sass.Instruction(0, "", opcode, ""),), arch).math_ratio

    assert busy("HMMA.16816.F32", 80) == 8
    assert busy("HMMA.16816.F32.BF16", 90) == 4
    assert busy("HMMA.1688.F32.TF32", 80) == 8
    assert busy("HGMMA.64x128x16.F32", 90) == 64  # four warps share it
