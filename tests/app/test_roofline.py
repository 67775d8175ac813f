"""The roofline: kernels counted from a forward pass, and the bounds that follow from them."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fused_resnet import devices, surgery
from fused_resnet.core.problem import Problem
from fused_resnet.kernels import gpu_model
from fused_resnet.nn import FusedConvBNReLU
from fused_resnet.roofline import Roofline, Row, Work, expected, measure, roofline, seconds
from fused_resnet.roofline.kernel_count import Kernel, count

torchvision = pytest.importorskip("torchvision")

H100 = devices.find("H100")


@pytest.fixture(scope="module")
def resnet18() -> tuple[nn.Module, nn.Module]:
    """Eager and fused; the comparison of the two is the surgery's test, not this one's."""
    model = torchvision.models.resnet18().eval()
    return model, surgery.fuse(model, check=False)


def test_the_kernels_of_a_block_one_by_one() -> None:
    n, c, k, side = 2, 8, 16, 6
    block = nn.Sequential(nn.Conv2d(c, k, 3, padding=1, bias=False), nn.BatchNorm2d(k), nn.ReLU(inplace=True))
    kernels = count(block, (n, c, side, side), torch.float16)
    x, w, y = 2 * n * c * side**2, 2 * 9 * c * k, 2 * n * k * side**2
    assert [kernel.module for kernel in kernels] == ["0", "1", "2"]
    assert [kernel.bytes for kernel in kernels] == [x + w + y, 2 * y + 4 * 2 * k, 2 * y]
    assert [kernel.flops for kernel in kernels] == [2 * n * k * side**2 * 9 * c, 0, 0]


def test_a_strided_1x1_reads_a_quarter() -> None:
    (dense,), (strided,) = (
        count(nn.Conv2d(16, 8, 1, stride=s, bias=False), (1, 16, 8, 8), torch.float32) for s in (1, 2)
    )
    weight = 4 * 16 * 8
    assert dense.bytes == 4 * 16 * 64 + weight + 4 * 8 * 64
    assert strided.bytes == 4 * 16 * 16 + weight + 4 * 8 * 16


def test_counting_leaves_the_model_alone() -> None:
    model = torchvision.models.resnet18().train()
    before = {name: (t.device, t.dtype, t.stride()) for name, t in model.state_dict().items()}
    call = nn.Module.__call__
    count(model, (1, 3, 32, 32))
    assert nn.Module.__call__ is call
    assert model.training
    assert before == {name: (t.device, t.dtype, t.stride()) for name, t in model.state_dict().items()}


def _with_separate_projection(result: Roofline) -> float:
    """The speed-up if the projections of the fused side were launches of their own (conv + BN, then added)."""
    total = 0.0
    for row in result.rows:
        for kernel in row.fused.kernels:
            total += seconds(kernel, result.device)
        projected = [k for k in row.fused.kernels if k.operator.endswith("proj_add_relu")]
        for kernel in projected:
            first = next(k for k in row.eager.kernels if k.module.endswith("downsample.0"))
            bn = next(k for k in row.eager.kernels if k.module.endswith("downsample.1"))
            y = bn.bytes // 2
            joined = dataclasses.replace(
                kernel, flops=kernel.flops - first.flops, bytes=kernel.bytes - first.bytes + 2 * y
            )
            total += seconds(first, result.device) + seconds(joined, result.device) - seconds(kernel, result.device)
    return result.bound("eager") / total


@pytest.mark.parametrize(
    ("name", "expected_separate", "expected", "launches"),
    [("resnet18", 2.15, 2.21, (68, 21)), ("resnet50", 2.61, 2.86, (174, 53))],
)
def test_the_bound_of_full_fusion(
    name: str, expected_separate: float, expected: float, launches: tuple[int, int]
) -> None:
    """fp16, batch 256, 790 TFLOP/s, 3.0 TB/s: the figures known from a count by hand, in which the projection is a
    launch of its own; ours is in the tail's launch, which gains what is above them."""
    model = getattr(torchvision.models, name)()
    result = roofline(model, (256, 3, 224, 224), torch.float16, H100, surgery.fuse(model.eval(), check=False))
    assert _with_separate_projection(result) == pytest.approx(expected_separate, abs=0.03)
    assert result.speedup == pytest.approx(expected, abs=0.02)
    assert launches[0] == sum(row.eager.launches for row in result.rows)
    assert launches[1] >= sum(row.fused.launches for row in result.rows)


