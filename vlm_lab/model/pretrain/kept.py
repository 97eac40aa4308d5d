"""Only some patches enter the encoder: CLIPA's image-token reduction (arXiv 2305.07017) for timm's transformers.

Which patches is decided by the data side (data/pretrain.py), so that a resumed run drops the same ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def encode(encoder: nn.Module, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
    """Patch tokens [B, N, C]; with `kept` [B, K] (patch numbers) the blocks see, and this returns, those K alone."""
    if kept is None:
        return encoder(pixels).tokens
    with _only(encoder, kept):
        return take(encoder(pixels).tokens, kept)


def take(x: Tensor, places: Tensor) -> Tensor:
    """x [B, N, C], places [B, K] -> [B, K, C]."""
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


@contextmanager
def _only(encoder: nn.Module, kept: Tensor) -> Iterator[None]:
    """Drops patches before the first block (they have their positions by then); zeros in their place after the last."""
    model: Any = getattr(encoder, "model", None)
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or len(getattr(encoder, "layers", [0])) != 1:
        raise ValueError(
            f"{type(encoder).__name__}: only a timm Vision Transformer with one output layer can drop image tokens; "
            "keep all of them"
        )
    rows, columns = model.patch_embed.grid_size
    first = model.num_prefix_tokens  # class and registers always stay
    places = torch.cat([torch.arange(first, device=kept.device).expand(len(kept), first), kept + first], dim=1)

    def drop(block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return take(args[0], places), *args[1:]

    def restore(block: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        full = out.new_zeros(len(out), first + rows * columns, out.shape[-1])
        return full.scatter(1, places.unsqueeze(-1).expand_as(out), out)

    hooks = [blocks[0].register_forward_pre_hook(drop), blocks[-1].register_forward_hook(restore)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
