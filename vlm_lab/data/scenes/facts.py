"""What can be asked about a scene: every template is an iterator over `Fact`s in random order.

Whether a template has facts at all must not depend on the answer (else counts would be easy to guess): it follows from
how the scene was built, never from what it happens to hold. Margins keep questions fair: 15 % of the side for places, a
factor of 1.6 for distances, 2 units for bars (by construction). Wordings and the choice among facts are in
`questions.py`, facts that need no image in `knowledge.py`.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import permutations

from numpy.random import Generator

from vlm_lab.data.scenes.compose import BARS, COUNTED, TOTALS, pick, shuffled
from vlm_lab.data.scenes.vocabulary import BAR_LABELS, COLORS, SHAPES, WORDS
from vlm_lab.data.scenes.world import TOP_VALUE, Bar, Scene, Sign

PLACE_MARGIN = 0.15  # of the image's side
DISTANCE_RATIO = 1.6


@dataclass(frozen=True)
class Fact:
    """Something that can be asked: `slots` fill the template's wording; `pool` are all answers, equally likely.

    Facts with the same `key` give each other away and are not asked about in one conversation.
    """

    template: str
    key: Hashable
    answer: str
    pool: tuple[str, ...]
    slots: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Named:
    """A thing with a place: `name` as in a sentence ("the red object"), `short` as an answer ("red").

    `half_width` and `half_height` matter for wide things only: what stands below a sign is not left of it.
    """

    name: str
    short: str
    x: float
    y: float
    half_width: float = 0
    half_height: float = 0


def shape_by_color(scene: Scene, rng: Generator) -> Iterator[Fact]:
    if "color" in scene.named_by:
        for shape in shuffled(rng, scene.shapes):
            yield Fact("shape", ("looks", shape), shape.shape, SHAPES, {"color": shape.color})


def color_by_shape(scene: Scene, rng: Generator) -> Iterator[Fact]:
    if "shape" in scene.named_by:
        for shape in shuffled(rng, scene.shapes):
            yield Fact("color", ("looks", shape), shape.color, tuple(COLORS), {"thing": shape.shape})


def color_of_sign(scene: Scene, rng: Generator) -> Iterator[Fact]:
    if len(scene.signs) == 1:
        yield Fact("color", "sign", scene.signs[0].color, tuple(COLORS), {"thing": "sign"})


def color_of_bar(scene: Scene, rng: Generator) -> Iterator[Fact]:
    for which, bar in _extreme_bars(scene, rng):
        yield Fact("color", which, bar.color, tuple(COLORS), {"thing": f"{which} bar"})


def count(scene: Scene, rng: Generator) -> Iterator[Fact]:
    if scene.count:
        noun, number = scene.count
        pool = {"objects": TOTALS, "bars": BARS}.get(noun, COUNTED)
        yield Fact("count", "count", str(number), tuple(map(str, pool)), {"things": noun})


def sign_text(scene: Scene, rng: Generator) -> Iterator[Fact]:
    for sign in shuffled(rng, scene.signs):
        pool = {"number": _numbers(len(sign.text)), "letter": BAR_LABELS, "word": WORDS}[sign.what]
        name = "sign" if len(scene.signs) == 1 else f"{sign.color} sign"
        slots = {"what": sign.what, "sign": name}
        yield Fact("sign_text", ("text", sign), sign.text, pool, slots)


def label_of_bar(scene: Scene, rng: Generator) -> Iterator[Fact]:
    for which, bar in _extreme_bars(scene, rng):
        yield Fact("label_of_bar", which, bar.label, BAR_LABELS, {"which": which})


def value_of_bar(scene: Scene, rng: Generator) -> Iterator[Fact]:
    pool = tuple(str(value) for value in range(1, TOP_VALUE + 1))
    for bar in shuffled(rng, scene.chart.bars if scene.chart else ()):
        yield Fact("value_of_bar", ("value", bar), str(bar.value), pool, {"label": bar.label})


def half(scene: Scene, rng: Generator) -> Iterator[Fact]:
    """In which half of the image a shape is."""
    ends = (("left", "right"), ("top", "bottom"))
    for thing in shuffled(rng, _named_shapes(scene, rng)):
        for place, side, (first, second) in shuffled(
            rng, tuple(zip((thing.x, thing.y), scene.size, ends, strict=True))
        ):
            if abs(place - side / 2) >= PLACE_MARGIN * side:
                answer = first if place < side / 2 else second
                slots = {"a": thing.name, "first": first, "second": second}
                yield Fact("half", ("half", first, thing), answer, (first, second), slots)


def left_right(scene: Scene, rng: Generator) -> Iterator[Fact]:
    for a, b in permutations(_named(scene, rng), 2):
        if abs(a.x - b.x) >= max(PLACE_MARGIN * scene.size[0], a.half_width, b.half_width):
            answer = "left" if a.x < b.x else "right"
            yield Fact("left_right", ("x", frozenset((a, b))), answer, ("left", "right"), {"a": a.name, "b": b.name})


def above_below(scene: Scene, rng: Generator) -> Iterator[Fact]:
    for a, b in permutations(() if scene.chart else _named(scene, rng), 2):
        if abs(a.y - b.y) >= max(PLACE_MARGIN * scene.size[1], a.half_height, b.half_height):
            answer = "above" if a.y < b.y else "below"
            yield Fact("above_below", ("y", frozenset((a, b))), answer, ("above", "below"), {"a": a.name, "b": b.name})


def taller_shorter(scene: Scene, rng: Generator) -> Iterator[Fact]:
    for a, b in permutations(shuffled(rng, scene.chart.bars if scene.chart else ()), 2):
        answer = "taller" if a.value > b.value else "shorter"
        slots = {"a": f"the {a.color} bar", "b": f"the {b.color} bar"}
        yield Fact("taller_shorter", ("height", frozenset((a, b))), answer, ("taller", "shorter"), slots)


def closer(scene: Scene, rng: Generator) -> Iterator[Fact]:
    """Which of two shapes is closer to a third."""
    for to, a, b in permutations(shuffled(rng, _named_shapes(scene, rng)), 3):
        near, far = sorted((a, b), key=lambda thing: _squared_distance(thing, to))
        if _squared_distance(far, to) >= DISTANCE_RATIO**2 * _squared_distance(near, to):
            slots = {"to": to.name, "a": a.name, "b": b.name}
            yield Fact("closer", ("closer", to, frozenset((a, b))), near.short, (a.short, b.short), slots)


def nearer(scene: Scene, rng: Generator) -> Iterator[Fact]:
    """Which of two overlapping shapes is nearer to the viewer, or farther away."""
    things = _named_shapes(scene, rng)
    for near, far in shuffled(rng, scene.fronts):
        a, b = shuffled(rng, (things[near], things[far]))
        which, asked = pick(rng, (("nearer to", near), ("farther from", far)))
        slots = {"which": which, "a": a.name, "b": b.name}
        yield Fact("nearer", ("depth", near), things[asked].short, (a.short, b.short), slots)


def _extreme_bars(scene: Scene, rng: Generator) -> list[tuple[str, Bar]]:
    if not scene.chart:
        return []
    ranked = sorted(scene.chart.bars, key=lambda bar: bar.value)
    return shuffled(rng, (("shortest", ranked[0]), ("tallest", ranked[-1])))


def _named(scene: Scene, rng: Generator) -> list[Named]:
    """Everything that has a place, in random order."""
    if scene.chart:
        slot = scene.size[0] / len(scene.chart.bars)
        bars = [Named(f"the {bar.color} bar", bar.color, i * slot, 0) for i, bar in enumerate(scene.chart.bars)]
        return shuffled(rng, bars)
    signs = [_named_sign(sign, alone=len(scene.signs) == 1) for sign in scene.signs]
    return shuffled(rng, _named_shapes(scene, rng) + signs)


def _named_shapes(scene: Scene, rng: Generator) -> list[Named]:
    """The shapes in drawing order, all named by color or all by shape."""
    if pick(rng, scene.named_by) == "color":
        return [Named(f"the {shape.color} object", shape.color, shape.x, shape.y) for shape in scene.shapes]
    return [Named(f"the {shape.shape}", shape.shape, shape.x, shape.y) for shape in scene.shapes]


def _named_sign(sign: Sign, alone: bool) -> Named:
    name = "sign" if alone else f"{sign.color} sign"
    return Named(f"the {name}", name, sign.x, sign.y, *sign.half_size)


def _squared_distance(a: Named, b: Named) -> float:
    return (a.x - b.x) ** 2 + (a.y - b.y) ** 2


@cache
def _numbers(digits: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(10 ** (digits - 1), 10**digits))
