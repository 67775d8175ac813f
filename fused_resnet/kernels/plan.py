"""From a problem and a configuration to one launch: compile-time arguments, grid, run-time sizes, workspace."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.problem import Problem
from .arguments import COUNTERS, Conv, Tile
from .config import TailConfig


@dataclass(frozen=True)
class Descriptor:
    """A tensor as TMA sees it: sizes, strides in elements, and the box that one copy takes; outermost dimension
    first.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


@dataclass(frozen=True)
class TailPlan:
    """All that a launch needs besides its tensors."""

    conv: Conv
    proj_conv: Conv | None
    tile: Tile
    grid: tuple[int, int]
    sizes: tuple[int, ...]  # M, H, W, P, Q, and the projection's H and W; with tensor descriptors N, P, Q
    tiles: int
    workspace_bytes: int  # zero before the first launch; a launch leaves what must be zero so
    descriptors: tuple[Descriptor, ...] = ()  # of x, weight, proj_x and proj_weight


def precision(problem: Problem, interpreting: bool) -> str:
    """How the dot treats its operands, see Tile.precision."""
    if interpreting:
        return "upcast"
    if problem.dtype is not torch.float32:
        return "tensor"
    return "tf32_rna" if problem.tf32 else "ieee"


def _is_wide(problem: Problem, pixels_per_tile: int, image: int) -> bool:
    """Whether offsets from a tile's first image, into all the images that its pixels touch, pass 31 bits."""
    images = pixels_per_tile // (problem.p * problem.q) + 2
    return images * image >= 2**31


def conv_of(problem: Problem, config: TailConfig) -> Conv:
    r, s, c = problem.r, problem.s, problem.c
    plain = Conv(c, problem.k, r, s, *problem.stride, *problem.padding, *problem.dilation)
    fused = Conv(c, problem.k, r, s, *problem.stride, *problem.padding, *problem.dilation, fuse_s=True)
    fuse_s = s > 1 and problem.dilation[1] == 1 and fused.steps(config.k) < plain.steps(config.k)
    if problem.padding == (0, 0) and not fuse_s:
        halo = "none"
    else:
        halo = "bits" if r * (1 if fuse_s else s) <= 32 else "compare"
    # the furthest tap lies below the last row of a tile's last image
    wide = _is_wide(problem, config.m, (problem.h + r * problem.dilation[0]) * problem.w * c)
    return Conv(c, problem.k, r, s, *problem.stride, *problem.padding, *problem.dilation, halo, fuse_s, wide)


def _workspace_bytes(config: TailConfig, tiles: int) -> int:
    if config.split_k == 1:
        return 0
    if tiles > COUNTERS:
        raise ValueError(f"split_k: expected at most {COUNTERS} tiles, got {tiles}: {config} is for small outputs")
    return 4 * (COUNTERS + tiles * (config.split_k if config.ordered else 1) * config.m * config.n)


def _tile(problem: Problem, config: TailConfig, precision: str, box: tuple[int, int, int] = (1, 1, 1)) -> Tile:
    return Tile(
        config.m, config.n, config.k, config.warps, config.stages, precision, activation=problem.activation,
        split_k=config.split_k, ordered=config.ordered, persistent=config.persistent, box=box,
    )  # fmt: skip


def plan(problem: Problem, config: TailConfig, programs: int, interpreting: bool = False) -> TailPlan:
    """The launch of `problem` with `config`; `programs` is the grid of a persistent one."""
    if config.tma:
        return _plan_tma(problem, config, programs, interpreting)
    proj = problem.projection
    proj_conv = None
    if proj is not None:
        wide = _is_wide(problem, config.m, proj.h * proj.w * proj.c)
        proj_conv = Conv(proj.c, problem.k, stride_h=proj.stride[0], stride_w=proj.stride[1], wide=wide)
    pixels = problem.n * problem.p * problem.q
    tiles = -(-pixels // config.m) * -(-problem.k // config.n)
    return TailPlan(
        conv_of(problem, config),
        proj_conv,
        _tile(problem, config, precision(problem, interpreting)),
        (min(tiles, programs) if config.persistent else tiles, config.split_k),
        (pixels, problem.h, problem.w, problem.p, problem.q, proj.h if proj else 0, proj.w if proj else 0),
        tiles,
        _workspace_bytes(config, tiles),
    )


# ---- tensor descriptors ------------------------------------------------------------------------------------


def choose_box(m: int, n: int, p: int, q: int) -> tuple[int, int, int]:
    """Images, rows and columns (powers of two, m pixels in all) that cover n*p*q pixels with the fewest boxes.

    Among equals the widest rows: they are contiguous in memory, and images the last to be joined.
    """
    powers = [2**i for i in range(m.bit_length())]
    boxes = [(m // h // w, h, w) for w in reversed(powers) for h in reversed(powers) if h * w <= m]
    return min(boxes, key=lambda box: -(-n // box[0]) * -(-p // box[1]) * -(-q // box[2]))


def _plan_tma(problem: Problem, config: TailConfig, programs: int, interpreting: bool) -> TailPlan:
    n, h, w, c, p, q = problem.n, problem.h, problem.w, problem.c, problem.p, problem.q
    proj, (stride_h, stride_w) = problem.projection, problem.stride
    pointwise = (problem.r, problem.s) == (1, 1) and problem.padding == (0, 0)
    strides = [1, 1] + ([*proj.stride] if proj else [])
    if pointwise and max(stride_h, stride_w, *strides) == 1:
        # every pixel is read by its own output pixel: boxes of one long row fit without remainder
        n, h, w, p, q = 1, 1, n * h * w, 1, n * p * q
        box = (1, 1, config.m)
        proj_shape = (n, h, w)
        proj_strides = (h * w, w, 1)
    else:
        box = choose_box(config.m, n, p, q)
        proj_shape = (n, p, q)
        proj_strides = (proj.h * proj.w, proj.stride[0] * proj.w, proj.stride[1]) if proj else (0, 0, 0)
    if pointwise:  # the pixels that the outputs read, as if no others were there
        x_shape, x_strides = (n, p, q), (h * w, stride_h * w, stride_w)
    else:
        x_shape, x_strides = (n, h, w), (h * w, w, 1)

    def pixels(shape: tuple[int, ...], strides: tuple[int, ...], c: int) -> Descriptor:
        return Descriptor((*shape, c), (*(s * c for s in strides), 1), (*box, config.k))

    def filters(taps: int, c: int) -> Descriptor:
        return Descriptor((problem.k, taps * c), (taps * c, 1), (config.n, config.k))

    descriptors = [pixels(x_shape, x_strides, c), filters(problem.r * problem.s, c)]
    proj_conv = None
    if proj is not None:
        descriptors += [pixels(proj_shape, proj_strides, proj.c), filters(1, proj.c)]
        proj_conv = Conv(proj.c, problem.k)
    conv = Conv(c, problem.k, problem.r, problem.s, 1, 1, *problem.padding, *problem.dilation)
    boxes = -(-n // box[0]) * -(-p // box[1]) * -(-q // box[2])
    tiles = boxes * -(-problem.k // config.n)
    return TailPlan(
        conv,
        proj_conv,
        _tile(problem, config, precision(problem, interpreting), box),
        (min(tiles, programs) if config.persistent else tiles, config.split_k),
        (n, p, q),
        tiles,
        _workspace_bytes(config, tiles),
        tuple(descriptors),
    )
