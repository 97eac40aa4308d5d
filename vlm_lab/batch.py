"""The one thing that the data side and the model side share: what a batch holds."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self

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
    """How one image or video enters the model: its views and its placeholders, block after block.

    `padded`: (width, height) of an image whose views are padded to squares that the encoder's user may not look at.
    """

    blocks: tuple[Block, ...]
    padded: tuple[int, int] | None = None

    @property
    def views(self) -> int:
        return sum(block.views for block in self.blocks)

    @property
    def num_tokens(self) -> int:
        return sum(block.num_tokens for block in self.blocks)


def unpadded(size: tuple[int, int], grid: Grid) -> tuple[Grid, Grid]:
    """(top, left) and (rows, columns) of the part of a `grid` of tokens on which an image (width, height) lies.

    Exact integers: equal to transformers' rounding, and to LLaVA's float division but for 1 in 192,000 sizes.
    """
    (width, height), (rows, columns) = size, grid
    if width * rows > columns * height:  # wider than the canvas: there are margins above and below
        margin = (rows - height * columns // width) // 2
        return (margin, 0), (rows - 2 * margin, columns)
    margin = (columns - width * rows // height) // 2
    return (0, margin), (rows, columns - 2 * margin)


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
    `sizes[encoder]` [V, 2] are the views' (height, width) without padding, if they are not all squares. `places` are
    the placeholders' positions, `answers` those that predict an answer token: found while the row is in main memory,
    because counting them on a device means to wait for it. `num_answers` counts the answer tokens of this process's
    whole optimizer step, of which the row is part `part` of `parts`.
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
    places: Tensor | None = None
    answers: Tensor | None = None

    def __post_init__(self) -> None:
        if self.places is None or self.answers is None:
            self.places, self.answers = placeholders(self.input_ids), self.targets[0].ne(IGNORE).nonzero().squeeze(1)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()


@dataclass
class CaptionBatch(OnDevice):
    """Pictures with captions, to pretrain an encoder: one process's share of an optimizer step, B pairs.

    `pixels` uint8 [B, 3, S, S]; `raw`, `synthetic` [B, T] are texts for the text tower, [CLS] last; `targets` [B, Q]
    the caption to write, IGNORE where it has ended. `valid` [B] is False for a record that could not be used. `kept`
    [B, K]: the patches that enter the encoder; `read` [B, R]: which of those tokens the decoder reads; None: all.
    `again`: another view of each picture, like `pixels`.
    """

    pixels: Tensor
    raw: Tensor
    synthetic: Tensor
    targets: Tensor
    valid: Tensor
    ids: list[str]
    kept: Tensor | None = None
    read: Tensor | None = None
    again: Tensor | None = None
    bad: list[Any] = field(default_factory=list)
    part: ClassVar[int] = 0  # of `parts`: a contrastive loss needs the step as one batch
    parts: ClassVar[int] = 1

    @property
    def num_tokens(self) -> int:
        """Of the texts and captions that are read or written, padding included, and of nothing else."""
        return self.raw.numel() + self.synthetic.numel() + self.targets.numel()

    def __getitem__(self, part: slice) -> Self:
        """Some of the pairs."""
        whole = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "bad"}
        cut: dict[str, Any] = {name: None if value is None else value[part] for name, value in whole.items()}
        return replace(self, **cut)


@dataclass
class Prompts(OnDevice):
    """Prompts to continue: `input_ids` and `attention_mask` [B, L], padded on the left; images as in `Batch`.

    `places` are the placeholders' positions in the flattened ids.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixels: dict[str, Tensor]
    layouts: list[Layout]
    sizes: dict[str, Tensor]
    places: Tensor | None = None

    def __post_init__(self) -> None:
        if self.places is None:
            self.places = placeholders(self.input_ids)


def placeholders(ids: Tensor) -> Tensor:
    """Where visual tokens go: indices into ids.flatten(), in reading order."""
    return ids.flatten().eq(IMAGE_TOKEN).nonzero().squeeze(1)


def moved(value: Any, device: torch.device | str, **kwargs: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, **kwargs)
    if isinstance(value, dict):
        return {key: moved(item, device, **kwargs) for key, item in value.items()}
    return value
