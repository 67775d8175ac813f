"""The 3 x 3 convolutions of a training step by Winograd: kernels of each instruction set, and when they are used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet import ops
from fused_resnet.backends.cpu_rule import Algorithm
from fused_resnet.backends.training import winograd
from fused_resnet.backends.training.base import TrainingBackend
from fused_resnet.backends.training.cpu import BACKEND
from fused_resnet.core import extensions
from fused_resnet.core.training_call import ConvGeometry
from fused_resnet.testing import assert_bitexact, assert_within_bar
from fused_resnet.testing.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, WINOGRAD_F4_RMS_FACTOR
from tests.support.instruction_sets import VECTORS, need

if extensions.cpu() is None:
    pytest.skip(str(extensions.why_not_cpu()), allow_module_level=True)

assert ops.NAMESPACE == "fused_resnet"  # the import registers the public operators
OPS = torch.ops.fused_resnet_C
F2 = Algorithm(2)
PUBLIC = torch.ops.fused_resnet

# n, c, h, w, k, padding: every remainder of lanes, chunks and panels in C and K, of tiles in P and Q; blocks of more
# than 128 channels; one tile; more tiles than a step takes; padding that reaches beyond the filter's centre.
SHAPES = [
    (1, 1, 1, 1, 1, (1, 1)),
    (2, 5, 5, 6, 7, (1, 1)),
    (3, 33, 7, 9, 17, (0, 2)),
    (1, 16, 3, 8, 130, (2, 0)),
    (2, 150, 4, 4, 40, (1, 1)),
    (1, 8, 39, 41, 24, (1, 1)),
    (5, 48, 13, 12, 33, (1, 1)),
]


@pytest.fixture(params=VECTORS)
def isa(request: pytest.FixtureRequest) -> str:
    return need(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def geometry_of(padding: tuple[int, int]) -> ConvGeometry:
    return ConvGeometry((1, 1), padding, (1, 1), 1)


def tensors(shape: tuple, integers: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and the gradient of the output."""
    n, c, h, w, k, padding = shape
    g = torch.Generator().manual_seed(seed)
    output = (n, k, h + 2 * padding[0] - 2, w + 2 * padding[1] - 2)
    if integers:
        draws = (torch.randint(-3, 4, size, generator=g).float() for size in ((n, c, h, w), (k, c, 3, 3), output))
    else:
        draws = (torch.randn(size, generator=g) for size in ((n, c, h, w), (k, c, 3, 3), output))
    x, weight, grad_y = (channels_last(t) for t in draws)
    return x, weight, grad_y


