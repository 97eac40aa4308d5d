"""Weights of an earlier stage for a model that has some of its parts, at the same resolution or another.

Learned position tables are resampled (bicubic, antialiased, as timm does on loading a checkpoint); sine-cosine tables
are not weights: the new model has computed its own.
"""

import math
from typing import Any

from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from vlm_lab.model.vlm import VLM


def take_over(model: nn.Module, state: dict[str, Tensor], parts: tuple[str, ...]) -> None:
    """Load what `state` has of the `parts` (module paths) that `model` has, too. ValueError if one does not fit."""
    own = {name: value for name, value in state.items() if any(name.startswith(f"{part}.") for part in parts)}
    if isinstance(model, VLM):  # which has no use for what lies behind the layer that it reads
        own = {name: value for name, value in own.items() if name in model.state_dict()}
    missing, unexpected = model.load_state_dict(at_resolution(own, model), strict=False)
    heads = {".".join(name.split(".")[: 2 if name.startswith("encoder.") else 1]) + "." for name in own}
    tensors = model.state_dict(keep_vars=True)
    loaded = {id(tensors[name]) for name in own if name in tensors}  # tied weights have two names, and are saved once
    lacking = [name for name in missing if name.startswith(tuple(heads)) and id(tensors[name]) not in loaded]
    if unexpected or lacking or not own:
        problem = f"without a place {unexpected[:3]}, missing {lacking[:3]}"
        raise ValueError(f"the weights of an earlier stage do not fit: {problem}")


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
