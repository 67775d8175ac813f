"""``pytest --pyargs fused_resnet.testing``: the problem list and the numerical bar, for any implementation.

Environment:
    FUSED_RESNET_IMPLEMENTATION: ``package.module:function``; default: this package's own operators.
    FUSED_RESNET_TEST_DEVICE: default cuda where there is a GPU, else cpu.
    FUSED_RESNET_TEST_DTYPES: default ``float32,bfloat16,float16``.
    FUSED_RESNET_TEST_KINDS: default ``integers,random``. An implementation that rounds between its steps, as
        eager does, cannot be bit-exact on integers in 16 bits: give it ``random``.

An implementation refuses a problem by raising RuntimeError or NotImplementedError; the test is then skipped with
that message. A wrong answer is never skipped.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet import backends, functional
from fused_resnet.core.packed_weights import PackedWeights
from fused_resnet.core.problem import DTYPES
from fused_resnet.testing import PROBLEMS, Case, assert_equivalent, in_dtype

DEVICE = os.environ.get("FUSED_RESNET_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
TESTED_DTYPES = os.environ.get("FUSED_RESNET_TEST_DTYPES", "float32,bfloat16,float16").split(",")
TESTED_KINDS = os.environ.get("FUSED_RESNET_TEST_KINDS", "integers,random").split(",")


def _own_kept(**arguments: Any) -> Tensor:
    """With packed weights, which is what the CPU's own kernels run on; without Winograd F(4x4), which is not exact."""
    return _own(**arguments, packed_weights=PackedWeights(), winograd="f2")


def _own(**arguments: Any) -> Tensor:
    if "proj_x" in arguments:
        return functional.conv_bn_proj_add_relu(**arguments)
    return functional.conv_bn_add_relu(**arguments)


def _implementation() -> Callable[..., Tensor]:
    target = os.environ.get("FUSED_RESNET_IMPLEMENTATION")
    if not target:
        return _own
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


@pytest.fixture(scope="module")
def implementation() -> Callable[..., Tensor]:
    return _implementation()


@pytest.mark.parametrize("dtype", TESTED_DTYPES)
@pytest.mark.parametrize("case", PROBLEMS, ids=[case.name for case in PROBLEMS])
def test_tail(implementation: Callable[..., Tensor], case: Case, dtype: str) -> None:
    problem = in_dtype(case.problem, DTYPES[dtype])
    problem = dataclasses.replace(problem, device_type=torch.device(DEVICE).type)
    kinds = TESTED_KINDS
    own = backends.choose(problem).name if implementation is _own else ""
    if own == "eager" and problem.dtype.itemsize == 2:
        kinds = ["random"]  # our own fallback is eager itself, which rounds four times
    refusal: list[str] = []

    def call(**arguments: Any) -> Tensor:
        try:
            return implementation(**arguments)
        except (RuntimeError, NotImplementedError) as error:
            refusal.append(str(error).splitlines()[0])
            raise

    try:
        # on the CPU weights that may not be kept are oneDNN's, which adds up in an order of its own
        assert_equivalent(call, problem, kinds=tuple(kinds), device=DEVICE, any_order=own == "cpu")  # type: ignore[arg-type]
        if own == "cpu":
            assert_equivalent(_own_kept, problem, kinds=tuple(kinds), any_order=True)  # type: ignore[arg-type]
    except (RuntimeError, NotImplementedError):
        if not refusal:
            raise
        pytest.skip(f"refused: {refusal[0]}")