def reference(grad_y: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of x, weight and bias by torch in ``dtype``."""
    x, weight, grad_y = x.to(dtype), weight.to(dtype), grad_y.to(dtype)
    y = torch.conv2d(x, weight, None, 1, padding)
    geometry = ([1, 1], list(padding), [1, 1], False, [0, 0], 1)
    return [y, *torch.ops.aten.convolution_backward(grad_y, x, weight, [weight.shape[0]], *geometry, [True] * 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_gradient_is_exact_on_integers(shape: tuple, isa: str) -> None:
    x, weight, grad_y = tensors(shape, integers=True)
    d_weight = OPS.conv_weight_gradient(x, grad_y, shape[-1], 2, isa)
    assert d_weight.is_contiguous(memory_format=torch.channels_last)
    assert_bitexact(d_weight, reference(grad_y, x, weight, shape[-1], torch.float64)[2], str(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", ["whole", "fresh"])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_input_gradient_is_exact_on_integers(
    shape: tuple, memory_format: torch.memory_format, weights: str, isa: str
) -> None:
    """conv_fused of grad_y with the weights that conv_pack_input_gradient made, whatever the weight's strides."""
    x, weight, grad_y = tensors(shape, integers=True)
    padding = shape[-1]
    packed = OPS.conv_pack_input_gradient(weight.contiguous(memory_format=memory_format), 2, isa, weights)
    d_x = OPS.conv_fused(
        grad_y, packed, (x.shape[1], 3, 3), 2, isa, (1, 1), (2 - padding[0], 2 - padding[1]), (1, 1),
        None, None, None, None, None, 0.0, None, 0, weights,
    )  # fmt: skip
    assert_bitexact(d_x, reference(grad_y, x, weight, padding, torch.float64)[1], str(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_f4_weight_gradient_finds_every_index(shape: tuple, isa: str) -> None:
    """F(4x4) rounds, so it cannot be exact; an index that is wrong is wrong by a thousand times more."""
    x, weight, grad_y = tensors(shape, integers=False)
    exact = reference(grad_y, x, weight, shape[-1], torch.float64)[2]
    d_weight = OPS.conv_weight_gradient(x, grad_y, shape[-1], 4, isa)
    torch.testing.assert_close(d_weight.double(), exact, rtol=0, atol=2e-6 * max(1.0, float(exact.abs().max())))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_threads(count: int, threads: None) -> None:
    """The number of threads decides how the tiles are split up for d_weight."""
    torch.set_num_threads(count)
    for shape in ((4, 40, 21, 19, 24, (1, 1)), (2, 150, 8, 8, 300, (1, 1))):
        x, weight, grad_y = tensors(shape, integers=True)
        exact = reference(grad_y, x, weight, (1, 1), torch.float64)
        geometry = geometry_of((1, 1))
        assert_bitexact(winograd.forward(x, weight, None, geometry, F2), exact[0], "y")
        assert_bitexact(winograd.input_gradient(grad_y, weight, geometry, F2), exact[1], "d_x")
        d_weight = winograd.weight_gradient(grad_y, x, geometry, 2)
        assert_bitexact(d_weight, exact[2], "d_weight")
        assert torch.equal(d_weight, winograd.weight_gradient(grad_y, x, geometry, 2))


@pytest.mark.parametrize("strided", ["x", "grad_y"])
def test_any_strides(strided: str) -> None:
    """Every second pixel of a larger tensor, and a gradient that is one number for all (as of a sum)."""
    x, weight, grad_y = tensors((2, 20, 9, 7, 12, (1, 1)), integers=True)
    if strided == "x":
        x = channels_last(torch.randint(-3, 4, (2, 20, 18, 14)).float())[:, :, ::2, ::2]
    else:
        grad_y = torch.ones(()).expand(grad_y.shape)
    exact = reference(grad_y, x, weight, (1, 1), torch.float64)
    geometry = geometry_of((1, 1))
    assert_bitexact(winograd.forward(x, weight, None, geometry, F2), exact[0], "y")
    assert_bitexact(winograd.input_gradient(grad_y, weight, geometry, F2), exact[1], "d_x")
    assert_bitexact(winograd.weight_gradient(grad_y, x, geometry, 2), exact[2], "d_weight")


# And the tiles that the rule takes: of the forward pass and d_x, and of d_weight.
REAL = {
    (8, 48, 13, 15, 56, (1, 1)): (2, 2),
    (8, 70, 13, 15, 80, (1, 1)): (4, 2),
    (17, 128, 17, 17, 96, (0, 1)): (4, 4),
    (5, 32, 30, 31, 40, (1, 1)): (2, 4),
    (32, 260, 5, 4, 256, (1, 1)): (4, 2),
}


@pytest.mark.parametrize("choice", ["auto", "f2"])
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_errors_against_float64(shape: tuple, choice: str) -> None:
    """The 2 x bar forward, the 3 x bar for gradients, and where F(4x4) is taken its own bound on the rms."""
    x, weight, grad_y = tensors(shape, integers=False)
    geometry = geometry_of(shape[-1])
    backend = BACKEND.with_winograd(choice)
    algorithm = winograd.algorithm(x, weight, geometry, choice)
    tiles = algorithm.m, winograd.weight_gradient_tile(x, weight, geometry, choice)
    assert (algorithm.weights == "fresh") == (shape[1] >= 256)
    assert tiles == (REAL[shape] if choice == "auto" else (2, 2))
    exact = reference(grad_y, x, weight, shape[-1], torch.float64)
    eager = reference(grad_y, x, weight, shape[-1], torch.float32)
    y, _, _ = backend.conv_stats(x, weight, None, geometry)
    gradients = backend.conv_backward(grad_y, x, weight, True, geometry, (True, True, True))
    names, factors = ("y", "d_x", "d_weight", "d_bias"), (FORWARD_FACTOR, *(GRADIENT_FACTOR,) * 3)
    for name, factor, ours, theirs, right in zip(names, factors, (y, *gradients), eager, exact, strict=True):
        errors = [(t.double() - right).abs() for t in (ours, theirs)]
        if (tiles[1] if name == "d_weight" else tiles[0]) == 4:
            rms = [float(error.square().mean().sqrt()) for error in errors]
            assert rms[0] <= WINOGRAD_F4_RMS_FACTOR * rms[1], name
            factor = GRADIENT_FACTOR
        assert_within_bar(ours, float(errors[1].max()), right, f"{name} {shape}", factor)


def test_nan_is_where_eager_has_it() -> None:
    """Forward and d_x exactly; d_weight in every tap of the filters that saw it, and in no other filter."""
    x, weight, grad_y = tensors((2, 5, 9, 7, 6, (1, 1)), integers=True)
    x[0, 2, 0, 3] = grad_y[1, 4, 8, 6] = float("nan")
    eager = reference(grad_y, x, weight, (1, 1), torch.float32)
    geometry = geometry_of((1, 1))
    for ours, theirs in (
        (winograd.forward(x, weight, None, geometry, F2), eager[0]),
        (winograd.input_gradient(grad_y, weight, geometry, F2), eager[1]),
    ):
        assert torch.equal(ours.isnan(), theirs.isnan())
    d_weight = winograd.weight_gradient(grad_y, x, geometry, 2)
    reached = torch.zeros(6, 5, dtype=torch.bool)
    reached[4], reached[:, 2] = True, True
    assert torch.equal(d_weight.isnan(), reached[:, :, None, None].expand(6, 5, 3, 3))
    assert (eager[2].isnan() <= d_weight.isnan()).all()


# ---------------------------------------------------------------- when they are used


class Spy:
    """Counts the calls of our own kernels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        for name in ("forward", "input_gradient", "weight_gradient"):
            monkeypatch.setattr(winograd, name, self._counting(name, getattr(winograd, name)))

    def _counting(self, name: str, function):  # type: ignore[no-untyped-def]
        def counted(*args):  # type: ignore[no-untyped-def]
            self.calls.append(name)
            return function(*args)

        return counted


def step(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> list[Tensor]:
    """Output, statistics and gradients of the public operators."""
    leaves = [t if t is None else t.clone(memory_format=torch.preserve_format) for t in (x, weight, bias)]
    for t in leaves:
        if t is not None:
            t.requires_grad_()
    y, mean, var = PUBLIC.conv_bn_stats(*leaves, *geometry)
    (y * torch.arange(y.shape[1]).view(1, -1, 1, 1)).sum().backward()
    return [y.detach(), mean, var, *(t.grad for t in leaves if t is not None)]


def test_the_operators_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    x, weight, _ = tensors((15, 32, 16, 16, 32, (1, 1)), integers=True)
    got = step(x, weight, torch.arange(32.0), geometry_of((1, 1)))
    assert spy.calls == ["forward", "input_gradient", "weight_gradient"]
    monkeypatch.setenv("FUSED_RESNET_WINOGRAD", "off")
    expected = step(x, weight, torch.arange(32.0), geometry_of((1, 1)))
    assert len(spy.calls) == 3
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stride": (2, 2)}, "stride 1"),
        ({"dilation": (2, 2)}, "dilation 1"),
        ({"groups": 2}, "one group"),
        ({"padding": (3, 3)}, "padding of at most 2"),
        ({"filter": (1, 1)}, "3 x 3 filter, got 1 x 1"),
        ({"dtype": torch.bfloat16}, "float32"),
        ({"format": torch.contiguous_format}, "channels_last"),
        ({"n": 1}, "does not pay"),
    ],
)
def test_other_convolutions_are_left_to_torch(change: dict, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    geometry = geometry_of((1, 1))._replace(**{k: v for k, v in change.items() if k in ConvGeometry._fields})
    g = torch.Generator().manual_seed(0)
    dtype, memory_format = change.get("dtype", torch.float32), change.get("format", torch.channels_last)
    size = 4 if "n" in change else 16
    x = torch.randn(change.get("n", 16), 32, size, size, generator=g)
    weight = torch.randn(32, 32 // geometry.groups, *change.get("filter", (3, 3)), generator=g)
    x, weight = (t.to(dtype).contiguous(memory_format=memory_format) for t in (x, weight))
    assert reason in str(BACKEND.why_not_conv_stats(x, weight, geometry))
    y, mean, var = PUBLIC.conv_bn_stats(x, weight, None, *geometry)
    theirs = TrainingBackend.conv_stats(BACKEND, x, weight, None, geometry)
    assert torch.equal(y, theirs[0])
    assert torch.equal(mean, theirs[1])
    assert torch.equal(var, theirs[2])
    grad_y = torch.randn(y.shape, generator=g).to(dtype).contiguous(memory_format=memory_format)
    d_x, _, _ = PUBLIC.conv_backward(grad_y, x, weight, False, *geometry, [True, True, False])
    eager = TrainingBackend.conv_backward(BACKEND, grad_y, x, weight, False, geometry, (True, True, False))
    assert torch.equal(d_x, eager[0])
    assert "forward" not in spy.calls
    assert "input_gradient" not in spy.calls


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_asked_for(wanted: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    x, weight, grad_y = tensors((15, 32, 16, 16, 32, (1, 1)), integers=True)
    got = BACKEND.conv_backward(grad_y, x, weight, True, geometry_of((1, 1)), wanted)
    assert spy.calls == [
        name for name, want in zip(("input_gradient", "weight_gradient"), wanted, strict=False) if want
    ]
    exact = reference(grad_y, x, weight, (1, 1), torch.float64)[1:]
    for ours, right, want in zip(got, exact, wanted, strict=True):
        if want:
            assert_bitexact(ours, right, str(wanted))


# ---------------------------------------------------------------- in a network


class Twice(nn.Module):
    """One residual block used two times: its gradients are sums over both uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        from torchvision.models.resnet import BasicBlock

        self.block = BasicBlock(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


def test_a_block_passes_its_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    x = channels_last(torch.randn(8, 32, 16, 16))
    for option, calls in (("off", 0), ("f2", 6)):
        block = fused_resnet.fuse(Twice().block.to(memory_format=torch.channels_last), winograd=option, check=False)
        block.train()
        block(x.clone().requires_grad_()).sum().backward()
        assert len(spy.calls) == calls, option
    with pytest.raises(ValueError, match="winograd: expected 'auto', 'f2' or 'off', got 'f8'"):
        PUBLIC.conv_bn_stats(x, block.conv1.weight, None, *geometry_of((1, 1)), winograd="f8")


@pytest.mark.parametrize("compiled", [False, True])
def test_a_shared_block_trains_as_in_eager(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    x = channels_last(torch.randn(8, 32, 16, 16, generator=torch.Generator().manual_seed(0)))
    results = []
    for kind in ("exact", "eager", "fused"):
        model = Twice().to(memory_format=torch.channels_last)
        image = x
        if kind == "exact":
            model, image = model.double(), x.double()
        elif kind == "fused":
            model = fused_resnet.fuse(model)
            if compiled:
                model = torch.compile(model, backend="aot_eager")
        model.train()
        # A smooth loss: ReLU's corners would make the gradients jump.
        model(image).square().mean().backward()
        results.append([p.grad for p in model.parameters()])
    assert spy.calls.count("forward") == spy.calls.count("weight_gradient") == 4
    for right, theirs, ours in zip(*results, strict=True):
        scale = float(right.abs().max())
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours.double(), right, rtol=0, atol=1e-4 * scale)
        torch.testing.assert_close(theirs.double(), right, rtol=0, atol=1e-4 * scale)


def chosen(n: int, c: int, size: int, winograd_option: str = "auto") -> tuple[int, int]:
    """The tiles of the forward pass and of d_weight for ``c`` channels of ``size`` x ``size`` pixels."""
    x = torch.empty(n, c, size, size, device="meta").to(memory_format=torch.channels_last)
    weight, geometry = torch.empty(c, c, 3, 3, device="meta"), geometry_of((1, 1))
    algorithm = winograd.algorithm(x, weight, geometry, winograd_option)
    return algorithm.m, winograd.weight_gradient_tile(x, weight, geometry, winograd_option)


def test_the_rule_weighs_transforms_against_multiplications(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [chosen(64, c, size) for c, size in ((64, 32), (128, 16), (256, 8))] == [(4, 4)] * 3
    assert chosen(64, 512, 4) == (4, 2), "64 tiles repay a filter's 36 products only if they are not stored"
    assert chosen(1, 512, 4) == (0, 0)
    assert chosen(1, 64, 12) == (0, 2), "the transform of a filter's gradient costs less than that of a filter"
    assert chosen(64, 16, 32) == (0, 4), "16 channels do not repay the transforms of the images by F(2x2)"
    assert chosen(64, 48, 32)[0] == 2, "sums over so few channels would show the error of F(4x4)"
    assert chosen(64, 64, 32, "f2") == (2, 2)
    assert chosen(64, 64, 32, "off") == (0, 0)
    monkeypatch.setenv("FUSED_RESNET_WINOGRAD", "f2")
    assert chosen(64, 64, 32) == (2, 2)
