"""Captions for pretraining: `long_caption`, a full synthetic description; `tags`, its nouns; `alt_text`, the web's.

The long one tells everything in the picture, the tags only what there is, `placed` in four words a thing also where it
is and what a bar is worth: as many for each thing, so that a toy decoder finds the third one at the same place. All go
through a picture as one reads: by thirds from top to bottom, and from left to right. The alt text is like what is
scraped from the web: it covers a part of the picture, may be dressed up with noise, and in one case of eight says
nothing about the picture at all.
"""

from collections.abc import Callable, Sequence

from numpy.random import Generator

from vlm_lab.data.scenes.layout import pick, shuffled
from vlm_lab.data.scenes.vocabulary import WORDS, with_article
from vlm_lab.data.scenes.world import Chart, Scene, Shape, Sign

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
OPENINGS = ("The image shows {}.", "This is a picture of {}.", "We see {}.")
DRESSINGS = ("{}", "{}", "{}.jpg", "{} - stock photo", "photo of {}", "buy {} online", "{} | {noise}", "{noise} {}")
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the center", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)


def long_caption(scene: Scene, rng: Generator) -> str:
    """Everything that is in the picture: looks, sizes, places, texts, values."""
    sentences = _chart_sentences(scene.chart, rng) if scene.chart else _thing_sentences(scene, rng)
    opening = pick(rng, OPENINGS).format(f"{_overview(scene)} on a {scene.background} background")
    return " ".join([opening, *sentences])


def _overview(scene: Scene) -> str:
    if scene.chart:
        return f"a bar chart with {len(scene.chart.bars)} bars"
    parts = [(len(scene.signs), "sign"), (len(scene.shapes), "object")]
    return " and ".join(with_article(noun) if n == 1 else f"{n} {noun}s" for n, noun in parts if n)


def _thing_sentences(scene: Scene, rng: Generator) -> list[str]:
    parts = [_describe(thing, _place(scene, thing)) for thing in _as_one_reads(scene)]
    sentences = [pick(rng, ("There is {}.", "It has {}.")).format(_join(parts))]
    if scene.count:
        sentences.append(f"Number of {scene.count[0]}: {scene.count[1]}.")
    for near, far in scene.fronts:
        sentences.append(f"The {_look(scene.shapes[near])} is in front of the {_look(scene.shapes[far])}.")
    return sentences


def _chart_sentences(chart: Chart, rng: Generator) -> list[str]:
    forms = ("bar {0.label} is {0.color} with value {0.value}", "the {0.color} bar {0.label} is {0.value} high")
    form = pick(rng, forms)
    ranked = sorted(chart.bars, key=lambda bar: bar.value)
    listed = _join([form.format(bar) for bar in chart.bars])
    ends = f"The tallest bar is {ranked[-1].label} and the shortest bar is {ranked[0].label}."
    return [f"From left to right, {listed}.", ends]


def _describe(thing: Shape | Sign, place: str) -> str:
    if isinstance(thing, Shape):
        return f"{with_article(thing.scale)} {_look(thing)} {place}"
    return f'{with_article(thing.color)} sign with the {thing.what} "{thing.text}" in {thing.scale} letters {place}'


def _look(shape: Shape) -> str:
    return f"{shape.color} {shape.shape}"


def _place(scene: Scene, thing: Shape | Sign) -> str:
    row, column = _thirds(scene, thing)
    return PLACES[row][column]


def _thirds(scene: Scene, thing: Shape | Sign) -> tuple[int, int]:
    """(row, column) of the thing's center, in thirds of the picture."""
    return min(2, 3 * thing.y // scene.size[1]), min(2, 3 * thing.x // scene.size[0])


def _join(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else parts[0]


def tags(scene: Scene, rng: Generator) -> str:
    """What there is, without places or sizes: "red star, purple rain" (a sign is told by its text); "blue K bar"."""
    if scene.chart:
        return ", ".join(f"{bar.color} {bar.label} bar" for bar in scene.chart.bars)
    return ", ".join(map(_tag, _as_one_reads(scene)))


def placed(scene: Scene, rng: Generator) -> str:
    """The tags with places and values: "red star top left, purple rain middle center"; "blue K bar 4"."""
    if scene.chart:
        return ", ".join(f"{bar.color} {bar.label} bar {bar.value}" for bar in scene.chart.bars)
    things = _as_one_reads(scene)
    places = [f"{ROWS[row]} {COLUMNS[column]}" for row, column in (_thirds(scene, thing) for thing in things)]
    return ", ".join(f"{_tag(thing)} {place}" for thing, place in zip(things, places, strict=True))


def _as_one_reads(scene: Scene) -> list[Sign | Shape]:
    return sorted([*scene.signs, *scene.shapes], key=lambda thing: (_thirds(scene, thing)[0], thing.x))


def _tag(thing: Sign | Shape) -> str:
    return f"{thing.color} {thing.shape if isinstance(thing, Shape) else thing.text}"


def alt_text(scene: Scene, rng: Generator) -> str:
    """A short, partial, noisy text such as a web page gives with a picture."""
    if rng.random() < 0.125:
        return pick(rng, ("IMG_{}.jpg", "DSC{}", "image {}", "{}.png")).format(rng.integers(1000, 10000))
    return pick(rng, DRESSINGS).format(_glimpse(scene, rng), noise=pick(rng, WORDS))


def _glimpse(scene: Scene, rng: Generator) -> str:
    """A few words about one or two things of the scene."""
    if scene.chart:
        labels = " ".join(bar.label for bar in scene.chart.bars)
        return pick(rng, ("bar chart", f"chart {labels}", f"{len(scene.chart.bars)} bars"))
    if scene.signs:
        sign = pick(rng, scene.signs)
        return pick(rng, (f"{sign.color} sign", f"sign {sign.text}", sign.text))
    seen = shuffled(rng, scene.shapes)[: 1 + int(rng.integers(2))]
    return " and ".join(pick(rng, (_look(shape), shape.shape)) for shape in seen)


CAPTIONS: dict[str, Callable[[Scene, Generator], str]] = {
    "long": long_caption,
    "tags": tags,
    "placed": placed,
    "alt": alt_text,
}
