"""One process of tests/training/test_distributed.py: trains SmallResNet under torchrun and writes its weights.

torchrun --nproc-per-node N distributed_worker.py MODE OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from fused_resnet.trainer.data import Batches, load_data
from fused_resnet.trainer.distributed import Group, process_group
from fused_resnet.trainer.loop import TrainConfig, train
from tests.support.training_models import SmallResNet, small_resnet

STEPS = 20
WHOLE_BATCH = 16
WHOLE_RECIPE_BATCH = 128


def train_steps(group: Group, mode: str) -> dict[str, torch.Tensor]:
    """Twenty float64 steps; the weights and buffers after them, gathered to whole tensors."""
    torch.manual_seed(0)
    model = SmallResNet().double()
    if mode == "fsdp":  # which takes contiguous parameters only
        from torch.distributed.fsdp import fully_shard

        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for block in (model.layer1, model.layer2):
            fully_shard(block)
        parallel = fully_shard(model)
    else:
        model, parallel = group.wrap(model.to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    batches = Batches(load_data("digits"), WHOLE_BATCH // group.world, seed=1, rank=group.rank, world=group.world)
    for step, (images, labels) in enumerate(batches.epoch(1)):
        if step == STEPS:
            break
        loss = F.cross_entropy(parallel(images.double()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = model.state_dict()
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}


def recipe(output: Path, batch_size: int) -> TrainConfig:
    """A short run of the whole recipe in float64; ``batch_size`` is per process."""
    return TrainConfig(
        model=small_resnet, epochs=2, batch_size=batch_size, dtype=torch.float64, output=output, progress=False
    )


def main() -> None:
    """Everything in one launch, for starting processes takes longer than the training does."""
    output = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    with process_group("cpu") as group:
        for mode in ("ddp", "fsdp"):
            state = train_steps(group, mode)
            if group.leads:
                torch.save(state, output / f"{mode}.pt")
    train(recipe(output / "run", WHOLE_RECIPE_BATCH // group.world))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
