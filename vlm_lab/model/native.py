"""A timm Vision Transformer on views of different shapes: masked padding, positions spread over each view.

Source: Idefics2 (arXiv 2405.02246), NaViT's fractional positions, and transformers' `Idefics2VisionEmbeddings`. Row
i of n gets the learned position floor(i * S / n) of S: what transformers computes in float32, up to its rounding
at n = 25, 49, 50, 55 (S = 70). A patch is real if all its pixels are, as in transformers (Idefics2's own training
code: any). Not here: models with rotary positions, packing of several views into one sequence.
"""

from typing import Any

import torch
from torch import Tensor

from vlm_lab.batch import Grid
from vlm_lab.model.features import FeatureMap


def native_features(encoder: Any, pixels: Tensor, sizes: Tensor) -> FeatureMap:
    """What a `TimmEncoder` makes of uint8 pixels [V, 3, H, W] whose real part is sizes [V, 2] (height, width)."""
    model: Any = getattr(encoder, "model", None)
    if getattr(model, "pos_embed", None) is None:
        name = type(encoder if model is None else model).__name__
        raise ValueError(f"views of other shapes than the encoder's square need learned positions, {name} has none")
    patches = model.patch_embed.proj((pixels.to(encoder.shift.dtype) - encoder.shift) / encoder.scale)  # [V, C, h, w]
    grid, real = (patches.shape[2], patches.shape[3]), sizes // encoder.stride
    mask = real_patches(real, grid)  # [V, N], N = h * w
    tokens = model.patch_embed.norm(patches.flatten(2).transpose(1, 2))  # [V, N, C]
    x = with_positions(model, tokens, positions(real, grid, model.patch_embed.grid_size))
    prefix = x.shape[1] - tokens.shape[1]  # class and register tokens
    keys = torch.cat([mask.new_ones(len(mask), prefix), mask], dim=1)[:, None, None]  # [V, 1, 1, prefix + N]
    for block in model.blocks:
        x = block(x, attn_mask=keys)
    return FeatureMap((model.norm(x) if encoder.last else x)[:, prefix:], grid, mask)


def real_patches(real: Tensor, grid: Grid) -> Tensor:
    """True where a view has a patch: real [V, 2] -> [V, h * w]."""
    rows = torch.arange(grid[0], device=real.device) < real[:, :1]  # [V, h]
    columns = torch.arange(grid[1], device=real.device) < real[:, 1:]  # [V, w]
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


def positions(real: Tensor, grid: Grid, table: Grid) -> Tensor:
    """Indices [V, h * w] into a row-major `table` of learned positions; arbitrary where a patch is padding."""
    rows, columns = (buckets(real[:, axis], grid[axis], table[axis]) for axis in (0, 1))
    return (rows[:, :, None] * table[1] + columns[:, None, :]).flatten(1)


def buckets(real: Tensor, count: int, table: int) -> Tensor:
    """real [V] -> [V, count]: i of n patches takes position floor(i * table / n)."""
    steps = torch.arange(count, device=real.device)
    return (steps * table // real[:, None]).clamp(max=table - 1)


def with_positions(model: Any, tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [V, N, C] and the prefix tokens, as timm's `_pos_embed` does it -> [V, prefix + N, C]."""
    table = model.pos_embed[0]  # [P + rows * columns, C]; P > 0 if class and register tokens have positions
    own = len(table) - model.patch_embed.num_patches
    extra = [token for token in (model.cls_token, model.reg_token) if token is not None]
    prefix = [token.expand(len(tokens), -1, -1) for token in extra]
    x = torch.cat([*prefix, tokens + table[own + index]], dim=1)
    if own:
        x = torch.cat([x[:, :own] + table[:own], x[:, own:]], dim=1)
    return model.norm_pre(model.pos_drop(x))
