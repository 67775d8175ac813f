"""The comparison that a plan must pass before it is used.

A plan is a rewriting of code, so what is compared is the code: the module and its rewritten twin run in float64 on
the reference backend, on copies with random weights (no gamma, scale or running statistic is left at a value that
could hide a difference), narrower where that says the same, in training and eval mode, at two odd sizes. Outputs, the
gradients of the input and of every parameter, and the buffers afterwards must agree. How accurately a backend computes
the tail is another question (``fused_resnet.testing``, ``fused-resnet verify``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .copies import StandIn, channels_read, on_meta, outside, randomised
from .narrow import Narrowing, narrowing
from .plan import Fusion, attach
from .program import Plan

# Float64 on both sides, the same operations in another order: rounding differs by some 1e-14 of the largest
# value, batch statistics over few pixels magnify that; anything a plan could get wrong is above 1e-5.
_TOLERANCE = 1e-9
# A difference above it is rounding where the original moves as far when each of its steps is wrong by this much, 2^12
# roundings, more than a sum of 10 000 products is off; and says nothing where the original moves more than _TELLS.
_DISTURBANCE = 2.0**-40
_TELLS = 1e-6
#: How the verdict on a module begins that takes no image by itself.
NEVER_RUNS = "cannot be compared: its own forward fails on a float64 copy"
_PIXELS = 12
# Sizes are odd, so that a wrong stride or padding shows; the last two are for modules that insist on multiples.
_SIZES = (
    ((9, 7), (6, 11)),
    ((37, 33), (35, 46)),
    ((97, 65), (75, 131)),
    ((16, 24), (8, 32)),
    ((64, 96), (96, 32)),
)


def difference(module: nn.Module, plan: Plan, opaque: dict[int, nn.Module]) -> str | None:
    """None when ``plan`` computes what ``module`` computes, else a clause that says where they differ.

    ``opaque`` are submodules, from images to images, that both call as a whole: cheap stand-ins replace them.
    ``module`` is only copied: its tensors, mode and hooks, and the random states, stay as they are.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.inference_mode(False), one_thread():
        return _difference(module, plan, opaque)


