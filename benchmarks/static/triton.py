"""Compile every Triton configuration for every architecture, read the machine code, compare it with its bounds.

    python -m benchmarks.static.triton                    # all architectures -> benchmarks/static/triton.{json,md}
    python -m benchmarks.static.triton --arch sm_80 sm_90 # some of them

The problem is a 3x3 tail of 256 channels with BN and residual, and the training convolution of that size with its
statistics. Needs Triton, no GPU. Exit status 1 where a bound is broken. Bounds: no spill and no local memory,
asynchronous copies, tensor instructions of the architecture; for fp16 and HMMA at most 3.5 instructions of the main
loop per HMMA at 128x128 and 6 at 64x64; for HGMMA at most 35 % of the tensor cores' cycles spent on issue, for the
tiles with at least 128x128 products to four warps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.static import table
from benchmarks.static.sass import read_cubin
from fused_resnet.aot.triton import compile_kernel, compile_stats_kernel, shipped
from fused_resnet.core.problem import Problem, dtype_name
from fused_resnet.kernels.config import TailConfig

#: What the tensor cores execute; a tile of too few filters for wgmma is none of the shipped ones.
TENSOR_OPCODE = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
INSTRUCTIONS_PER_HMMA_128 = 3.5
INSTRUCTIONS_PER_HMMA_64 = 6.0
ISSUE_SHARE_HGMMA = 0.35


def kernels(arch: int) -> Iterator[tuple[Problem, TailConfig, bool]]:
    """What ships for an architecture: problem, configuration, and whether it is the convolution with statistics."""
    for problem, config in shipped(arch):
        yield problem, config, False
        # the training convolution: the same main loop, another epilogue
        yield replace(problem, residual=None, bn=False, bias=True, activation="none"), config, True


def read(problem: Problem, config: TailConfig, arch: int, stats: bool = False) -> table.KernelReport:
    """Compile one configuration (or take it from Triton's cache) and read its cubin."""
    if stats:
        kernel = compile_stats_kernel(problem, config, arch)
    else:
        kernel, _, _ = compile_kernel(problem, config, arch)
    (code,) = read_cubin(kernel.asm["cubin"])
    math = ("tf32" if problem.tf32 else dtype_name(problem.dtype)) + (" stats" if stats else "")
    return table.report(
        code, threads=32 * config.warps, dynamic_shared=kernel.metadata.shared, name=f"triton {math} {config}"
    )


def violations(row: table.KernelReport, problem: Problem, config: TailConfig, arch: int) -> list[str]:
    """One sentence for every bound that this kernel breaks."""
    found: list[str] = []

    def expect(holds: bool, sentence: str) -> None:
        if not holds:
            found.append(f"{row.name} for sm_{arch}: {sentence}")

    expect(row.stack == row.local == row.spill_instructions == 0, f"expected no local memory, got {row.stack} bytes")
    copies = sum(n for key, n in row.loads.items() if key.startswith("UTMALDG" if config.tma else "LDGSTS.16B"))
    expect(copies >= config.stages - 1, f"expected asynchronous copies, got {row.loads}")
    expect("STG.16B" in row.loads, f"expected 16-byte stores, got {row.loads}")
    expect(row.loop is not None, "expected a main loop, found none")
    if problem.dtype is torch.float32 and not problem.tf32:
        expect(not row.mma_opcodes, f"expected FFMA alone for exact fp32, got {row.mma_opcodes}")
        return found
    expected = TENSOR_OPCODE[arch]
    expect(
        bool(row.mma_opcodes) and all(opcode.startswith(expected) for opcode in row.mma_opcodes),
        f"expected {expected} alone, got {row.mma_opcodes}",
    )
    if row.loop is None or row.loop.instructions_per_mma is None or problem.dtype is torch.float32:
        return found
    per_mma = row.loop.instructions_per_mma
    if expected == "HMMA" and (config.m, config.n) == (64, 64):
        expect(per_mma <= INSTRUCTIONS_PER_HMMA_64, f"expected {INSTRUCTIONS_PER_HMMA_64} a HMMA, got {per_mma}")
    if expected == "HMMA" and min(config.m, config.n) >= 128:
        expect(per_mma <= INSTRUCTIONS_PER_HMMA_128, f"expected {INSTRUCTIONS_PER_HMMA_128} a HMMA, got {per_mma}")
    if expected == "HGMMA" and config.m * config.n // config.warps >= 128 * 128 // 4:
        share = 1 / row.loop.math_ratio
        expect(share <= ISSUE_SHARE_HGMMA, f"expected {ISSUE_SHARE_HGMMA:.0%} of the cycles on issue, got {share:.0%}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static.triton", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=[f"sm_{a}" for a in TENSOR_OPCODE], help="as sm_80 (default: all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of triton.json and triton.md")
    options = parser.parse_args()
    rows, broken = [], []
    for arch in (int(name.removeprefix("sm_")) for name in options.arch):
        for problem, config, stats in kernels(arch):
            row = read(problem, config, arch, stats)
            rows.append(row)
            broken += violations(row, problem, config, arch)
    table.write(rows, options.out, "triton")
    print(table.markdown(rows))
    print(f"{len(rows)} kernels, {len(broken)} bounds broken", *broken, sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
