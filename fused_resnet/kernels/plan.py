"""From a problem and a configuration to one launch: compile-time arguments, grid, run-time sizes, workspace."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..problem import Problem
from .arguments import COUNTERS, Conv, Tile
from .config import TailConfig


@dataclass(frozen=True)
class TailPlan:
    """All that a launch needs besides its tensors."""

    conv: Conv
    proj_conv: Conv | None
    tile: Tile
    grid: tuple[int, int]
    sizes: tuple[int, int, int, int, int, int, int]  # M, H, W, P, Q, and the projection's H and W
    workspace_bytes: int  # zero before the first launch; a launch leaves what must be zero so


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


def plan(problem: Problem, config: TailConfig, programs: int, interpreting: bool = False) -> TailPlan:
    """The launch of `problem` with `config`; `programs` is the grid of a persistent one."""
    proj = problem.projection
    proj_conv = None
    if proj is not None:
        wide = _is_wide(problem, config.m, proj.h * proj.w * proj.c)
        proj_conv = Conv(proj.c, problem.k, stride_h=proj.stride[0], stride_w=proj.stride[1], wide=wide)
    tile = Tile(
        config.m, config.n, config.k, config.warps, config.stages, precision(problem, interpreting),
        activation=problem.activation, split_k=config.split_k, ordered=config.ordered, persistent=config.persistent,
    )  # fmt: skip
    pixels = problem.n * problem.p * problem.q
    tiles = -(-pixels // config.m) * -(-problem.k // config.n)
    workspace = 0
    if config.split_k > 1:
        if tiles > COUNTERS:
            raise ValueError(f"split_k: expected at most {COUNTERS} tiles, got {tiles}: {config} is for small outputs")
        partial_tiles = tiles * (config.split_k if config.ordered else 1)
        workspace = 4 * (COUNTERS + partial_tiles * config.m * config.n)
    return TailPlan(
        conv_of(problem, config),
        proj_conv,
        tile,
        (min(tiles, programs) if config.persistent else tiles, config.split_k),
        (pixels, problem.h, problem.w, problem.p, problem.q, proj.h if proj else 0, proj.w if proj else 0),
        workspace,
    )
