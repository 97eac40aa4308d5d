"""Weights of one resolution for an encoder of another, between the stages of progressive pretraining.

Learned position tables are resampled (bicubic, antialiased, as timm does on loading a checkpoint); sine-cosine tables
are not weights: the new model has computed its own.
"""

import math
from typing import Any

from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn


def at_resolution(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`state` with the position tables of timm transformers at the size that `model` has. The rest is the same."""
    out = dict(state)
    modules: dict[str, Any] = dict(model.named_modules())
    for name, module in modules.items():
        key = f"{name}.pos_embed"
        if key in state and state[key].shape != module.pos_embed.shape:
            out[key] = resampled(state[key], module)
    return out


def resampled(table: Tensor, vit: Any) -> Tensor:
    """Positions [1, P + n * n, C] of a square grid for `vit`'s grid; those of its P prefix tokens stay."""
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    side = math.isqrt(table.shape[1] - prefix)
    return resample_abs_pos_embed(table, list(vit.patch_embed.grid_size), [side, side], prefix)
