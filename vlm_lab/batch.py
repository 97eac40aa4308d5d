"""The one thing that the data side and the model side share: what a batch holds."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

IMAGE_TOKEN = -200  # stands in `input_ids` where a visual token goes; no row of the embedding table is spent on it
IGNORE = -100  # target of a position that predicts nothing


@dataclass
class OnDevice:
    def to(self, device: torch.device | str, **kwargs: Any) -> OnDevice:
        """Every tensor moved; the rest as it is."""
        return replace(self, **{f.name: moved(getattr(self, f.name), device, **kwargs) for f in fields(self)})


@dataclass
class Batch(OnDevice):
    """A packed training row: whole samples one after the other, without padding.

    `input_ids`, `targets`, `position_ids` are [1, L]; `targets[t]` is the token after t where that is part of an answer,
    else IGNORE. `cu_seqlens` are the samples' boundaries, 0 first and L last. `pixels[encoder]` is uint8 [V, 3, S, S], in
    the order of the placeholders (one blank view if the row has no image). `num_answers` counts the answer tokens of this
    process's whole optimizer step, of which the row is part `part` of `parts`.
    """

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor
    cu_seqlens: list[int]
    pixels: dict[str, Tensor]
    ids: list[str]
    num_answers: int = 0
    part: int = 0
    parts: int = 1
    bad: list[Any] = field(default_factory=list)  # records that could not be used


@dataclass
class Prompts(OnDevice):
    """Prompts to continue: `input_ids` and `attention_mask` [B, L], padded on the left; `pixels` as in `Batch`."""

    input_ids: Tensor
    attention_mask: Tensor
    pixels: dict[str, Tensor]


def moved(value: Any, device: torch.device | str, **kwargs: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, **kwargs)
    if isinstance(value, dict):
        return {key: moved(item, device, **kwargs) for key, item in value.items()}
    return value
