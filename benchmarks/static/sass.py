"""Read what ptxas really made of a kernel: resources, instructions and loops, from its cubin.

The same reader serves the CUDA extension and Triton (whose cubin is `compiled.asm["cubin"]`); table.py makes
one row of it and writes the tables, so that both can be laid side by side:

    from benchmarks.static import sass, table
    kernels = sass.read_cubin(path_or_bytes)                            # every kernel of the cubin
    row = table.report(kernels[0], threads=128, dynamic_shared=49152, name="fp16 128x128x32 s4")
    row.spill_instructions, row.loop.instructions_per_mma, row.loop.math_ratio
    table.write([row, ...], Path("benchmarks/static"), "triton")        # -> triton.json and triton.md

Terms. *Main loop*: an innermost natural loop that holds tensor instructions (FFMA in a kernel without any).
Its instruction count is the length of its body, so code that only some iterations execute counts as if all
did: an upper bound. *math_ratio*: the cycles that the loop's math instructions keep their unit busy, over its
issue slots (one instruction per cycle and scheduler). At 1.0 and more the instruction stream can keep the
tensor cores busy; below, it is the highest fraction of the peak that the loop can reach.

Needs `cuobjdump`: the CUDA toolkit's, or the copy inside Triton's wheel. No GPU.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

# FMA per SM and cycle of the dense fp16/bf16 tensor path with fp32 accumulation, from published peak FLOP/s
# (86, 89 and 120: the professional boards; a GeForce has half); tf32 runs at half of it. A warp-level HMMA
# cannot reach the peaks of 90 and 100 (they need wgmma and tcgen05); the ratio is against them all the same.
TENSOR_FMA_PER_SM = {75: 512, 80: 1024, 86: 512, 87: 1024, 89: 512, 90: 2048, 100: 4096, 103: 4096, 120: 512, 121: 512}
FP32_FMA_PER_SM = {75: 64, 80: 64}  # 128 everywhere else
SCHEDULERS = 4


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "@P0", "@!UP1" or ""
    opcode: str  # with its modifiers: "LDGSTS.E.BYPASS.LTC128B.128"
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def width(self) -> int:
        """Bytes per thread of a memory instruction."""
        for modifier, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
            if modifier in self.opcode.split(".")[1:]:
                return size
        return 4

    @property
    def branch_target(self) -> int | None:
        if self.base not in ("BRA", "BRX", "JMP", "CALL"):  # CALL.REL.NOINC is a subroutine, or a far jump
            return None
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(found.group(1), 16) if found else None


TENSOR_BASES = ("HMMA", "HGMMA", "QGMMA", "IMMA", "UTCHMMA", "UTCQMMA", "OMMA", "QMMA")


def mma_fma(instruction: Instruction) -> int | None:
    """Multiply-adds of one tensor instruction; None where the opcode does not name its shape (UTCHMMA)."""
    modifiers = instruction.opcode.split(".")[1:]
    for modifier in modifiers:
        if found := re.fullmatch(r"(\d+)x(\d+)x(\d+)", modifier):  # HGMMA.64x128x16
            m, n, k = map(int, found.groups())
            return m * n * k
        if found := re.fullmatch(r"168(\d+)", modifier):  # HMMA.16816, HMMA.1688, HMMA.1684
            return 16 * 8 * int(found.group(1))
    return None


@dataclass(frozen=True)
class Loop:
    """A natural loop of one kernel."""

    head: int
    instructions: tuple[Instruction, ...]
    arch: int

    @cached_property
    def mma(self) -> tuple[Instruction, ...]:
        return tuple(i for i in self.instructions if i.base in TENSOR_BASES)

    @property
    def ffma(self) -> int:
        return sum(i.base in ("FFMA", "FFMA2") for i in self.instructions)

    @property
    def barriers(self) -> int:
        return sum(i.base in ("BAR", "SYNCS") for i in self.instructions)

    @property
    def divisions(self) -> int:
        """Instructions that only a division by a number unknown to the compiler needs (CALL is a far jump, too)."""
        return sum(i.base in ("MUFU", "I2F", "F2I") for i in self.instructions)

    @property
    def instructions_per_mma(self) -> float:
        return len(self.instructions) / len(self.mma) if self.mma else math.inf

    @property
    def math_ratio(self) -> float:
        """Busy cycles of the tensor (or FP32) pipe of one scheduler over its issue slots in the loop."""
        if not self.mma:
            per_scheduler = FP32_FMA_PER_SM.get(self.arch, 128) / SCHEDULERS
            return self.ffma * 32 / per_scheduler / len(self.instructions)
        cycles = 0.0
        for instruction in self.mma:
            fma = mma_fma(instruction)
            if fma is None:
                return math.nan
            rate = TENSOR_FMA_PER_SM[self.arch] / SCHEDULERS
            if "TF32" in instruction.opcode:
                rate /= 2
            if instruction.base in ("HGMMA", "QGMMA"):  # four warps, one on each scheduler, share its work
                fma //= SCHEDULERS
            cycles += fma / rate
        return cycles / len(self.instructions)


@dataclass(frozen=True)
class Kernel:
    """One function of a cubin: the resources ptxas gave it, and its instructions."""

    name: str
    arch: int
    registers: int
    stack: int
    static_shared: int
    local: int
    instructions: tuple[Instruction, ...] = field(repr=False)

    def count(self, *bases: str) -> int:
        return sum(i.base in bases for i in self.instructions)

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        return tuple(
            Loop(head, tuple(self.instructions[i] for i in sorted(body)), self.arch)
            for head, body in _natural_loops(self.instructions)
        )

    @property
    def main_loops(self) -> tuple[Loop, ...]:
        """The innermost loops that do the multiplications, the one with the most of them first."""

        def work(loop: Loop) -> int:
            return len(loop.mma) or (0 if any(o.mma for o in self.loops) else loop.ffma)

        busy = [loop for loop in self.loops if work(loop)]
        spans = {id(loop): {i.address for i in loop.instructions} for loop in busy}
        innermost = [a for a in busy if not any(spans[id(b)] < spans[id(a)] for b in busy)]
        return tuple(sorted(innermost, key=work, reverse=True))


def _natural_loops(code: Sequence[Instruction]) -> list[tuple[int, set[int]]]:
    """(address of the head, indices of the body) of every natural loop, by dominators over basic blocks."""
    index = {ins.address: i for i, ins in enumerate(code)}
    leaders = {0}
    for i, ins in enumerate(code):
        if (target := ins.branch_target) is not None and target in index:
            leaders.add(index[target])
        if ins.base in ("BRA", "BRX", "JMP", "CALL", "EXIT", "RET", "BREAK") and i + 1 < len(code):
            leaders.add(i + 1)
    starts = sorted(leaders)
    ends = starts[1:] + [len(code)]
    block_of = {s: b for b, s in enumerate(starts)}
    successors: list[list[int]] = []
    for b, end in enumerate(ends):
        last, out = code[end - 1], []
        if (target := last.branch_target) is not None and target in index:
            out.append(block_of[index[target]])
        conditional = bool(last.predicate) or _conditional_operand(last)
        ends_here = last.base in ("BRA", "JMP", "EXIT", "RET") and not conditional
        if not ends_here and b + 1 < len(starts):
            out.append(b + 1)
        successors.append(out)
    reached, todo = {0}, [0]
    while todo:  # what nothing reaches would hide every loop that it falls into
        todo = sorted({s for b in todo for s in successors[b]} - reached)
        reached.update(todo)
    predecessors: list[list[int]] = [[] for _ in starts]
    for b, out in enumerate(successors):
        for s in out if b in reached else ():
            predecessors[s].append(b)
    everything = set(range(len(starts)))
    dominators = [everything] * len(starts)
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for b in range(1, len(starts)):
            incoming = [dominators[p] for p in predecessors[b]]
            new = (set.intersection(*incoming) if incoming else set()) | {b}
            if new != dominators[b]:
                dominators[b], changed = new, True
    bodies: dict[int, set[int]] = {}
    for b, out in enumerate(successors):
        for head in out:
            if head not in dominators[b]:
                continue
            body, todo = {head}, [b]
            while todo:
                node = todo.pop()
                if node not in body:
                    body.add(node)
                    todo.extend(predecessors[node])
            bodies.setdefault(head, set()).update(body)
    trap = {i.address for i in code if i.branch_target == i.address}
    return [
        (code[starts[head]].address, {i for b in body for i in range(starts[b], ends[b])})
        for head, body in sorted(bodies.items())
        if code[starts[head]].address not in trap  # ptxas ends every kernel with a branch to itself
    ]


def _conditional_operand(instruction: Instruction) -> bool:
    """`BRA.U UP0, 0x..` and `BRA P0, 0x..` carry the condition as an operand; `BRA.DIV` asks whether lanes diverged."""
    if instruction.opcode.startswith("BRA.DIV"):
        return True
    first = instruction.operands.split(",")[0].strip()
    always = first in ("PT", "UPT")
    return instruction.base == "BRA" and not always and bool(re.fullmatch(r"!?U?P[0-9T]+", first))


@lru_cache
def cuobjdump() -> str:
    """The toolkit's cuobjdump, or the one that Triton ships."""
    candidates: list[Path] = []
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(Path(home) / "bin" / "cuobjdump")
    if found := shutil.which("cuobjdump"):
        candidates.append(Path(found))
    if (spec := importlib.util.find_spec("triton")) and spec.origin:
        candidates.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    for candidate in candidates:
        if candidate.exists():
            return str(candidate)
    raise FileNotFoundError("cuobjdump: expected in CUDA_HOME/bin, on PATH or in triton, got none")


