"""The search in a child process: a kernel that ends its process, or leaves the GPU's context broken, ends only that.

The child writes what it finds into the store, as ever; when it dies, its note there tells which candidate it was
trying, and the next child goes on without it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..selection.calls import Call
from ..selection.store import Store

#: How many children in a row may die without a new result before a call is given up.
PATIENCE = 3

#: The reason given for calls that were never started.
NO_TIME = "not begun within the time given"

COMMAND = (sys.executable, "-m", "fused_resnet.tuning.worker")


def tune_calls(
    calls: Sequence[Call],
    device: torch.device,
    store: Store,
    options: dict[str, Any],
    report: Callable[[int, str], None],
    command: Sequence[str] = COMMAND,
    seconds: float | None = None,
) -> dict[str, str]:
    """Tune ``calls`` in child processes. Returns what could not be finished, by key, with the reason.

    ``report(i, text)`` is told what happens to call number i. KeyboardInterrupt is passed on after the child has
    ended; what it had found is in the store. After ``seconds`` no further call is begun.
    """
    end = None if seconds is None else time.monotonic() + seconds
    number = {call.key: i for i, call in enumerate(calls)}
    pending = list(calls)
    given_up: dict[str, str] = {}
    idle = 0
    while pending:
        before = store.progress(pending[0].key)
        finished: set[str] = set()
        left = None if end is None else end - time.monotonic()
        request = {"calls": [c.as_json() for c in pending], "device": str(device), "options": options, "seconds": left}
        child = _Child(command, request)
        with child as messages:
            for message in messages:
                if "finished" in message:
                    finished.add(message["finished"])
                else:
                    report(number.get(message.get("call", ""), 0), message.get("text", ""))
        if child.status in (-2, 130):
            raise KeyboardInterrupt
        pending = [call for call in pending if call.key not in finished]
        store.reload()
        if child.status == 0:  # all done, or no time for the rest
            given_up |= {call.key: f"{call.problem}: {NO_TIME}" for call in pending}
        if not pending or child.status == 0:
            break
        idle = 0 if finished or store.progress(pending[0].key) > before else idle + 1
        report(number[pending[0].key], f"the process ended ({child.last_words}); going on without what it tried")
        if idle == PATIENCE:
            call = pending.pop(0)
            given_up[call.key] = f"{call.problem}: given up after {PATIENCE} processes that ended ({child.last_words})"
            idle = 0
    return given_up


class _Child:
    """A worker process as a context manager that gives the messages it prints; it does not outlive the context."""

    def __init__(self, command: Sequence[str], request: dict[str, Any]) -> None:
        self._command = list(command)
        self._request = json.dumps(request)
        self.status = 0
        self.last_words = ""

    def __enter__(self) -> Iterator[dict[str, Any]]:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        return self._messages()

    def _messages(self) -> Iterator[dict[str, Any]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died before it read; its status says so
            self._process.stdin.write(self._request)
            self._process.stdin.close()
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # a library's own chatter
                message = json.loads(line)
                if isinstance(message, dict):
                    yield message

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self._process.kill()
        assert self._process.stderr is not None
        with contextlib.suppress(ValueError):
            errors = self._process.stderr.read().strip().splitlines()
            self.last_words = errors[-1] if errors else ""
        self.status = self._process.wait()
        self.last_words = self.last_words or f"status {self.status}"
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(OSError, ValueError):
                if stream is not None:
                    stream.close()
