"""bn_add_relu against nn.BatchNorm2d + add + activation: values, gradients, statistics, modes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_resnet.backends.training import dispatch as training_dispatch
from fused_resnet.core.reference import ACTIVATIONS
from fused_resnet.functional import BatchNormBranch, bn_add_relu, bn_add_relu_train
from fused_resnet.testing import assert_within_bar
from fused_resnet.testing.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR

RUNNABLE = [name for name, why in training_dispatch.reasons(torch.zeros(1, 1, 1, 1)).items() if why is None]
KINDS = ("plain", "residual", "projection")


class Tail(nn.Module):
    """BN + (residual or the projection's BN) + activation; ``fused`` decides who computes it."""

    def __init__(self, channels: int, kind: str, activation: str = "relu", fused: bool = False, **bn: Any) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, **bn)
        self.bn_proj = nn.BatchNorm2d(channels, **bn) if kind == "projection" else None
        self.kind, self.activation, self.fused, self.backend = kind, activation, fused, "auto"
        g = torch.Generator().manual_seed(7)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g) + 0.5

    def forward(self, y: Tensor, other: Tensor) -> Tensor:
        if self.fused:
            residual = {"plain": None, "residual": other, "projection": (other, self.bn_proj)}[self.kind]
            return bn_add_relu(y, self.bn, residual=residual, activation=self.activation, backend=self.backend)
        z = self.bn(y)
        if self.kind == "residual":
            z = z + other
        if self.bn_proj is not None:
            z = z + self.bn_proj(other)
        return ACTIVATIONS[self.activation](z)

    def twin(self) -> Tail:
        """The same module, computed the other way."""
        other = copy.deepcopy(self)
        other.fused = not self.fused
        return other


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, shift: float = 0.0, seed: int = 0
) -> list[Tensor]:
    """y, the second activation and grad_out, channels_last."""
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3)]
    made[0] = made[0] * 2 + shift
    return [t.to(dtype).contiguous(memory_format=torch.channels_last) for t in made]


def run(tail: Tail, tensors: list[Tensor]) -> dict[str, Tensor]:
    """Output, gradients and buffers of one training step through ``tail``."""
    y, other, grad_out = (t.detach().clone() for t in tensors)
    y.requires_grad_()
    other.requires_grad_()
    tail.zero_grad()
    out = tail(y, other)
    out.backward(grad_out.to(out.dtype))
    results = {"out": out.detach(), "d_y": y.grad, "d_other": other.grad}
    results |= {f"grad of {n}": p.grad for n, p in tail.named_parameters()}
    results |= dict(tail.named_buffers())
    return {n: t for n, t in results.items() if t is not None}


def assert_same_as_eager(tail: Tail, tensors: list[Tensor]) -> None:
    """The error rule: at most twice (gradients: three times) eager's own error against float64."""
    eager = run(tail.twin(), tensors)
    exact = run(tail.twin().double(), [t.double() for t in tensors])
    actual = run(tail, tensors)
    assert actual.keys() == eager.keys()
    for name, value in actual.items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(value, eager[name])
            continue
        assert value.dtype == eager[name].dtype, name
        factor = FORWARD_FACTOR if name == "out" else GRADIENT_FACTOR
        error = float((eager[name].double() - exact[name]).abs().max())
        assert_within_bar(value, error, exact[name], name, factor)


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_rule(backend: str, kind: str, activation: str, dtype: torch.dtype) -> None:
    reason = training_dispatch.get(backend).can_run(torch.zeros(1, 1, 1, 1, dtype=dtype))
    if reason is not None:
        pytest.skip(reason)
    tail = Tail(33, kind, activation, fused=True)
    tail.backend = backend
    assert_same_as_eager(tail, inputs((4, 33, 9, 7), dtype))


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("shape", [(2, 64, 16, 16), (3, 1, 5, 5), (2, 130, 1, 1), (1, 3, 40, 41), (70, 16, 8, 8)])
def test_shapes(backend: str, shape: tuple[int, ...]) -> None:
    tail = Tail(shape[1], "residual", fused=True)
    tail.backend = backend
    assert_same_as_eager(tail, inputs(shape))


