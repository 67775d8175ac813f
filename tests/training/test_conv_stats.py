"""conv_bn_stats and conv_backward: schemas, gradients of their own, argument checks; and the training tail on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_resnet import functional
from fused_resnet.backends.training import dispatch as training_dispatch
from fused_resnet.backends.training.base import TrainingBackend
from fused_resnet.core.reference import ACTIVATIONS
from fused_resnet.core.training_call import ConvGeometry
from fused_resnet.nn import tail
from fused_resnet.testing import assert_within_bar
from fused_resnet.testing.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR

OPS = torch.ops.fused_resnet
RUNNABLE = [name for name, why in training_dispatch.reasons(torch.zeros(1, 1, 1, 1)).items() if why is None]
GEOMETRIES = {
    "3x3": ConvGeometry((1, 1), (1, 1), (1, 1), 1),
    "asymmetric": ConvGeometry((2, 1), (1, 2), (1, 2), 1),
    "groups": ConvGeometry((1, 1), (0, 1), (1, 1), 2),
}


def operands(
    dtype: torch.dtype = torch.float32, groups: int = 1, memory_format: torch.memory_format = torch.channels_last
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, 7, 6, generator=g, dtype=torch.float64)
    weight = torch.randn(8, 6 // groups, 3, 3, generator=g, dtype=torch.float64)
    bias = torch.randn(8, generator=g, dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=memory_format), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend: str, geometry: ConvGeometry, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    x, weight, bias = operands(dtype, geometry.groups, memory_format)
    for t in (x, weight, bias):
        t.requires_grad_()
    torch.library.opcheck(OPS.conv_bn_stats.default, (x, weight, bias, *geometry, backend))
    y = OPS.conv_bn_stats(x, weight, None, *geometry, backend)[0].detach()
    x, weight = x.detach(), weight.detach()
    for mask in ([True, True, True], [False, True, False]):
        torch.library.opcheck(OPS.conv_backward.default, (y, x, weight, True, *geometry, mask, backend))


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_those_of_the_rounded_output(backend: str, geometry: ConvGeometry, dtype: torch.dtype) -> None:
    """The values that are normalised are y's, so the statistics are y's, not the accumulators'."""
    x, weight, bias = operands(dtype, geometry.groups)
    y, mean, var = OPS.conv_bn_stats(x, weight, bias, *geometry, backend)
    expected = F.conv2d(x, weight, bias, *geometry)
    assert y.dtype == dtype
    assert y.stride() == expected.stride()
    exact = F.conv2d(x.double(), weight.double(), bias.double(), *geometry)
    assert_within_bar(y, float((expected.double() - exact).abs().max()), exact, "y", FORWARD_FACTOR)
    exact_var, exact_mean = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
    assert mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(geometry: ConvGeometry, with_bias: bool) -> None:
    """All three outputs, the statistics included, as functions of all three inputs."""
    x, weight, bias = operands(torch.float64, geometry.groups)
    leaves = [t.requires_grad_() for t in (x[:2, :, :5, :4].clone(), weight, bias)]
    if with_bias:
        assert torch.autograd.gradcheck(lambda *t: OPS.conv_bn_stats(*t, *geometry, "eager"), leaves)
    else:
        assert torch.autograd.gradcheck(lambda *t: OPS.conv_bn_stats(*t, None, *geometry, "eager"), leaves[:2])


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_asked_for(wanted: tuple[bool, ...]) -> None:
    x, weight, bias = operands()
    leaves = [t.requires_grad_(want) for t, want in zip((x, weight, bias), wanted, strict=True)]
    y = OPS.conv_bn_stats(*leaves, *GEOMETRIES["3x3"])[0]
    y.sum().backward()
    assert tuple(t.grad is not None for t in leaves) == wanted
    got = OPS.conv_backward(torch.ones_like(y), x.detach(), weight.detach(), True, *GEOMETRIES["3x3"], wanted)
    assert [g.numel() > 0 for g in got] == list(wanted)


