"""Illustrated articles: `article(scenes, rng) -> units`, texts and the numbers of the pictures that stand between them.

For pretraining on interleaved documents (OBELICS): what is written is about the pictures nearby, before or after the
text, and some of it about a picture further up or about all of them. As on the web, some sentences have nothing to do
with any picture. Everything that is said is true.
"""

from collections.abc import Iterator, Sequence

from numpy.random import Generator

from vlm_lab.data.scenes import knowledge
from vlm_lab.data.scenes.captions import long_caption, tags
from vlm_lab.data.scenes.comparisons import ORDINALS
from vlm_lab.data.scenes.layout import pick
from vlm_lab.data.scenes.vocabulary import WORDS, with_article
from vlm_lab.data.scenes.world import Scene

TITLES = ("Pictures from the {}", "The {} album", "A day at the {}")
LEADS = ("Next comes", "Below is", "Here we look at")
TAILS = ("Above is", "That was", "This one has")
ASIDES = {
    "sum": "{a} plus {b} is {answer}.",
    "neighbor": "In the alphabet, {answer} comes {which} {letter}.",
    "category": "{item} is {answer}.",
}


def article(scenes: Sequence[Scene], rng: Generator) -> list[str | int]:
    """Text units and picture numbers (from 0) in reading order: a title, the pictures in order, a last line."""
    units: list[str | int] = [f"{pick(rng, TITLES).format(pick(rng, WORDS))}: {len(scenes)} pictures."]
    for number, scene in enumerate(scenes):
        before = bool(rng.random() < 0.5)
        told = _told(scene, before, rng)
        units += [told, number] if before else [number, told]
        units += _links(scenes[: number + 1], rng)
        if rng.random() < 0.25:
            units.append(_aside(scene, rng))
    units.append(f"The {len(scenes)} pictures show {sum(map(things, scenes))} things in all.")
    return units


def things(scene: Scene) -> int:
    """Objects, signs and bars."""
    return len(scene.shapes) + len(scene.signs) + (len(scene.chart.bars) if scene.chart else 0)


def _told(scene: Scene, before: bool, rng: Generator) -> str:
    """One picture of four is described in full, the others by what there is."""
    if rng.random() < 0.25:
        return long_caption(scene, rng)
    return f"{pick(rng, LEADS if before else TAILS)}: {tags(scene, rng)}."


def _links(scenes: Sequence[Scene], rng: Generator) -> Iterator[str]:
    """How the last picture compares to an earlier one."""
    if len(scenes) < 2 or rng.random() < 0.3:
        return
    number = int(rng.integers(len(scenes) - 1))
    here, there, name = (
        scenes[-1],
        scenes[number],
        ORDINALS[number] if number < len(ORDINALS) else f"number {number + 1}",
    )
    if rng.random() < 0.5:
        more = things(here) - things(there)
        amount = "as many things as" if more == 0 else f"{_things(abs(more))} {'more' if more > 0 else 'fewer'} than"
        yield f"It shows {amount} the {name} picture."
    else:
        same = "the same" if here.background == there.background else "not the same"
        yield f"Its background is {same} as in the {name} picture."


def _things(number: int) -> str:
    return "1 thing" if number == 1 else f"{number} things"


def _aside(scene: Scene, rng: Generator) -> str:
    """Something that is true and has nothing to do with the pictures."""
    fact = next(pick(rng, (knowledge.total, knowledge.neighbor, knowledge.category))(scene, rng))
    answer = with_article(fact.answer) if fact.template == "category" else fact.answer
    told = ASIDES[fact.template].format(answer=answer, **fact.slots)
    return told[0].upper() + told[1:]