_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)\s*([^;]*);")


def read_cubin(cubin: Path | bytes) -> list[Kernel]:
    """Every kernel of a cubin, in the order of the file."""
    if isinstance(cubin, bytes):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as handle:
            handle.write(cubin)
            handle.flush()
            return read_cubin(Path(handle.name))
    done = subprocess.run([cuobjdump(), "-res-usage", "-sass", str(cubin)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cuobjdump: expected a readable cubin in {cubin}, got: {done.stderr.strip()}")
    return _parse(done.stdout)


def _parse(text: str) -> list[Kernel]:
    usage: dict[str, tuple[int, int, int, int]] = {}
    code: dict[str, list[Instruction]] = {}
    arch, name, pending = 0, "", ""
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("Function : "):
            name = stripped[len("Function : ") :]
            code[name] = []
        elif stripped.startswith("Function ") and stripped.endswith(":"):
            pending = stripped[len("Function ") : -1]
        elif found := _USAGE.search(line):
            registers, stack, shared, local = map(int, found.groups())
            usage[pending] = (registers, stack, shared, local)
        elif found := re.match(r"(?:\.target|code for)\s+sm_(\d+)", stripped):  # CUDA 13's form, older cubins' form
            arch = int(found.group(1))
        elif name and (match := _INSTRUCTION.match(line)):
            address, predicate, opcode, operands = match.groups()
            code[name].append(Instruction(int(address, 16), (predicate or "").strip(), opcode, operands.strip()))
    # The cubin of CUDA 13's ptxas pads with NOPs after the closing branch: they are never reached.
    return [Kernel(n, arch, *usage[n], tuple(i for i in c if i.base != "NOP")) for n, c in code.items()]
