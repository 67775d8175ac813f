"""Nsight Compute's view of the three tails that are furthest from the roof.

    python -m benchmarks.gpu_counters --tails tails.json --out counters.csv

Where there is no ncu, or it cannot read the counters (gVisor), one sentence says so and the status is 0.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats", "InstructionStats")
#: What the table shows of them.
SHOWN = ("Duration", "Memory Throughput", "DRAM Throughput", "Compute (SM) Throughput", "L2 Hit Rate",
         "Achieved Occupancy", "Registers Per Thread", "Block Limit Shared Mem")  # fmt: skip
#: Sides whose kernels are ours.
OURS = ("fused, triton", "fused, cuda", "fused, triton TMA")


def worst(document: dict[str, Any], count: int = 3) -> list[tuple[str, str, float]]:
    """Problem, side and fraction of the roof of the tails that are furthest from it, each by the best side of ours."""
    found = []
    for entry in document["benchmarks"]:
        info = entry["extra_info"]
        fractions = {row["name"]: row["roofline_fraction"] for row in info["rows"] if row["name"] in OURS}
        if fractions:
            side = max(fractions, key=lambda name: fractions[name])
            found.append((info["problem"], side, fractions[side]))
    return sorted(found, key=lambda item: item[2])[:count]


def rows(text: str) -> list[dict[str, Any]]:
    """The kernels of an ncu CSV (details page): names, grid, and the metrics by name with their unit."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    problem = ""
    for line in text.splitlines():
        if line.startswith("#"):
            problem = line[1:].strip()
        elif line.startswith('"ID"'):
            header = next(csv.reader([line]))
        elif line.startswith('"') and lines:
            row = dict(zip(header, next(csv.reader([line])), strict=False))
            if not row.get("Metric Name"):
                continue
            kernel = found.setdefault(
                (problem, row["ID"]), {"problem": problem, "kernel": row["Kernel Name"], "grid": row.get("Grid Size")}
            )
            kernel[row["Metric Name"]] = f"{row['Metric Value']} {row.get('Metric Unit', '')}".strip()
    return list(found.values())


def ncu(command: Sequence[str], stand_in: bool) -> list[str]:
    tool = [sys.executable, "-m", "benchmarks.gpu_stand_in", "--ncu"] if stand_in else [shutil.which("ncu") or "ncu"]
    sections = [piece for section in SECTIONS for piece in ("--section", section)]
    # clocks are left as they are; only what stands between the profiler's marks
    options = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details"]
    return [*tool, *options, *sections, *command]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_counters", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--tails", type=Path, required=True, help="what benchmarks.gpu_speed wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stand-in", action="store_true", help="for a dry run: no ncu, and no GPU")
    options = parser.parse_args(arguments)
    if not options.stand_in and shutil.which("ncu") is None:
        print("gpu_counters: there is no ncu on PATH")
        return
    text = io.StringIO()
    python = [sys.executable, *(["-m", "benchmarks.gpu_stand_in"] if options.stand_in else [])]
    for problem, side, fraction in worst(json.loads(options.tails.read_text())):
        command = [*python, "-m", "benchmarks.gpu_speed", "profile", "--problem", problem, "--side", side]
        done = subprocess.run(ncu(command, options.stand_in), capture_output=True, text=True)
        print(f"gpu_counters: {side}, {fraction:.0%} of the roof, status {done.returncode}: {problem}", flush=True)
        if done.returncode:
            print((done.stdout + done.stderr)[-2000:], flush=True)
            continue
        text.write(f"# {side}: {problem}\n" + "\n".join(ln for ln in done.stdout.splitlines() if ln[:1] == '"') + "\n")
        options.out.write_text(text.getvalue())


if __name__ == "__main__":
    main()
