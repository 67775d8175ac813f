"""Which backend runs where nothing has been timed: the rule of ``auto`` on CUDA.

Status: expected not slower than eager, **unmeasured**. The rule stands until a GPU's tuning file is committed, and
``fused-resnet tune`` replaces it on any machine. It compares what :mod:`fused_resnet.kernels.gpu_model`
expects of each way to run the call: the device's time, or the host's where that is longer. Of the backend ``cuda``
that is the time of the kernels that its planner would launch (:mod:`.cuda_launch`).
"""

from __future__ import annotations

from collections.abc import Iterable

from ..core.problem import Problem
from ..devices import Device
from ..kernels import gpu_model
from . import cuda_launch

#: What our own kernels are taken to need more than the model says, until a GPU has measured them.
UNMEASURED = 1.05

#: Times closer than this are taken as equal; the order below then decides.
TIE = 0.02

#: Between equals: live BN and the lowest launch cost first, then no folded copies, then no fusion.
PREFERENCE = ("cuda", "triton", "cudnn", "two_pass", "eager")


def order(
    backends: Iterable[str], problem: Problem, device: Device, planned_for: cuda_launch.Device | None = None
) -> list[str]:
    """The names ``backends``, the one to be tried first in front.

    ``planned_for``: what the planner of ``cuda`` knows of this machine's GPU; None: a full build on such a device.
    """
    expected = {name: seconds(name, problem, device, planned_for) for name in backends}
    best = min(expected.values(), default=0.0)

    def rank(name: str) -> tuple[float, int]:
        place = PREFERENCE.index(name) if name in PREFERENCE else len(PREFERENCE)
        return (0.0 if expected[name] <= best * (1 + TIE) else expected[name], place)

    return sorted(expected, key=rank)


def seconds(backend: str, problem: Problem, device: Device, planned_for: cuda_launch.Device | None = None) -> float:
    """The time in which ``backend`` is expected to run ``problem``, calls following each other."""
    if backend not in PREFERENCE:
        backend = "eager"
    ours = UNMEASURED if backend in ("cuda", "triton") else 1.0
    launch = None
    if backend == "cuda":
        launch = cuda_launch.expected(problem, planned_for or cuda_launch.of_row(device))
    on_device = gpu_model.device_seconds(backend, problem, device, launch) * ours
    return max(on_device, gpu_model.host_seconds(backend, problem))
