"""The support matrix: every leg in an environment of its own, built and tested as `make test` does it.

    make matrix                          # or: python3 tests/support/matrix.py [--short] [--legs oldest,gpu-stack]

A leg is a Python and a torch; its copy of the tree, its virtual environment and its logs lie in .matrix/LEG and are
used again by the next run. What cannot be had here (no such Python, no network) is said in one sentence and fails
nothing. Results: .matrix/results.json and .matrix/results.md. Plain Python, needs git and make. Each CUDA torch is
about 6 GB on the disk.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Files that show within minutes whether a stack carries the package: calls, surgery, training, Triton, the build.
SHORT = (
    "tests/ops/test_ops.py tests/surgery/test_nn.py tests/surgery/test_fuse_models.py "
    "tests/surgery/test_models.py tests/core/test_packed_weights.py tests/surgery/test_freeze.py "
    "tests/surgery/test_live.py tests/training/test_training_ops.py tests/training/test_training_step.py "
    "tests/app/test_optional.py tests/test_package.py tests/triton/test_triton_interpreter.py "
    "tests/triton/test_triton_aot.py"
)
OPTIMISED = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "FUSED_RESNET_CPU_ISA")


@dataclass(frozen=True)
class Leg:
    name: str
    python: tuple[str, ...]  # the first that is there
    torch: str  # what pip installs
    variables: dict[str, str] = field(default_factory=dict)
    same_as: str = ""  # the leg whose environment and build it uses


def _isa(name: str, *values: str) -> Leg:
    return Leg(f"gpu-stack-{name}", (), "", dict(zip(OPTIMISED, values, strict=True)), same_as="gpu-stack")


LEGS = (
    Leg("gpu-stack", ("3.12",), "torch==2.11.0 torchvision==0.26.0"),  # of a real GPU machine; Triton 3.6
    _isa("avx512", "avx512", "AVX512_CORE", "avx512"),
    _isa("avx2", "avx2", "AVX2", "avx2"),
    _isa("portable", "default", "SSE41", "portable"),
    Leg("oldest", ("3.10",), "torch==2.10.0 torchvision==0.25.0"),
    Leg("newest", ("3.14", "3.13"), "torch torchvision"),
)


@dataclass
class Outcome:
    """What a leg was and how it ended; `absent` is why it could not be had."""

    leg: str
    stack: dict[str, str] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)
    minutes: float = 0.0
    absent: str = ""
    ok: bool = False


class NotHere(Exception):
    """Why a leg cannot be had, in one sentence."""


def find_python(versions: tuple[str, ...]) -> str:
    """An interpreter of the first of these versions that is installed: on PATH, in pyenv or as uv keeps them."""
    for version in versions:
        found = [shutil.which(f"python{version}") or ""]
        for pattern in ("~/.pyenv/versions/{}.*/bin/python", "~/.local/share/uv/python/cpython-{}.*/bin/python"):
            found += sorted(glob.glob(os.path.expanduser(pattern.format(version))), reverse=True)
        for path in filter(None, found):
            code = f"import ensurepip, sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '{version}')"
            if subprocess.run([path, "-c", code], capture_output=True, check=False).returncode == 0:
                return path
    raise NotHere(f"Python {' or '.join(versions)} is not on PATH, in ~/.pyenv/versions or among uv's")


def copy_tree(target: Path) -> None:
    """The tracked files, and those that git would add. Only what changed, so that the build goes on from there."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wanted = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    record = target / ".copied"
    for name in set(record.read_text().splitlines() if record.exists() else []) - wanted:
        (target / name).unlink(missing_ok=True)
    for name in wanted:
        source, copy = ROOT / name, target / name
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)
    record.write_text("\n".join(sorted(wanted)))


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "fused_resnet:"))]
    return (errors or lines or ["nothing was printed"])[-1][:200]