def test_saved_for_backward_is_x_and_weight_only() -> None:
    x, weight, bias = operands()
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        OPS.conv_bn_stats(x, weight.requires_grad_(), bias, *GEOMETRIES["3x3"])
    assert {t.data_ptr() for t in seen} == {x.data_ptr(), weight.data_ptr()}


def test_double_backward_is_right() -> None:
    x, weight, bias = (t.requires_grad_() for t in operands(torch.float64))
    call = lambda *a: OPS.conv_bn_stats(*a, *GEOMETRIES["3x3"])  # noqa: E731
    assert torch.autograd.gradgradcheck(lambda *a: call(*a)[0], (x, weight, bias))


def test_a_gradient_op_and_forward_mode_refuse() -> None:
    x, weight, _ = operands(torch.float64)
    y = OPS.conv_bn_stats(x, weight, None, *GEOMETRIES["3x3"])[0]
    grad = OPS.conv_backward(
        y.requires_grad_(), x, weight, False, *GEOMETRIES["3x3"], [True, True, False]
    )[0]  # fmt: skip
    with pytest.raises(RuntimeError, match=r"conv_backward cannot be differentiated.*unfuse"):
        grad.sum().backward()
    with pytest.raises((RuntimeError, NotImplementedError), match="forward-mode"):
        torch.func.jvp(
            lambda x: OPS.conv_bn_stats(x, weight, None, *GEOMETRIES["3x3"])[0], (x.detach(),), (x.detach(),)
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 6)}, ValueError, r"x: expected 4 dimensions, got 2"),
        (
            {"x": torch.zeros(0, 6, 7, 6)},
            ValueError,
            r"conv_bn_stats: x: expected at least one element, got shape",
        ),
        ({"weight": torch.zeros(8, 5, 3, 3)}, ValueError, r"weight: expected \[K, 6 / groups, R, S\] .* got \[8, 5, 3"),
        ({"weight": torch.zeros(8, 6, 3, 3).double()}, TypeError, r"weight: expected dtype float32, that of x, got f"),
        ({"weight": torch.zeros(8, 6, 9, 9)}, ValueError, r"x: 7x6 is too small for a 9x9 filter"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias: expected shape \[8\], one value per output channel, got \[7\]"),
        ({"stride": [0, 1]}, ValueError, r"stride must be at least 1, got \(0, 1\)"),
        ({"backend": "tpu"}, ValueError, r"backend: expected 'auto' or one of .*, got 'tpu'"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = dict(zip(("x", "weight", "bias"), operands(), strict=True)) | GEOMETRIES["3x3"]._asdict() | change
    with pytest.raises(error, match=message):
        OPS.conv_bn_stats(**arguments)


def test_wrong_grad_y_is_named() -> None:
    x, weight, _ = operands()
    with pytest.raises(ValueError, match=r"grad_y: expected .* output, torch.float32 \[3, 8, 7, 6\], got"):
        OPS.conv_backward(torch.zeros(3, 8, 7, 5), x, weight, False, *GEOMETRIES["3x3"], [True, True, False])


# ---- a backend's own convolution --------------------------------------------------------------------------


class Recording(TrainingBackend):
    """A backend that has a convolution with statistics for 3x3 filters, and says what it was asked."""

    name = "recording"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def can_run(self, y: Tensor, *others: Tensor | None) -> str | None:
        return None

    def stats(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append("stats")
        var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
        return mean, var

    def why_not_conv_stats(self, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> str | None:
        return None if weight.shape[2:] == (3, 3) else f"recording: 3x3 only, got {list(weight.shape)}"

    def conv_stats(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append("conv_stats")
        return super().conv_stats(x, weight, bias, geometry)

    def conv_backward(self, *args: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        self.calls.append("conv_backward")
        return super().conv_backward(*args)


def test_a_backends_own_convolution_is_taken_where_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording()
    monkeypatch.setattr(training_dispatch, "choose", lambda *_: recording)
    x, weight, _ = operands()
    OPS.conv_bn_stats(x, weight.requires_grad_(), None, *GEOMETRIES["3x3"])[0].sum().backward()
    assert recording.calls == ["conv_stats", "stats", "conv_backward"]
    recording.calls.clear()
    OPS.conv_bn_stats(x, weight[:, :, :1, :1], None, *GEOMETRIES["3x3"])
    assert recording.calls == ["stats"]
    why = TrainingBackend.why_not_conv_stats(recording, x, weight, GEOMETRIES["3x3"])
    assert why == "recording: no convolution with statistics in its epilogue"


# ---- the training tail ------------------------------------------------------------------------------------


class Block(nn.Module):
    """conv + BN + (residual or the projection's conv + BN) + activation; ``fused`` decides who computes it."""

    def __init__(self, kind: str, fused: bool, activation: str = "relu", bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(6, 8, 3, padding=1, bias=bias), nn.BatchNorm2d(8)
        if kind == "projection":
            self.proj_conv, self.proj_bn = nn.Conv2d(4, 8, 1, stride=2, bias=bias), nn.BatchNorm2d(8)
        self.kind, self.fused, self.activation = kind, fused, activation

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        if self.fused and self.kind == "projection":
            y = tail.conv_bn_proj_act(self.conv, self.bn, x, self.proj_conv, self.proj_bn, other, self.activation)
            return tail.leave(y)
        if self.fused:
            residual = other if self.kind == "residual" else None
            return tail.leave(tail.conv_bn_act(self.conv, self.bn, x, residual, self.activation))
        z = self.bn(self.conv(x))
        if self.kind == "residual":
            z = z + other
        if self.kind == "projection":
            z = z + self.proj_bn(self.proj_conv(other))
        return ACTIVATIONS[self.activation](z)

    def inputs(self, memory_format: torch.memory_format = torch.channels_last) -> tuple[Tensor, Tensor, Tensor]:
        """x, the residual or the projection's input, and grad_out.

        Odd sizes: with even ones torch's own backward, the other side of the comparison, overruns memory on AVX2.
        """
        g = torch.Generator().manual_seed(1)
        shapes = [(2, 6, 5, 6), (2, 4, 9, 11) if self.kind == "projection" else (2, 8, 5, 6), (2, 8, 5, 6)]
        x, other, grad = (torch.randn(s, generator=g).contiguous(memory_format=memory_format) for s in shapes)
        return x, other, grad


def step(
    block: Block, inputs: tuple[Tensor, Tensor, Tensor], run: Callable[..., Tensor] | None = None
) -> dict[str, Tensor]:
    """Output, gradients and buffers of one training step."""
    dtype = next(block.parameters()).dtype
    x, other, grad = (t.to(dtype).detach().clone() for t in inputs)
    out = (block if run is None else run)(x.requires_grad_(), other.requires_grad_())
    out.backward(grad.to(out.dtype))
    results = {"out": out.detach(), "d_x": x.grad, "d_other": other.grad}
    results |= {f"grad of {name}": p.grad for name, p in block.named_parameters()} | dict(block.named_buffers())
    return {name: t for name, t in results.items() if t is not None}


def assert_three_times_eager(got: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """At most three times eager's own error against float64, in everything that a step leaves behind."""
    assert got.keys() == eager.keys()
    for name, value in got.items():
        assert value.dtype == eager[name].dtype, name
        for dim, size in enumerate(value.shape):  # the stride of a dimension of size 1 means nothing
            assert size == 1 or value.stride(dim) == eager[name].stride(dim), name
        if not value.is_floating_point():
            assert torch.equal(value, eager[name]), name
            continue
        error = float((eager[name].double() - exact[name]).abs().max())
        assert_within_bar(value, error, exact[name], name, GRADIENT_FACTOR)


@pytest.mark.parametrize("kind", ["plain", "residual", "projection"])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_block_against_eager(kind: str, activation: str, memory_format: torch.memory_format) -> None:
    blocks = {fused: Block(kind, fused, activation) for fused in (False, True)}
    inputs = blocks[True].inputs(memory_format)
    exact = step(copy.deepcopy(blocks[False]).double(), inputs)
    assert_three_times_eager(step(blocks[True], inputs), step(blocks[False], inputs), exact)


def test_one_op_computes_convolution_and_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass over the activation takes statistics, whatever the model's own layout."""
    seen: list[str] = []
    mode = torch.utils._python_dispatch.TorchDispatchMode

    class Names(mode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func._schema.name.removeprefix("fused_resnet::"))
            return func(*args, **(kwargs or {}))

    block = Block("projection", fused=True)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        seen.clear()
        with Names():
            step(block, block.inputs(memory_format))
        assert seen.count("conv_bn_stats") == seen.count("conv_backward") == 2
        assert seen.count("bn_stats") == 0
        assert seen.count("bn_apply_add_relu") == seen.count("bn_backward_apply") == 1


@pytest.mark.parametrize("kind", ["plain", "projection"])
def test_gradient_checkpointing_and_compile(kind: str) -> None:
    reference = Block(kind, fused=True).double()
    expected = step(reference, reference.inputs())
    for how in ("checkpoint", "compile"):
        block = Block(kind, fused=True).double()
        run = torch.compile(block, fullgraph=True, backend="aot_eager")
        if how == "checkpoint":
            run = lambda *args, block=block: checkpoint(block, *args, use_reentrant=False)  # noqa: E731
        got = step(block, block.inputs(), run)
        for name, value in expected.items():
            if how == "checkpoint" and ("running" in name or "num_batches" in name):
                continue  # the forward runs twice, as with eager's own BN
            torch.testing.assert_close(got[name], value, msg=lambda m, where=f"{how} {name}": f"{where}: {m}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """The op casts as eager's convolution does; BN, its gradients and the statistics stay float32."""
    results = {}
    for fused in (False, True):
        block = Block("residual", fused)

        def run(x: Tensor, other: Tensor, block: Block = block) -> Tensor:
            with torch.autocast("cpu", dtype):
                return block(x, other.to(dtype))

        results[fused] = step(block, block.inputs(), run)
    exact = step(Block("residual", False).double(), Block("residual", False).inputs())
    assert_three_times_eager(results[True], results[False], exact)
    x, weight, bias = operands()
    with torch.autocast("cpu", dtype):
        y, mean, var = OPS.conv_bn_stats(x, weight, bias, *GEOMETRIES["3x3"])
    assert (y.dtype, mean.dtype, var.dtype) == (dtype, torch.float32, torch.float32)


def test_public_function_against_eager() -> None:
    """The formula of the docstring, with a projection branch."""
    block = Block("projection", fused=False, bias=True).double()
    x, other, _ = (t.double() for t in block.inputs())
    running = [torch.zeros(8).double(), torch.ones(8).double()]
    branch = functional.conv_bn_branch(
        other, block.proj_conv.weight, block.proj_conv.bias, block.proj_bn.weight, block.proj_bn.bias, stride=2
    )
    out = functional.conv_bn_add_relu_train(
        x, block.conv.weight, block.conv.bias, block.bn.weight, block.bn.bias, *running, padding=1, residual=branch,
    )  # fmt: skip
    torch.testing.assert_close(out, block(x, other))
    torch.testing.assert_close(running, [block.bn.running_mean, block.bn.running_var])
    with pytest.raises(TypeError, match="stride: expected an int or a pair of ints, got 'two'"):
        functional.conv_bn_add_relu_train(x, block.conv.weight, stride="two")  # type: ignore[arg-type]


def test_frozen_empty_and_single_value() -> None:
    x, weight, bias = operands(torch.float64)
    running = torch.full((8,), 0.5).double(), torch.full((8,), 2.0).double()
    out = functional.conv_bn_add_relu_train(x, weight, bias, None, None, *running, training=False, activation="none")
    torch.testing.assert_close(out, F.batch_norm(F.conv2d(x, weight, bias), *running))
    empty = functional.conv_bn_add_relu_train(x[:0], weight.to(memory_format=torch.channels_last), bias)
    assert empty.shape == (0, 8, 5, 4)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        functional.conv_bn_add_relu_train(x[:1, :, :3, :3].contiguous(memory_format=torch.channels_last), weight, bias)
