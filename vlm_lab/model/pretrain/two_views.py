"""Self-supervised pretraining of any encoder: two views of a picture find each other (SimCLR, arXiv 2002.05709).

The loss is InfoNCE both ways between the first views and the second ones, as in MoCo v3: other pictures are negatives
in their other view only. What a view is (crop, jitter), data/pretrain.py decides.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm_lab.batch import CaptionBatch
from vlm_lab.model.pretrain.dual import Losses, unit
from vlm_lab.model.pretrain.losses import info_nce

SCALE = 10.0  # 1 / temperature
OUT_DIM = 64  # of the space in which views are compared


class TwoViews(nn.Module):
    """`encoder.<name>` and `towers` (the projection head) are the module paths that a stage's `train:` table names."""

    def __init__(self, name: str, encoder: nn.Module) -> None:
        super().__init__()
        self.name, self.encoder = name, nn.ModuleDict({name: encoder})
        eye: Any = encoder
        self.towers = nn.Sequential(nn.Linear(eye.dim, 2 * eye.dim), nn.GELU(), nn.Linear(2 * eye.dim, OUT_DIM))

    def forward(self, batch: CaptionBatch, micro_batch: int | None = None) -> Losses:
        """`micro_batch`: pictures that are encoded at a time, see `DualEncoder`; the loss is the global batch's."""
        assert batch.again is not None
        size = len(batch.ids) if micro_batch is None else micro_batch
        see = self.see if size >= len(batch.ids) else partial(checkpoint, self.see, use_reentrant=False)
        first, second = (
            torch.cat([see(part) for part in pixels.split(size)]) for pixels in (batch.pixels, batch.again)
        )
        with torch.autocast(first.device.type, enabled=False):
            total = info_nce(unit(first), unit(second), torch.tensor(SCALE, device=first.device), batch.valid)
        return Losses(total, total, None)

    def see(self, pixels: Tensor) -> Tensor:
        """uint8 [b, 3, S, S] -> [b, OUT_DIM]"""
        return self.towers(self.encoder[self.name](pixels).tokens.mean(1))
