"""Training over several processes, on PyTorch's own engine: the result is that of one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_resnet.functional import bn_add_relu
from fused_resnet.trainer.checkpoint import read_weights
from fused_resnet.trainer.distributed import Group
from fused_resnet.trainer.loop import train
from tests.support.distributed_worker import WHOLE_RECIPE_BATCH, recipe, train_steps
from tests.support.training_models import SmallResNet

pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch built with gloo")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two gloo processes wrote."""
    output = tmp_path_factory.mktemp("two")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "tests/support/distributed_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, str(output)]
    launched = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    return output


@pytest.fixture(scope="module")
def one_process() -> dict[str, torch.Tensor]:
    return train_steps(Group(0, 1, torch.device("cpu")), "ddp")


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_the_double_batch(
    mode: str, one_process: dict[str, torch.Tensor], two_processes: Path
) -> None:
    """float64, 20 steps: every weight and every running statistic agrees to 1e-10."""
    state = torch.load(two_processes / f"{mode}.pt", weights_only=True)
    assert state.keys() == one_process.keys()
    for name, expected in one_process.items():
        torch.testing.assert_close(state[name], expected, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_unsynchronised_statistics_would_be_seen(one_process: dict[str, torch.Tensor]) -> None:
    """The oracle is sharp: one process with half the batch ends elsewhere by far more than the tolerance."""
    from tests.support import distributed_worker

    whole = distributed_worker.WHOLE_BATCH
    try:
        distributed_worker.WHOLE_BATCH = whole // 2
        half = train_steps(Group(0, 1, torch.device("cpu")), "ddp")
    finally:
        distributed_worker.WHOLE_BATCH = whole
    assert float((half["layer1.bn1.running_mean"] - one_process["layer1.bn1.running_mean"]).abs().max()) > 1e-3


def test_train_under_torchrun_equals_one_process(two_processes: Path, tmp_path: Path) -> None:
    """The whole recipe: data, schedule, evaluation, checkpoint and export, written by one of the two."""
    one = train(recipe(tmp_path / "one", WHOLE_RECIPE_BATCH))
    two, meta = read_weights(two_processes / "run" / "weights.safetensors")
    for name, expected in read_weights(one.weights)[0].items():
        torch.testing.assert_close(two[name], expected, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert meta["accuracy"] == one.accuracy


def test_sync_batch_norm_is_seen_at_each_forward() -> None:
    """Converted without a process group, or after one has gone, it is plain batch norm."""
    x = torch.randn(4, 8, 3, 3, dtype=torch.float64)
    plain = torch.nn.BatchNorm2d(8).double()
    sync = torch.nn.SyncBatchNorm.convert_sync_batchnorm(torch.nn.BatchNorm2d(8).double())
    assert torch.equal(bn_add_relu(x, plain), bn_add_relu(x, sync))
    assert torch.equal(plain.running_var, sync.running_var)


def test_one_process_is_not_wrapped() -> None:
    model = SmallResNet()
    same, parallel = Group(0, 1, torch.device("cpu")).wrap(model)
    assert same is parallel is model
