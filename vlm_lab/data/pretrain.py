"""Pictures with captions to tensors, for encoder pretraining: sentences, token dropping, crops, batches of whole steps.

Everything random is drawn from a generator keyed (seed, draw number), so a run that goes on after an interruption sees
the same crops, sentences and dropped tokens. A record's captions are `meta["raw"]` and `meta["synthetic"]`; a record
without them (any captioning data) has its last answer as both.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor

from vlm_lab.batch import IGNORE, CaptionBatch
from vlm_lab.data.augment import augment
from vlm_lab.data.images import load_image
from vlm_lab.data.loader import Loader, Records
from vlm_lab.data.mixture import Mixture, generator
from vlm_lab.data.sample import BadRecord, Sample, Source, Video
from vlm_lab.data.wordpiece import Wordpiece

Shorten = Literal["truncate", "random", "block"]
STREAM = 1 << 20  # keeps the draws' generators apart from the mixture's own


@dataclass
class Pair:
    """One processed record; shapes as in `CaptionBatch`, without B. `pixels` is [S, S, 3]."""

    id: str
    pixels: np.ndarray
    raw: np.ndarray
    synthetic: np.ndarray
    targets: np.ndarray
    kept: np.ndarray | None
    read: np.ndarray | None
    again: np.ndarray | None
    valid: bool = True


class CaptionProcessor:
    """Turns records into pairs.

    Args:
        words: the text tower's tokenizer.
        side, patches: pixels per side, and patches per picture, of the encoder.
        length, queries: tokens of a text with its [CLS]; tokens of the caption to write.
        shorten: what is left of a text that is too long: its start, a random part in order, or a random run of words
            (the choices that CLIPA and CLIPS compare).
        keep: share of the patches that enter the encoder (CLIPA); read: share of those that the decoder reads
            (OpenVision 2: 0.35).
        crop, jitter: see data/augment.py; OpenVision: 0.4 and 0.4.
        twice: whether a second view of the picture is drawn (SimCLR).
        texts: both captions, or the raw one in the place of the synthetic one too (OpenVision's "original captions").
    """

    def __init__(
        self,
        words: Wordpiece,
        side: int,
        patches: int,
        length: int = 80,
        queries: int = 128,
        shorten: Shorten = "truncate",
        keep: float = 1.0,
        read: float = 1.0,
        crop: float = 1.0,
        jitter: float = 0.0,
        twice: bool = False,
        texts: Literal["both", "raw"] = "both",
    ) -> None:
        if texts not in ("both", "raw"):
            raise ValueError(f"texts = {texts}: it is both or raw")
        for name, share in (("keep", keep), ("read", read), ("crop", crop)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} = {share} is a share: more than 0, at most 1")
        self.words, self.side, self.length, self.queries, self.shorten = words, side, length, queries, shorten
        self.crop, self.jitter, self.twice, self.texts = crop, jitter, twice, texts
        self.patches, self.kept = patches, max(1, round(keep * patches))
        self.read = max(1, round(read * self.kept))

    def pair(self, sample: Sample, rng: Generator) -> Pair:
        """Raises BadRecord if there is no image, or one that cannot be used, or no caption at all."""
        if not sample.images or isinstance(sample.images[0], Video):
            raise BadRecord(sample.where, sample.id, "has no image")
        raw, sentence, full = captions(sample, rng)
        if self.texts == "raw":
            sentence = full = raw
        image = load_image(sample.images[0], sample.where, sample.id)
        pixels, again = self.view(image, rng), self.view(image, rng) if self.twice else None
        targets = self.words.target(self.words.words(full), self.queries)
        texts = self.text(raw, rng), self.text(sentence, rng)
        return Pair(sample.id, pixels, *texts, targets, *self.dropped(rng), again)

    def view(self, image: Image.Image, rng: Generator) -> np.ndarray:
        return np.asarray(augment(image, self.side, self.crop, self.jitter, rng))

    def text(self, text: str, rng: Generator) -> np.ndarray:
        return self.words.text(shortened(self.words.words(text), self.length - 3, self.shorten, rng), self.length)

    def dropped(self, rng: Generator) -> tuple[np.ndarray | None, np.ndarray | None]:
        """`kept` and `read`, None where nothing is dropped."""
        kept = some(self.kept, self.patches, rng) if self.kept < self.patches else None
        return kept, some(self.read, self.kept, rng) if self.read < self.kept else None

    def blank(self) -> Pair:
        """Stands in for a record that could not be used: every process has batches of the same shape."""
        text, rng = self.words.text([], self.length), np.random.default_rng(0)
        pixels = np.zeros((self.side, self.side, 3), dtype=np.uint8)
        again = pixels if self.twice else None
        return Pair("", pixels, text, text, np.full(self.queries, IGNORE), *self.dropped(rng), again, valid=False)


def captions(sample: Sample, rng: Generator) -> tuple[str, str, str]:
    """(raw caption, one sentence of the synthetic one, all of it); what is empty is replaced by what is there."""
    answer = "".join(part for part in sample.messages[-1].content if isinstance(part, str))
    raw, synthetic = sample.meta.get("raw", answer), sample.meta.get("synthetic", answer)
    if not isinstance(raw, str):  # several alternatives
        raw = raw[int(rng.integers(len(raw)))] if raw else ""
    sentences = [sentence.strip() for sentence in re.split(r"[.!]", synthetic) if sentence.strip()]
    if not (raw.strip() or sentences):
        raise BadRecord(sample.where, sample.id, "has no caption")
    if not sentences:
        return raw, raw, raw
    sentence = sentences[int(rng.integers(len(sentences)))]
    return (raw if raw.strip() else sentence), sentence, synthetic


def shortened(words: Sequence[int], room: int, how: Shorten, rng: Generator) -> Sequence[int]:
    """`words`, or `room` of them in their order."""
    if len(words) <= room or how == "truncate":
        return words[:room]
    if how == "random":
        return [words[place] for place in some(room, len(words), rng)]
    start = int(rng.integers(len(words) - room + 1))
    return words[start : start + room]


def some(count: int, of: int, rng: Generator) -> np.ndarray:
    """`count` of the numbers below `of`, ascending."""
    return np.sort(rng.permutation(of)[:count])


class PairRecords(Records):
    """Draw number -> pair, or the BadRecord that says why there is none."""

    def __init__(self, sources: Sequence[Source], mixture: Mixture, processor: CaptionProcessor) -> None:
        self.sources, self.mixture, self.captions = sources, mixture, processor

    def __getitem__(self, draw: int) -> Any:
        source, index = self.mixture[draw]
        try:
            return self.captions.pair(self.sources[source][index], generator(self.mixture.seed, STREAM, draw))
        except BadRecord as bad:
            return bad


class PairLoader(Loader):
    """One `CaptionBatch` per optimizer step: a contrastive loss needs all of it at once (`DualEncoder` splits it)."""

    def __init__(
        self, records: PairRecords, steps: int, batch: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> None:
        super().__init__(records, steps, batch, -(-batch // world), rank, world, workers)
        self.captions = records.captions

    def collate(self, examples: Sequence[Any]) -> Any:
        return [stack(examples, self.captions)]


def stack(examples: Sequence[Pair | BadRecord], processor: CaptionProcessor) -> CaptionBatch:
    """One step's pairs of a process; a blank, invalid pair in the place of each bad record."""
    bad = [e for e in examples if isinstance(e, BadRecord)]
    pairs = [processor.blank() if isinstance(e, BadRecord) else e for e in examples]
    pixels = pictures([pair.pixels for pair in pairs])
    again = pictures([pair.again for pair in pairs if pair.again is not None]) if processor.twice else None
    raw, synthetic, targets = (rows([getattr(p, name) for p in pairs]) for name in ("raw", "synthetic", "targets"))
    kept, read = (optional([getattr(pair, name) for pair in pairs]) for name in ("kept", "read"))
    valid = torch.tensor([pair.valid for pair in pairs])
    return CaptionBatch(pixels, raw, synthetic, targets, valid, [pair.id for pair in pairs], kept, read, again, bad)


def pictures(arrays: Sequence[np.ndarray]) -> Tensor:
    """[S, S, 3] each -> [B, 3, S, S]"""
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def rows(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays).astype(np.int64))


def optional(arrays: Sequence[np.ndarray | None]) -> Tensor | None:
    return None if arrays[0] is None else rows([array for array in arrays if array is not None])
