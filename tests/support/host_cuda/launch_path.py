"""Run the launcher above a stand-in for the CUDA runtime: a program of its own, since torch brings the real one.

    python launch_path.py LIBRARY JOBS.json      # PTXI_HOME: where the stand-in is

JOBS.json lists the launches: {"request": hex of a PlanRequest (with "pass", the number of a training pass: of a
BnRequest), "buffers": {name: {"file", "alignment", "writable"}}, "shift": {name: bytes}, "drop": [names],
"extra": [names]}; each is answered by one line of JSON on stdout, {"error", "launches", "device", "kernel"}, and the
buffers are written back to their files.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np


def aligned(data: bytes, alignment: int) -> np.ndarray:
    """A copy at a multiple of `alignment` and of nothing more."""
    storage = np.zeros(len(data) + 4 * alignment, np.uint8)
    start = -storage.ctypes.data % (2 * alignment) + alignment
    view = storage[start : start + len(data)]
    view[:] = np.frombuffer(data, np.uint8)
    return view


def run(library: Any, runtime: Any, job: dict[str, Any]) -> dict[str, Any]:
    error = ctypes.create_string_buffer(512)
    sizes, device = (ctypes.c_int32 * 4)(), (ctypes.c_int32 * 5)()
    api = "fused_resnet_bn_" if "pass" in job else "fused_resnet_"
    which = (job["pass"],) if "pass" in job else ()
    make_plan, launch = library[f"{api}plan"], library[f"{api}launch"]
    library[f"{api}sizes"](sizes)
    plan = ctypes.create_string_buffer(sizes[1 if which else 2])
    failed = library.fused_resnet_query_device(device, error, len(error)) or make_plan(
        bytes.fromhex(job["request"]), device, plan, error, len(error)
    )
    runtime.reset()
    runtime.options(seed=5, global_race=1, resident=2)
    buffers = {name: aligned(Path(b["file"]).read_bytes(), b["alignment"]) for name, b in job["buffers"].items()}
    addresses = {}
    for name, buffer in buffers.items():
        addresses[name] = runtime.allow(buffer, job["buffers"][name]["writable"], name) + job["shift"].get(name, 0)
    addresses |= dict.fromkeys(job["extra"], 4096)
    count = library[f"{api}tensor_count"]()
    tensor_name = library[f"{api}tensor_name"]
    tensor_name.restype = ctypes.c_char_p
    table = (ctypes.c_void_p * count)()
    for slot in range(count):
        name = tensor_name(*which, slot).decode()
        table[slot] = None if name in job["drop"] else addresses.get(name)
    before = runtime.launches()
    failed = failed or launch(plan, table, None, error, len(error))
    if not failed:
        runtime.check()
    for name, buffer in buffers.items():
        Path(job["buffers"][name]["file"]).write_bytes(buffer.tobytes())
    kernel = ctypes.cast(plan, ctypes.POINTER(ctypes.c_int32))[0]
    return {
        "error": error.value.decode() if failed else "", "launches": runtime.launches() - before,
        "device": list(device), "kernel": kernel,
    }  # fmt: skip


def main() -> None:
    sys.path.insert(0, str(Path(os.environ["PTXI_HOME"]) / "fake_cudart"))
    import fake_cudart

    runtime = fake_cudart.activate(int(os.environ.get("PTXI_ARCH", "80")))
    library = ctypes.CDLL(sys.argv[1])
    for job in json.loads(Path(sys.argv[2]).read_text()):
        print(json.dumps(run(library, runtime, job)), flush=True)


if __name__ == "__main__":
    main()
