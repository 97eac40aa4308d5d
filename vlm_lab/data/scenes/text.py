"""The made-up world in words alone, to pretrain a language model: `SceneText`.

Half of the records are running text (a description, a list of what there is, an alt text); the others are conversations
about a picture that is told and not shown: its description stands where a picture would. So a model learns the world's
vocabulary, its forms of questions, and to read answers off what stands before them; it never sees a pixel.
"""

from numpy.random import Generator

from vlm_lab.data.sample import Message, Sample, document
from vlm_lab.data.scenes.captions import alt_text, long_caption, placed, tags
from vlm_lab.data.scenes.compose import compose
from vlm_lab.data.scenes.layout import pick
from vlm_lab.data.scenes.questions import GROUPS, ask
from vlm_lab.data.scenes.source import REQUESTS, hash_of, require, require_index
from vlm_lab.data.scenes.world import SPLITS, Scene, stream

SEEN = tuple(group for group in GROUPS if group != "knowledge")
TELLERS, SHARES = (tags, placed, long_caption), (0.1, 0.8, 0.1)  # what a picture is told by
KINDS = {"running": 0.1, "retold": 0.2, "answers": 0.6, "known": 0.1}  # shares


class SceneText:
    """`size` texts. ValueError on an unknown split."""

    def __init__(self, split: str, size: int, seed: int = 0) -> None:
        require("split", split, SPLITS)
        self.split, self.size, self.seed = split, size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        require_index(index, self.size)
        scene, rng = compose(self.seed, self.split, index), stream(self.seed, self.split, index, "text")
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
        messages = {"running": running, "retold": retold, "answers": answers, "known": known}[kind](scene, rng)
        return Sample(f"{self.split}-{index}", messages, (), "scenes", f"text_{kind}")

    def fingerprint(self) -> str:
        return hash_of(self, [self.split, self.size, self.seed, 1])


def running(scene: Scene, rng: Generator) -> tuple[Message, ...]:
    """A text as it stands."""
    return (document([pick(rng, (long_caption, tags, alt_text))(scene, rng)]),)


def answers(scene: Scene, rng: Generator) -> tuple[Message, ...]:
    """A description, and questions about it."""
    told = TELLERS[int(rng.choice(len(TELLERS), p=SHARES))]
    groups = {tags: ("general",), placed: SEEN}.get(told, GROUPS)  # that it tells of
    return asked(told(scene, rng), scene, groups, rng)


def known(scene: Scene, rng: Generator) -> tuple[Message, ...]:
    """Questions that need no picture."""
    return asked("", scene, ("knowledge",), rng)


def retold(scene: Scene, rng: Generator) -> tuple[Message, ...]:
    """A description said in another way."""
    first, second = (TELLERS[int(rng.choice(len(TELLERS), p=SHARES))] for _ in range(2))
    second = second if first is long_caption else first  # shorter ones say less: they can only be repeated
    return turns(first(scene, rng), [(pick(rng, REQUESTS), second(scene, rng))])


def asked(told: str, scene: Scene, groups: tuple[str, ...], rng: Generator) -> tuple[Message, ...]:
    return turns(told, [(question.prompt, question.answer) for question in ask(scene, groups, 6, rng)])


def turns(told: str, asked: list[tuple[str, str]]) -> tuple[Message, ...]:
    """A conversation with `told` at the start of the first question."""
    messages: list[Message] = []
    for number, (prompt, answer) in enumerate(asked):
        content = (f"{told}\n{prompt}" if number == 0 and told else prompt,)
        messages += [Message("user", content), Message("assistant", (answer,))]
    return tuple(messages)
