"""The one thing that the data side and the model side share: what a batch holds."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

IMAGE_TOKEN = -200  # stands in `input_ids` where a visual token goes; no row of the embedding table is spent on it
IGNORE = -100  # target of a position that predicts nothing
Grid = tuple[int, int]  # (rows, columns)


@dataclass(frozen=True)
class Block:
    """Neighbouring views as one run of visual tokens: merged to a raster, cropped, scaled, read row by row.

    `tiles` (rows, columns) of views; `offset` (top, left) and `crop` (height, width), in tokens, of the part that is
    kept; `size` (height, width) after bilinear scaling; `newline`: a newline embedding after every row, or at the end.
    """

    tiles: Grid
    offset: Grid
    crop: Grid
    size: Grid
    newline: Literal["", "row", "end"] = ""

    @property
    def views(self) -> int:
        return self.tiles[0] * self.tiles[1]

    @property
    def num_tokens(self) -> int:
        rows, columns = self.size
        return rows * (columns + (self.newline == "row")) + (self.newline == "end")


@dataclass(frozen=True)
class Layout:
    """How one image or video enters the model: its views and its placeholders, block after block."""

    blocks: tuple[Block, ...]

    @property
    def views(self) -> int:
        return sum(block.views for block in self.blocks)

    @property
    def num_tokens(self) -> int:
        return sum(block.num_tokens for block in self.blocks)


@dataclass
class OnDevice:
    def to(self, device: torch.device | str, **kwargs: Any) -> Self:
        """Every tensor moved; the rest as it is."""
        return replace(self, **{f.name: moved(getattr(self, f.name), device, **kwargs) for f in fields(self)})


@dataclass
class Batch(OnDevice):
    """A packed training row: whole samples one after the other, without padding.

    `input_ids`, `targets`, `position_ids` are [1, L]; `targets[t]` is the token after t where that is part of an
    answer, else IGNORE. `cu_seqlens` are the samples' boundaries, 0 first and L last. `pixels[encoder]` is uint8
    [V, 3, H, W], in the order of the placeholders (one blank view if there is no image); `layouts` order their tokens.
    `sizes[encoder]` [V, 2] are the views' (height, width) without padding, if they are not all squares.
    `num_answers` counts the answer tokens of this process's whole optimizer step, of which the row is part `part` of
    `parts`.
    """

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor
    cu_seqlens: list[int]
    pixels: dict[str, Tensor]
    layouts: list[Layout]
    sizes: dict[str, Tensor]
    ids: list[str]
    num_answers: int = 0
    part: int = 0
    parts: int = 1
    bad: list[Any] = field(default_factory=list)  # records that could not be used


@dataclass
class Prompts(OnDevice):
    """Prompts to continue: `input_ids` and `attention_mask` [B, L], padded on the left; images as in `Batch`."""

    input_ids: Tensor
    attention_mask: Tensor
    pixels: dict[str, Tensor]
    layouts: list[Layout]
    sizes: dict[str, Tensor]


def moved(value: Any, device: torch.device | str, **kwargs: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, **kwargs)
    if isinstance(value, dict):
        return {key: moved(item, device, **kwargs) for key, item in value.items()}
    return value
