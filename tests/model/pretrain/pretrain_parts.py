"""A tiny pretraining model of the real classes, and a batch for it."""

from typing import Any

import torch

from vlm_lab.batch import IGNORE, CaptionBatch
from vlm_lab.model.encoders import TimmEncoder
from vlm_lab.model.pretrain import DualEncoder, Towers

OPENVISION = "openvision_vit_tiny_patch16_224"


def small_encoder(layer: Any = (-1,), name: str = OPENVISION, side: int = 32) -> TimmEncoder:
    """16 patches (at 32 pixels) of 8 x 8 pixels, 16 channels, two blocks."""
    return TimmEncoder(name, None, layer, image_size=side, patch_size=8, width=16, depth=2, heads=2)


def small_model(encoder: TimmEncoder | None = None, seed: int = 0, **towers: Any) -> DualEncoder:
    """Texts of 6 tokens, captions of 5, 40 word pieces, a shared space of 12 dimensions."""
    torch.manual_seed(seed)
    encoder = encoder or small_encoder()
    sizes = {"width": 24, "depth": 2, "heads": 2, "mlp": 48, "out_dim": 12, "vocab": 40, "length": 6, "queries": 5}
    return DualEncoder("eye", encoder, Towers(encoder.dim, **{**sizes, "normed": encoder.norm, **towers}))


def small_batch(side: int = 32) -> CaptionBatch:
    """Eight pairs with captions of 1 to 5 tokens, the last one invalid."""
    draw = torch.Generator().manual_seed(1)
    texts = torch.randint(3, 40, (3, 8, 6), generator=draw)
    targets = texts[2, :, :5].clone()
    for row, length in enumerate([1, 2, 3, 4, 5, 5, 4, 0]):
        targets[row, length:] = IGNORE
    pixels = torch.randint(0, 256, (8, 3, side, side), dtype=torch.uint8, generator=draw)
    valid = torch.tensor([True] * 7 + [False])
    return CaptionBatch(pixels, texts[0], texts[1], targets, valid, [f"p{number}" for number in range(8)])
