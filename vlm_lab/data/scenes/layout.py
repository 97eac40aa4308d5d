"""Where things go in a made-up picture, and how they are drawn by lot: sizes of pictures, grids, bands, boxes.

Nothing here knows what is placed. All lengths are pixels.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.random import Generator

RADII = {"small": 0.26, "medium": 0.34, "large": 0.43}  # in shorter sides of a grid's cell
ROOMY = 4  # so many objects at most have large cells

Size = tuple[int, int]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1
Item = TypeVar("Item")


def image_size(rng: Generator, wide: bool | None = None) -> Size:
    """(width, height): sides of 80 to 200 pixels, aspect 1:2 to 2:1, mostly near 1; `wide=None`: either orientation."""
    longer = int(rng.integers(110, 201))
    shorter = round(longer / (1 + rng.random() ** 2 * (min(2.0, longer / 80) - 1)))
    wide = bool(rng.random() < 0.5) if wide is None else wide
    return (longer, shorter) if wide else (shorter, longer)


def grid(size: Size, n: int) -> tuple[int, int]:
    """(columns, rows) of a grid with a cell for each of `n` objects: large ones if they are few."""
    square = max(size) < 1.4 * min(size)
    along, across = ((2, 2) if square else (3, 2)) if n <= ROOMY else ((3, 3) if square else (4, 2))
    return (along, across) if size[0] > size[1] else (across, along)


def radius(scale: str, size: Size, n: int) -> int:
    """Of an object among `n`, in pixels."""
    columns, rows = grid(size, n)
    return round(RADII[scale] * min(size[0] / columns, size[1] / rows))


def grid_centers(rng: Generator, size: Size, radii: list[int]) -> list[tuple[int, int]]:
    """Centers in different cells of a grid whose cells hold the largest shape: nothing overlaps."""
    columns, rows = grid(size, len(radii))
    boxes = [box for row in split_box((0, 0, *size), rows, False) for box in split_box(row, columns, True)]
    return [place(rng, box, r, r) for box, r in zip(some(rng, boxes, len(radii)), radii, strict=True)]


def split_box(box: Box, n: int, beside: bool, shares: Sequence[float] | None = None) -> list[Box]:
    """`n` boxes beside (left to right) or below each other (top to bottom), equal or by `shares` of their sum."""
    x0, y0, x1, y1 = box
    edges = np.cumsum([0.0, *(shares or [1 / n] * n)])
    spans = pairwise((edges / edges[-1]).tolist())
    if beside:
        return [(x0 + a * (x1 - x0), y0, x0 + b * (x1 - x0), y1) for a, b in spans]
    return [(x0, y0 + a * (y1 - y0), x1, y0 + b * (y1 - y0)) for a, b in spans]


def place(rng: Generator, box: Box, half_width: float, half_height: float) -> tuple[int, int]:
    """A random center at which something of this size stays inside the box.

    Only the middle half of the free room is used, so that things in neighboring boxes are surely apart by the margin
    that position questions ask for (`facts.PLACE_MARGIN`).
    """
    free_x = max(0.0, box[2] - box[0] - 2 * half_width) / 2
    free_y = max(0.0, box[3] - box[1] - 2 * half_height) / 2
    x = (box[0] + box[2]) / 2 + free_x * (rng.random() - 0.5)
    return round(x), round((box[1] + box[3]) / 2 + free_y * (rng.random() - 0.5))


def pick(rng: Generator, items: Sequence[Item]) -> Item:
    return items[int(rng.integers(len(items)))]


def shuffled(rng: Generator, items: Sequence[Item]) -> list[Item]:
    return [items[i] for i in rng.permutation(len(items))]


def some(rng: Generator, items: Iterable[Item], n: int) -> list[Item]:
    """`n` different items in random order."""
    return shuffled(rng, tuple(items))[:n]
