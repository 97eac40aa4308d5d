"""Facts that can be answered from the text alone: sums, differences, the alphabet, categories.

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

_DIGITS = range(1, 6)  # so few that a toy learns all sums: whether it finds out how to add was a matter of the seed
_PAIRS = tuple((a, b) for a in _DIGITS for b in _DIGITS)
_NEIGHBORS = tuple(pairwise(ascii_uppercase))
_MEMBERS = tuple(
    (item, pair, pair[side]) for pair, sides in CATEGORIES.items() for side in (0, 1) for item in sides[side]
)


def total(scene: Scene, rng: Generator) -> Iterator[Fact]:
    pool = tuple(str(value) for value in range(2, 11))
    for a, b in shuffled(rng, _PAIRS):
        yield Fact("sum", ("sum", a, b), str(a + b), pool, {"a": str(a), "b": str(b)})


def difference(scene: Scene, rng: Generator) -> Iterator[Fact]:
    pool = tuple(str(value) for value in range(5))
    for a, b in shuffled(rng, _PAIRS):
        if a >= b:
            yield Fact("difference", ("difference", a, b), str(a - b), pool, {"a": str(a), "b": str(b)})


def neighbor(scene: Scene, rng: Generator) -> Iterator[Fact]:
    pool = tuple(ascii_uppercase)
    for first, second in shuffled(rng, _NEIGHBORS):
        which, given, answer = shuffled(rng, (("after", first, second), ("before", second, first)))[0]
        yield Fact("neighbor", ("neighbor", first), answer, pool, {"which": which, "letter": given})


def category(scene: Scene, rng: Generator) -> Iterator[Fact]:
    for item, pair, name in shuffled(rng, _MEMBERS):
        slots = {"item": with_article(item), "a": with_article(pair[0]), "b": with_article(pair[1])}
        yield Fact("category", ("category", item), name, pair, slots)
