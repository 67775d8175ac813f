"""The file of verdicts and times: whole, merged, locked, and ignored when it is not ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fused_resnet.core import extensions
from fused_resnet.selection import environment
from fused_resnet.selection.store import FORMAT, Store, file_of
from tests.support.tuning_fakes import ENVIRONMENT, store_in


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.set_verdict("call", "a", "ok")
    store.set_verdict("call", "b", "wrong: by 1")
    store.set_times("call", {"a": 1e-6, "c": 2e-6}, 30)
    again = store_in(tmp_path)
    assert again.verdict("call", "a") == "ok"
    assert again.verdict("call", "b") == "wrong: by 1"
    assert again.verdict("call", "c") is None
    assert again.times("call") == {"a": 1e-6, "c": 2e-6}
    assert again.times("other") is None
    assert json.loads(again.path.read_text())["format"] == FORMAT


BROKEN = {
    "empty": "",
    "not_json": "{]",
    "cut_off": '{"format": 1, "environment": {"dev',
    "a_list": "[1, 2]",
    "another_format": json.dumps({"format": 99, "environment": ENVIRONMENT, "verdicts": {}, "times": {}}),
    "another_gpu": json.dumps({"format": 1, "environment": {"device": "Slide rule"}, "verdicts": {}, "times": {}}),
    "no_tables": json.dumps({"format": 1, "environment": ENVIRONMENT}),
    "wrong_tables": json.dumps({"format": 1, "environment": ENVIRONMENT, "verdicts": {"k": 3}, "times": {}}),
    "binary": "\x00\x01\x02",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_corrupt_or_foreign_file_is_ignored_with_one_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    (tmp_path / "tuning.json").write_text(content)
    store = store_in(tmp_path)
    assert store.verdict("call", "a") is None
    store.set_verdict("call", "a", "ok")
    store.set_verdict("call", "b", "ok")
    assert len(caplog.records) == 1
    assert "is ignored" in caplog.text
    assert "tuning.json" in caplog.text
    assert store_in(tmp_path).verdict("call", "b") == "ok"  # replaced by a good one


def test_undecodable_bytes_are_ignored_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tuning.json").write_bytes(b"\xff\xfe\x80")
    assert store_in(tmp_path).times("call") is None
    assert len(caplog.records) == 1


def test_an_unwritable_place_costs_the_memory_of_it_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = tmp_path / "a file, not a folder"
    place.write_text("")
    store = Store(ENVIRONMENT, place / "tuning.json")
    store.set_verdict("call", "a", "ok")
    store.set_times("call", {"a": 1.0}, 1)
    assert store.verdict("call", "a") == "ok"
    assert store.times("call") == {"a": 1.0}
    assert len(caplog.records) == 1
    assert "cannot be" in caplog.text


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_in(tmp_path)
    store.set_verdict("call", "a", "ok")
    before = store.path.read_bytes()

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", fail)
    store.set_verdict("call", "b", "ok")
    assert store.path.read_bytes() == before
    assert store.verdict("call", "b") == "ok"
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_two_stores_do_not_overwrite_each_other(tmp_path: Path) -> None:
    one, two = store_in(tmp_path), store_in(tmp_path)
    one.set_verdict("call", "a", "ok")
    two.set_verdict("call", "b", "ok")
    one.set_times("call", {"a": 1.0}, 1)
    both = store_in(tmp_path)
    assert both.verdict("call", "a") == both.verdict("call", "b") == "ok"
    assert both.times("call") == {"a": 1.0}


def test_what_another_process_took_back_does_not_return(tmp_path: Path) -> None:
    one = store_in(tmp_path)
    one.set_trying("call", "a")
    two = store_in(tmp_path)
    one.forget("call", "a")
    two.set_verdict("call", "b", "ok")
    assert store_in(tmp_path).verdicts() == {"call": {"b": "ok"}}


WRITER = """
import sys
from pathlib import Path
from fused_resnet.selection.store import Store
store = Store({environment!r}, Path({path!r}))
for i in range(40):
    store.set_verdict("call", f"{{sys.argv[1]}} {{i}}", "ok")
"""


def test_several_processes_at_once(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    code = WRITER.format(environment=ENVIRONMENT, path=str(path))
    writers = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("first", "second", "third")]
    torn: list[Exception] = []

    def read() -> None:
        while any(writer.poll() is None for writer in writers):
            try:
                if path.exists():
                    json.loads(path.read_text())
            except ValueError as error:
                torn.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    reader.join()
    assert torn == []
    assert len(store_in(tmp_path).verdicts()["call"]) == 3 * 40


# ---- notes of trials -----------------------------------------------------------------------------------------


def _dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_candidate_that_ended_two_processes_is_banned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = []
    for _ in range(2):
        with monkeypatch.context() as patch:
            pid = _dead_pid()
            patch.setattr(os, "getpid", lambda pid=pid: pid)
            store_in(tmp_path).set_trying("call", "a")
        verdicts.append(store_in(tmp_path).verdict("call", "a"))
    # once may have been a kill from outside: tried again
    assert verdicts == [None, "crashed: it ended two processes that tried it"]


def test_a_trial_that_is_still_running_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getppid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: parent)
        for _ in range(3):
            store_in(tmp_path).set_trying("call", "a")
    assert store_in(tmp_path).verdict("call", "a") is None


# ---- what a file is for --------------------------------------------------------------------------------------


def test_each_environment_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_RESNET_CACHE_DIR", str(tmp_path))
    files = {file_of({**ENVIRONMENT, "driver": driver}) for driver in ("570.1", "580.2")}
    assert len(files) == 2
    assert all(file.parent == tmp_path and "Abacus-3000" in file.name for file in files)


def test_the_environment_names_what_generates_code(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment.environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert {"fused_resnet", "code", "triton", "device", "capability"} <= set(found)

    class Properties:
        name, major, minor, multi_processor_count = "NVIDIA H100 80GB HBM3", 9, 0, 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    monkeypatch.setattr(environment, "driver_version", lambda: "580.65.06")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    gpu = environment.environment(torch.device("cuda", 0))
    assert gpu["device"] == "NVIDIA H100 80GB HBM3"
    assert gpu["driver"] == "580.65.06"
    assert {"capability", "sms", "cuda", "cudnn"} <= set(gpu)


def test_another_instruction_set_is_another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was right and fast on matrix tiles says nothing of the portable kernels."""
    found = []
    for isa in ("amx", "portable"):
        extension = SimpleNamespace(build_info=lambda isa=isa: {"cpu_isa": isa})
        monkeypatch.setattr(extensions, "cpu", lambda extension=extension: extension)
        found.append(environment.environment(torch.device("cpu")))
    assert [there["kernels"] for there in found] == ["amx", "portable"]
    assert file_of(found[0]) != file_of(found[1])


def test_changed_kernels_are_another_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_PACKAGE", tmp_path)
    (tmp_path / "kernels").mkdir()
    digests = []
    for text in ("a = 1", "a = 2"):
        (tmp_path / "kernels" / "tail.py").write_text(text)
        environment.code_digest.cache_clear()
        digests.append(environment.code_digest())
    environment.code_digest.cache_clear()
    assert digests[0] != digests[1]
