"""A frozen model is a module like others: names, copies, threads, hooks, conversions."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn

from fused_resnet import freeze, fuse
from fused_resnet.surgery.frozen import FrozenModel
from tests.support.frozen_models import assert_close, build, image, needs_extension
from tests.support.surgery_helpers import randomise


def test_names_are_the_live_models() -> None:
    model = build("resnet")
    fast = freeze(model)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in fast.named_buffers()] == [n for n, _ in model.named_buffers()]
    assert fast.fc is model.fc
    other = randomise(build("resnet"), torch.float32, seed=5)
    x = image("resnet")
    with torch.inference_mode():
        fast(x)
        fast.load_state_dict(other.state_dict())
        assert_close(fast(x), other(x))


@pytest.mark.parametrize("name", ["resnet", "own", "branching"])
def test_deepcopy_pickle_and_save(name: str) -> None:
    fast, x = freeze(fuse(build(name))), image(name)
    with torch.inference_mode():
        expected = fast(x)
        buffer = io.BytesIO()
        torch.save(fast, buffer)
        buffer.seek(0)
        for other in (
            copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(buffer, weights_only=False),
        ):  # fmt: skip
            assert isinstance(other, FrozenModel)
            assert torch.equal(other(x), expected)
            assert other.model is not fast.model


def test_threads() -> None:
    fast, images = freeze(build("resnet")), [image("resnet", 24 + i, seed=i) for i in range(12)]
    with torch.inference_mode():
        expected = [freeze(build("resnet"))(x) for x in images]
    wrong: list[int] = []

    def work(first: int) -> None:
        with torch.inference_mode():
            for i in range(len(images)):  # more kinds than are kept
                at = (first + i) % len(images)
                if not torch.equal(fast(images[at]), expected[at]):
                    wrong.append(at)

    threads = [threading.Thread(target=work, args=(3 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_extension
def test_old_kinds_of_input_go() -> None:
    fast = freeze(build("block"))
    with torch.inference_mode():
        for size in range(8, 30):
            fast(image("block", size))
    assert len(list(fast.prepared_for())) <= 8


def test_conversions_reach_the_live_model() -> None:
    model, x = build("resnet"), image("resnet")
    fast = freeze(model, x)
    assert fast.double() is fast
    assert model.fc.weight.dtype is torch.float64
    with torch.inference_mode():
        assert_close(fast(x.double()), model(x.double()), rtol=1e-9)
        fast.bfloat16()
        torch.testing.assert_close(fast(x.bfloat16()), model(x.bfloat16()), rtol=0.1, atol=0.1)


def test_compiled_it_runs_as_it_is() -> None:
    model, x = build("block"), image("block")
    fast = freeze(model)
    compiled = torch.compile(nn.Sequential(nn.Hardtanh(), fast, nn.Hardtanh()), backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(x), compiled._orig_mod(x))
    assert len(list(fast.prepared_for())) == 1
    compiled(x).sum().backward()  # gradients come from the live model, as they do outside
    assert model.conv1.weight.grad is not None


def test_a_hook_between_the_tails_sees_what_eager_has() -> None:
    model, x = build("resnet"), image("resnet")
    seen: list[Tensor] = []
    model.layer2.register_forward_hook(lambda m, a, y: seen.append(y))
    with torch.no_grad():
        model(x)
        freeze(model)(x)
    assert seen[-1].stride() == seen[0].stride()
    torch.testing.assert_close(seen[-1], seen[0], rtol=1e-4, atol=1e-4)


def test_as_a_part_of_another_module() -> None:
    model, x = build("resnet"), image("resnet")
    whole, plain = nn.Sequential(freeze(model), nn.Linear(7, 3)), nn.Sequential(model, nn.Linear(7, 3))
    assert list(whole.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in whole.named_parameters()] == [n for n, _ in plain.named_parameters()]
    other = nn.Sequential(randomise(build("resnet"), torch.float32, seed=5), nn.Linear(7, 3)).eval()
    whole.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert_close(whole(x), other(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        whole.load_state_dict({k: v for k, v in other.state_dict().items() if "layer3" not in k})


def test_attributes_are_set_on_the_live_model() -> None:
    model, x = build("resnet"), image("resnet")
    fast = freeze(model, x)
    fast.fc = nn.Identity()
    assert isinstance(model.fc, nn.Identity)
    with torch.inference_mode():
        assert_close(fast.refresh()(x), model(x))
        fast.model = other = build("own")
        assert_close(fast(x), other(x))


def test_tangents_go_to_the_live_model() -> None:
    model, x = build("no tail"), image("no tail")
    fast = freeze(model.requires_grad_(False), x)
    got, expected = (torch.func.jvp(m, (x,), (x,)) for m in (fast, model))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_module_in_training_mode_stays_in_it() -> None:
    model, x = build("resnet"), image("resnet")
    model.layer1[0].bn2.train()
    expected = copy.deepcopy(model)
    with torch.inference_mode():
        assert_close(freeze(model)(x), expected(x))
    assert int(model.layer1[0].bn2.num_batches_tracked) == 0
