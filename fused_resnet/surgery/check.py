"""The comparison that a plan must pass before it is used.

A plan is a rewriting of code, so what is compared is the code: the module and its rewritten twin run in float64 on
the reference backend, on copies with random weights (no gamma, scale or running statistic is left at a value that
could hide a difference), in training and eval mode, at two odd sizes. Outputs, the gradients of
the input and of every parameter, and the buffers afterwards must agree. How accurately a backend computes the tail
is another question (``fused_resnet.testing``, ``fused-resnet verify``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .plan import Fusion, attach
from .program import Plan
from .trace import is_batch_norm, tensors_of, without_hooks

# Float64 on both sides, the same operations in another order: rounding differs by some 1e-14 of the largest
# value, batch statistics over few pixels magnify that; anything a plan could get wrong is above 1e-5.
_TOLERANCE = 1e-9
# The first pair that the module itself accepts is used. Sizes are odd, so that a wrong stride or padding shows; the
# last two are for modules that insist on multiples.
_PIXELS = 12
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
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.inference_mode(False):
        torch.set_num_threads(1)  # many small operations: threads would only wait for one another
        try:
            return _difference(module, plan, opaque)
        finally:
            torch.set_num_threads(threads)


def _difference(module: nn.Module, plan: Plan, opaque: dict[int, nn.Module]) -> str | None:
    torch.manual_seed(0)
    try:
        original = randomised(module, {key: StandIn(m) for key, m in opaque.items()})
        twin = copy.deepcopy(original)
        attach(twin, Fusion(plan, backend="eager", expands=False))
    except Exception as error:
        return f"cannot be copied for the comparison ({_first_line(error)})"
    channels, sizes, problem = _accepted_input(original)
    if problem is not None:
        return problem
    for training in (True, False):
        for seed, size in enumerate(sizes):
            x = _image(channels, size, seed)
            grad = seed == 0  # with gradients at one size, without (another way through the operator) at the other
            try:
                right = _run(original, x, training, grad)
            except Exception as error:
                return f"cannot be compared: its own backward fails ({_first_line(error)})"
            mode = "training" if training else "eval"
            try:
                where = _first_difference(right, _run(twin, x, training, grad))
            except Exception as error:
                return f"differs from its fused form, which fails in {mode} mode ({_first_line(error)})"
            if where is not None:
                return f"differs from its fused form: in {mode} mode, at {size[0]}x{size[1]}, {where}"
    return None


def _accepted_input(module: nn.Module) -> tuple[int, tuple[tuple[int, int], ...], str | None]:
    """Channels and sizes that the module's own forward takes, or a clause that says why none could be found.

    Sizes at which a batch norm sees few pixels come last: statistics of a handful of values magnify rounding.
    """
    channels = list(dict.fromkeys(m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d)))
    problem = None
    pixels: list[int] = []
    otherwise: tuple[int, tuple[tuple[int, int], ...]] | None = None

    def count(_: nn.Module, args: Any) -> None:
        pixels.append(args[0].numel() // args[0].shape[1])

    handles = [m.register_forward_pre_hook(count) for m in module.modules() if isinstance(m, _BatchNorm)]
    try:
        # Usually the first convolution reads the input; a later one, or two groups of it, in blocks that split it.
        for candidate in (channels[0], 2 * channels[0], *channels[1:3]):
            for sizes in _SIZES:
                try:
                    pixels.clear()
                    for size in sizes:
                        _run(module, _image(candidate, size, 0), True, grad=False)
                except Exception as error:
                    problem = problem or _first_line(error)
                    continue
                if min(pixels, default=_PIXELS) >= _PIXELS:
                    return candidate, sizes, None
                otherwise = otherwise or (candidate, sizes)  # behind a global pool there are never more
        if otherwise is not None:
            return *otherwise, None
        return 0, (), f"cannot be compared: its own forward fails on a float64 copy ({problem})"
    finally:
        for handle in handles:
            handle.remove()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].rstrip('.')}" if text else type(error).__name__


def randomised(module: nn.Module, replacements: dict[int, nn.Module]) -> nn.Module:
    """A float64 CPU copy of ``module`` with random tensors and no hooks; submodules replaced as told, by id."""
    memo: dict[int, Any] = dict(replacements)
    generator = torch.Generator().manual_seed(0)
    norms = {id(t) for m in module.modules() if is_batch_norm(m) for t in m.parameters(recurse=False)}
    kept = {id(t) for m in _outside(module, replacements) for _, t in _own_tensors(m)}
    for name, tensor in tensors_of(module):
        if id(tensor) in kept:
            memo[id(tensor)] = _random_like(name, tensor, id(tensor) in norms, generator)
    return copy.deepcopy(module, without_hooks(module, memo))


def _outside(module: nn.Module, replacements: dict[int, nn.Module]) -> Iterator[nn.Module]:
    if id(module) not in replacements:
        yield module
        for child in module.children():
            yield from _outside(child, replacements)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _random_like(name: str, tensor: Tensor, in_norm: bool, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        value = torch.zeros(tensor.shape, dtype=tensor.dtype)
        return value if tensor.is_meta else value.copy_(tensor.detach())
    uniform = torch.rand(tensor.shape, generator=generator).double()
    if name.endswith("running_var"):
        value = 0.25 + 2 * uniform
    elif name.endswith("running_mean"):
        value = uniform - 0.5
    elif tensor.dim() <= 1 or in_norm:  # scales and shifts: of either sign, none near zero
        value = torch.where(uniform < 0.5, -0.5 - 2 * uniform, 2 * uniform - 0.5)
    else:
        value = (uniform - 0.5) * (12 / max(tensor[0].numel(), 1)) ** 0.5
    return nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value


class StandIn(nn.Module):
    """Takes the place of a submodule that both sides call as a whole: the same shapes, next to no work."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # Not registered: its tensors are on no device and take no part in the comparison.
        self.__dict__["meta"] = _on_meta(module)
        self.shapes: dict[tuple[int, ...], tuple[int, ...]] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = tuple(x.shape)
        if key not in self.shapes:
            with torch.no_grad():
                self.shapes[key] = tuple(self.__dict__["meta"](torch.empty(key, device="meta", dtype=x.dtype)).shape)
        _, channels, height, width = self.shapes[key]
        y = F.adaptive_avg_pool2d(x, (height, width))
        # Linear and never expanding: a hundred stand-ins in a row must not magnify rounding.
        return y[:, torch.arange(channels) % x.shape[1]]

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        return self  # it holds no state that a run could change


def _on_meta(module: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for _, tensor in tensors_of(module):
        dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, without_hooks(module, memo)).eval()


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
    for m in module.modules():
        m.training = training
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    try:
        return _observe(module, x, grad)
    finally:
        for name, b in module.named_buffers():
            b.copy_(buffers[name])  # as it was, for the next run


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


def _first_difference(expected: list[tuple[str, Any]], got: list[tuple[str, Any]]) -> str | None:
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
            if not error <= _TOLERANCE * (1 + float(a.abs().max())):
                return f"{name} differs by {error:.2g}"
        else:
            return f"{name} differs"
    return None
