"""Facts that can be answered from the text alone: one more or less, the alphabet, categories.

They have the same form as the templates of `facts.py` and leave the scene unread, so a model that scores on the group
`knowledge` shows what its language model knows, not what it sees. The mapping from question to answer is fixed.
"""

from collections.abc import Iterator
from itertools import pairwise
from string import ascii_uppercase

from numpy.random import Generator

from vlm_lab.data.scenes.facts import Fact
from vlm_lab.data.scenes.layout import shuffled
from vlm_lab.data.scenes.vocabulary import CATEGORIES, with_article
from vlm_lab.data.scenes.world import Scene

_NUMBERS = range(1, 10)
_NEIGHBORS = tuple(pairwise(ascii_uppercase))
_MEMBERS = tuple(
    (item, pair, pair[side]) for pair, sides in CATEGORIES.items() for side in (0, 1) for item in sides[side]
)


def total(scene: Scene, rng: Generator) -> Iterator[Fact]:
    """One more. Not sums of any two: whether a toy finds out how to add within a stage is a matter of the seed."""
    pool = tuple(str(number + 1) for number in _NUMBERS)
    for number in shuffled(rng, _NUMBERS):
        yield Fact("sum", ("sum", number), str(number + 1), pool, {"a": str(number), "b": "1"})


def difference(scene: Scene, rng: Generator) -> Iterator[Fact]:
    """One less."""
    pool = tuple(str(number - 1) for number in _NUMBERS)
    for number in shuffled(rng, _NUMBERS):
        yield Fact("difference", ("difference", number), str(number - 1), pool, {"a": str(number), "b": "1"})


def neighbor(scene: Scene, rng: Generator) -> Iterator[Fact]:
    pool = tuple(ascii_uppercase)
    for first, second in shuffled(rng, _NEIGHBORS):
        which, given, answer = shuffled(rng, (("after", first, second), ("before", second, first)))[0]
        yield Fact("neighbor", ("neighbor", first), answer, pool, {"which": which, "letter": given})


def category(scene: Scene, rng: Generator) -> Iterator[Fact]:
    for item, pair, name in shuffled(rng, _MEMBERS):
        slots = {"item": with_article(item), "a": with_article(pair[0]), "b": with_article(pair[1])}
        yield Fact("category", ("category", item), name, pair, slots)
