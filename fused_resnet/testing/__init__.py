"""A kernel regression suite for any implementation of the residual tail, your own included.

    from fused_resnet.testing import PROBLEMS, assert_equivalent
    for case in PROBLEMS:
        assert_equivalent(my_conv_bn_add_relu, case.problem)

or, with ``FUSED_RESNET_IMPLEMENTATION=my_module:my_conv_bn_add_relu``, ``pytest --pyargs fused_resnet.testing``.
``my_conv_bn_add_relu`` takes the arguments of :func:`fused_resnet.functional.conv_bn_add_relu` (and, for problems
with a projection, those of :func:`fused_resnet.functional.conv_bn_proj_add_relu`), without ``backend``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.problem import Problem, dtype_name
from ..core.reference import ConvBN, TailArguments, reference
from .one_accumulator import in_one_accumulator
from .problems import DESCRIBED, PROBLEMS, RESNET_TAILS, Case, RealTail, in_dtype
from .tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, OUTPUTS_SEEN, ROUNDING

__all__ = [
    "DESCRIBED",
    "PROBLEMS",
    "RESNET_TAILS",
    "Case",
    "RealTail",
    "assert_bitexact",
    "assert_equivalent",
    "assert_gradients",
    "assert_within_bar",
    "call_arguments",
    "check_tail",
    "in_dtype",
    "in_one_accumulator",
    "make_tail",
    "round_to_tf32",
]

Kind = Literal["random", "integers"]


def make_tail(
    problem: Problem, kind: Kind = "random", seed: int = 0, device: torch.device | str = "cpu", **options: Any
) -> TailArguments:
    """Tensors for ``problem``, drawn from ``seed`` on the CPU (so equal on every device), then moved to ``device``.

    ``"random"``: normal values with He-scaled weights; gamma of both signs, running_var in [0.25, 2].
    ``"integers"``: values so small and round that no rounding can occur before the store: |v| <= 3, eps = 1,
    running_var in {0, 3}, gamma in {+-1, +-2}. ``options`` override fields of the ``TailArguments``.
    """
    g = torch.Generator().manual_seed(seed)
    integers = kind == "integers"
    wide_bn = problem.dtype.itemsize == 2  # BN stays float32 in mixed precision
    bn_dtype = torch.float32 if wide_bn else problem.dtype

    def values(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        if integers:
            return torch.randint(-3, 4, shape, generator=g).to(dtype)
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    def pick(k: int, choices: list[float]) -> Tensor:
        return torch.tensor(choices, dtype=bn_dtype)[torch.randint(0, len(choices), (k,), generator=g)]

    def conv_bn(c: int, r: int, s: int, bias: bool, bn: bool) -> ConvBN:
        k = problem.k
        weight = values(k, c, r, s, dtype=problem.dtype, scale=(2.0 / (c * r * s)) ** 0.5)
        bias_t = values(k, dtype=problem.dtype, scale=0.1) if bias else None
        if not bn:
            return ConvBN(_place(weight), _move(bias_t))
        if integers:
            gamma, var, eps = pick(k, [-2.0, -1.0, 1.0, 2.0]), pick(k, [0.0, 3.0]), 1.0
        else:
            uniform = torch.rand(2, k, generator=g, dtype=torch.float64)
            sign = torch.where(torch.rand(k, generator=g) < 0.2, -1.0, 1.0)
            gamma = ((0.5 + uniform[0]) * sign).to(bn_dtype)
            var, eps = (0.25 + 1.75 * uniform[1]).to(bn_dtype), 1e-5
        beta, mean = values(k, dtype=bn_dtype, scale=0.3), values(k, dtype=bn_dtype, scale=0.3)
        return ConvBN(_place(weight), _move(bias_t), _move(gamma), _move(beta), _move(mean), _move(var), eps)

    def _move(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(device)

    def _place(t: Tensor) -> Tensor:
        fmt = torch.channels_last if problem.channels_last else torch.contiguous_format
        return t.to(device).contiguous(memory_format=fmt)

    x = _place(values(problem.n, problem.c, problem.h, problem.w, dtype=problem.dtype))
    conv = conv_bn(problem.c // problem.groups, problem.r, problem.s, problem.bias, problem.bn)
    residual = proj_x = proj = None
    proj_stride = (1, 1)
    if problem.residual is not None:
        residual = _place(values(*problem.output_shape, dtype=problem.residual))
    if problem.projection is not None:
        p = problem.projection
        proj_x = _place(values(problem.n, p.c, p.h, p.w, dtype=problem.dtype))
        proj, proj_stride = conv_bn(p.c, 1, 1, p.bias, p.bn), p.stride
    tail = TailArguments(
        x, conv, residual, problem.stride, problem.padding, problem.dilation, problem.groups, problem.activation,
        proj_x, proj, proj_stride,
    )  # fmt: skip
    return tail._replace(**options)


def call_arguments(tail: TailArguments) -> dict[str, Any]:
    """The keyword arguments with which ``functional.conv_bn_add_relu`` (or its projection twin) computes ``tail``."""
    arguments: dict[str, Any] = {"x": tail.x, **tail.conv._asdict()}
    for name in ("stride", "padding", "dilation", "groups", "activation"):
        arguments[name] = getattr(tail, name)
    if tail.proj is None:
        arguments["residual"] = tail.residual
    else:
        arguments |= {"proj_x": tail.proj_x, "proj_stride": tail.proj_stride}
        arguments |= {f"proj_{name}": value for name, value in tail.proj._asdict().items()}
    return arguments


def round_to_tf32(t: Tensor) -> Tensor:
    """float32 rounded to the nearest tf32 (10 bits of mantissa), halves away from zero as ``cvt.rna.tf32`` does."""
    bits = t.contiguous().view(torch.int32)
    rounded = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(torch.isfinite(t), rounded, t)


def eager_output(tail: TailArguments, tf32: bool) -> Tensor:
    """Eager's result, the baseline of the bar. For tf32: eager on operands rounded to tf32."""
    if tf32:
        tail = tail._replace(x=round_to_tf32(tail.x), conv=tail.conv._replace(weight=round_to_tf32(tail.conv.weight)))
        if tail.proj is not None and tail.proj_x is not None:
            tail = tail._replace(
                proj_x=round_to_tf32(tail.proj_x),
                proj=tail.proj._replace(weight=round_to_tf32(tail.proj.weight)),
            )
    with torch.no_grad():
        return reference(tail)


