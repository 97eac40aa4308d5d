"""What the blocks of a connector inside the LLM can look at: `Seen`, made by the VLM once per pass.

Which visual token lies on which placeholder, and which views a position may see.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vlm_lab.batch import Batch, Grid, Layout, Prompts
from vlm_lab.model.arrange import arrange


@dataclass
class Seen:
    """What one pass of the LLM can look at.

    `tokens [V, T, D]` on `grid` are the visual tokens before they are arranged, `memory` is what the connector's blocks
    attend to. `image [B, L]` is True at placeholders; `sample [B, L]` numbers the samples of all rows.
    """

    tokens: Tensor
    grid: Grid
    memory: Any
    image: Tensor
    sample: Tensor
    layouts: Sequence[Layout]

    @cached_property
    def cells(self) -> Tensor:
        """For every placeholder in reading order, the index v * T + t of the visual token on it; -1 for a newline."""
        views, count = self.tokens.shape[:2]
        if not self.layouts:
            return torch.zeros(0, dtype=torch.long, device=self.tokens.device)
        numbers = torch.arange(views * count, dtype=torch.float64, device=self.tokens.device)
        newline = numbers.new_full((1, 1), -1)
        return arrange(numbers.view(views, count, 1), self.grid, self.layouts, newline)[:, 0].long()

    @cached_property
    def visible(self) -> Tensor:
        """[B, L, V]: whether a position sees a view, which is in its sample and does not begin after it."""
        order = torch.arange(self.image.numel(), device=self.image.device).view_as(self.image)  # [B, L]
        views, count = self.tokens.shape[:2]
        kept = self.cells >= 0
        place = order.new_full((views,), order.numel())  # of each view's first token; past the end if it has none
        place = place.scatter_reduce(0, self.cells[kept] // count, order[self.image][kept], "amin")
        sample = torch.cat([self.sample.flatten(), self.sample.new_full((1,), -1)])[place]  # [V]
        return (self.sample[..., None] == sample) & (order[..., None] >= place)


def sample_numbers(batch: Batch | Prompts) -> Tensor:
    """Which sample each position [B, L] belongs to: by `cu_seqlens` in a packed row, else by row."""
    ids = batch.input_ids
    if isinstance(batch, Prompts):
        return torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    starts = torch.tensor(batch.cu_seqlens[1:-1], device=ids.device)
    return torch.bucketize(torch.arange(ids.shape[1], device=ids.device), starts, right=True)[None]
