"""The memory of outputs on the CPU (csrc/cpu/output_pool.h): used again after the last reference, never before."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.core import extensions
from fused_resnet.functional import PackedWeights, conv_bn_add_relu

pytestmark = pytest.mark.skipif(extensions.cpu() is None, reason="needs the CPU extension")

#: Older versions of torch do not tell when a storage ends; there the outputs are torch's own memory.
POOLED = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)


class Call:
    """One convolution with an output of 800 KB."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(1, 64, 56, 56, generator=generator).to(memory_format=torch.channels_last)
        self.weight = torch.randn(64, 64, 1, 1, generator=generator)
        self.packed_weights = PackedWeights()

    def __call__(self) -> torch.Tensor:
        return conv_bn_add_relu(self.x, self.weight, packed_weights=self.packed_weights)

    def expected(self) -> torch.Tensor:
        return F.relu(F.conv2d(self.x, self.weight))


@pytest.mark.skipif(not POOLED, reason="torch < 2.11 cannot tell when a storage ends")
@pytest.mark.parametrize("inference", [False, True])
def test_memory_serves_again_and_not_while_anything_refers_to_it(inference: bool) -> None:
    call = Call()
    with torch.inference_mode(inference):
        y = call()
        assert y.is_inference() == inference
        address = y.data_ptr()
        view = y[:, :3].permute(0, 2, 3, 1)
        del y
        assert call().data_ptr() != address
        del view
        assert call().data_ptr() == address  # what was given back last comes first


def test_outputs_that_are_kept_stay_as_they_are() -> None:
    call, other = Call(0), Call(1)
    kept = [call() for _ in range(5)]
    copies = [y.clone() for y in kept]
    for _ in range(5):
        other()
    assert len({y.data_ptr() for y in kept}) == 5
    assert all(torch.equal(y, z) for y, z in zip(kept, copies, strict=True))
    torch.testing.assert_close(kept[0], call.expected(), rtol=1e-4, atol=1e-4)


def test_an_output_can_be_copied_pickled_shared_and_written_to() -> None:
    call = Call()
    y = call()
    expected = y.clone()
    assert torch.equal(copy.deepcopy(y), expected)
    assert torch.equal(pickle.loads(pickle.dumps(y)), expected)
    shared = y.share_memory_()
    assert shared.is_shared()
    assert torch.equal(shared, expected)
    y.neg_()
    assert torch.equal(call(), expected)
    torch.mul(expected, 2, out=y)
    assert torch.equal(call(), expected)


def test_threads_never_share_an_output() -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        call = Call(seed)
        expected = call()
        for i in range(40):
            y = call()
            if not torch.equal(y, expected):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_outputs_with_gradients_live_as_long_as_the_graph() -> None:
    call = Call()
    call.x.requires_grad_()
    losses = [call().square().sum() for _ in range(3)]
    gradients = [torch.autograd.grad(loss, call.x)[0] for loss in losses]
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])
    (expected,) = torch.autograd.grad(call.expected().square().sum(), call.x)
    torch.testing.assert_close(gradients[0], expected, rtol=1e-3, atol=1e-2)
