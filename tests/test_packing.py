"""The weight cache: reuse while nothing has changed, and every way in which something can."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from fused_resnet import _extension, functional
from fused_resnet.backends import packing
from fused_resnet.ops import plans
from fused_resnet.reference import ConvBN, Tail, reference
from fused_resnet.testing import assert_within_bar


@pytest.fixture(params=["extension", "python"], autouse=True)
def comparison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every test runs with the comparison in C++ and with the one in Python."""
    if request.param == "extension" and _extension.cpu() is None:
        pytest.skip(str(_extension.why_not_cpu()))
    if request.param == "python":
        monkeypatch.setattr(packing._extension, "cpu", lambda: None)
    packing.clear()
    plans.clear()  # made with the extension, or without
    yield request.param
    packing.clear()
    plans.clear()


def vectors(k: int = 8) -> list[Tensor | None]:
    return [None, torch.rand(k) + 0.5, torch.randn(k), torch.randn(k), torch.rand(k) + 0.5]


class Counted:
    """Calls the cache and counts how often a copy is made."""

    def __init__(self, weight: Tensor, folded: list[Tensor | None]) -> None:
        self.weight, self.folded, self.made = weight, folded, 0

    def __call__(self) -> Tensor:
        def make() -> Tensor:
            self.made += 1
            return self.weight.detach().clone()

        return packing.get(self.weight, "test", tuple(self.folded), make)  # type: ignore[arg-type]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*(shape or (8, 4, 3, 3))))


def test_a_copy_is_made_once() -> None:
    get = Counted(parameter(), vectors())
    assert get() is get()
    assert get.made == 1


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(2)


def data_write(weight: nn.Parameter) -> None:
    weight.data.mul_(2)


def storage_swap(weight: nn.Parameter) -> None:
    weight.data = weight.data.clone()


def ema(weight: nn.Parameter) -> None:
    torch._foreach_lerp_([weight.data], [torch.ones_like(weight.data)], 0.1)


def optimizer_step(weight: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    weight.grad = torch.ones_like(weight)
    optimizer.step()


def fused_sgd(weight: nn.Parameter) -> None:
    optimizer_step(weight, torch.optim.SGD([weight], lr=0.1, fused=True))


def fused_adam(weight: nn.Parameter) -> None:
    optimizer_step(weight, torch.optim.Adam([weight], lr=0.1, fused=True))


def foreach_sgd(weight: nn.Parameter) -> None:
    optimizer_step(weight, torch.optim.SGD([weight], lr=0.1, foreach=True))


def numpy_view(weight: nn.Parameter) -> None:
    weight.detach().numpy()[...] += 1


WRITES = [in_place, data_write, storage_swap, ema, fused_sgd, fused_adam, foreach_sgd, numpy_view]


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_a_changed_weight_is_noticed(write: Callable[[nn.Parameter], None]) -> None:
    weight = parameter()
    get = Counted(weight, vectors())
    get()
    write(weight)
    assert torch.equal(get(), weight)
    assert get.made == 2
    get()
    assert get.made == 2


@pytest.mark.parametrize("which", range(5))
def test_any_element_of_any_vector_is_noticed(which: int) -> None:
    folded = [torch.rand(200) + 0.5 for _ in range(5)]
    get = Counted(parameter(200, 4, 3, 3), list(folded))
    get()
    folded[which].data[137] += 0.25  # through .data: no version tells
    get()
    assert get.made == 2


def test_a_vector_that_appears_or_goes_is_noticed() -> None:
    get = Counted(parameter(), vectors())
    get()
    get.folded[0] = torch.zeros(8)
    get()
    assert get.made == 2
    get.folded[1] = None
    get()
    assert get.made == 3


def test_strided_vectors_are_compared_by_value() -> None:
    wide = torch.randn(8, 2)
    get = Counted(parameter(), [wide[:, 0], None, None, None, None])
    get()
    wide[:, 1] += 1
    get()
    assert get.made == 1
    wide[3, 0] += 1
    get()
    assert get.made == 2


def test_nan_equals_itself() -> None:
    weight = parameter()
    weight.data[0] = torch.nan
    get = Counted(weight, [torch.full((8,), torch.nan), None, None, None, None])
    get()
    get()
    assert get.made == 1


def test_load_state_dict_with_assign() -> None:
    module = nn.Conv2d(4, 8, 3)
    old = Counted(module.weight, vectors())
    old()
    module.load_state_dict({"weight": torch.zeros(8, 4, 3, 3), "bias": torch.zeros(8)}, assign=True)
    new = Counted(module.weight, old.folded)
    assert torch.equal(new(), torch.zeros(8, 4, 3, 3))


def test_inference_tensors() -> None:
    with torch.inference_mode():
        weight = torch.randn(8, 4, 3, 3)
        get = Counted(weight, vectors())
        get()
        get()
        assert get.made == 1
        weight.mul_(2)
        assert torch.equal(get(), weight)


def test_every_sample_is_compared_and_the_rest_is_what_drop_is_for() -> None:
    count = 4096
    for index in range(64):
        weight = nn.Parameter(torch.zeros(count, 1, 1, 1))
        get = Counted(weight, [None] * 5)
        get()
        weight.data[index * (count - 1) // 63] = 1
        get()
        assert get.made == 2, f"sample {index}"
    weight.data[1] = 5  # lies between two samples, and .data leaves no version
    get()
    assert get.made == 2
    packing.drop(weight)
    assert torch.equal(get(), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 3, 3), (64, 16, 1, 1)])
