"""The rule prices the backend ``cuda`` by the family of kernels that its planner launches."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import pytest
import torch

from fused_resnet import backends, devices, surgery
from fused_resnet.aot.planner import Planner
from fused_resnet.backends import cuda, cuda_launch, gpu_rule
from fused_resnet.core import extensions
from fused_resnet.core.problem import Problem
from fused_resnet.kernels import gpu_model
from fused_resnet.roofline.kernel_count import count
from fused_resnet.surgery import report

pytestmark = pytest.mark.skipif(extensions.cpu() is None, reason="the planner is part of _C")

H200 = devices.find("H200")
WITHOUT_WGMMA = dataclasses.replace(cuda_launch.of_row(H200), wgmma=False)
DEEP = Problem.parse("n=256,h=14,w=14,c=256,k=256,padding=1,dtype=float16,residual=1,device=cuda")
COMPILED = [module for module in (extensions.cpu(), extensions.cuda()) if module is not None]


def _family(problem: Problem, device: devices.Device) -> str:
    launch = cuda_launch.expected(problem, cuda_launch.of_row(device))
    assert launch is not None
    return launch.family


@pytest.mark.parametrize("name", ["H100", "H100 PCIe", "H200"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_hopper_a_large_3x3_is_priced_by_wgmma(name: str, dtype: torch.dtype) -> None:
    device, problem = devices.find(name), dataclasses.replace(DEEP, dtype=dtype, residual=dtype)
    assert _family(problem, device) == "wgmma"
    on_mma = gpu_model.device_seconds("cuda", problem, device)
    assert gpu_rule.seconds("cuda", problem, device) < 0.8 * gpu_rule.UNMEASURED * on_mma
    assert gpu_rule.order(gpu_rule.PREFERENCE, problem, device)[0] == "cuda"


@pytest.mark.parametrize("name", ["A100", "L40S", "B200", "RTX 5090"])
def test_elsewhere_it_is_priced_by_mma_sync(name: str) -> None:
    device = devices.find(name)
    assert _family(DEEP, device) == "mma.sync"
    expected = gpu_rule.UNMEASURED * gpu_model.device_seconds("cuda", DEEP, device)
    assert gpu_rule.seconds("cuda", DEEP, device) == expected


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({"c": 12}, "mma.sync"),
        ({"k": 12}, "mma.sync"),
        ({"residual": torch.float32}, "mma.sync"),  # y is float32 then
        ({"stride": (9, 9)}, "mma.sync"),
        ({"dtype": torch.float32, "residual": torch.float32, "tf32": True}, "mma.sync"),
        ({"dtype": torch.float32, "residual": torch.float32}, "FMA"),
    ],
)
def test_what_the_hopper_family_refuses_is_priced_as_before(changes: dict[str, object], family: str) -> None:
    problem = dataclasses.replace(DEEP, **changes)  # type: ignore[arg-type]
    assert _family(problem, H200) == family
    expected = gpu_rule.UNMEASURED * gpu_model.device_seconds("cuda", problem, H200)
    assert gpu_rule.seconds("cuda", problem, H200) == max(expected, gpu_model.host_seconds("cuda", problem))


def test_what_no_family_takes_has_no_launch() -> None:
    device = cuda_launch.of_row(H200)
    for changes in ({"groups": 32}, {"dtype": torch.float64, "residual": None}):
        problem = dataclasses.replace(DEEP, **changes)  # type: ignore[arg-type]
        assert cuda_launch.expected(problem, device) is None
        assert gpu_rule.seconds("cuda", problem, H200) > 0
    assert cuda_launch.arithmetic(torch.float64, device) is None


def test_a_build_or_a_driver_without_wgmma_is_priced_by_mma_sync() -> None:
    """And convolutions that are bound by arithmetic are left to Triton and cuDNN, as on Blackwell."""
    order = gpu_rule.order(gpu_rule.PREFERENCE, DEEP, H200, WITHOUT_WGMMA)
    assert order.index("cuda") > order.index("triton")
    assert order.index("two_pass") < order.index("eager")
    assert gpu_rule.seconds("cuda", DEEP, H200, WITHOUT_WGMMA) > gpu_rule.seconds("cuda", DEEP, H200)


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def layers(request: pytest.FixtureRequest) -> list[Problem]:
    """Every fused tail of the network, for one image."""
    torchvision = pytest.importorskip("torchvision")
    network = surgery.fuse(getattr(torchvision.models, request.param)().eval(), check=False)
    found = [kernel.problem for kernel in count(network, (1, 3, 224, 224)) if kernel.problem is not None]
    assert len(found) == {"resnet18": 17, "resnet50": 49}[request.param]
    return found


@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.parametrize("extension", COMPILED, ids=[module.__name__ for module in COMPILED])
def test_the_priced_family_and_tile_are_what_the_planner_launches(
    layers: list[Problem], batch: int, extension: ModuleType
) -> None:
    device, asked = cuda_launch.of_row(H200), Planner(extension)
    families = set()
    for layer in layers:
        problem = dataclasses.replace(layer, n=batch)
        launch = cuda_launch.expected(problem, device)
        planned = asked.plan(problem, "sm_90", device=device)
        kernel = asked.kernels[planned.kernel]
        assert launch is not None
        assert launch.family == {"wgmma": "wgmma", "mma": "mma.sync"}[kernel.family]
        assert (f"{launch.m}x{launch.n}", launch.splits) == (kernel.tile, planned.grid[1])
        on_mma = gpu_model.device_seconds("cuda", problem, H200)
        found = gpu_model.device_seconds("cuda", problem, H200, launch)
        assert (found == on_mma) == (launch.family == "mma.sync")
        families.add(launch.family)
    if batch > 1:
        assert families == {"wgmma", "mma.sync"}, "the stem's three channels, and all else that fills the SMs"


def test_the_model_gives_the_figure_that_was_worked_out_by_hand() -> None:
    """392 tiles of 256x128 are 3 rounds of 132 SMs but for 4; 720 TFLOP/s, less 64 of 2368 of the depth; 2 us."""
    launch = cuda_launch.expected(DEEP, cuda_launch.of_row(H200))
    assert str(launch) == "wgmma 256x128"
    assert gpu_model.filled(DEEP, 132, launch) == pytest.approx(392 / 396)
    assert 1e6 * gpu_model.device_seconds("cuda", DEEP, H200, launch) == pytest.approx(87.5, rel=0.01)


def test_a_last_round_of_few_tiles_costs_a_whole_one() -> None:
    launch = gpu_model.Launch("wgmma", 256, 128, 1, 2304)
    one, more = (dataclasses.replace(DEEP, n=n, h=16, w=16, residual=None) for n in (66, 67))
    times = [gpu_model.kernel("wgmma", problem, H200, launch=launch) - 2e-6 for problem in (one, more)]
    assert times[1] == pytest.approx(2 * times[0], rel=0.02)


def test_steps_that_are_not_full_are_paid_for() -> None:
    """A step of the Hopper family is one tap and 64 channels, however many there are."""
    half, full = (dataclasses.replace(DEEP, c=c) for c in (40, 64))
    launch, other = (cuda_launch.expected(problem, cuda_launch.of_row(H200)) for problem in (half, full))
    assert launch is not None
    assert (launch.family, launch.depth) == ("wgmma", 9 * 64)
    assert launch == other
    times = [gpu_model.kernel("wgmma", problem, H200, moved=0, launch=launch) for problem in (half, full)]
    assert times[0] == pytest.approx(times[1])


# ---- this machine's GPU ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wgmma", [True, False])
def test_the_rule_goes_by_what_the_driver_and_the_build_have(monkeypatch: pytest.MonkeyPatch, wgmma: bool) -> None:
    told = cuda_launch.of_row(H200).properties
    if not wgmma:
        del told["wgmma"]
    monkeypatch.setattr(cuda, "properties", lambda index: told)
    here = cuda_launch.of_index(0)
    assert here == dataclasses.replace(cuda_launch.of_row(H200), wgmma=wgmma)
    seen = []

    def order(names: tuple[str, ...], *asked: object) -> list[str]:
        seen.append(asked)
        return list(names)

    monkeypatch.setattr(gpu_rule, "order", order)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(devices, "of", lambda device: H200)
    for name in backends.names():
        monkeypatch.setattr(backends.get(name), "can_run", lambda problem: None)
    backends.choose(DEEP)
    assert seen == [(DEEP, H200, here)]


def test_without_the_extension_the_table_of_devices_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "why_not_loaded", lambda: "cuda: it is not there")
    assert cuda_launch.of_index(0) is None
    monkeypatch.setattr(extensions, "cpu", lambda: None)
    monkeypatch.setattr(extensions, "cuda", lambda: None)
    assert cuda_launch.expected(dataclasses.replace(DEEP, n=255), cuda_launch.of_row(H200)) is None


def test_explain_names_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(cuda_launch, "of_index", lambda index: cuda_launch.of_row(H200))
    (sentence,) = report._arithmetic(torch.float16, gpu)
    assert sentence.startswith("cuda: float16 is multiplied by wgmma where there are tiles enough")
    monkeypatch.setattr(cuda_launch, "of_index", lambda index: WITHOUT_WGMMA)
    assert report._arithmetic(torch.bfloat16, gpu) == ["cuda: bfloat16 is multiplied by mma.sync"]
    monkeypatch.setattr(cuda_launch, "of_index", lambda index: None)
    assert report._arithmetic(torch.float16, gpu) == []
