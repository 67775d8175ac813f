"""One row per kernel of what sass.py reads, and the JSON and Markdown tables of such rows."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.static.sass import SCHEDULERS, TENSOR_BASES, Kernel, Loop


@dataclass(frozen=True)
class SmLimits:
    """What bounds the number of resident blocks of one SM."""

    shared: int
    warps: int
    blocks: int


SM_LIMITS = {
    75: SmLimits(65536, 32, 16),
    80: SmLimits(167936, 64, 32),
    86: SmLimits(102400, 48, 16),
    87: SmLimits(167936, 48, 16),
    89: SmLimits(102400, 48, 24),
    90: SmLimits(233472, 64, 32),
    100: SmLimits(233472, 64, 32),
    103: SmLimits(233472, 64, 32),
    120: SmLimits(102400, 48, 24),
    121: SmLimits(102400, 48, 24),
}


def blocks_per_sm(arch: int, registers: int, threads: int, shared: int) -> int:
    """Resident blocks of one SM (the occupancy calculator's arithmetic)."""
    limits, warps = SM_LIMITS[arch], -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = (65536 // SCHEDULERS // per_warp) * SCHEDULERS // warps
    unit, system = (256, 0) if arch < 80 else (128, 1024)  # what a block is rounded up to, and what it pays besides
    by_shared = limits.shared // (-(-shared // unit) * unit + system)
    return max(0, min(by_registers, by_shared, limits.warps // warps, limits.blocks))


@dataclass(frozen=True)
class LoopReport:
    instructions: int
    mma: int
    ffma: int
    instructions_per_mma: float | None
    math_ratio: float
    ldmatrix: int
    barriers: int
    divisions: int = 0


@dataclass(frozen=True)
class KernelReport:
    """One row of the table. `loop` is None for a kernel without a multiplying loop."""

    name: str
    symbol: str
    arch: int
    threads: int
    registers: int
    stack: int
    local: int
    spill_instructions: int
    shared: int
    blocks_per_sm: int
    occupancy: float
    mma_opcodes: dict[str, int]
    loads: dict[str, int]  # opcode and bytes per thread -> number of instructions in the kernel
    loop: LoopReport | None
    other_loops: list[LoopReport]


def _loop_report(loop: Loop) -> LoopReport:
    per = loop.instructions_per_mma
    return LoopReport(
        instructions=len(loop.instructions),
        mma=len(loop.mma),
        ffma=loop.ffma,
        instructions_per_mma=None if math.isinf(per) else round(per, 3),
        math_ratio=round(loop.math_ratio, 3),
        ldmatrix=sum(i.base == "LDSM" for i in loop.instructions),
        barriers=loop.barriers,
        divisions=loop.divisions,
    )


def report(kernel: Kernel, *, threads: int, dynamic_shared: int, name: str = "") -> KernelReport:
    shared = kernel.static_shared + dynamic_shared
    blocks = blocks_per_sm(kernel.arch, kernel.registers, threads, shared)
    loads: dict[str, int] = {}
    mma: dict[str, int] = {}
    for i in kernel.instructions:
        if i.base in ("LDG", "LDGSTS", "STG", "UTMALDG", "UTMASTG"):
            key = i.base if i.base.startswith("UTMA") else f"{i.base}.{i.width}B"
            loads[key] = loads.get(key, 0) + 1
        elif i.base in TENSOR_BASES:
            mma[i.opcode] = mma.get(i.opcode, 0) + 1
    loops = [_loop_report(loop) for loop in kernel.main_loops]
    return KernelReport(
        name=name or kernel.name,
        symbol=kernel.name,
        arch=kernel.arch,
        threads=threads,
        registers=kernel.registers,
        stack=kernel.stack,
        local=kernel.local,
        spill_instructions=kernel.count("LDL", "STL"),
        shared=shared,
        blocks_per_sm=blocks,
        occupancy=round(blocks * -(-threads // 32) / SM_LIMITS[kernel.arch].warps, 3),
        mma_opcodes=dict(sorted(mma.items())),
        loads=dict(sorted(loads.items())),
        loop=loops[0] if loops else None,
        other_loops=loops[1:],
    )


def markdown(rows: Iterable[KernelReport]) -> str:
    lines = [
        "| kernel | sm | threads | registers | spills | local B | shared B | blocks/SM | occupancy "
        "| loop instr. | MMA | instr./MMA | math/issue | 16 B loads | narrower |",
        "|---" * 15 + "|",
    ]
    for r in rows:
        wide = sum(n for key, n in r.loads.items() if key.startswith("LD") and key.endswith(".16B"))
        narrow = sum(n for key, n in r.loads.items() if key.startswith("LD")) - wide
        loop = r.loop
        cells = [r.name, r.arch, r.threads, r.registers, r.spill_instructions, r.local + r.stack, r.shared]
        cells += [r.blocks_per_sm, f"{r.occupancy:.0%}"]
        if loop:
            per_mma = f"{loop.instructions_per_mma:.2f}" if loop.instructions_per_mma else "-"
            cells += [loop.instructions, loop.mma or f"{loop.ffma} FFMA", per_mma, f"{loop.math_ratio:.2f}"]
        else:
            cells += ["-"] * 4
        cells += [wide, narrow]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def write(rows: Sequence[KernelReport], directory: Path, stem: str) -> None:
    """`<stem>.json` for programs and `<stem>.md` for people, from the same rows."""
    directory.mkdir(parents=True, exist_ok=True)
    records = [json.dumps(dataclasses.asdict(row), allow_nan=True) for row in rows]  # one row a line, for diffs
    (directory / f"{stem}.json").write_text("[\n " + ",\n ".join(records) + "\n]\n")
    (directory / f"{stem}.md").write_text(markdown(rows))
