"""Everything that a machine with a GPU can tell, in one command and in the order of worth.

    bash benchmarks/gpu_day.sh OUT 9                     # nine minutes, the default
    bash benchmarks/gpu_day.sh OUT 4 --only tails,networks
    PTXI_HOME=... bash benchmarks/gpu_day.sh OUT --dry   # here: the stand-ins of benchmarks/gpu_stand_in.py, tiny sizes

Neither pip nor a network is used. Each step is a process with a time limit of its own; whatever ends one, the next
begins. What may be carried along to save minutes: the built fused_resnet/_C_cuda*.so, and Triton's kernels in
triton_cache.tar.gz (``fused-resnet precompile resnet50 resnet18 --dtype float16,bfloat16 --limit 1 --out
triton_cache.tar.gz``, with the GPU machine's Triton).

After each step OUT holds all that is known by then, in at most eight files: gpu.json (steps, tests and the
comparisons, as ``benchmarks/report.py`` reads them), gpu.md and gpu.png (its tables and plot), log.txt,
counters.csv (Nsight Compute), tuning.json (verdicts and times of the tuner), and what a later run may carry:
triton_cache.tar.gz and the built module.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fused_resnet.tuning.precompile import pack, unpack

from . import report

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = "benchmarks.gpu_stand_in"
#: Kernels of Triton that were compiled elsewhere: `fused-resnet precompile ... --out triton_cache.tar.gz`.
CARRIED = ROOT / "triton_cache.tar.gz"
#: Bytes that one file in OUT may have, and the end of a step's log that is kept.
FILE_LIMIT, LOG_LIMIT = 16 << 20, 1 << 20
#: Seconds kept back at the end for writing the results.
RESERVE = 8


@dataclass(frozen=True)
class Step:
    """One process: its command, the seconds it may take, and what of its results goes into the JSON."""

    name: str
    command: Sequence[str]
    seconds: int
    collect: Callable[[], dict[str, Any]] = dict
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


class Day:
    """The state of a run: what is known, and where it is written."""

    def __init__(self, out: Path, minutes: float, dry: bool) -> None:
        self.out, self.dry = out, dry
        self.end = time.monotonic() + 60 * minutes
        self.work = Path(tempfile.mkdtemp(prefix="gpu_day_"))
        self.python = [sys.executable, *(["-m", STAND_IN] if dry else [])]
        now = datetime.datetime.now(datetime.timezone.utc).isoformat()
        self.document: dict[str, Any] = {
            "datetime": now, "dry": dry, "machine_info": {}, "steps": [], "tests": {}, "benchmarks": [], "counters": [],
        }  # fmt: skip
        if CARRIED.exists() and "TRITON_CACHE_DIR" not in os.environ:
            print(f"{unpack(CARRIED, self.work / 'triton')} kernels from {CARRIED.name}", flush=True)
        self.environment = os.environ | {
            "FUSED_RESNET_CACHE_DIR": str(self.work / "tuning"), "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(self.work / "triton")),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
        }  # fmt: skip

    # ---- the steps ---------------------------------------------------------------------------------------

    def steps(self) -> list[Step]:
        small = ["--small", "--rounds", "2"] if self.dry else []
        jobs = 2 if self.dry else 16
        workers = 2 if self.dry else 6
        selected = ["--seconds", "40", "--limit", "1"]
        if self.dry:
            selected = ["--seconds", "60", "--limit", "1", "--backend", "triton", "--jobs", "2"]
        dry_tests, dry_rest = (["-k", DRY_TESTS], ["-k", DRY_REST]) if self.dry else ([], [])
        tests = [*self.python, "-m", "pytest", "-q", "-m", "gpu", "-n", str(workers), "-p", "no:cacheprovider"]
        tests += ["-p", STAND_IN] if self.dry else []
        if self.dry:
            tests[1:3] = []  # pytest's workers load the stand-in themselves
        backends, others = "tests/cuda/test_gpu_backends.py", sorted((ROOT / "tests").rglob("test_gpu_*.py"))
        rest = [str(path.relative_to(ROOT)) for path in others if path.name != "test_gpu_backends.py"]
        speed = [*self.python, "-m", "benchmarks.gpu_speed"]
        return [
            Step("build", self._build(jobs), 240, self._built),
            Step("doctor", [*self.python, "-m", "fused_resnet", "doctor"], 40, self._doctor),
            self._tests("conformance", [*tests, backends, *dry_tests], 130),
            self._tests("tests", [*tests, *rest, *dry_rest], 120),
            Step("selftest", [*self.python, "-m", "fused_resnet", "selftest", "--device", "cuda", *selected], 60),
            Step("warm", [*speed, "warm", "--seconds", "50", "--workers", str(1 if self.dry else 12), *small[:1]], 70),
            self._speed("tails", speed, small, 130),
            self._speed("networks", speed, small, 110),
            Step("counters", [sys.executable, "-m", "benchmarks.gpu_counters", *self._counters()], 60, self._counted),
        ]

    def _tests(self, name: str, command: list[str], seconds: int) -> Step:
        xml = self.work / f"{name}.xml"
        return Step(name, [*command, f"--junitxml={xml}"], seconds, lambda: {"tests": {name: outcome(xml)}})

    def _speed(self, kind: str, command: list[str], small: list[str], seconds: int) -> Step:
        out = self.work / f"{kind}.json"
        budget = str(seconds - 15)
        return Step(
            kind, [*command, kind, "--out", str(out), "--seconds", budget, *small], seconds, lambda: compared(out)
        )

    def _build(self, jobs: int) -> list[str]:
        """The extension for this GPU in place, unless one that loads was carried along."""
        dry = ["--dry"] if self.dry else []
        return [sys.executable, "-m", "benchmarks.gpu_build", "--jobs", str(jobs), *dry]

    def _built(self) -> dict[str, Any]:
        for module in (ROOT / "fused_resnet").glob("_C_cuda*.so"):
            if module.stat().st_size <= FILE_LIMIT:
                shutil.copy(module, self.out)
        return {}

    def _doctor(self) -> dict[str, Any]:
        found = subprocess.run(
            [*self.python, "-m", "fused_resnet", "doctor", "--json"], capture_output=True, text=True, timeout=40,
            cwd=ROOT, env=self.environment,
        )  # fmt: skip
        doctor = json.loads(found.stdout)
        return {"machine_info": {"fused_resnet": doctor["environment"]}, "doctor": doctor}

    def _counters(self) -> list[str]:
        stand_in = ["--stand-in"] if self.dry else []
        return ["--tails", str(self.work / "tails.json"), "--out", str(self.out / "counters.csv"), *stand_in]

    def _counted(self) -> dict[str, Any]:
        from .gpu_counters import rows

        path = self.out / "counters.csv"
        return {"counters": rows(path.read_text())} if path.exists() else {}

    # ---- running -----------------------------------------------------------------------------------------

    def run(self, only: Sequence[str]) -> bool:
        """Run the steps; whether every one of them ended well."""
        for step in self.steps():
            if only and step.name not in only:
                continue
            left = self.end - time.monotonic() - RESERVE
            if left < 5:
                self.document["steps"].append({"name": step.name, "status": "no time left", "seconds": 0.0})
            else:
                self._run(step, min(step.seconds * (3 if self.dry else 1), left))
            self.write()
        self._pack()
        self.write()
        return all(step["status"] == "ok" for step in self.document["steps"])

    def _run(self, step: Step, limit: float) -> None:
        print(f"== {step.name} (at most {limit:.0f} s): {' '.join(step.command)}", flush=True)
        log = self.work / f"{step.name}.log"
        start, status = time.monotonic(), "ok"
        with log.open("wb") as file:
            process = subprocess.Popen(
                list(step.command), stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
                env=self.environment | step.environment, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(timeout=limit)
                status = "ok" if code == 0 else f"exit status {code}"
            except subprocess.TimeoutExpired:
                status = f"stopped after {limit:.0f} s"
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        text = log.read_bytes()[-LOG_LIMIT:].decode(errors="replace")
        entry = {"name": step.name, "status": status, "seconds": time.monotonic() - start, "limit": limit}
        try:
            merge(self.document, step.collect())
        except Exception as error:  # a step that was stopped leaves half a file
            entry["collect"] = f"{type(error).__name__}: {error}"
        self.document["steps"].append(entry | {"command": " ".join(step.command), "end": text.splitlines()[-3:]})
        with (self.out / "log.txt").open("a") as whole:
            whole.write(f"==== {step.name}: {status}, {entry['seconds']:.1f} s\n{text}\n")
        print("\n".join(text.splitlines()[-4:]), f"\n   {status}, {entry['seconds']:.1f} s", flush=True)

    def _pack(self) -> None:
        """What a later run can carry: Triton's cache, and the tuner's verdicts."""
        for path in (self.work / "tuning").glob("*.json"):
            shutil.copy(path, self.out / "tuning.json")
        cache, packed = Path(self.environment["TRITON_CACHE_DIR"]), self.work / CARRIED.name
        if cache.is_dir() and pack(cache, packed) and packed.stat().st_size <= FILE_LIMIT:
            shutil.copy(packed, self.out)

    def write(self) -> None:
        """JSON, table and plot as of now."""
        path = self.out / "gpu.json"
        path.write_text(json.dumps(self.document, indent=1))
        try:
            text = report.day(self.document, path.name)
            if report.results_of(self.document):
                report.plot(report.results_of(self.document), self.out / "gpu.png")
        except Exception as error:  # the numbers are in the JSON
            text = f"report: {type(error).__name__}: {error}\n"
        (self.out / "gpu.md").write_text(text)


#: What of the tests a dry run runs: one problem of each kind in float16, and what is special; of the older ones, at
#: real sizes, that they are found.
DRY_REST = "one_channel and float16 and not bfloat16"
DRY_TESTS = (
    "(float16 and not bfloat16 and (one_channel or described_projection_1x1)) or nan_and_infinity"
    " or test_in_a_cuda_graph or float32_residual"
)


def outcome(xml: Path) -> dict[str, Any]:
    """The counts of a junit file, and the first line of each failure."""
    suite = ElementTree.parse(xml).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = [
        {"test": f"{case.get('classname')}::{case.get('name')}", "message": (problem.get("message") or "")[:400]}
        for case in suite.iter("testcase")
        for problem in [*case.findall("failure"), *case.findall("error")]
    ]
    skips: dict[str, int] = {}
    for skip in suite.iter("skipped"):
        skips[skip.get("message") or ""] = skips.get(skip.get("message") or "", 0) + 1
    return {**counts, "failed": bad[:60], "skips": dict(sorted(skips.items(), key=lambda item: -item[1])[:20])}


def compared(path: Path) -> dict[str, Any]:
    """What ``benchmarks.gpu_speed`` wrote."""
    document = json.loads(path.read_text())
    return {
        "machine_info": document["machine_info"], "benchmarks": document["benchmarks"],
        "not_compared": {path.stem: {"failed": document["failed"], "left": document["left"]}},
    }  # fmt: skip


def merge(document: dict[str, Any], more: dict[str, Any]) -> None:
    """Put ``more`` into ``document``: lists are joined, dicts merged, the rest replaced."""
    for key, value in more.items():
        if isinstance(value, list):
            document[key] = [*document.get(key, []), *value]
        elif isinstance(value, dict):
            document[key] = {**document.get(key, {}), **value}
        else:
            document[key] = value


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gpu_day.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("minutes", type=float, nargs="?", default=9.0)
    parser.add_argument("--dry", action="store_true", help="on the stand-ins, with tiny sizes")
    parser.add_argument("--only", default="", help="steps, such as build,tails")
    options = parser.parse_args(arguments)
    if options.dry and "PTXI_HOME" not in os.environ:
        parser.error("--dry needs PTXI_HOME, the folder of the PTX interpreter")
    day = Day(options.out, options.minutes, options.dry)
    well = day.run([name for name in options.only.split(",") if name])
    print((options.out / "gpu.md").read_text())
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
