"""The verdicts and times of kernels on this machine, kept on disk.

One JSON file for each environment (GPU, driver, versions, the kernels' own code), so that an update of any of them
starts afresh. Files are replaced as a whole (written beside, then renamed) and merged under a lock, so several
processes may write at once; a file that is damaged or not ours is ignored with one sentence.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..core import user_cache

logger = logging.getLogger("fused_resnet")

FORMAT = 1


def file_of(environment: dict[str, str]) -> Path:
    """The file for ``environment``: named after the device for people, by a hash for the rest."""
    digest = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:12]
    device = "-".join("".join(c if c.isalnum() else " " for c in environment.get("device", "unknown")).split())
    return user_cache.directory() / f"tuning-v{FORMAT}-{device}-{digest}.json"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file beside ``path``. It is never deleted: another process may be waiting on it."""
    with open(path.with_suffix(".lock"), "a+b") as lock:
        try:
            import fcntl
        except ImportError:  # Windows
            import msvcrt

            lock.seek(0)
            msvcrt.locking(lock.fileno(), msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]
            try:
                yield
            finally:
                lock.seek(0)
                msvcrt.locking(lock.fileno(), msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined]
            return
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # closing the file releases the lock


def _read(path: Path, environment: dict[str, str]) -> dict[str, Any]:
    """The file's content; ValueError with one sentence where there is a file that cannot be used."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"the tuning file {path} cannot be read ({type(error).__name__}) and is ignored") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"the tuning file {path} is not in format {FORMAT} and is ignored")
    if data.get("environment") != environment:
        raise ValueError(f"the tuning file {path} is of another environment and is ignored")
    tables = [data.get("verdicts"), data.get("times")]
    if not all(isinstance(table, dict) and all(isinstance(row, dict) for row in table.values()) for table in tables):
        raise ValueError(f"the tuning file {path} is damaged and is ignored")
    return data


class Store:
    """Verdicts and times of one environment, in memory and on disk.

    A verdict is text: ``"ok"``, or ``"wrong: …"``, ``"failed: …"`` and ``"crashed: …"``, which ban a candidate.
    """

    def __init__(self, environment: dict[str, str], path: Path | None = None) -> None:
        self.environment = environment
        self.path = path or file_of(environment)
        self._verdicts: dict[str, dict[str, str]] = {}
        self._times: dict[str, dict[str, Any]] = {}
        self._complained = False
        self._merge()

    # ---- reading -------------------------------------------------------------------------------------------

    def verdict(self, key: str, candidate: str) -> str | None:
        """What is known of ``candidate`` for the call ``key``, or None."""
        found = self._verdicts.get(key, {}).get(candidate)
        if found is not None and found.startswith("trying"):
            return _verdict_of_trial(found)
        return found

    def verdicts(self) -> dict[str, dict[str, str]]:
        """All verdicts, by call and candidate."""
        return {key: {name: self.verdict(key, name) or "" for name in row} for key, row in self._verdicts.items()}

    def times(self, key: str) -> dict[str, float] | None:
        """Median seconds of each candidate that was timed for the call ``key``, best first, or None."""
        record = self._times.get(key)
        if record is None:
            return None
        return {str(name): float(seconds) for name, seconds in record.get("medians", [])}

    def progress(self, key: str) -> int:
        """Grows with every verdict and time recorded for the call ``key``."""
        row = self._verdicts.get(key, {})
        return sum(_trials(text) if text.startswith("trying") else 100 for text in row.values())

    def reload(self) -> None:
        """Take over what other processes have written."""
        self._merge()

    # ---- writing -------------------------------------------------------------------------------------------

    def set_verdict(self, key: str, candidate: str, verdict: str) -> None:
        self._update(lambda: self._verdicts.setdefault(key, {}).__setitem__(candidate, verdict))

    def set_trying(self, key: str, candidate: str) -> None:
        """Record that a candidate is about to run for the first time: if it crashes this process, the next knows."""

        def note() -> None:
            row = self._verdicts.setdefault(key, {})
            trial = 1 + _trials(row.get(candidate, ""))
            row[candidate] = f"trying {trial} {socket.gethostname()} {os.getpid()}"

        self._update(note)

    def forget(self, key: str, candidate: str) -> None:
        """Remove such a record, or a verdict."""

        def remove() -> None:
            self._verdicts.get(key, {}).pop(candidate, None)

        self._update(remove)

    def set_times(self, key: str, medians: dict[str, float], rounds: int) -> None:
        record = {
            "medians": [[name, value] for name, value in medians.items()],
            "rounds": rounds,
            "at": int(time.time()),
        }
        self._update(lambda: self._times.__setitem__(key, record))

    # ---- the file ------------------------------------------------------------------------------------------

    def _merge(self) -> None:
        """Take over what other processes have written."""
        try:
            data = _read(self.path, self.environment)
        except ValueError as error:
            self._complain(str(error))
            return
        if data:  # the file is the truth: what another process has taken back must not come back from memory
            self._verdicts, self._times = data["verdicts"], data["times"]

    def _update(self, change: Callable[[], Any]) -> None:
        """Apply ``change`` to what is on disk now, and write the result."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path):
                self._merge()
                change()
                self._write()
        except OSError as error:  # a read-only or full disk: this process keeps what it knows
            change()
            self._complain(f"tuning results cannot be kept in {self.path} ({error.strerror or error})")

    def _write(self) -> None:
        data = {
            "format": FORMAT, "environment": self.environment, "verdicts": self._verdicts, "times": self._times,
        }  # fmt: skip
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(data, file, indent=1)
            os.replace(name, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def _complain(self, sentence: str) -> None:
        if not self._complained:
            self._complained = True
            logger.warning("fused_resnet: %s", sentence)


def _trials(note: str) -> int:
    """How many processes have crashed while trying the candidate, by the record of the last one."""
    return int(note.split()[1]) if note.startswith("trying") else 0


def _verdict_of_trial(note: str) -> str | None:
    """Two crashed processes make a verdict; a single one may have been killed from outside."""
    _, trial, host, pid = note.split()
    if host != socket.gethostname() or int(pid) == os.getpid():
        return None
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return "crashed: it ended two processes that tried it" if int(trial) >= 2 else None
    except OSError:
        return None
    return None
