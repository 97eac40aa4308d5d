"""The made-up world for encoder pretraining and its evaluation: pictures with both captions, pictures with a class.

`ScenePairs` has the short noisy alt text as the raw caption and the long description as the synthetic one; its
conversation is `SceneCaptions`'. `SceneLooks` is a classification set: one object a picture, its look is the class.
"""

from itertools import count, islice

from vlm_lab.data.sample import ImageSlot, Message, Sample
from vlm_lab.data.scenes.cache import ImageCache, SceneImage
from vlm_lab.data.scenes.captions import CAPTIONS, alt_text
from vlm_lab.data.scenes.compose import compose
from vlm_lab.data.scenes.source import hash_of, require, require_index
from vlm_lab.data.scenes.vocabulary import COLORS, SHAPES
from vlm_lab.data.scenes.world import KINDS, SPLITS, block_kinds, stream

TEMPLATES = ("{}", "photo of {}", "{} - stock photo", "buy {} online", "{}.jpg")


class ScenePairs:
    """A picture, its `meta["raw"]` and its `meta["synthetic"]` caption per record.

    `synthetic`: the kind of the latter (`captions.CAPTIONS`). ValueError on an unknown split or kind.
    """

    def __init__(self, split: str, size: int, seed: int = 0, synthetic: str = "long", cache: str | None = None) -> None:
        require("split", split, SPLITS)
        require("synthetic", synthetic, tuple(CAPTIONS))
        self.split, self.size, self.seed, self.synthetic = split, size, seed, synthetic
        self._cache = None if cache is None else ImageCache(cache, seed, split, size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        require_index(index, self.size)
        scene, rng = compose(self.seed, self.split, index), stream(self.seed, self.split, index, "caption")
        synthetic, raw = CAPTIONS[self.synthetic](scene, rng), alt_text(scene, rng)
        messages = (Message("user", (ImageSlot(0), "\nDescribe the image.")), Message("assistant", (synthetic,)))
        image = SceneImage(scene.size, self.seed, self.split, index, self._cache)
        meta = {"raw": raw, "synthetic": synthetic}
        return Sample(f"{self.split}-{index}", messages, (image,), "scenes", "pairs", meta)

    def fingerprint(self) -> str:
        return hash_of(self, [self.split, self.size, self.seed, self.synthetic])


class SceneLooks:
    """`size` pictures with one object each, and its colour and shape as the class ("red star", 42 of them)."""

    classes = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)

    def __init__(self, split: str, size: int, seed: int = 0) -> None:
        numbers = (len(KINDS) * block + place for block in count() for place in places(seed, split, block))
        self.split, self.seed, self.numbers = split, seed, list(islice(numbers, size))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[SceneImage, int]:
        """(picture, class number)"""
        number = self.numbers[index]
        scene = compose(self.seed, self.split, number)
        look = f"{scene.shapes[0].color} {scene.shapes[0].shape}"
        return SceneImage(scene.size, self.seed, self.split, number), self.classes.index(look)


def places(seed: int, split: str, block: int) -> list[int]:
    """Where in a block of scenes those with one object are."""
    return [place for place, kind in enumerate(block_kinds(seed, split, block)) if kind == KINDS[0]]
