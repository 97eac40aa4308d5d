"""From the connector's tokens per view to the sequence that replaces the placeholders, as the tilings laid it out.

Sources: LLaVA-NeXT's and LLaVA-OneVision's `prepare_inputs_labels_for_multimodal` ("spatial_unpad", newline in every
row, bilinear token cap, pooled frames). The geometry itself is decided on the data side (vlm_lab/data/tiling).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_lab.batch import Block, Grid, Layout


def arrange(tokens: Tensor, grid: Grid, layouts: Sequence[Layout], newline: Tensor | None) -> Tensor:
    """tokens [V, T, D] on `grid` (h, w), T = h * w; newline [1, D] -> [sum of num_tokens, D] in reading order."""
    blocks = [block for layout in layouts for block in layout.blocks]
    if (views := sum(block.views for block in blocks)) != len(tokens):
        raise ValueError(f"{views} views laid out but {len(tokens)} encoded")
    parts = tokens.unflatten(1, grid).split([block.views for block in blocks])
    return torch.cat([run(part, block, newline) for part, block in zip(parts, blocks, strict=True)])


def run(views: Tensor, block: Block, newline: Tensor | None) -> Tensor:
    """views [rows * columns, h, w, D] -> the block's tokens [num_tokens, D]."""
    raster = merge(views, block.tiles)  # [H, W, D]
    (top, left), (height, width) = block.offset, block.crop
    if top + height > raster.shape[0] or left + width > raster.shape[1]:
        raise ValueError(f"a {height} x {width} part of tokens at {top}, {left} laid out, on {tuple(raster.shape[:2])}")
    raster = scale(raster[top : top + height, left : left + width], block.size)
    if block.newline == "row":
        raster = torch.cat([raster, ends(newline, raster).expand(len(raster), 1, -1)], dim=1)
    sequence = raster.flatten(0, 1)
    return torch.cat([sequence, ends(newline, raster)]) if block.newline == "end" else sequence


def merge(views: Tensor, tiles: Grid) -> Tensor:
    """Views in reading order, side by side: [rows * columns, h, w, D] -> [rows * h, columns * w, D]."""
    return views.unflatten(0, tiles).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def scale(raster: Tensor, size: Grid) -> Tensor:
    """Bilinear to `size`, half-pixel centres, no antialiasing: [H, W, D] -> [*size, D]."""
    if raster.shape[:2] == size:
        return raster
    maps = raster.permute(2, 0, 1)[None]  # [1, D, H, W]
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)


def ends(newline: Tensor | None, raster: Tensor) -> Tensor:
    """The newline embedding [1, D] in the tokens' type."""
    if newline is None:
        raise ValueError("the layouts ask for newlines, but the VLM was built without: VLM(..., newline=True)")
    return newline.to(raster.dtype)
