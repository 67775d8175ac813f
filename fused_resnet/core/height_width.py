"""Arguments that are one number for height and width, or a number for each."""

from __future__ import annotations

from collections.abc import Sequence

HeightWidth = int | tuple[int, int]


def height_width(name: str, value: HeightWidth | Sequence[int]) -> tuple[int, int]:
    """``value`` as (height, width); TypeError names the argument ``name``."""
    if isinstance(value, int):
        return (value, value)
    if isinstance(value, (tuple, list)) and len(value) in (1, 2):
        return (value[0], value[-1])
    raise TypeError(f"{name}: expected an int or a pair of ints, got {value!r}")


def conv_geometry(
    stride: HeightWidth, padding: HeightWidth, dilation: HeightWidth
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """A convolution's three pairs, each as (height, width)."""
    return height_width("stride", stride), height_width("padding", padding), height_width("dilation", dilation)
