"""Model level: whole torchvision ResNets at 224x224."""

from __future__ import annotations

import pytest
import torch

from fused_resnet.comparison.sides import expected_output

from .baselines import model_contenders
from .comparison import Work
from .conftest import Record

torchvision = pytest.importorskip("torchvision")

#: The default run leaves out what only --full has the time for.
QUICK = [("resnet18", 1), ("resnet50", 1)]
FULL = [("resnet18", 8), ("resnet34", 1), ("resnet34", 8), ("resnet50", 8)]
CASES = [pytest.param(*case, id=f"{case[0]}-b{case[1]}") for case in QUICK]
CASES += [pytest.param(*case, id=f"{case[0]}-b{case[1]}", marks=pytest.mark.full) for case in FULL]


def run(record: Record, name: str, batch: int, device: torch.device, dtype: torch.dtype, threads: int | None) -> None:
    from fused_resnet.roofline import roofline

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    traffic = roofline(model, (batch, 3, 224, 224), dtype)
    work = Work(sum(row.fused.flops for row in traffic.rows), sum(row.fused.bytes for row in traffic.rows))
    expected = expected_output(model.to(device))
    model = model.to(device, dtype)

    def make_inputs(round_number: int) -> tuple[torch.Tensor]:
        g = torch.Generator(device).manual_seed(round_number)
        return (torch.randn(batch, 3, 224, 224, generator=g, device=device).to(dtype),)

    record(
        model_contenders(model, make_inputs(0)[0], threads or torch.get_num_threads()),
        make_inputs,
        title={"kind": "model", "network": name, "stage": "", "batch": batch, "problem": f"{batch}x3x224x224"},
        work=work,
        images=batch,
        device=device,
        dtype=dtype,
        num_threads=threads,
        expected=expected,
    )


@pytest.mark.benchmark(group="models, CPU, float32")
@pytest.mark.parametrize(("name", "batch"), CASES)
def test_cpu_model(record: Record, name: str, batch: int, num_threads: int) -> None:
    run(record, name, batch, torch.device("cpu"), torch.float32, num_threads)


@pytest.mark.gpu
@pytest.mark.benchmark(group="models, GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("batch", [1, 8, 256], ids=["b1", "b8", "b256"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_gpu_model(record: Record, name: str, batch: int, dtype: torch.dtype) -> None:
    run(record, name, batch, torch.device("cuda"), dtype, None)