@pytest.mark.parametrize("backend", RUNNABLE)
def test_statistics_where_the_mean_is_far_above_the_deviation(backend: str) -> None:
    """Sums of squares in float32 lose everything here; mean/M2 keep six digits."""
    y = inputs((8, 16, 12, 12), shift=3000.0)[0]
    mean, var = torch.ops.fused_resnet.bn_stats(y, backend)
    exact = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), exact[1], rtol=2e-7, atol=0)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_statistics_do_not_depend_on_the_number_of_threads(backend: str) -> None:
    y, _, grad = inputs((16, 48, 17, 13))
    mask = torch.ops.fused_resnet.bn_apply_add_relu(y, *[torch.ones(48)] * 4, *[None] * 6)[1]
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            stats = torch.ops.fused_resnet.bn_stats(y, backend)
            results.append(
                (
                    *stats,
                    *torch.ops.fused_resnet.bn_backward_reduce(grad, mask, y, *stats, None, None, None, backend),
                )
            )
    finally:
        torch.set_num_threads(threads)
    if backend == "eager":
        pytest.skip("eager's own reductions split the work by the number of threads")
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gradcheck(kind: str, activation: str) -> None:
    y, other, _ = inputs((2, 3, 3, 2), torch.float64)
    tail = Tail(3, kind, activation, fused=True).double()
    parameters = [p.detach().requires_grad_() for p in tail.parameters()]

    def fn(y: Tensor, other: Tensor, *p: Tensor) -> Tensor:
        residual: Any = {"plain": None, "residual": other}.get(kind)
        if kind == "projection":
            residual = BatchNormBranch(other, p[2], p[3])
        return bn_add_relu_train(y, p[0], p[1], None, None, residual=residual, activation=activation)

    leaves = (y.requires_grad_(), other.requires_grad_(kind != "plain"), *parameters)
    assert torch.autograd.gradcheck(fn, leaves)


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_running_statistics_over_steps_and_modes(momentum: float | None, affine: bool, track: bool) -> None:
    tail = Tail(6, "projection", fused=True, momentum=momentum, affine=affine, track_running_stats=track).double()
    twin = tail.twin()
    for step, training in enumerate([True, True, False, True, False]):
        tail.train(training)
        twin.train(training)
        tensors = inputs((3, 6, 4, 5), torch.float64, seed=step)
        got, expected = run(tail, tensors), run(twin, tensors)
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("frozen", ["bn", "bn_proj"])
def test_one_of_two_bns_frozen(frozen: str) -> None:
    tail = Tail(6, "projection", fused=True).double()
    twin = tail.twin()
    for t in (tail, twin):
        run(t, inputs((3, 6, 4, 5), torch.float64))  # running statistics that differ from 0 and 1
        getattr(t, frozen).eval()
    tensors = inputs((3, 6, 4, 5), torch.float64, seed=1)
    got, expected = run(tail, tensors), run(twin, tensors)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], msg=lambda m, name=name: f"{name}: {m}")


def test_saved_for_backward_is_y_statistics_mask_and_nothing_else() -> None:
    y, other, _ = inputs((4, 32, 8, 8))
    tail = Tail(32, "residual", fused=True)
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        out = tail(y.requires_grad_(), other.requires_grad_())
    sizes = sorted((t.numel() * t.element_size(), t.dtype) for t in seen if t is not tail.bn.weight)
    vector = (32 * 4, torch.float32)
    assert sizes == sorted(
        [vector, vector, (y.numel() // 8, torch.int32), (y.numel() * 4, torch.float32)], key=lambda s: s[0]
    )
    assert not any(t.data_ptr() == out.data_ptr() for t in seen)


def test_nothing_is_saved_and_no_mask_written_without_grad() -> None:
    y, other, _ = inputs((4, 32, 8, 8))
    tail = Tail(32, "residual", fused=True)
    with torch.no_grad():
        out = tail(y, other)
    assert out.grad_fn is None
    torch.testing.assert_close(out, tail.twin()(y, other))


def test_output_may_be_written_in_place_afterwards() -> None:
    """Eager's ReLU saves its output and refuses this; the mask does not care."""
    y, other, grad = inputs((2, 8, 4, 4), torch.float64)
    tail = Tail(8, "residual", fused=True).double()
    expected = run(tail.twin(), [y, other, grad])["d_y"]
    leaf = y.clone().requires_grad_()
    out = tail(leaf, other)
    out.mul_(2)
    out.backward(grad / 2)
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_is_eagers(kind: str, training: bool) -> None:
    y, other, _ = inputs((2, 4, 3, 3), torch.float64)
    tail = Tail(4, kind, fused=True).double().train(training)
    results = []
    for module in (tail, tail.twin()):
        leaves = [y.detach().clone().requires_grad_(), other.detach().clone().requires_grad_(), *module.parameters()]
        used = leaves if kind != "plain" else [leaves[0], *leaves[2:]]
        # Cubed, so that the incoming gradient depends on everything too.
        first = torch.autograd.grad(module(*leaves[:2]).pow(3).sum(), used, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), used)
        results.append((*first, *second))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_func_transforms_raise() -> None:
    y, other, _ = inputs((2, 4, 3, 3), torch.float64)
    tail = Tail(4, "residual", fused=True).double()
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda y: tail(y, other).sum())(y.detach())
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda y: tail(y, other), (y.detach(),), (y.detach(),))