def _where(error: Tensor) -> str:
    flat = int(error.flatten().argmax())
    return str(tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape)))


def assert_within_bar(
    actual: Tensor, eager_error: float, exact: Tensor, label: str, factor: float = FORWARD_FACTOR
) -> None:
    """``|actual - exact| <= factor * eager_error + one rounding of exact``, everywhere; AssertionError otherwise."""
    if tuple(actual.shape) != tuple(exact.shape):
        raise AssertionError(f"{label}: shape {list(actual.shape)}, expected {list(exact.shape)}")
    if actual.numel() == 0:
        return
    error = (actual.detach().to("cpu", torch.float64) - exact.cpu()).abs()
    error = torch.where(torch.isnan(error), torch.inf, error)
    excess = error - (factor * eager_error + ROUNDING[actual.dtype] * exact.cpu().abs())
    if float(excess.max()) > 0:
        worst = float(error.flatten()[excess.flatten().argmax()])
        raise AssertionError(
            f"{label}: error {worst:.3e} at {_where(excess)}, allowed {factor:g} x eager's {eager_error:.3e} + one "
            f"rounding to {dtype_name(actual.dtype)}; {int((excess > 0).sum())} of {error.numel()} outputs fail"
        )


def assert_bitexact(actual: Tensor, exact: Tensor, label: str) -> None:
    """``actual`` equals the float64 result rounded once to its dtype, in every output."""
    expected = exact.to(actual.dtype).cpu()
    got = actual.detach().cpu()
    if tuple(got.shape) != tuple(expected.shape):
        raise AssertionError(f"{label}: shape {list(got.shape)}, expected {list(expected.shape)}")
    wrong = ~((got == expected) | (got.isnan() & expected.isnan()))
    if bool(wrong.any()):
        at = _where(wrong.to(torch.uint8))
        raise AssertionError(
            f"{label}: {int(wrong.sum())} of {wrong.numel()} outputs differ on small integers, where nothing rounds; "
            f"first at {at}: got {got[wrong][0].item()}, expected {expected[wrong][0].item()}"
        )


def check_tail(
    run: Callable[[TailArguments], Tensor],
    problem: Problem,
    *,
    kinds: tuple[Kind, ...] = ("integers", "random"),
    seed: int = 0,
    device: torch.device | str = "cpu",
    label: str = "",
    any_order: bool = False,
    **options: Any,
) -> None:
    """Hold ``run(tail)`` to the numerical bar on ``problem``: bit-exact on integers, 2 x eager on random values.

    ``any_order``: for runs that leave the order of their float32 sums to a library, see :func:`eager_error`.
    ``options`` override fields of the ``TailArguments`` (``winograd="f2"``, say). AssertionError names the problem.
    """
    label = f"{label + ': ' if label else ''}{problem}"
    for kind in kinds:
        tail = make_tail(problem, kind, seed, device, **options)
        exact = reference(tail.to(torch.float64))
        actual = run(tail)
        if actual.dtype != problem.output_dtype:
            raise AssertionError(f"{label}: dtype {actual.dtype}, expected {problem.output_dtype}")
        if kind == "integers":
            assert_bitexact(actual, exact, label)
            continue
        assert_within_bar(actual, eager_error(problem, seed, device, any_order), exact, label)


