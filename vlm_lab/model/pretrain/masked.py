"""Self-supervised pretraining of any encoder: hide patches of a picture, say what was there (SimMIM, arXiv 2111.09886).

Hidden patches are painted in the encoder's mean colour, so the network itself needs no mask token and every kind of
encoder can learn this way. One linear map reads the pixels of a cell off its token.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_lab.batch import CaptionBatch
from vlm_lab.model.pretrain.dual import Losses
from vlm_lab.model.pretrain.losses import summed


class MaskedEncoder(nn.Module):
    """`encoder.<name>` and `towers` (the linear map) are the module paths that a stage's `train:` table names.

    The loss is the mean absolute error of the hidden cells' normalised pixels, over the global batch.
    """

    def __init__(self, name: str, encoder: nn.Module) -> None:
        super().__init__()
        self.name, self.encoder = name, nn.ModuleDict({name: encoder})
        eye: Any = encoder
        self.rows, self.cell = eye.grid[0], eye.image_size // eye.grid[0]
        self.towers = nn.Linear(eye.dim, 3 * self.cell**2)

    def forward(self, batch: CaptionBatch, micro_batch: int | None = None) -> Losses:
        """`batch.kept` are the cells that the encoder sees. `micro_batch` is not needed: pictures are independent."""
        assert batch.kept is not None
        hidden = torch.ones(len(batch.pixels), self.rows**2, dtype=torch.bool, device=batch.pixels.device)
        hidden = hidden.scatter(1, batch.kept, False) & batch.valid[:, None]  # [B, N]
        encoder: Any = self.encoder[self.name]
        wanted = self.cells(encoder.normalised(batch.pixels))[hidden]  # [hidden, 3 * cell * cell]
        said = self.towers(encoder(self.painted(batch.pixels, hidden)).tokens[hidden])
        total = F.l1_loss(said, wanted, reduction="sum") / (summed(hidden.sum()).clamp(min=1) * wanted.shape[1])
        return Losses(total, None, None)

    def cells(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, N, 3 * cell * cell]; a remainder at the right and the bottom is left out."""
        side = self.rows * self.cell
        return F.unfold(pixels[..., :side, :side], self.cell, stride=self.cell).transpose(1, 2)

    def painted(self, pixels: Tensor, hidden: Tensor) -> Tensor:
        """uint8 pixels with the hidden cells in the encoder's mean colour."""
        mask = hidden.view(-1, 1, self.rows, self.rows).repeat_interleave(self.cell, 2).repeat_interleave(self.cell, 3)
        margin = pixels.shape[-1] - mask.shape[-1]
        mask = F.pad(mask, (0, margin, 0, margin))
        encoder: Any = self.encoder[self.name]
        return torch.where(mask, encoder.shift.round().to(pixels.dtype), pixels)
