"""Every operator of ours turns into core ATen with equal results, its sizes still dynamic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet.ops import SCHEMAS
from fused_resnet.testing import PROBLEMS, make_tail
from tests.ops.test_ops import positional

TAILS = {case.name: case.problem for case in PROBLEMS if case.problem.n and case.problem.dtype is torch.float32}
GEOMETRY = ([1, 1], [1, 1], [1, 1], 1)


class Call(nn.Module):
    """One operator with its arguments, the tensors among them as inputs."""

    def __init__(self, operator: Any, *arguments: Any) -> None:
        super().__init__()
        self.operator, self.arguments = operator, arguments

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(value for value in self.arguments if isinstance(value, Tensor))

    def forward(self, *tensors: Tensor) -> Any:
        rest = iter(tensors)
        return self.operator(*(next(rest) if isinstance(value, Tensor) else value for value in self.arguments))


def assert_decomposes(call: Call, dynamic_shapes: Any = None) -> torch.export.ExportedProgram:
    program = torch.export.export(call, call.tensors(), dynamic_shapes=dynamic_shapes)
    assert "fused_resnet" in str(program.graph)
    decomposed = program.run_decompositions(fused_resnet.decompositions())
    targets = [node.target for node in decomposed.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert not [target for target in targets if torch.Tag.core not in target.tags]
    expected, got = call(*call.tensors()), decomposed.module()(*call.tensors())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    return decomposed


@pytest.mark.parametrize("name", sorted(TAILS)[::4])
def test_a_tail(name: str) -> None:
    operator, arguments = positional(make_tail(TAILS[name]), "auto")
    assert_decomposes(Call(operator, *arguments))


def _vectors(count: int) -> list[Tensor]:
    return [torch.rand(8) + 0.5 for _ in range(count)]


def _training_calls() -> dict[str, Call]:
    torch.manual_seed(0)
    ops = torch.ops.fused_resnet
    x, weight = torch.randn(3, 4, 7, 6), torch.randn(8, 4, 3, 3)
    y, other, grad = torch.randn(3, 8, 7, 6), torch.randn(3, 8, 7, 6), torch.randn(3, 8, 7, 6)
    mean, invstd, gamma, beta = _vectors(4)
    nothing = (None, None, None, None, None)
    mask = ops.bn_apply_add_relu(y, mean, invstd, gamma, beta, other, *nothing)[1]
    return {
        "conv_bn_add_relu_max_pool": Call(
            ops.conv_bn_add_relu_max_pool, x, weight, None, *_vectors(4), 1e-5, *GEOMETRY, [3, 3], [2, 2], [1, 1]
        ),
        "conv_bn_stats": Call(ops.conv_bn_stats, x, weight, beta, *GEOMETRY),
        "conv_backward": Call(ops.conv_backward, y, x, weight, True, *GEOMETRY, [True, True, True]),
        "conv_backward of the weight": Call(ops.conv_backward, y, x, weight, False, *GEOMETRY, [False, True, True]),
        "bn_stats": Call(ops.bn_stats, y),
        "bn_apply_add_relu": Call(ops.bn_apply_add_relu, y, mean, invstd, gamma, beta, other, *nothing),
        "bn_apply_add_relu of a projection": Call(
            ops.bn_apply_add_relu, y, mean, invstd, gamma, beta, None, other, *_vectors(4), "relu6"
        ),
        "bn_apply_add_relu without activation": Call(
            ops.bn_apply_add_relu, y, mean, invstd, None, None, None, *nothing, "none", False
        ),
        "bn_backward_reduce": Call(ops.bn_backward_reduce, grad, mask, y, mean, invstd, None, None, None),
        "bn_backward_reduce of a projection": Call(
            ops.bn_backward_reduce, grad, mask, y, mean, invstd, other, *_vectors(2)
        ),
        "bn_backward_apply": Call(
            ops.bn_backward_apply, grad, mask, y, mean, invstd, gamma, *_vectors(2), *nothing, None, torch.float32
        ),
        "bn_backward_apply of a projection": Call(
            ops.bn_backward_apply, grad, mask, y, mean, invstd, gamma, *_vectors(2), other, *_vectors(5), None
        ),
    }


TRAINING = _training_calls()


@pytest.mark.parametrize("name", TRAINING)
def test_what_is_no_tail(name: str) -> None:
    assert_decomposes(TRAINING[name])


def test_none_is_forgotten() -> None:
    table = fused_resnet.decompositions()
    for name in SCHEMAS:
        assert getattr(torch.ops.fused_resnet, name).default in table


@pytest.mark.parametrize("name", ["conv_bn_add_relu_max_pool", "conv_bn_stats", "bn_apply_add_relu"])
def test_the_batch_stays_dynamic(name: str) -> None:
    call = TRAINING[name]
    batch = torch.export.Dim("batch", min=1, max=64)
    sizes = tuple({0: batch} if t.dim() == 4 and t.shape[0] == 3 else None for t in call.tensors())
    decomposed = assert_decomposes(call, (sizes,))
    fewer = tuple(t[:2] if size else t for t, size in zip(call.tensors(), sizes, strict=True))
    torch.testing.assert_close(decomposed.module()(*fewer), call(*fewer), rtol=1e-4, atol=1e-4)


def test_one_that_is_taken_out_of_the_table_stays() -> None:
    call = TRAINING["conv_bn_stats"]
    table = fused_resnet.decompositions()
    table.pop(torch.ops.fused_resnet.conv_bn_stats.default)
    program = torch.export.export(call, call.tensors()).run_decompositions(table)
    assert "fused_resnet.conv_bn_stats" in str(program.graph)


def test_the_gradients_of_the_max_pool_operator() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 4, 7, 6).double(), torch.randn(8, 4, 3, 3).double()
    gamma, beta, mean, var = (v.double() for v in _vectors(4))

    def stem(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Any:
        return torch.ops.fused_resnet.conv_bn_add_relu_max_pool(
            x, weight, None, gamma, beta, mean, var, 1e-5, *GEOMETRY, [3, 3], [2, 2], [1, 1]
        )

    inputs = [t.requires_grad_() for t in (x, weight, gamma, beta)]
    assert torch.autograd.gradcheck(stem, inputs)
    assert torch.autograd.gradgradcheck(stem, inputs)