@pytest.mark.parametrize(
    "layout",
    [
        torch.Tensor.contiguous,
        lambda g: g.sum().expand(g.shape),
        lambda g: g.transpose(2, 3).contiguous().transpose(2, 3),
    ],
)
def test_grad_out_in_any_layout(layout: Callable[[Tensor], Tensor]) -> None:
    y, other, grad = inputs((2, 8, 4, 6), torch.float64)
    tail = Tail(8, "projection", fused=True).double()
    twin = tail.twin()
    results = []
    for t in (tail, twin):
        leaf = y.clone().requires_grad_()
        t(leaf, other).backward(layout(grad))
        results.append(leaf.grad)
    torch.testing.assert_close(*results)
    assert results[0].is_contiguous(memory_format=torch.channels_last)


def test_nchw_stays_nchw() -> None:
    y, other, grad = (t.contiguous() for t in inputs((2, 8, 4, 6), torch.float64))
    tail = Tail(8, "residual", fused=True).double()
    leaf, leaf2 = y.clone().requires_grad_(), y.clone().requires_grad_()
    out, expected = tail(leaf, other), tail.twin()(leaf2, other)
    assert out.stride() == expected.stride()
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(leaf.grad, leaf2.grad)


@pytest.mark.parametrize("residual", ["same tensor", "broadcast", "wider dtype"])
def test_residuals(residual: str) -> None:
    y, other, grad = inputs((2, 8, 4, 4), torch.float32)
    results = []
    for fused in (True, False):
        tail = Tail(8, "residual", fused=fused)
        leaf = y.clone().requires_grad_()
        side = {"same tensor": leaf, "broadcast": other[:1, :, :1], "wider dtype": other.double()}[residual]
        if side is not leaf:
            side = side.detach().clone().requires_grad_()
        out = tail(leaf, side)
        out.backward(grad.to(out.dtype))
        results.append((out, leaf.grad, side.grad))
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_shared_bn_is_used_twice() -> None:
    y, other, grad = inputs((2, 8, 4, 4), torch.float64)
    results = []
    for fused in (True, False):
        tail = Tail(8, "residual", fused=fused).double()
        leaf = y.clone().requires_grad_()
        tail(tail(leaf, other), leaf).backward(grad)
        results.append(
            {"d_y": leaf.grad} | {n: p.grad for n, p in tail.named_parameters()} | dict(tail.named_buffers())
        )
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name])


def test_gradient_checkpointing_equals_eager() -> None:
    y, other, grad = inputs((2, 8, 4, 4), torch.float64)
    results = []
    for fused in (True, False):
        tail = Tail(8, "projection", fused=fused).double()
        leaf = y.clone().requires_grad_()
        checkpoint(tail, leaf, other, use_reentrant=False).backward(grad)
        results.append(
            {"d_y": leaf.grad} | {n: p.grad for n, p in tail.named_parameters()} | dict(tail.named_buffers())
        )
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name])


def test_empty_batch_and_single_value_as_eager() -> None:
    tail = Tail(8, "residual", fused=True)
    before = copy.deepcopy(dict(tail.named_buffers()))
    y = torch.zeros(0, 8, 4, 4, requires_grad=True)
    out = tail(y, torch.zeros(0, 8, 4, 4))
    assert out.shape == (0, 8, 4, 4)
    out.sum().backward()
    assert y.grad is not None
    assert torch.equal(tail.bn.running_var, before["bn.running_var"])
    assert int(tail.bn.num_batches_tracked) == 1
    one = torch.zeros(1, 8, 1, 1)
    for t in (tail, tail.twin()):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            t(one, one)


def test_deterministic_mode() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        tensors = inputs((8, 16, 9, 9))
        first, second = (run(Tail(16, "projection", fused=True), tensors) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name in first:
        assert torch.equal(first[name], second[name]), name
