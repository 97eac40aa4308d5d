"""The made-up world with several pictures a record: `SceneComparisons`, `SceneVideos` and `SceneDocuments`.

Arguments, determinism and caches are those of `source.py`. Comparisons and videos ask one question a record;
`meta` has `template`, `chance` and, if options are offered, `choices`. Documents share the cache of captions
and questions whose size is `size` x `pictures`.

    SceneComparisons("train", 4000)                  two to four pictures, group `multi_image`
    SceneVideos("val", 200)                          a clip of four to eight frames, group `video`
    SceneDocuments("train", 1500, pictures=4)        running text around two to four pictures, all of it learnt
"""

from collections.abc import Callable

from numpy.random import Generator

from vlm_lab.data.sample import ImageSlot, Message, Sample, Video, document
from vlm_lab.data.scenes import clips, comparisons
from vlm_lab.data.scenes.cache import Compose, ImageCache, SceneImage
from vlm_lab.data.scenes.comparisons import ORDINALS, Puzzle
from vlm_lab.data.scenes.compose import compose
from vlm_lab.data.scenes.documents import article
from vlm_lab.data.scenes.questions import word
from vlm_lab.data.scenes.source import hash_of, meta_of, require, require_index
from vlm_lab.data.scenes.world import SPLITS, stream


class Puzzles:
    """One question on the pictures of one puzzle per record: the base of the two classes below.

    `cache`: as for `SceneCaptions`. Raises ValueError on an unknown split.
    """

    group = ""
    most = 0  # pictures of one puzzle
    puzzle: Callable[[int, str, int], Puzzle]
    picture: Compose
    wordings: dict[str, tuple[str, ...]]

    def __init__(self, split: str, size: int, seed: int = 0, cache: str | None = None) -> None:
        require("split", split, SPLITS)
        self.split, self.size, self.seed = split, size, seed
        self._cache = (
            None if cache is None else ImageCache(cache, seed, split, size * self.most, self.group, self.picture)
        )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        require_index(index, self.size)
        rng = stream(self.seed, self.split, index, "wording")
        fact = self.puzzle(self.seed, self.split, index).fact
        question = word(self.group, fact, self.wordings[fact.template], rng)
        content, images = self.shown(self._pictures(index), question.prompt, rng)
        messages = (Message("user", content), Message("assistant", (question.answer,)))
        return Sample(f"{self.split}-{index}", messages, images, "scenes", self.group, meta_of(question))

    def fingerprint(self) -> str:
        return hash_of(self, [self.split, self.size, self.seed])

    def shown(
        self, pictures: tuple[SceneImage, ...], prompt: str, rng: Generator
    ) -> tuple[tuple[str | ImageSlot, ...], tuple[SceneImage | Video, ...]]:
        """What the user says, and the images that it mentions. Every kind of puzzle has its own."""
        raise NotImplementedError

    def _pictures(self, index: int) -> tuple[SceneImage, ...]:
        scenes = self.puzzle(self.seed, self.split, index).scenes
        return tuple(
            SceneImage(scene.size, self.seed, self.split, index * self.most + place, self._cache, self.picture)
            for place, scene in enumerate(scenes)
        )


class SceneComparisons(Puzzles):
    """Two to four pictures. Half of the records have them in front, half in place: "First image: <image>"."""

    group = "multi_image"
    most = comparisons.PICTURES
    puzzle = staticmethod(comparisons.compare)
    picture = staticmethod(comparisons.compared_picture)
    wordings = comparisons.WORDINGS

    def shown(
        self, pictures: tuple[SceneImage, ...], prompt: str, rng: Generator
    ) -> tuple[tuple[str | ImageSlot, ...], tuple[SceneImage | Video, ...]]:
        if rng.random() < 0.5:
            return (*map(ImageSlot, range(len(pictures))), prompt), pictures
        named = [(f"{ORDINALS[place].capitalize()} image: ", ImageSlot(place), "\n") for place in range(len(pictures))]
        return (*sum(named, ()), prompt), pictures


class SceneVideos(Puzzles):
    """One clip, as a video. Needs a tiling with a rule for videos."""

    group = "video"
    most = clips.FRAMES
    videos = True  # read by vlm_lab/compat.py
    puzzle = staticmethod(clips.clip)
    picture = staticmethod(clips.clip_frame)
    wordings = clips.WORDINGS

    def shown(
        self, pictures: tuple[SceneImage, ...], prompt: str, rng: Generator
    ) -> tuple[tuple[str | ImageSlot, ...], tuple[SceneImage | Video, ...]]:
        return (ImageSlot(0), prompt), (Video(pictures),)


class SceneDocuments:
    """An article on two to `pictures` pictures per record: those of scenes that follow each other in the world.

    `cache`: as for `SceneCaptions`. Raises ValueError on an unknown split or fewer than two pictures.
    """

    def __init__(self, split: str, size: int, seed: int = 0, *, pictures: int = 6, cache: str | None = None) -> None:
        require("split", split, SPLITS)
        if pictures < 2:
            raise ValueError(f"pictures={pictures}: a document has at least two")
        self.split, self.size, self.seed, self.pictures = split, size, seed, pictures
        self._cache = None if cache is None else ImageCache(cache, seed, split, size * pictures)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        require_index(index, self.size)
        rng = stream(self.seed, self.split, index, "document")
        first = index * self.pictures
        places = range(first, first + int(rng.integers(2, self.pictures + 1)))
        scenes = [compose(self.seed, self.split, place) for place in places]
        images = tuple(
            SceneImage(scene.size, self.seed, self.split, place, self._cache)
            for scene, place in zip(scenes, places, strict=True)
        )
        units = [ImageSlot(unit) if isinstance(unit, int) else unit for unit in article(scenes, rng)]
        return Sample(f"{self.split}-{index}", (document(units),), images, "scenes", "document")

    def fingerprint(self) -> str:
        return hash_of(self, [self.split, self.size, self.seed, self.pictures])
