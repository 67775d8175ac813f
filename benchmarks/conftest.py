"""Options and recording shared by all benchmarks.

    pytest benchmarks --benchmark-only                      # ten minutes on two cores
    pytest benchmarks --benchmark-only --full               # every tail, network, batch, and all rivals
    pytest benchmarks --benchmark-only -k cpu --threads 1,2 # the CPU tables
    pytest benchmarks --benchmark-only -k gpu               # on a GPU

A benchmark is one comparison by :mod:`fused_resnet.timing`: all sides in one process, in alternating rounds. Its
rows are in the JSON's ``extra_info``; pytest-benchmark's own columns are the fused side alone, for
``--benchmark-compare`` between versions.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet import __version__
from fused_resnet.cli.inspect import environment
from fused_resnet.contenders import EAGER, EAGER_LAYOUTS, FUSED, summary
from fused_resnet.timing import Comparison, Contender, compare

from . import peaks

#: Pool workers of other runtimes spin for a while after each call; this long a pause lets them fall asleep.
_PAUSE = 3e-3


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused_resnet")
    group.addoption("--full", action="store_true", help="all networks, batches and rivals (90 minutes on two cores)")
    group.addoption("--threads", default="", help="CPU threads, such as 1,2; default: torch's own number")
    group.addoption("--rounds", type=int, default=30, help="alternating rounds of each comparison")
    group.addoption("--strict-device", action="store_true", help="fail instead of skipping where a GPU is missing")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: only with --full")


def thread_counts(config: pytest.Config) -> list[int]:
    text = config.getoption("--threads")
    return [int(piece) for piece in text.split(",")] if text else [torch.get_num_threads()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "num_threads" in metafunc.fixturenames:
        counts = thread_counts(metafunc.config)
        metafunc.parametrize("num_threads", counts, ids=[f"t{count}" for count in counts])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("full") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="only with --full"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available() and not config.getoption("--strict-device"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fused_resnet"] = environment()


@dataclass(frozen=True)
class Work:
    """The size of one call."""

    flops: float
    bytes: float


Record = Callable[..., Comparison]


@pytest.fixture
def record(benchmark: Any, request: pytest.FixtureRequest) -> Record:
    """Run a comparison and put it into the benchmark's JSON."""
    rounds = request.config.getoption("--rounds")

    def run(
        sides: Sequence[Contender],
        make_inputs: Callable[[int], tuple[Tensor, ...]],
        *,
        title: dict[str, Any],
        work: Work,
        images: int,
        device: torch.device,
        dtype: torch.dtype,
        num_threads: int | None,
        expected: Callable[..., Tensor] | None,
        pause: float = _PAUSE,
    ) -> Comparison:
        torch._dynamo.reset()  # what earlier comparisons compiled would count as recompilation here
        max_error = 1e-2 if dtype is torch.float32 else 5e-2
        result = compare(
            sides, make_inputs, rounds=rounds, device=device, num_threads=num_threads, expected=expected,
            max_error=max_error, pause=pause if device.type == "cpu" else 0.0,
        )  # fmt: skip
        roof = peaks.measured(device, dtype, result.threads)
        rows = summary(result, images)
        for row in rows:
            row["roofline_fraction"] = roof.bound(work.flops, work.bytes) / (row["median_ms"] / 1e3)
        over = {name: list(result.speedup(FUSED, name)) for name in result.timings if name != FUSED}
        benchmark.extra_info |= {
            **title, "rows": rows, "fused_over": over, "absent": result.absent, "threads": result.threads,
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."), "rounds": rounds, "images": images, "flops": work.flops,
            "bytes": work.bytes, "peaks": asdict(roof), "versions": _versions(),
        }  # fmt: skip
        _alone(benchmark, next(side for side in sides if side.name == FUSED), make_inputs, num_threads)
        return result

    return run


def _alone(benchmark: Any, side: Contender, make_inputs: Callable[[int], Any], num_threads: int | None) -> None:
    from fused_resnet.timing import threads

    with threads(num_threads), torch.inference_mode():
        fn = side.build()
        first = side.inputs(*make_inputs(0))
        fn(*first)

        def call(*inputs: Any) -> None:
            fn(*inputs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        benchmark.pedantic(call, setup=lambda: (side.inputs(*make_inputs(1)), {}), rounds=10, iterations=1)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"fused_resnet": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "torchvision", "onnxruntime", "openvino", "ncnn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


__all__ = ["EAGER", "EAGER_LAYOUTS", "Record", "Work"]