def test_blocks_line_up(resnet18: tuple[nn.Module, nn.Module]) -> None:
    result = roofline(resnet18[0], (8, 3, 64, 64), fused=resnet18[1])
    blocks = [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    assert [row.block for row in result.rows] == ["stem", *blocks, "head"]
    for row in result.rows[1:-1]:
        assert row.fused.launches == 2
        assert row.eager.launches == (9 if row.block in ("layer2.0", "layer3.0", "layer4.0") else 7)
        assert row.fused.flops == row.eager.flops
        assert row.fused.bytes < row.eager.bytes
    assert "layer3.1" in str(result.as_dict())


def test_what_the_model_expects_names_the_family(resnet18: tuple[nn.Module, nn.Module]) -> None:
    from rich.console import Console

    for name, family, quicker in (("H200", "wgmma 256x128", True), ("A100", "mma.sync 128x128", False)):
        device = devices.find(name)
        result = roofline(resnet18[0], (256, 3, 224, 224), device=device, fused=resnet18[1])
        tails = result.tails()
        assert sum(tail.calls for tail in tails) == 17
        assert (expected.total(tails, "cuda") < 0.9 * expected.total(tails, "mma.sync")) == quicker
        assert expected.total(tails, "auto") <= 1.06 * min(expected.total(tails, side) for side in expected.SIDES)
        for tail in tails:
            assert min(tail.seconds.values()) > seconds_of_bound(tail.problem, device)
        numbers = result.as_dict()["expected"]
        assert numbers["source"] == "model, not measured"
        assert family in {row["launch"] for row in numbers["tails"]}
        assert numbers["seconds"]["cuda"] == pytest.approx(expected.total(tails, "cuda"))
        console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(expected.table(tails, device))
        text = console.export_text()
        assert "not measured" in text
        assert family in text
        assert "…" not in text, "wider than 80 columns"


def seconds_of_bound(problem: Problem, device: devices.Device) -> float:
    return gpu_model.bound(problem.flops, problem.compulsory_bytes, problem.dtype, device)


def test_compulsory_bytes_of_the_fused_operator_are_the_problems(resnet18: tuple[nn.Module, nn.Module]) -> None:
    kernels = [k for k in count(resnet18[1], (4, 3, 64, 64)) if k.module == "layer1.0"]
    plain = Problem.parse("n=4,h=16,w=16,c=64,k=64,padding=1,dtype=float16")
    tail = dataclasses.replace(plain, residual=torch.float16)
    # BN is half here like everything else; Problem counts its vectors as float32
    vectors = 4 * 64 * 2
    assert [k.bytes + vectors for k in kernels] == pytest.approx(
        [plain.compulsory_bytes, tail.compulsory_bytes], rel=1e-2
    )


def test_a_batch_norm_without_running_statistics_is_counted() -> None:
    """In evaluation mode it normalises with the batch's, so the training tail runs: two launches."""
    block = FusedConvBNReLU(16, 32, norm_layer=partial(nn.BatchNorm2d, track_running_stats=False))
    kernels = {k.operator: k for k in count(block, (2, 16, 8, 8))}
    assert kernels["fused_resnet::conv_bn_stats"].flops == 2 * (2 * 8 * 8 * 32) * (16 * 9)
    assert "fused_resnet::bn_apply_add_relu" in kernels


@pytest.mark.parametrize(
    ("reported", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-80GB", "A100 PCIe"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H200", "H200"),
        ("h100", "H100"),
    ],
)
def test_devices_by_the_name_that_cuda_reports(reported: str, row: str) -> None:
    assert devices.find(reported).name == row


def test_an_unknown_device_is_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"device: expected one of T4, A10, .*got 'Voodoo 2'"):
        devices.find("Voodoo 2")


def test_a_device_outside_the_table_is_estimated() -> None:
    class Properties:
        name, major, minor, multi_processor_count = "NVIDIA H100 something", 9, 0, 132
        clock_rate, memory_clock_rate, memory_bus_width = 1_830_000, 2_619_000, 5120

    estimate = devices.estimated(Properties())
    assert estimate.tensor16 == pytest.approx(989e12, rel=0.01)
    assert estimate.bandwidth == pytest.approx(3.35e12, rel=0.01)


def test_rates_of_ones_own() -> None:
    own = H100.with_rates(tensor16=395e12, bandwidth=1.5e12)
    kernel = Kernel("conv", "", 10**12, 10**9, torch.float16)
    assert seconds(kernel, own) == pytest.approx(2 * seconds(kernel, H100))
    assert own.tf32 == pytest.approx(H100.tf32 / 2)


def test_compute_and_memory_bound_kernels() -> None:
    compute = Kernel("conv", "", 790 * 10**12, 1, torch.float16)
    memory = Kernel("add", "", 0, 3 * 10**12, torch.float16)
    assert seconds(compute, H100) == pytest.approx(1.0)
    assert seconds(memory, H100) == pytest.approx(1.0)
    assert Work((compute, memory)).bound(H100) == pytest.approx(2.0)


def test_table_and_plot(tmp_path: Path, resnet18: tuple[nn.Module, nn.Module]) -> None:
    pytest.importorskip("matplotlib")
    from rich.console import Console

    result = roofline(resnet18[0], (2, 3, 64, 64), fused=resnet18[1])
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result.table())
    text = console.export_text()
    assert "layer4.1" in text
    assert "790 TFLOP/s" in text
    result.plot(tmp_path / "roof.png")
    assert (tmp_path / "roof.png").stat().st_size > 10_000


def test_measured_fractions() -> None:
    """On the CPU, with a timer of blocks injected: what is measured lands in its row, and in the table."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    kernel = Kernel("conv", "0", 79 * 10**10, 1, torch.float16)  # 1 ms on an H100
    result = Roofline([Row("0", Work((kernel,)), Work((kernel,)))], H100, (1, 3, 8, 8), torch.float16)

    def block_timer(network: nn.Module, x: Tensor, blocks: object, rounds: int) -> dict[str, float]:
        return {"0": 4e-3}

    measure(result, model, model, torch.randn(1, 3, 8, 8), rounds=2, block_timer=block_timer)
    assert result.rows[0].measured == {"eager": 4e-3, "fused": 4e-3}
    assert set(result.measured) == {"eager", "fused"}
    columns = {str(column.header): list(column.cells) for column in result.table().columns}
    assert columns["eager at"][0] == "25%"


@pytest.mark.gpu
def test_measure_on_a_gpu() -> None:
    model = torchvision.models.resnet18().eval().cuda().half()
    fused = surgery.fuse(model)
    shape = (32, 3, 224, 224)
    result = roofline(model, shape, torch.float16, devices.of(torch.device("cuda")), fused)
    measure(result, model, fused, torch.randn(shape, device="cuda", dtype=torch.float16))
    for row in result.rows[1:-1]:
        assert 0 < row.fused.bound(result.device) < row.measured["fused"]