def test_both_snapshots_hold_the_same_bytes(shape: tuple[int, ...], dtype: torch.dtype, comparison: str) -> None:
    if comparison == "python":
        pytest.skip("compares the two, once")
    weight = torch.randn(*shape).to(dtype)
    folded = (None, *[torch.randn(shape[0]) for _ in range(4)])
    for w in (weight, weight.contiguous(memory_format=torch.channels_last), weight.transpose(0, 1)):
        ours = torch.ops.fused_resnet_C.snapshot(w, *folded)
        assert torch.equal(ours, packing._snapshot_in_python(w, folded))  # type: ignore[arg-type]


def test_copies_die_with_their_weight() -> None:
    weight = parameter()
    Counted(weight, vectors())()
    assert len(packing._entries) == 1
    del weight
    gc.collect()
    assert not packing._entries


def test_another_tensor_in_the_same_place_is_another_weight() -> None:
    for fill in (1.0, 2.0, 3.0):  # CPython gives the freed address, hence the id, to the next tensor
        weight = torch.full((8, 4, 3, 3), fill)
        assert torch.equal(Counted(weight, [None] * 5)(), weight)
        del weight


def test_memory_is_accounted_for_and_given_back() -> None:
    weight = parameter()
    assert packing.nbytes(weight) == 0
    Counted(weight, vectors())()
    assert packing.nbytes(weight) == 8 * 4 * 9 * 4
    packing.drop(weight)
    assert packing.nbytes(weight) == 0


def test_copies_stay_out_of_state_dict_pickle_and_deepcopy() -> None:
    module = nn.Conv2d(4, 8, 3)
    plain, keys = len(pickle.dumps(module)), list(module.state_dict())
    Counted(module.weight, vectors())()
    assert len(pickle.dumps(module)) == plain
    assert list(module.state_dict()) == keys
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    twin = copy.deepcopy(module)
    assert packing.nbytes(twin.weight) == 0
    assert packing.nbytes(module.weight) > 0


def test_threads_make_a_copy_once() -> None:
    get, barrier = Counted(parameter(), vectors()), threading.Barrier(8)
    found: list[Tensor] = []

    def work() -> None:
        barrier.wait()
        found.append(get())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert get.made == 1
    assert all(copy is found[0] for copy in found)


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_follows_its_weight(write: Callable[[nn.Parameter], None], dtype: torch.dtype) -> None:
    """End to end: whatever the backend keeps, the answer is that of the weights as they are now."""
    if dtype is torch.bfloat16 and (write is numpy_view or not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        pytest.skip("numpy has no bfloat16, or this CPU has none")
    g = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(32, 32, 3, 3, generator=g).to(dtype))
    bn = [torch.rand(32, generator=g) + 0.5 for _ in range(4)]
    x = torch.randn(1, 32, 16, 16, generator=g).to(dtype)
    for _ in range(2):
        conv = ConvBN(weight, None, *bn)
        with torch.no_grad():
            y = functional.conv_bn_add_relu(
                x, *conv[:6], padding=1, backend="cpu", cache_weights=True, winograd="f2"
            )  # fmt: skip
            tail = Tail(x, conv, padding=(1, 1))
            exact = reference(tail.to(torch.float64))
            eager_error = float((reference(tail).double() - exact).abs().max())
        assert_within_bar(y, eager_error, exact, "after the write")
        write(weight)
        bn[0].data[5] += 1
