"""Patch grids: resizing, pooling, windows and means of a `FeatureMap`, shared by the spatial connectors.

A masked patch (padding) never influences a result: means and interpolations run over the real patches only. Where an
official repository lets padding leak in (Cambrian's bilinear resize and global mean do), this is the one difference.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_lab.model.connectors import Grid
from vlm_lab.model.features import FeatureMap


def to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """[V, h*w, C] -> [V, C, h, w]."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def to_tokens(maps: Tensor) -> Tensor:
    """[V, C, h, w] -> [V, h*w, C]."""
    return maps.flatten(2).transpose(1, 2)


def real_tokens(feature: FeatureMap) -> Tensor:
    """Tokens with zeros in place of masked patches, [V, N, C]."""
    return feature.tokens if feature.mask is None else feature.tokens.masked_fill(~feature.mask[..., None], 0)


def resize(feature: FeatureMap, size: Grid) -> FeatureMap:
    """Bilinear to `size` in float32 or better, half-pixel centres, no antialiasing (as Cambrian's encoders do)."""
    if feature.grid == size:
        return feature
    return _average(feature, partial(F.interpolate, size=size, mode="bilinear", align_corners=False))


def pool(feature: FeatureMap, size: Grid) -> FeatureMap:
    """Adaptive average over the patches of each cell of `size`; a cell of padding only is zero."""
    return _average(feature, partial(F.adaptive_avg_pool2d, output_size=size))


def _average(feature: FeatureMap, weigh: Callable[[Tensor], Tensor]) -> FeatureMap:
    """`weigh` [V, C, h, w] -> [V, C, H, W] takes weighted means; here the weights of masked patches go to the rest."""
    dtype = torch.promote_types(feature.tokens.dtype, torch.float32)
    out = weigh(to_map(real_tokens(feature).to(dtype), feature.grid))  # [V, C, H, W]
    mask = None
    if feature.mask is not None:
        share = weigh(to_map(feature.mask[..., None].to(dtype), feature.grid))  # [V, 1, H, W], real part of each cell
        out = out / share.clamp(min=torch.finfo(dtype).tiny)
        mask = share.flatten(1) >= 0.5
    return FeatureMap(to_tokens(out).to(feature.tokens.dtype), (out.shape[2], out.shape[3]), mask)


def cut_windows(tokens: Tensor, grid: Grid, cells: Grid) -> Tensor:
    """Cut a map into one window per cell: [V, h*w, C] -> [V*H*W, (h/H)*(w/W), C], all row-major."""
    v, _, c = tokens.shape
    (h, w), (rows, cols) = grid, cells
    assert h % rows == 0 and w % cols == 0, f"a {h} x {w} map has no equal windows for {rows} x {cols} cells"
    blocks = tokens.reshape(v, rows, h // rows, cols, w // cols, c).transpose(2, 3)  # [V, H, W, a, b, C]
    return blocks.reshape(v * rows * cols, (h // rows) * (w // cols), c)


def window_mask(feature: FeatureMap, cells: Grid) -> Tensor:
    """True on the real patches of each cell's window, [V*H*W, window]."""
    mask = feature.mask
    if mask is None:
        mask = torch.ones(feature.tokens.shape[:2], dtype=torch.bool, device=feature.tokens.device)
    return cut_windows(mask[..., None], feature.grid, cells)[..., 0]


def mean(feature: FeatureMap) -> Tensor:
    """Mean over the real patches, [V, C]; zero for a view of padding only."""
    if feature.mask is None:
        return feature.tokens.mean(1)
    return real_tokens(feature).sum(1) / feature.mask.sum(1, keepdim=True).clamp(min=1)
