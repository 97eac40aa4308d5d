"""Sample to tensors: images to views, the conversation to ids with placeholders. What a loader worker does.

The model side is known here by three values only: each encoder's `Eye`, the connector's grid of tokens per view, and
the tokenizer inside `Chat`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from PIL import Image

from vlm_lab.batch import IGNORE, IMAGE_TOKEN, Layout
from vlm_lab.data.chat import Chat, Encoded
from vlm_lab.data.images import image_size, load_image
from vlm_lab.data.sample import BadRecord, ImageRef, ImageSlot, Sample, Video
from vlm_lab.data.tiling import Eye, Grid, Tiling, View
from vlm_lab.data.tiling.whole import squash
from vlm_lab.data.video import count_frames, read_frames


@dataclass
class Example:
    """One processed sample: `ids` and `targets` [L]; `views[encoder]` uint8 arrays [H, W, 3], laid out by `layouts`."""

    id: str
    ids: np.ndarray
    targets: np.ndarray
    views: dict[str, list[np.ndarray]]
    layouts: list[Layout] = field(default_factory=list)


class Processor:
    """Turns samples into examples (training) or prompts (generation). `max_tokens` limits a training sample."""

    def __init__(self, chat: Chat, tiling: Tiling, eyes: dict[str, Eye], grid: Grid, max_tokens: int) -> None:
        self.chat, self.tiling, self.eyes, self.grid, self.max_tokens = chat, tiling, eyes, grid, max_tokens
        first = next(iter(eyes.values()))
        self.view = View(first.side, first.stride, grid)
        tiling.check(self.view, len(eyes))

    def example(self, sample: Sample) -> Example:
        """Raises BadRecord if an image cannot be used, or if no answer fits in `max_tokens`.

        Answers are cut off where they are too long, a document also before an image that does not fit.
        """
        layouts = self.layouts(sample)
        encoded = self.chat.encode(*spelt(sample, layouts, self.tiling.marker))
        if len(encoded.ids) > self.max_tokens and sample.messages[0].role == "document":
            encoded, layouts = shortened(encoded, layouts, self.max_tokens)
            sample = replace(sample, images=sample.images[: len(layouts)])
        ids, targets = encoded.ids[: self.max_tokens], encoded.targets[: self.max_tokens]
        if len(ids) < len(encoded.ids):
            targets[-1] = IGNORE  # its token was cut off
            if (encoded.ids[self.max_tokens :] == IMAGE_TOKEN).any() or (targets == IGNORE).all():
                reason = f"needs {len(encoded.ids)} tokens, max_tokens is {self.max_tokens}"
                raise BadRecord(sample.where, sample.id, reason)
        return Example(sample.id, ids, targets, self.views(sample, layouts), layouts)

    def prompt(self, sample: Sample) -> Example:
        layouts = self.layouts(sample)
        ids = self.chat.prompt(*spelt(sample, layouts, self.tiling.marker))
        return Example(sample.id, ids, np.full_like(ids, IGNORE), self.views(sample, layouts), layouts)

    def layouts(self, sample: Sample) -> list[Layout]:
        """One per image or video, from their headers alone."""
        where, images = (sample.where, sample.id), [ref for ref in sample.images if not isinstance(ref, Video)]
        laid_out = iter(self.tiling.layouts([image_size(ref, *where) for ref in images], self.view))
        return [
            self.tiling.video(count_frames(ref, *where), self.view) if isinstance(ref, Video) else next(laid_out)
            for ref in sample.images
        ]

    def views(self, sample: Sample, layouts: Sequence[Layout]) -> dict[str, list[np.ndarray]]:
        views: dict[str, list[np.ndarray]] = {name: [] for name in self.eyes}
        for ref, layout in zip(sample.images, layouts, strict=True):
            for name, pictures in self.render(ref, layout, sample).items():
                views[name] += [np.asarray(picture) for picture in pictures]
        return views

    def render(self, ref: ImageRef | Video, layout: Layout, sample: Sample) -> dict[str, list[Image.Image]]:
        """The views of one image or video for every encoder."""
        if isinstance(ref, Video):
            frames = read_frames(ref, layout.views, sample.where, sample.id)
            return {name: [squash(frame, eye.side) for frame in frames] for name, eye in self.eyes.items()}
        image = load_image(ref, sample.where, sample.id)
        return {name: self.tiling.render(image, layout, eye) for name, eye in self.eyes.items()}

    def blank(self) -> dict[str, list[np.ndarray]]:
        """One black view per encoder, for rows without an image."""
        return {name: [np.zeros((eye.side, eye.side, 3), dtype=np.uint8)] for name, eye in self.eyes.items()}


class TextProcessor:
    """Turns samples into examples without their images, to pretrain a LLM: running text and answers are learnt."""

    eyes: ClassVar[dict[str, Eye]] = {}

    def __init__(self, chat: Chat, max_tokens: int) -> None:
        self.chat, self.max_tokens = chat, max_tokens

    def example(self, sample: Sample) -> Example:
        """Texts longer than `max_tokens` are cut off."""
        messages = tuple(replace(m, content=tuple(p for p in m.content if isinstance(p, str))) for m in sample.messages)
        encoded = self.chat.encode(replace(sample, messages=messages, images=()), [])
        ids, targets = encoded.ids[: self.max_tokens], encoded.targets[: self.max_tokens].copy()
        if len(ids) < len(encoded.ids):
            targets[-1] = IGNORE  # its token was cut off
        return Example(sample.id, ids, targets, {})

    def blank(self) -> dict[str, list[np.ndarray]]:
        return {}


def shortened(document: Encoded, layouts: Sequence[Layout], length: int) -> tuple[Encoded, list[Layout]]:
    """The start of a document, at most `length` tokens long and with whole images only, and their layouts."""
    places = np.flatnonzero(document.ids == IMAGE_TOKEN)  # of all placeholders; images stand in their order
    ends = np.cumsum([layout.num_tokens for layout in layouts], dtype=np.int64)
    whole = int(np.searchsorted(ends, np.searchsorted(places, length), side="right"))
    if whole < len(layouts):
        length = min(length, int(places[ends[whole] - layouts[whole].num_tokens]))
    targets = document.targets[:length].copy()
    targets[-1:] = IGNORE  # its token was cut off
    return Encoded(document.ids[:length], targets), list(layouts[:whole])


def spelt(sample: Sample, layouts: Sequence[Layout], marker: str) -> tuple[Sample, list[int]]:
    """The sample with a slot for every run of placeholders, `marker` between them, and the runs' lengths.

    Without a marker an image is one run. With one, each block is (Idefics2's `<fake_token_around_image>`).
    """
    if not marker:
        return sample, [layout.num_tokens for layout in layouts]
    runs: list[int] = []
    messages = [replace(m, content=marked(m.content, layouts, marker, runs)) for m in sample.messages]
    return replace(sample, messages=tuple(messages)), runs


def marked(
    content: Sequence[str | ImageSlot], layouts: Sequence[Layout], marker: str, runs: list[int]
) -> tuple[str | ImageSlot, ...]:
    """One message's content for `spelt`; appends to `runs`. Images that touch share the marker between them."""
    out: list[str | ImageSlot] = []
    for part in content:
        if isinstance(part, str):
            out.append(part)
            continue
        if out[-1:] != [marker]:
            out.append(marker)
        for block in layouts[part.index].blocks:
            out += [ImageSlot(len(runs)), marker]
            runs.append(block.num_tokens)
    return tuple(out)