def make(tree: Path, log: Path, target: str, variables: dict[str, str], environment: dict[str, str], limit: int) -> int:
    command = ["make", "--no-print-directory", target, *(f"{name}={value}" for name, value in variables.items())]
    env = {k: v for k, v in os.environ.items() if k not in (*OPTIMISED, "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL")}
    with open(log, "w") as file:
        try:
            done = subprocess.run(
                command, cwd=tree, env=env | environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            file.write(f"\nstopped after {limit // 60} minutes\n")
            return 124
    return done.returncode


def stack_of(tree: Path) -> dict[str, str]:
    """What `fused-resnet doctor` says that decides: versions and how the modules were loaded."""
    done = subprocess.run(
        [str(tree / ".venv/bin/python"), "-m", "fused_resnet", "doctor", "--json"],
        cwd=tree, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return {"doctor": (done.stderr.strip().splitlines() or ["failed"])[-1]}
    facts = json.loads(done.stdout)["environment"]
    names = ("python", "torch", "triton", "torchvision", "CPU", "extension _C", "extension _C_cuda")
    return {name: facts[name].split(" on ")[0] for name in names}


def run(leg: Leg, folder: Path, options: argparse.Namespace) -> Outcome:
    outcome, start = Outcome(leg.name), time.monotonic()
    tree, logs = folder / (leg.same_as or leg.name), folder / "logs"
    tree.mkdir(parents=True, exist_ok=True)
    logs.mkdir(exist_ok=True)
    try:
        variables = {"VENV": ".venv", "EXTRAS": "dev"}
        if leg.same_as:
            if not (tree / ".venv/.installed").exists():
                raise NotHere(f"the leg {leg.same_as} was not built")
        else:
            variables |= {"PYTHON": find_python(leg.python), "TORCH": leg.torch}
            copy_tree(tree)
            log = logs / f"{leg.name}-build.log"
            print(f"{leg.name}: {leg.torch} with {variables['PYTHON']} -> {log}", flush=True)
            if make(tree, log, f"{variables['VENV']}/.torch", variables, {}, options.limit):
                raise NotHere(f"{leg.torch} cannot be installed: {last_line(log)}")
            status = make(tree, log, "install", variables, {}, options.limit)
            outcome.steps["build"] = "ok" if status == 0 else f"failed: {last_line(log)}"
        outcome.stack = stack_of(tree) | leg.variables
        ok = outcome.steps.get("build", "ok") == "ok"
        if ok:
            if options.short:
                variables["TESTS"] = " ".join(SHORT.split())
            for step in ("test-interpreter", "test-rest"):
                log = logs / f"{leg.name}-{step}.log"
                print(f"{leg.name}: {step} -> {log}", flush=True)
                status = make(tree, log, step, variables, leg.variables, options.limit)
                summary = re.findall(r"^=* ?(\d+ (?:passed|failed|skipped|error).*?)(?: =+)?$", log.read_text(), re.M)
                outcome.steps[step] = (summary or [last_line(log)])[-1] + ("" if status == 0 else f" (exit {status})")
                ok = ok and status == 0
        outcome.ok = ok
    except NotHere as reason:
        outcome.absent = str(reason)
    outcome.minutes = round((time.monotonic() - start) / 60, 1)
    return outcome


def table(outcomes: list[Outcome]) -> str:
    """The results as Markdown."""
    rows = ["| leg | Python | torch | Triton | instruction set | build | interpreter | other tests | minutes |"]
    rows.append("| --- " * 9 + "|")
    for o in outcomes:
        if o.absent:
            rows.append(f"| {o.leg} | not run: {o.absent} |" + " |" * 7)
            continue
        isa = o.stack.get("FUSED_RESNET_CPU_ISA") or "this CPU's best"
        versions = [o.stack.get(name, "?") for name in ("python", "torch", "triton")]
        steps = [o.steps.get(name, "") for name in ("build", "test-interpreter", "test-rest")]
        rows.append("| " + " | ".join([o.leg, *versions, isa, *steps, str(o.minutes)]) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="default: .matrix")
    parser.add_argument("--legs", help=f"some of {', '.join(leg.name for leg in LEGS)}; default: all")
    parser.add_argument("--short", action="store_true", help="the files that show most, in minutes")
    parser.add_argument("--limit", type=int, default=3600, help="seconds for each step")
    options = parser.parse_args()
    known = [leg.name for leg in LEGS]
    names = options.legs.split(",") if options.legs else known
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"--legs: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    outcomes = []
    for leg in LEGS:
        if leg.name in names:
            outcomes.append(run(leg, options.folder, options))
            report = {"machine": platform.platform(), "short": options.short, "legs": [asdict(o) for o in outcomes]}
            (options.folder / "results.json").write_text(json.dumps(report, indent=1) + "\n")
            (options.folder / "results.md").write_text(table(outcomes) + "\n")
    print(table(outcomes))
    sys.exit(any(not (o.ok or o.absent) for o in outcomes))


if __name__ == "__main__":
    main()
