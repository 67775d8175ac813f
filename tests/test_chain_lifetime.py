"""A fused block's call in one piece, as an object: what it keeps alive, who gets a copy, and its comparison."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from chain_helpers import Counter, assert_close, bind, block, image, own
from torch import nn

from fused_resnet import _extension, unfuse
from fused_resnet.backends import packing
from fused_resnet.ops import direct
from fused_resnet.surgery.chain import Chains
from fused_resnet.surgery.plan import ATTRIBUTE

pytestmark = [
    pytest.mark.skipif(_extension.cpu() is None, reason=str(_extension.why_not_cpu())),
    pytest.mark.usefixtures("one_thread"),
]


def test_inference_mode_and_no_grad_take_turns(chained: Counter) -> None:
    module, x = block(), image()
    modes = (torch.inference_mode, torch.no_grad)
    for _ in range(6):
        for mode in modes:
            with mode():
                module(x)
    for mode in modes:
        with mode():
            assert chained.during(lambda: module(x)) == 1


def test_copies_start_without(chained: Counter) -> None:
    module, x = block(), image()
    with torch.no_grad():
        bind(module, x, chained)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            twin.conv1.weight.mul_(2)
            assert chained.during(lambda twin=twin: twin(x)) == 0
            assert_close(twin(x), own(twin, x))
        assert chained.during(lambda: module(x)) == 1


def test_nothing_outlives_its_module(chained: Counter) -> None:
    module, x = block(), image()
    gc.collect()  # the graphs that it was planned with
    with torch.no_grad():
        bind(module, x, chained)
    gone = [weakref.ref(t) for t in (module, module.conv1, module.conv1.weight, module.bn1.running_mean)]
    gc.disable()
    try:
        del module
        assert [ref() for ref in gone] == [None] * 4  # no cycle, the collector is not asked
    finally:
        gc.enable()


def test_a_cycle_through_a_child_is_collected(chained: Counter) -> None:
    module, x = block(), image()
    with torch.no_grad():
        bind(module, x, chained)
    module.conv1.parent = [module]
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_a_replaced_weight_is_let_go_at_the_next_call(chained: Counter) -> None:
    module, x = block(), image()
    gc.collect()  # the graphs that it was planned with
    with torch.no_grad():
        bind(module, x, chained)
        gone = weakref.ref(module.conv1.weight)
        module.conv1.weight = nn.Parameter(torch.zeros(32, 32, 3, 3))
        module(x)
    assert gone() is None


def test_inputs_that_never_chain_leave_nothing_behind(chained: Counter) -> None:
    module = block()
    chains: Chains = module.__dict__[ATTRIBUTE].chains
    with torch.no_grad():
        for x in (image().to("meta"), nn.Parameter(image(), requires_grad=False)):
            try:
                module(x)
            except (RuntimeError, NotImplementedError):
                assert x.is_meta  # no backend for it
            assert not chains._calls


def test_a_torch_without_guards_runs_the_program(chained: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "TensorGuards", None)
    module, x = block(), image()
    with torch.no_grad():
        assert chained.during(lambda: [module(x) for _ in range(6)]) == 0


def test_shapes_without_end_leave_little_behind(chained: Counter) -> None:
    module = block()
    chains: Chains = module.__dict__[ATTRIBUTE].chains
    with torch.no_grad():
        for height in range(5, 30):
            bind(module, image(height=height), chained)
            assert len(chains._bound) <= Chains._KEPT
            assert len(chains._calls) <= Chains._KEPT


def test_unfused_again(chained: Counter) -> None:
    module, x = block(), image()
    with torch.no_grad():
        bind(module, x, chained)
        expected = module(x)
        unfuse(module)
        assert chained.during(lambda: module(x)) == 0
        assert_close(module(x), expected)


def test_threads_share_one(chained: Counter) -> None:
    module, x = block("projection"), image()
    with torch.no_grad():
        expected = module(x)
    wrong: list[int] = []

    def work() -> None:
        with torch.no_grad():
            for i in range(40):
                if i == 20:
                    packing.drop(module.conv2.weight)
                if not torch.equal(module(x), expected):
                    wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert chained.made > 0


# ---- the comparison ----------------------------------------------------------------------------------------


def test_facts() -> None:
    class Thing:
        pass

    thing, root, other = Thing(), Thing(), Thing()
    inner: dict[str, Any] = {}
    thing.__dict__.update(inner=inner)
    facts = _extension.cpu().Facts()  # type: ignore[union-attr]
    facts.object(thing)
    facts.item(thing.__dict__, "inner", inner)
    facts.item(None, "mine", other)
    facts.absent(inner, "key")
    facts.size(inner, 0)
    assert not facts.hold(root)  # no attribute `mine` yet
    root.mine = other  # type: ignore[attr-defined]
    assert facts.hold(root)
    inner["other"] = 1
    assert not facts.hold(root)  # size
    del inner["other"]
    thing.__dict__["inner"] = {}
    assert not facts.hold(root)  # equal, another object
    thing.__dict__["inner"] = inner
    assert facts.hold(root)
    thing.__class__ = type("Thing", (Thing,), {})
    assert not facts.hold(root)
    thing.__class__ = Thing
    thing.__dict__ = dict(thing.__dict__)
    assert not facts.hold(root)
    with pytest.raises(TypeError, match="expected a dict"):
        facts.size([], 0)
