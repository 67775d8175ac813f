"""What ptxas made of the training passes, and the bounds it must keep. They only have to keep memory busy.

    python -m benchmarks.static.training                    # all architectures -> training.md
    python -m benchmarks.static.training --arch sm_80

The *streaming loop* is the one that moves the most bytes. `memory/issue` is the time memory needs for the bytes of one
turn over the time the SM needs to issue its instructions (one per cycle and scheduler, code for a partial packet
counted as if it always ran): from 1 on, memory is what the kernel waits for. Rates are the vendor's figures.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.static import gate, sass, table
from fused_resnet.aot.cuda import assemble_kernel
from fused_resnet.aot.training import OPS, TrainingKernel, training_planner

#: Bytes of memory per SM and cycle: T4, A100 80 GB, A40, L40S, H100 SXM, B200, RTX 5090.
BYTES_PER_CYCLE = {75: 5.0, 80: 13.4, 86: 4.8, 89: 2.4, 90: 14.5, 100: 29.2, 120: 4.4}
#: That an SM must have room for, per architecture: what keeps memory busy for its latency of about 700 cycles.
LATENCY = 700
THREADS = 256


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture."""

    kernel: TrainingKernel
    arch: int
    registers: int
    spill_instructions: int
    local: int
    blocks_per_sm: int
    loop_instructions: int
    loads: dict[int, int]  # in the streaming loop: bytes per thread -> number of instructions
    stores: dict[int, int]

    @property
    def loop_bytes(self) -> int:
        """Of one thread and turn, the mask's words left out."""
        return sum(size * count for table_ in (self.loads, self.stores) for size, count in table_.items() if size >= 8)

    @property
    def memory_over_issue(self) -> float:
        memory = self.loop_bytes * 32 / BYTES_PER_CYCLE[self.arch]
        return memory / (self.loop_instructions / sass.SCHEDULERS)

    @property
    def under_way(self) -> int:
        """Bytes that the loads of one turn of all resident threads have under way."""
        return self.blocks_per_sm * THREADS * sum(size * n for size, n in self.loads.items() if size >= 8)


def _widths(loop: sass.Loop, base: str) -> dict[int, int]:
    found: dict[int, int] = {}
    for i in loop.instructions:
        if i.base == base:
            found[i.width] = found.get(i.width, 0) + 1
    return found


def read(op: str, arch: str) -> list[Row]:
    """All kernels of a pass, as the extension holds them."""
    planner = training_planner()
    rows = []
    for found in sass.read_cubin(assemble_kernel(planner.all_of(op), arch)):
        kernel = planner.kernels[found.name]

        def moved(loop: sass.Loop) -> int:
            return sum(i.width for i in loop.instructions if i.base in ("LDG", "STG"))

        loop = max(found.loops, key=moved)
        rows.append(
            Row(
                kernel, found.arch, found.registers, found.count("LDL", "STL"), found.local + found.stack,
                table.blocks_per_sm(found.arch, found.registers, THREADS, kernel.shared_bytes),
                len(loop.instructions), _widths(loop, "LDG"), _widths(loop, "STG"),
            )
        )  # fmt: skip
    return rows


def violations(row: Row) -> list[str]:
    """One sentence for every bound that this kernel breaks."""
    where = f"{row.kernel.symbol} for sm_{row.arch}"
    found: list[str] = []

    def expect(holds: bool, sentence: str) -> None:
        if not holds:
            found.append(f"{where}: {sentence}")

    expect(row.spill_instructions == 0, f"expected no spill, got {row.spill_instructions} LDL/STL instructions")
    expect(row.local == 0, f"expected no local memory, got {row.local} bytes")
    expect(row.blocks_per_sm >= 2, f"expected two blocks on an SM, got {row.blocks_per_sm}")
    if row.kernel.packet == 1:
        return found
    expect(row.loads.get(16, 0) > 0, f"expected 16-byte loads in the streaming loop, got {row.loads}")
    if row.kernel.op in ("bn_apply_add_relu", "bn_backward_apply"):
        expect(row.stores.get(16, 0) > 0, f"expected 16-byte stores in the streaming loop, got {row.stores}")
    if row.kernel.symbol.endswith("_mixed"):  # holds the code of three types
        return found
    ratio = row.memory_over_issue
    expect(ratio >= 1, f"expected memory to be the limit, got {ratio:.2f} of the issue slots' time")
    needed = LATENCY * BYTES_PER_CYCLE[row.arch]
    expect(row.under_way >= needed, f"expected {needed:.0f} bytes under way on an SM, got {row.under_way}")
    return found


def markdown(rows: list[Row]) -> str:
    lines = [
        "| kernel | sm | registers | spills | local B | blocks/SM | loop instr. | loads | stores | bytes/turn "
        "| memory/issue | KiB under way |",
        "|---" * 12 + "|",
    ]
    for r in rows:
        loads, stores = (", ".join(f"{n} x {s} B" for s, n in sorted(t.items(), reverse=True)) or "-"
                         for t in (r.loads, r.stores))  # fmt: skip
        cells = [r.kernel.symbol, r.arch, r.registers, r.spill_instructions, r.local, r.blocks_per_sm]
        cells += [r.loop_instructions, loads, stores, r.loop_bytes]
        streams = r.kernel.packet > 1 and not r.kernel.symbol.endswith("_mixed")
        cells += [f"{r.memory_over_issue:.2f}", f"{r.under_way / 1024:.0f}"] if streams else ["-", "-"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static.training", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=list(gate.ARCHS), help="architectures, as sm_80 (default: all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of training.md")
    options = parser.parse_args()
    rows = [row for arch in options.arch for op in OPS for row in read(op, arch)]
    (options.out / "training.md").write_text(markdown(rows))
    broken = [sentence for row in rows for sentence in violations(row)]
    print(markdown(rows))
    print(f"{len(rows)} kernels, {len(broken)} bounds broken", *broken, sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
