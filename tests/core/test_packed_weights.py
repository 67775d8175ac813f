"""Packed copies of weights: they serve again while every byte is what it was, and nobody but their owner keeps them."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_resnet import functional
from fused_resnet.backends import cpu_fused, cpu_onednn
from fused_resnet.core import extensions
from fused_resnet.core.packed_weights import Packed, PackedWeights, by_number
from fused_resnet.core.reference import ConvBN, TailArguments

needs_extension = pytest.mark.skipif(extensions.cpu() is None, reason=str(extensions.why_not_cpu()))


def checksum(*tensors: Tensor) -> Tensor:
    value: Tensor = torch.ops.fused_resnet_C.checksum(list(tensors))
    return value


# ---- the checksum ------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "one bit of one element": lambda w: w.view(torch.int32).flatten()[1234].bitwise_xor_(1),
    "the sign of every element": lambda w: w.neg_(),
    "the signs of two elements": lambda w: w.flatten()[8:25:16].neg_(),
    "two filters swapped": lambda w: w.copy_(w[[1, 0, *range(2, len(w))]].clone()),
    "two elements swapped": lambda w: w.flatten()[0:32:16].copy_(w.flatten()[0:32:16].flip(0).clone()),
    "all filters in another order": lambda w: w.copy_(w.flip(0).clone()),
    "added here, taken there": lambda w: (w.flatten()[0].add_(1), w.flatten()[16].sub_(1)),
    "-0 for 0": lambda w: w.flatten()[5].copy_(torch.tensor(-0.0)),
}


@needs_extension
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (7, 5, 3, 3)])
def test_the_checksum_sees(change: Callable[[Tensor], Any], shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    weight.flatten()[5] = 0.0
    if weight.numel() < 1300 and change is CHANGES["one bit of one element"]:
        change = lambda w: w.view(torch.int32).flatten()[-1].bitwise_xor_(1)  # noqa: E731
    before = checksum(weight)
    assert torch.equal(before, checksum(weight.clone()))
    change(weight)
    assert not torch.equal(before, checksum(weight))


@needs_extension
def test_every_single_bit_counts() -> None:
    weight = torch.randn(3, 5, 3, 3)
    bits = weight.view(torch.int32).flatten()
    before = checksum(weight)
    for element in range(bits.numel()):
        for bit in range(32):
            bits[element] ^= 1 << bit if bit < 31 else -(1 << 31)
            assert not torch.equal(before, checksum(weight)), (element, bit)
            bits[element] ^= 1 << bit if bit < 31 else -(1 << 31)
    assert torch.equal(before, checksum(weight))


@needs_extension
def test_shape_strides_and_type_count() -> None:
    weight = torch.zeros(8, 8, 3, 3)
    others = [
        weight.transpose(0, 1), weight[:4], weight.view(4, 16, 3, 3), weight.to(torch.bfloat16), weight.double(),
        weight.to(memory_format=torch.channels_last), torch.zeros(1, 1, 1, 1).expand(8, 8, 3, 3),
    ]  # fmt: skip
    sums = [tuple(checksum(t).flatten().tolist()) for t in [weight, *others]]
    assert len(set(sums)) == len(sums)


@needs_extension
def test_elements_with_gaps_are_read_in_their_order() -> None:
    large = torch.randn(8, 10, 3, 3)
    view = large[:, 1:-1]
    before = checksum(view)
    large[:, 0] = 7.0  # beside it
    assert torch.equal(before, checksum(view))
    large[3, 4, 1, 1] = 7.0
    assert not torch.equal(before, checksum(view))


@needs_extension
def test_any_number_of_threads_gives_the_same() -> None:
    weight, threads = torch.randn(512, 512, 3, 3), torch.get_num_threads()
    seen = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.add(tuple(checksum(weight).flatten().tolist()))
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1


# ---- the object --------------------------------------------------------------------------------------------


def make(value: int = 0) -> Callable[[], Packed]:
    return lambda: Packed(torch.full((4,), value), torch.empty(0))


def test_a_copy_is_made_once_and_dropped_when_told() -> None:
    kept, weight = PackedWeights(), torch.zeros(3)
    first = kept.find(weight, "a", make(1))
    assert kept.find(weight, "a", make(2)) is first
    assert kept.find(weight, "b", make(2)) is not first
    kept.drop(weight, "a")
    assert int(kept.find(weight, "a", make(3)).value[0]) == 3
    assert kept.nbytes == 2 * 4 * 8
    kept.clear()
    assert kept.nbytes == 0


def test_copies_of_weights_that_moved_are_forgotten() -> None:
    kept = PackedWeights()
    staying, moving = torch.zeros(3), []
    for _ in range(200):
        moving.append(torch.zeros(3))  # kept alive: each at an address of its own
        kept.find(staying, "a", make())
        kept.find(moving[-1], "a", make())
    assert kept.nbytes < 60 * 4 * 8
    assert int(kept.find(staying, "a", make(9)).value[0]) == 0, "what is in use was never forgotten"


def test_nothing_refers_to_the_weight() -> None:
    kept, weight = PackedWeights(), nn.Parameter(torch.randn(32, 32, 3, 3))
    functional.conv_bn_add_relu(torch.randn(1, 32, 8, 8), weight, padding=1, packed_weights=kept)
    assert weakref.getweakrefcount(weight) == 0
    gone = weakref.ref(weight)
    del weight
    gc.collect()
    assert gone() is None


def test_copies_and_pickles_begin_empty_and_numbers_die_with_their_object() -> None:
    kept = PackedWeights()
    kept.find(torch.zeros(3), "a", make())
    for other in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert other.nbytes == 0
        assert other.number != kept.number
    number = kept.number
    assert by_number(number) is kept
    assert by_number(0) is None
    del kept
    gc.collect()
    assert by_number(number) is None


# ---- through the operator ----------------------------------------------------------------------------------


def _write_data(weight: Tensor) -> None:
    weight.data.mul_(2)


def _optimizer(weight: Tensor) -> None:
    weight.grad = torch.zeros_like(weight)
    weight.grad[5] = 1.0
    torch.optim.SGD([weight], lr=1.0, fused=True).step()


WRITES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda w: torch.no_grad()(w.mul_)(2),
    ".data": _write_data,
    ".data of one element": lambda w: w.data[5, 7, 1, 2].fill_(1e3),
    "other memory": lambda w: setattr(w, "data", w.data * 2),
    "other strides": lambda w: setattr(w, "data", w.data.transpose(0, 1)),
    "numpy": lambda w: w.detach().numpy().__imul__(2),
    "a fused optimizer, one filter": _optimizer,
    "dlpack": lambda w: torch.from_dlpack(w.detach()).mul_(2),
    "storage": lambda w: torch.tensor([], dtype=w.dtype).set_(w.untyped_storage()).mul_(2),
    "foreach": lambda w: torch._foreach_mul_([w.data], 2.0),
    "swap_tensors": lambda w: torch.utils.swap_tensors(w, nn.Parameter(w.detach() * 2)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_way_to_write_is_seen(write: Callable[[Any], Any], dtype: torch.dtype, mode: Callable[[], Any]) -> None:
    weight = nn.Parameter(torch.randn(32, 32, 3, 3).to(dtype))
    if dtype is torch.bfloat16 and write in (WRITES["numpy"],):
        pytest.skip("numpy has no bfloat16")
    x, mean, var = torch.randn(1, 32, 9, 9).to(dtype), torch.randn(32), torch.rand(32) + 0.5
    kept = PackedWeights()

    def call(packed_weights: PackedWeights) -> Tensor:
        with mode():
            return functional.conv_bn_add_relu(
                x, weight.detach(), running_mean=mean, running_var=var, padding=1, packed_weights=packed_weights
            )

    before = call(kept)
    assert torch.equal(call(kept), before)
    bits = weight.detach().clone()
    write(weight)
    if torch.equal(weight, bits):  # fused SGD in bfloat16 on a Zen 4 with torch 2.11
        pytest.skip(f"torch {torch.__version__} itself writes nothing here")
    fresh = call(PackedWeights())
    assert not torch.allclose(fresh, before, rtol=1e-2, atol=1e-2), "the write changes nothing"
    for _ in range(2):
        assert torch.equal(call(kept), fresh)


@pytest.mark.parametrize("groups", [1, 2])
def test_vectors_folded_into_a_copy_are_compared(groups: int) -> None:
    """Grouped convolutions of bfloat16, and others where we have no kernels, fold BN into the packed weight."""
    weight = torch.randn(32, 32 // groups, 3, 3).bfloat16()
    vectors = [torch.rand(32) + 0.5 for _ in range(5)]
    vectors[0] = vectors[0].bfloat16()
    x, kept = torch.randn(1, 32, 9, 9).bfloat16(), PackedWeights()

    def call(kept: PackedWeights) -> Tensor:
        return functional.conv_bn_add_relu(x, weight, *vectors, padding=1, groups=groups, packed_weights=kept)

    for vector in vectors:
        before = call(kept)
        vector[7] += 3
        fresh = call(PackedWeights())
        assert torch.equal(call(kept), fresh)
        assert not torch.equal(fresh, before)


@needs_extension
def test_two_threads_pack_once_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    packs: list[int] = []
    pack = cpu_fused.pack_checked
    monkeypatch.setattr(cpu_fused, "pack_checked", lambda *a: packs.append(1) or pack(*a))
    kept, weight, x = PackedWeights(), torch.randn(64, 64, 3, 3), torch.randn(1, 64, 14, 14)
    barrier, results = threading.Barrier(4), []

    def work() -> None:
        barrier.wait()
        results.append(functional.conv_bn_add_relu(x, weight, padding=1, packed_weights=kept))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(packs) == 1
    assert all(torch.equal(y, results[0]) for y in results)


def test_without_the_extension_nothing_is_kept_that_cannot_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_onednn.extensions, "cpu", lambda: None)
    kept = PackedWeights()
    tail = TailArguments(
        torch.randn(1, 32, 9, 9), ConvBN(torch.randn(32, 32, 3, 3)), padding=(1, 1), packed_weights=kept
    )
    first = cpu_onednn.run_folded(tail)
    tail.conv.weight[5] *= -3
    assert not torch.equal(cpu_onednn.run_folded(tail), first)
    assert kept.nbytes == 0