@contextmanager
def one_thread() -> Iterator[None]:
    """Many small operations: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _difference(module: nn.Module, plan: Plan, opaque: dict[int, nn.Module]) -> str | None:
    narrower = narrowing(module, list(outside(module, opaque)))
    if narrower is not None:
        verdict = _compare(module, plan, opaque, narrower)
        if verdict is None or not verdict.startswith("cannot be") or not _takes_any(module):
            return verdict
    return _compare(module, plan, opaque, None)


def _takes_any(module: nn.Module) -> bool:
    """Whether ``module`` takes images of any of the sizes, on a device where nothing is computed."""
    for channels in dict.fromkeys(channels_read(module)):
        for (height, width), _ in _SIZES:
            try:
                on_meta(module)(torch.empty(2, channels, height, width, device="meta", dtype=torch.float64))
            except Exception:
                continue
            return True
    return False


def _compare(module: nn.Module, plan: Plan, opaque: dict[int, nn.Module], narrower: Narrowing | None) -> str | None:
    torch.manual_seed(0)
    try:
        original = randomised(module, {key: StandIn(m, narrower) for key, m in opaque.items()}, narrower)
        twin = copy.deepcopy(original)
        attach(twin, Fusion(plan, backend="eager", expands=False))
    except Exception as error:
        return f"cannot be copied for the comparison ({_first_line(error)})"
    problem = _why_not_fused(twin, plan)
    if problem is not None:
        return f"cannot be compared: {problem}"
    channels, candidates, why_not = _accepted_inputs(original)
    for sizes in candidates:
        try:
            return _compare_at(original, twin, channels, sizes)
        except _Undecided as undecided:
            why_not = f"cannot be compared: {undecided}"
    return why_not


class _Undecided(Exception):
    """A comparison that says nothing; the message is a clause that says why."""


def _why_not_fused(twin: nn.Module, plan: Plan) -> str | None:
    """None where ``twin`` would run the programs of ``plan`` in both modes: else it is compared with itself."""
    problem = None
    for training in (True, False):
        _set_mode(twin, training)
        problem = problem or plan.choose(twin)[1]
    return problem


def _compare_at(original: nn.Module, twin: nn.Module, channels: int, sizes: tuple[tuple[int, int], ...]) -> str | None:
    for training in (True, False):
        for seed, size in enumerate(sizes):
            x = _image(channels, size, seed)
            grad = seed == 0  # with gradients at one size, without (another way through the operator) at the other
            try:
                right = _run(original, x, training, grad)
            except Exception as error:
                raise _Undecided(f"its own backward fails ({_first_line(error)})") from error
            mode = "training" if training else "eval"
            try:
                got = _run(twin, x, training, grad)
            except Exception as error:
                return f"differs from its fused form, which fails in {mode} mode ({_first_line(error)})"
            where = _first_difference(right, got, {})
            if where is not None:
                with _disturbed(original):
                    where = _first_difference(right, got, _spread(right, _run(original, x, training, grad)))
            if where is not None:
                return f"differs from its fused form: in {mode} mode, at {size[0]}x{size[1]}, {where}"
    return None


@contextmanager
def _disturbed(module: nn.Module) -> Iterator[None]:
    """Have every convolution and batch norm of ``module`` be wrong by a relative :data:`_DISTURBANCE`."""
    generator = torch.Generator().manual_seed(3)

    def disturb(_: nn.Module, __: Any, y: Any) -> Any:
        if not isinstance(y, Tensor):
            return y
        signs = torch.randint(0, 2, y.shape, generator=generator, dtype=y.dtype).mul_(2).sub_(1)
        return y * (1 + _DISTURBANCE * signs)

    handles = [m.register_forward_hook(disturb) for m in module.modules() if isinstance(m, (nn.Conv2d, _BatchNorm))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _spread(right: list[tuple[str, Any]], disturbed: list[tuple[str, Any]]) -> dict[str, float]:
    """By name, how far each result moves when every step is wrong by far more than rounding is."""
    spread = {}
    for (name, a), (_, b) in zip(right, disturbed, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point() and a.shape == b.shape:
            spread[name] = float((a - b).abs().max()) if a.numel() else 0.0
            if not spread[name] <= _TELLS * (1 + float(a.abs().max() if a.numel() else 0)):
                raise _Undecided(
                    f"{name} depends on rounding (a step's error grows {spread[name] / _DISTURBANCE:.0e}x)"
                )
    return spread


def _accepted_inputs(module: nn.Module) -> tuple[int, list[tuple[tuple[int, int], ...]], str | None]:
    """Channels and pairs of sizes that the module's own forward takes, best first, or a clause that says why none.

    First the pair at which every batch norm sees enough pixels: statistics of a handful of values magnify rounding,
    and next to nothing of a 3 x 3 filter shows on one pixel. Behind a global pool there are never more.
    """
    channels = list(dict.fromkeys(channels_read(module)))
    problem = None
    pixels: list[int] = []

    def count(_: nn.Module, args: Any) -> None:
        pixels.append(args[0].numel() // args[0].shape[1])

    handles = [m.register_forward_pre_hook(count) for m in module.modules() if isinstance(m, _BatchNorm)]
    try:
        # Usually the first convolution reads the input; a later one, or two groups of it, in blocks that split it.
        for candidate in dict.fromkeys((channels[0], 2 * channels[0], *channels[1:3])):
            accepted: list[tuple[tuple[tuple[int, int], ...], list[int]]] = []
            for sizes in _SIZES:
                try:
                    pixels.clear()
                    for size in sizes:
                        _run(module, _image(candidate, size, 0), True, grad=False)
                except Exception as error:
                    problem = problem or _first_line(error)
                    continue
                accepted.append((sizes, list(pixels)))
                if _has_enough(accepted):
                    break
            if accepted:
                return candidate, [sizes for sizes, _ in reversed(accepted)], None
        return 0, [], f"{NEVER_RUNS} ({problem})"
    finally:
        for handle in handles:
            handle.remove()


def _has_enough(accepted: list[tuple[Any, list[int]]]) -> bool:
    counts = accepted[-1][1]
    before = accepted[-2][1] if len(accepted) > 1 and len(accepted[-2][1]) == len(counts) else [0] * len(counts)
    return all(now >= _PIXELS or now == was for now, was in zip(counts, before, strict=True))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].rstrip('.')}" if text else type(error).__name__


# ---- running and comparing -----------------------------------------------------------------------------------


def _image(channels: int, size: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # NCHW throughout: dropout draws its mask in the order of memory, which must be the same on both sides.
    return torch.randn(2, channels, *size, dtype=torch.float64, generator=generator)


def _tensors(value: Any, path: str = "output") -> Iterator[tuple[str, Any]]:
    """The tensors of a nested result, each with where it is; types that are not containers are yielded as types."""
    if isinstance(value, dict):
        yield f"{path} type", (type(value), tuple(value))
        for key, item in value.items():
            yield from _tensors(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        yield f"{path} type", (type(value), len(value))
        for i, item in enumerate(value):
            yield from _tensors(item, f"{path}[{i}]")
    else:
        yield path, value


def _run(module: nn.Module, x: Tensor, training: bool, grad: bool = True) -> list[tuple[str, Any]]:
    """Everything observable of one forward and backward of ``module``, by name."""
    _set_mode(module, training)
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    try:
        return _observe(module, x, grad)
    finally:
        for name, b in module.named_buffers():
            b.copy_(buffers[name])  # as it was, for the next run


def _set_mode(module: nn.Module, training: bool) -> None:
    for m in module.modules():
        m.training = training


def _observe(module: nn.Module, x: Tensor, grad: bool) -> list[tuple[str, Any]]:
    torch.manual_seed(1)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        # Not the leaf itself: blocks that change their input in place are allowed to.
        inner = x * 1.0
        seen = list(_tensors(module(inner)))
        seen.append(("the input afterwards", inner))
        if grad:
            generator = torch.Generator().manual_seed(2)
            loss = torch.zeros((), dtype=torch.float64)
            for _, value in seen:
                if isinstance(value, Tensor) and value.requires_grad:
                    weights = torch.randn(value.shape, dtype=torch.float64, generator=generator)
                    loss = loss + (value * weights).sum()
            parameters = [(f"the gradient of {n}", p) for n, p in module.named_parameters() if p.requires_grad]
            leaves = [("the gradient of the input", x), *parameters]
            grads = torch.autograd.grad(loss, [t for _, t in leaves], allow_unused=True)
            seen += [(name, g) for (name, _), g in zip(leaves, grads, strict=True)]
    seen += [(f"the buffer {name}", b.clone()) for name, b in module.named_buffers()]
    return [(name, v.detach() if isinstance(v, Tensor) else v) for name, v in seen]


def _first_difference(
    expected: list[tuple[str, Any]], got: list[tuple[str, Any]], spread: dict[str, float]
) -> str | None:
    if [name for name, _ in expected] != [name for name, _ in got]:
        return "the output has another structure"
    for (name, a), (_, b) in zip(expected, got, strict=True):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            if type(a) is not type(b) or a != b:
                return f"{name} differs ({a!r} and {b!r})"
        elif a.shape != b.shape or a.dtype != b.dtype:
            return f"{name} is {b.dtype} {tuple(b.shape)} instead of {a.dtype} {tuple(a.shape)}"
        elif torch.equal(a, b):
            continue
        elif a.is_floating_point():
            error = float((a - b).abs_().max())
            if not error <= max(_TOLERANCE * (1 + float(a.abs().max())), spread.get(name, 0.0)):
                return f"{name} differs by {error:.2g}"
        else:
            return f"{name} differs"
    return None