def eager_error(problem: Problem, seed: int = 0, device: torch.device | str = "cpu", any_order: bool = False) -> float:
    """Eager's largest error against float64 on ``problem``, over at least ``OUTPUTS_SEEN`` outputs.

    With ``any_order`` and in float32 the larger one of eager's and of that of :func:`in_one_accumulator`, whose bits,
    unlike eager's, do not depend on the processor.
    """
    any_order = any_order and problem.dtype is torch.float32
    worst, seen = 0.0, 0
    outputs = max(1, torch.Size(problem.output_shape).numel())
    while seen < OUTPUTS_SEEN:
        tail = make_tail(problem, "random", seed, device)
        exact = reference(tail.to(torch.float64))
        for y in [eager_output(tail, problem.tf32)] + ([in_one_accumulator(tail)] if any_order else []):
            error = (y.to(torch.float64) - exact).abs()
            worst = max(worst, float(error.max()) if error.numel() else 0.0)
        seen += outputs if problem.n else OUTPUTS_SEEN
        seed += 1
    return worst


def assert_equivalent(
    fn: Callable[..., Tensor],
    problem: Problem,
    *,
    kinds: tuple[Kind, ...] = ("integers", "random"),
    seed: int = 0,
    device: torch.device | str = "cpu",
    any_order: bool = False,
) -> None:
    """Assert that ``fn`` computes the tail of ``problem`` as well as eager PyTorch does.

    ``fn`` is called with the keyword arguments of :func:`fused_resnet.functional.conv_bn_add_relu`, or of
    ``conv_bn_proj_add_relu`` where the problem has a projection. Two checks: bit-exact on small integers (catches
    every indexing mistake), and on random values an error against float64 of at most twice eager's own plus one
    rounding of the output (``any_order``: twice that of one accumulator, where it is larger, see :func:`eager_error`).
    Raises AssertionError naming the problem and the first wrong output.
    """
    problem = dataclasses.replace(problem, device_type=torch.device(device).type)
    check_tail(
        lambda tail: fn(**call_arguments(tail)), problem, kinds=kinds, seed=seed, device=device, any_order=any_order
    )


def assert_gradients(fn: Callable[..., Tensor], problem: Problem, seed: int = 0) -> None:
    """The gradients of ``fn`` (called as in :func:`assert_equivalent`) obey the bar with the factor of gradients.

    Outputs so near a corner of the activation that one rounding decides on which side they fall receive no gradient:
    there the derivative jumps, and two right implementations may differ by all of it.
    """
    upstream = torch.randn(problem.output_shape, generator=torch.Generator().manual_seed(seed))
    upstream = torch.where(_near_corner(problem, seed), 0, upstream)

    def gradients(call: Callable[[TailArguments], Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
        tail = make_tail(problem, "random", seed)
        if dtype is not None:
            tail = tail.to(dtype)
        leaves = {name: t for name, t in call_arguments(tail).items() if isinstance(t, Tensor)}
        leaves = {name: t for name, t in leaves.items() if "running" not in name}
        for t in leaves.values():
            t.requires_grad_()
        out = call(tail)
        out.backward(upstream.to(out.dtype))
        return {name: t.grad for name, t in leaves.items() if t.grad is not None}

    exact = gradients(reference, torch.float64)
    eager = gradients(reference, None)
    actual = gradients(lambda tail: fn(**call_arguments(tail)), None)
    if actual.keys() != eager.keys():
        raise AssertionError(f"{problem}: gradients for {sorted(actual)}, expected {sorted(eager)}")
    for name, value in actual.items():
        difference = (eager[name].to(torch.float64) - exact[name]).abs()
        error = float(difference.max()) if difference.numel() else 0.0
        assert_within_bar(value, error, exact[name], f"{problem}: gradient of {name}", GRADIENT_FACTOR)


def _near_corner(problem: Problem, seed: int) -> Tensor:
    """Where an implementation within the bar may find itself on either side of a corner of the activation."""
    corners = {"relu": (0.0,), "relu6": (0.0, 6.0), "none": ()}[problem.activation]
    linear = dataclasses.replace(problem, activation="none")
    z = reference(make_tail(linear, "random", seed).to(torch.float64))
    reach = FORWARD_FACTOR * eager_error(linear, seed) + ROUNDING[problem.output_dtype] * z.abs()
    near = torch.zeros_like(z, dtype=torch.bool)
    for corner in corners:
        near |= (z - corner).abs() <= reach
    return near
