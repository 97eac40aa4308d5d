"""Sample to tensors: images to views, the conversation to ids with placeholders. What a loader worker does.

The model side is known here by three values only: each encoder's side and mean colour, the connector's grid of tokens
per view, and the tokenizer inside `Chat`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlm_lab.batch import IGNORE, IMAGE_TOKEN
from vlm_lab.data.chat import Chat
from vlm_lab.data.images import image_size, load_image
from vlm_lab.data.sample import BadRecord, Sample
from vlm_lab.data.tiling import Grid, Tiling


@dataclass(frozen=True)
class Eye:
    """What the data side must know of an encoder: `side` pixels, and its mean colour (RGB in 0..1)."""

    side: int
    mean: tuple[float, float, float]


@dataclass
class Example:
    """One processed sample: `ids` and `targets` [L]; `views[encoder]` uint8 arrays [S, S, 3]."""

    id: str
    ids: np.ndarray
    targets: np.ndarray
    views: dict[str, list[np.ndarray]]


class Processor:
    """Turns samples into examples (training) or prompts (generation). `max_tokens` limits a training sample."""

    def __init__(self, chat: Chat, tiling: Tiling, eyes: dict[str, Eye], grid: Grid, max_tokens: int) -> None:
        self.chat, self.tiling, self.eyes, self.grid, self.max_tokens = chat, tiling, eyes, grid, max_tokens

    def example(self, sample: Sample) -> Example:
        """Raises BadRecord if an image cannot be used, or if no answer fits in `max_tokens`."""
        encoded = self.chat.encode(sample, self.image_tokens(sample))
        ids, targets = encoded.ids[: self.max_tokens], encoded.targets[: self.max_tokens]
        if len(ids) < len(encoded.ids):
            targets[-1] = IGNORE  # its token was cut off
            if (encoded.ids[self.max_tokens :] == IMAGE_TOKEN).any() or (targets == IGNORE).all():
                reason = f"needs {len(encoded.ids)} tokens, max_tokens is {self.max_tokens}"
                raise BadRecord(sample.source, sample.id, reason)
        return Example(sample.id, ids, targets, self.views(sample))

    def prompt(self, sample: Sample) -> Example:
        ids = self.chat.prompt(sample, self.image_tokens(sample))
        return Example(sample.id, ids, np.full_like(ids, IGNORE), self.views(sample))

    def image_tokens(self, sample: Sample) -> list[int]:
        sizes = [image_size(ref, sample.source, sample.id) for ref in sample.images]
        return [self.tiling.layout(size, self.grid).num_tokens for size in sizes]

    def views(self, sample: Sample) -> dict[str, list[np.ndarray]]:
        images = [load_image(ref, sample.source, sample.id) for ref in sample.images]
        return {name: self.render(images, eye) for name, eye in self.eyes.items()}

    def render(self, images: Sequence[Image.Image], eye: Eye) -> list[np.ndarray]:
        return [np.asarray(view) for image in images for view in self.tiling.render(image, eye.side, eye.mean)]

    def blank(self) -> dict[str, list[np.ndarray]]:
        """One black view per encoder, for rows without an image."""
        return {name: [np.zeros((eye.side, eye.side, 3), dtype=np.uint8)] for name, eye in self.eyes.items()}
