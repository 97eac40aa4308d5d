"""The made-up world as sources for a mixture: `SceneCaptions` and `SceneQuestions` (`data=scenes`).

Constructor arguments are YAML keys. Record i is a pure function of the arguments and i; captions and questions of the
same split and seed show the same pictures and share one cache file. Nothing is drawn before a picture is asked for.

    SceneQuestions("train", 4000, cache="~/.cache/vlm_lab")            up to six turns on each picture
    SceneQuestions("val", 800, turns=1)                                evaluation: one question each, groups in turn
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from vlm_lab.data.sample import ImageSlot, Message, Sample
from vlm_lab.data.scenes.cache import ImageCache, SceneImage
from vlm_lab.data.scenes.captions import CAPTIONS
from vlm_lab.data.scenes.compose import compose
from vlm_lab.data.scenes.formats import STYLES, styled
from vlm_lab.data.scenes.layout import pick
from vlm_lab.data.scenes.questions import GROUPS, Question, ask, bears
from vlm_lab.data.scenes.world import KINDS, SPLITS, WORLD_VERSION, block_kinds, stream

REQUESTS = ("Describe the image.", "What is in this image?", "Write a caption for the image.", "What do you see?")


class SceneCaptions:
    """One picture and its caption per record.

    `kind`: "long" (a full synthetic description), "tags" (what there is, nothing more), "placed" (and where) or "alt"
    (partial, noisy).
    `cache`: a folder for ready-made pixels; None draws each picture when it is asked for.
    Raises ValueError on an unknown split or kind.
    """

    def __init__(self, split: str, size: int, seed: int = 0, kind: str = "long", cache: str | None = None) -> None:
        require("split", split, SPLITS)
        require("kind", kind, tuple(CAPTIONS))
        self.split, self.size, self.seed, self.kind = split, size, seed, kind
        self._cache = None if cache is None else ImageCache(cache, seed, split, size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        require_index(index, self.size)
        scene = compose(self.seed, self.split, index)
        rng = stream(self.seed, self.split, index, "caption")
        turns = [(pick(rng, REQUESTS), CAPTIONS[self.kind](scene, rng))]
        image = SceneImage(scene.size, self.seed, self.split, index, self._cache)
        return Sample(f"{self.split}-{index}", _conversation(turns), (image,), "scenes", f"caption_{self.kind}")

    def fingerprint(self) -> str:
        return hash_of(self, [self.split, self.size, self.seed, self.kind])


class SceneQuestions:
    """One picture with up to `turns` questions on it per record; with `turns=1` one question, the groups in turn.

    `groups` is a subset of `questions.GROUPS` (None: all). `image=False` leaves the picture out: text-only records,
    which make sense for `groups=[knowledge]`. `style` is how an answer is asked for and given (`formats.py`). With one
    turn, `Sample.group` is the question's group and `meta` has `template`, `chance` (what a blind guess scores)
    and, if options are offered, `choices`. Raises ValueError on an unknown split, group or style.
    """

    def __init__(
        self,
        split: str,
        size: int,
        seed: int = 0,
        groups: list[str] | None = None,
        *,
        turns: int = 6,
        image: bool = True,
        style: str = "plain",
        cache: str | None = None,
    ) -> None:
        require("split", split, SPLITS)
        require("style", style, STYLES)
        self.groups = GROUPS if groups is None else tuple(groups)
        for group in self.groups:
            require("groups", group, GROUPS)
        if turns < 1 or not self.groups:
            raise ValueError(f"turns={turns}, groups={groups}: need at least one turn and one group")
        self.split, self.size, self.seed, self.turns, self.image = split, size, seed, turns, image
        self.style = style
        self._cache = None if cache is None else ImageCache(cache, seed, split, max(size, self._scenes_needed()))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        require_index(index, self.size)
        groups, rank = self._plan(index)
        place = self._scene_index(groups, rank)
        scene = compose(self.seed, self.split, place)
        asked = ask(scene, groups, self.turns, stream(self.seed, self.split, index, "question"))
        images = (SceneImage(scene.size, self.seed, self.split, place, self._cache),) if self.image else ()
        messages = _conversation([styled(question, self.style) for question in asked], self.image)
        group, meta = self._labels(asked[0]) if self.turns == 1 else ("mixed", {})
        return Sample(f"{self.split}-{index}", messages, images, "scenes", group, meta)

    def fingerprint(self) -> str:
        style = [] if self.style == "plain" else [self.style]
        return hash_of(self, [self.split, self.size, self.seed, self.groups, self.turns, self.image, *style])

    def _labels(self, question: Question) -> tuple[str, dict[str, Any]]:
        """Sentences are a group of their own: they are scored on other grounds than words."""
        if self.style == "sentence":
            return "conversation", {"template": question.template, "chance": 0.0}
        return question.group, meta_of(question)

    def _plan(self, index: int) -> tuple[tuple[str, ...], int]:
        """Which groups record `index` asks from, and its rank among the records that ask from the same."""
        if self.turns > 1:
            return self.groups, index
        rank, turn = divmod(index, len(self.groups))
        return (self.groups[turn],), rank

    def _scene_index(self, groups: tuple[str, ...], rank: int) -> int:
        """The scene number `rank` among those that have something to ask in these groups."""
        block, nth = divmod(rank, _bearing_per_block(groups))
        kinds = block_kinds(self.seed, self.split, block)
        return block * len(KINDS) + [place for place, kind in enumerate(kinds) if bears(kind, groups)][nth]

    def _scenes_needed(self) -> int:
        """Fewer than `size` when groups take turns on the same pictures, more when few scenes bear the groups."""
        last = range(max(0, self.size - len(self.groups)), self.size)
        return max((self._scene_index(*self._plan(index)) + 1 for index in last), default=0)


def _conversation(turns: Sequence[tuple[str, str]], image: bool = True) -> tuple[Message, ...]:
    """User and assistant in turn, the image (if there is one) at the start of the first user turn."""
    messages: list[Message] = []
    for number, (prompt, answer) in enumerate(turns):
        content = (ImageSlot(0), prompt) if image and number == 0 else (prompt,)
        messages += [Message("user", content), Message("assistant", (answer,))]
    return tuple(messages)


def meta_of(question: Question) -> dict[str, Any]:
    meta: dict[str, Any] = {"template": question.template, "chance": question.chance}
    return meta | ({"choices": list(question.choices)} if question.choices else {})


def _bearing_per_block(groups: tuple[str, ...]) -> int:
    return sum(bears(kind, groups) for kind in KINDS)


def hash_of(source: object, arguments: list[Any]) -> str:
    """Hash of all that decides the records; the cache folder does not."""
    text = json.dumps([type(source).__name__, WORLD_VERSION, *arguments])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def require(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(known)}")


def require_index(index: int, size: int) -> None:
    if not 0 <= index < size:
        raise IndexError(f"record {index} of a source of {size}")
