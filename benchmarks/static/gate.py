"""The bounds that the machine code of the CUDA kernels must keep, each with its reason.

An m16n8k16 HMMA keeps the tensor core of one A100 scheduler busy for 8 cycles (as does an m16n8k8 that of Turing),
and a scheduler issues one instruction a cycle: more than 8 instructions per HMMA in the main loop, and the tensor
cores wait for the instruction stream. Tiles of 64 x 64 and more must keep to that, 128 x 128 to half of it (what else
the SM does then hides behind the products).

An m64nNk16 HGMMA keeps the tensor cores of an H100 busy for N / 2 cycles, and each scheduler has two of the eight warps
that multiply: with the ratio of busy cycles to instructions of one of them at 1, both issue in half of that time.
"""

from __future__ import annotations

from benchmarks.static import sass, table
from fused_resnet.aot.cuda import assemble_kernel
from fused_resnet.aot.planner import Kernel
from fused_resnet.backends.cuda_launch import DEVICES

ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

INSTRUCTIONS_PER_HMMA = 8.0
INSTRUCTIONS_PER_HMMA_128 = 4.0
REGISTERS = 255
#: Of the 65536 of an SM, for the 384 threads of a block; setmaxnreg moves them between the warpgroups.
WGMMA_REGISTERS = 168
WGMMA_MATH_RATIO = 1.5

_MATH = {"float16": "f16", "bfloat16": "bf16", "tf32": "tf32", "float32": "f32"}


def read(kernel: Kernel, arch: str) -> table.KernelReport:
    """One kernel's machine code for ``arch``, as the extension holds it."""
    (found,) = sass.read_cubin(assemble_kernel(kernel, arch))
    name = f"{_MATH[kernel.math]} {kernel.tile} {kernel.load}"
    if kernel.epilogue == "statistics":
        name += " with statistics"
    shared = kernel.turing_shared_bytes if arch == "sm_75" else kernel.shared_bytes
    return table.report(found, threads=kernel.threads, dynamic_shared=shared, name=name)


def violations(row: table.KernelReport) -> list[str]:
    """One sentence for every bound that this kernel breaks."""
    if "_wgmma_" in row.symbol:
        return _wgmma_violations(row)
    where = f"{row.symbol} for sm_{row.arch}"
    fp32, gather = "_f32_" in row.symbol, "_gather_" in row.symbol
    tile_m, tile_n = map(int, row.symbol.rsplit("_", 1)[1].split("x"))
    found: list[str] = []

    def expect(holds: bool, sentence: str) -> None:
        if not holds:
            found.append(f"{where}: {sentence}")

    expect(row.spill_instructions == 0, f"expected no spill, got {row.spill_instructions} LDL/STL instructions")
    expect(row.local == 0 and row.stack == 0, f"expected no local memory, got {row.local + row.stack} bytes")
    expect(row.registers <= REGISTERS, f"expected at most {REGISTERS} registers, got {row.registers}")
    limit = DEVICES[row.arch].shared_per_block
    if row.shared <= limit:  # the planner leaves the others out on this architecture
        expect(row.blocks_per_sm >= 1, "no block fits on an SM")
    expect(row.loop is not None, "expected a main loop, found none")
    if row.loop is None:
        return found
    if fp32:
        expect(row.loop.ffma > 0 and not row.mma_opcodes, f"expected FFMA alone, got {row.mma_opcodes}")
    else:
        half = "HMMA.1688.F32" if row.arch == 75 else "HMMA.16816.F32"
        kind = {"f16": half, "bf16": "HMMA.16816.F32.BF16", "tf32": "HMMA.1688.F32.TF32"}
        expected = kind[row.symbol.split("_")[2 if gather else 1]]
        expect(list(row.mma_opcodes) == [expected], f"expected {expected} alone, got {row.mma_opcodes}")
        expect(row.loop.ldmatrix > 0, "expected ldmatrix in the main loop, found none")
    barriers = 2 if row.arch == 75 else 1
    expect(row.loop.barriers == barriers, f"expected {barriers} barriers a step, got {row.loop.barriers}")
    expect(row.loop.divisions == 0, f"expected no division in the main loop, got {row.loop.divisions} instructions")
    copy = "LDG.16B" if row.arch == 75 else "LDGSTS.16B"
    expect(row.loads.get(copy, 0) > 0, f"expected 16-byte copies by {copy}, got {row.loads}")
    if gather:
        return found
    narrow = {name: n for name, n in row.loads.items() if name.startswith("LDGSTS") and name != "LDGSTS.16B"}
    expect(not narrow, f"expected 16-byte copies alone, got {narrow}")
    per_mma = row.loop.instructions_per_mma
    if per_mma is not None and "tf32" not in row.symbol:
        if tile_m >= 128 and tile_n >= 128:
            bound = INSTRUCTIONS_PER_HMMA_128
        elif tile_m >= 64 and tile_n >= 64:
            bound = INSTRUCTIONS_PER_HMMA
        else:
            return found
        expect(per_mma <= bound, f"expected at most {bound:g} instructions per HMMA in the main loop, got {per_mma}")
    return found


def _wgmma_violations(row: table.KernelReport) -> list[str]:
    """The same for the Hopper family, whose main loop neither loads nor computes an address."""
    found: list[str] = []

    def expect(holds: bool, sentence: str) -> None:
        if not holds:
            found.append(f"{row.symbol} for sm_{row.arch}: {sentence}")

    spills = row.spill_instructions
    expect(spills == 0, f"expected no spill, got {spills} LDL/STL instructions")
    expect(row.local == 0 and row.stack == 0, f"expected no local memory, got {row.local + row.stack} bytes")
    expect(row.registers <= WGMMA_REGISTERS, f"expected at most {WGMMA_REGISTERS} registers, got {row.registers}")
    expect(row.blocks_per_sm == 1, f"expected one block on an SM, got {row.blocks_per_sm}")
    shape = f"64x{row.symbol.rsplit('x', 1)[1]}x16"
    expected = f"HGMMA.{shape}.F32{'.BF16' if '_bf16_' in row.symbol else ''}"
    expect(list(row.mma_opcodes) == [expected], f"expected {expected} alone, got {row.mma_opcodes}")
    expect(row.loads.get("UTMALDG", 0) == 2, f"expected two copies by tensor map, got {row.loads}")
    copies = [name for name in row.loads if name.startswith("LDGSTS")]
    expect(not copies, f"expected no copies by threads, got {copies}")
    narrow = [name for name in row.loads if name.startswith("STG") and name != "STG.16B"]
    expect(not narrow, f"expected 16-byte stores alone, got {narrow}")
    expect(row.loop is not None, "expected a main loop, found none")
    for loop in [row.loop, *row.other_loops] if row.loop is not None else []:
        expect(loop.divisions == 0, f"expected no division in the main loop, got {loop.divisions} instructions")
        ratio = loop.math_ratio
        expect(ratio >= WGMMA_MATH_RATIO, f"expected a math ratio of {WGMMA_MATH_RATIO} or more, got {ratio}")
    return found
