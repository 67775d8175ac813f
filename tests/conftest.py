"""What every test shares: which process runs which marker, and fixtures of several files."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# CI draws the same examples every time, so that a red run is a change's own doing; at home each run draws anew.
settings.register_profile("ci", derandomize=True, database=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config: pytest.Config) -> None:
    """Tuning results of this machine's user must not choose what the tests run; xdist's workers share one folder."""
    if "FUSED_RESNET_CACHE_DIR" not in os.environ:
        folder = os.environ["FUSED_RESNET_CACHE_DIR"] = tempfile.mkdtemp(prefix="fused_resnet_cache_")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def _why_no_interpreter() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None  # the tests that need it say so
    from tests.support.interpreter_probe import why_not

    return why_not()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run in this process, with the reason.

    Triton decides at import whether kernels are interpreted, and once imported for interpretation its library
    functions stay interpreted; so interpreter tests and everything that compiles are two processes.
    """
    no_ptxi = not os.environ.get("PTXI_HOME")
    no_gpu = not torch.cuda.is_available()
    no_interpreter = _why_no_interpreter() if INTERPRETING else None
    for item in items:
        interpreter = item.get_closest_marker("interpreter") is not None
        if interpreter and not INTERPRETING:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 before the process starts"))
        elif interpreter and no_interpreter:
            item.add_marker(pytest.mark.skip(reason=no_interpreter))
        elif INTERPRETING and not interpreter:
            item.add_marker(pytest.mark.skip(reason="runs in the process without TRITON_INTERPRET=1"))
        if no_ptxi and item.get_closest_marker("ptx"):
            item.add_marker(pytest.mark.skip(reason="needs PTXI_HOME, the folder of the PTX interpreter"))
        if no_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For images of a few pixels: waking a second thread takes longer than all the rest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
