"""What an encoder hands to a connector: tokens that know where on the image they sit."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlm_lab.batch import Grid, Layout, unpadded


class FeatureMap(NamedTuple):
    """Patch tokens of V views. `tokens [V, N, C]` are row-major over `grid (h, w)`, N == h * w.

    `mask [V, N]` is True on real patches; None means that every patch is real (no padding). A tuple, because ZeRO-3
    looks for tensors in what modules return, and does not look into other classes.
    """

    tokens: Tensor
    grid: tuple[int, int]
    mask: Tensor | None = None


def without_padding(feature: FeatureMap, layouts: Sequence[Layout]) -> FeatureMap:
    """Masks the patches that padded an image to its square view, where the layouts say so (Cambrian-1's key masks)."""
    if all(layout.padded is None for layout in layouts):
        return feature
    views = [real(layout.padded, feature.grid) for layout in layouts for _ in range(layout.views)]
    return feature._replace(mask=torch.stack(views).to(feature.tokens.device))


def real(size: tuple[int, int] | None, grid: Grid) -> Tensor:
    """True on the patches [h * w] that an image of `size`, in the middle of a square, covers."""
    mask = torch.zeros(grid, dtype=torch.bool)
    (top, left), (height, width) = ((0, 0), grid) if size is None else unpadded(size, grid)
    mask[top : top + height, left : left + width] = True
    return mask.flatten()
