"""A timm Vision Transformer on views of different shapes: masked padding, positions spread over each view.

Two kinds of model can do that. Those with a table of learned positions take Idefics2's way (arXiv 2405.02246, NaViT's
fractional positions, transformers' `Idefics2VisionEmbeddings`): row i of n gets the position floor(i * S / n) of S,
what transformers computes in float32, up to its rounding at n = 25, 49, 50, 55 (S = 70). NaFlex models (SigLIP 2, arXiv
2502.14786) resample their table to every view's own shape; timm does it. A patch is real if all its pixels are, as in
transformers (Idefics2's own training code: any). Not here: models with rotary or relative positions, hierarchical ones,
packing of several views into one sequence.
"""

from typing import Any

import torch
from timm.models import checkpoint
from timm.models.naflexvit import NaFlexVit, batch_patchify
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vlm_lab.batch import Grid
from vlm_lab.model.features import FeatureMap


def native_features(encoder: Any, pixels: Tensor, sizes: Tensor) -> FeatureMap:
    """What a `TimmEncoder` makes of uint8 pixels [V, 3, H, W] whose real part is sizes [V, 2] (height, width)."""
    model: Any = getattr(encoder, "model", encoder)
    flexible = isinstance(model, NaFlexVit)
    if not flexible and (not isinstance(model, VisionTransformer) or model.pos_embed is None):
        name = type(model).__name__
        raise ValueError(f"views of other shapes than the encoder's square need learned positions, {name} has none")
    patch = (model.embeds if flexible else model.patch_embed).patch_size[0]
    if patch != encoder.stride:
        raise ValueError(f"views of other shapes need maps as they are: encoder side = {encoder.grid[0]} resizes them")
    grid, real = (pixels.shape[2] // patch, pixels.shape[3] // patch), sizes // patch
    images = encoder.normalised(pixels[..., : grid[0] * patch, : grid[1] * patch])
    layers = (naflex_layers if flexible else learned_layers)(encoder, images, real, grid)
    return FeatureMap(torch.cat(layers, dim=-1), grid, real_patches(real, grid))


def learned_layers(encoder: Any, images: Tensor, real: Tensor, grid: Grid) -> list[Tensor]:
    """The layers in use, each [V, N, C], of a model with one learned position per patch of its square."""
    model = encoder.model
    tokens = model.patch_embed.norm(model.patch_embed.proj(images).flatten(2).transpose(1, 2))  # [V, N, C]
    mask = real_patches(real, grid)
    x = with_positions(model, tokens, positions(real, grid, model.patch_embed.grid_size))
    prefix = x.shape[1] - tokens.shape[1]  # class and register tokens
    keys = torch.cat([mask.new_ones(len(mask), prefix), mask], dim=1)[:, None, None]  # [V, 1, 1, prefix + N]
    layers = []
    for index, block in enumerate(model.blocks):
        x = checkpoint(block, x, attn_mask=keys) if model.grad_checkpointing else block(x, attn_mask=keys)
        if index in encoder.layers:
            layers.append((model.norm(x) if encoder.norm else x)[:, prefix:])
    return layers


def naflex_layers(encoder: Any, images: Tensor, real: Tensor, grid: Grid) -> list[Tensor]:
    """The same of a NaFlex model, which reads a view's real patches first, row by row, and padding behind them."""
    patches, _ = batch_patchify(images, encoder.model.embeds.patch_size, pad=False)  # [V, N, p * p * 3]
    mask = real_patches(real, grid)
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)  # [V, N]
    valid = mask.gather(1, order)
    coordinates = torch.stack([order // grid[1], order % grid[1]], dim=-1) * valid[..., None]  # [V, N, 2]
    found = encoder.model.forward_intermediates(
        {"patches": take(patches, order), "patch_coord": coordinates, "patch_valid": valid},
        indices=encoder.layers,
        norm=encoder.norm,
        output_fmt="NLC",
        intermediates_only=True,
    )
    back = order.argsort(dim=1)
    return [take(tokens, back) for tokens in found]


def take(tokens: Tensor, order: Tensor) -> Tensor:
    """tokens [V, N, C] in the order [V, N]."""
    return tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))


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
