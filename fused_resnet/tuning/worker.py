"""The child process of :mod:`.isolate`: reads a request from stdin, tunes its calls, prints messages as JSON lines."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from typing import Any

import torch

from ..selection import choice
from ..selection.calls import Call
from ..selection.search import tune_call
from ..selection.verify import DeviceLost

#: Exit statuses: all calls done (whatever was found), the device lost to a kernel, interrupted by the user.
DONE, LOST, INTERRUPTED = 0, 2, 130


def main() -> int:
    request = json.load(sys.stdin)
    device = torch.device(request["device"])
    store = choice.store_for(device)
    seconds = request.get("seconds")
    end = None if seconds is None else time.monotonic() + seconds
    for data in request["calls"]:
        if end is not None and time.monotonic() > end:
            break
        call = Call.from_json(data)
        torch.use_deterministic_algorithms(call.deterministic)
        if call.problem.dtype is torch.float32:
            torch.backends.cudnn.allow_tf32 = call.problem.tf32
        try:
            tune_call(call, device, store, report=functools.partial(_report, call.key), **request["options"])
        except DeviceLost:
            return LOST
        _say(finished=call.key)
    return DONE


def _report(key: str, text: str) -> None:
    _say(call=key, text=text)


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def run() -> None:
    """Run :func:`main` and end the process at once: a broken GPU context makes an orderly exit hang."""
    try:
        status = main()
    except KeyboardInterrupt:
        status = INTERRUPTED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
