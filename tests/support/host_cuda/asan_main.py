"""Run a few shapes of some kernels in a build with AddressSanitizer: `python asan_main.py KERNEL...`,
all cases of training passes: `python asan_main.py bn_stats...`, or the probe that must be reported: `... probe`.

A process of its own, because the sanitizer's library must be loaded before everything else; the caller preloads it.
"""

from __future__ import annotations

import sys

import torch

from fused_resnet.aot.training import OPS
from fused_resnet.core.reference import reference
from fused_resnet.testing import assert_bitexact, make_tail
from tests.support.host_cuda.host import HostCuda, Order
from tests.support.host_cuda.shapes import ARCH, shapes
from tests.support.launch_harness import Memory
from tests.support.training_calls import cases, values_of

FLAGS = ("-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer")


def main() -> None:
    torch.set_num_threads(1)
    host = HostCuda(flags=FLAGS)
    if sys.argv[1:] == ["probe"]:
        host.probe(15)
        return
    count = 0
    for op in (name for name in sys.argv[1:] if name in OPS):
        for case in cases(op):
            launch = host.training.plan(case.call, f"sm_{ARCH}", alignment=case.alignment, device=case.device)
            host.execute(launch, Memory(launch, values_of(case.call, "random", case.seed)), Order.RANDOM, case.seed)
            count += 1
    for symbol in (name for name in sys.argv[1:] if name not in OPS):
        for shape in shapes(symbol):
            tail = make_tail(shape.problem, "integers")
            launch = host.planner.plan(
                shape.problem, f"sm_{ARCH}", tile=shape.tile, splitk=shape.splits, alignment=shape.alignment,
                eps=tail.conv.eps, proj_eps=tail.proj.eps if tail.proj else 1e-5,
            )  # fmt: skip
            y, _ = host.run(launch, tail, Order.RANDOM, shape.seed)
            assert_bitexact(y, reference(tail.to(torch.float64)), str(shape))
            count += 1
    print(f"{count} shapes, no report")


if __name__ == "__main__":
    main()
