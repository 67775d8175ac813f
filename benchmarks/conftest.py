"""Options and recording shared by all benchmarks.

    pytest benchmarks --benchmark-only                      # ten minutes on two cores
    pytest benchmarks --benchmark-only --full               # every tail, network, batch, and all rivals
    pytest benchmarks --benchmark-only -k cpu --threads 1,2 # the CPU tables
    pytest benchmarks --benchmark-only -k gpu               # on a GPU

A benchmark is one comparison by :mod:`fused_resnet.core.timing`: all sides in one process, in alternating rounds. Its
rows are in the JSON's ``extra_info``; pytest-benchmark's own columns are the fused side alone, for
``--benchmark-compare`` between versions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet.cli.inspect import environment
from fused_resnet.comparison.sides import EAGER, EAGER_LAYOUTS, FUSED
from fused_resnet.core.timing import Comparison, Contender

from .comparison import Work, measure

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
        result, info = measure(
            sides, make_inputs, title=title, work=work, images=images, device=device, dtype=dtype, rounds=rounds,
            num_threads=num_threads, expected=expected, pause=pause,
        )  # fmt: skip
        benchmark.extra_info |= info
        _alone(benchmark, next(side for side in sides if side.name == FUSED), make_inputs, num_threads)
        return result

    return run


def _alone(benchmark: Any, side: Contender, make_inputs: Callable[[int], Any], num_threads: int | None) -> None:
    from fused_resnet.core.timing import threads

    with threads(num_threads), torch.inference_mode():
        fn = side.build()
        first = side.inputs(*make_inputs(0))
        fn(*first)

        def call(*inputs: Any) -> None:
            fn(*inputs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        benchmark.pedantic(call, setup=lambda: (side.inputs(*make_inputs(1)), {}), rounds=10, iterations=1)


__all__ = ["EAGER", "EAGER_LAYOUTS", "Record", "Work"]
