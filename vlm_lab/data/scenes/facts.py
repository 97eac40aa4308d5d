"""What can be asked about a scene: every template is an iterator over `Fact`s in random order.

Whether a template has facts at all must not depend on the answer (else counts would be easy to guess): it follows from
how the scene was built, never from what it happens to hold. Margins keep questions fair: 15 % of the side for places, a
factor of 1.6 for distances, 2 units for bars (by construction). Wordings and the choice among facts are in
`questions.py`, facts that need no image in `knowledge.py`.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import permutations, product

from numpy.random import Generator

from vlm_lab.data.scenes.compose import BARS, COUNTED, TOTALS
from vlm_lab.data.scenes.layout import pick, shuffled
from vlm_lab.data.scenes.vocabulary import ALPHABET, COLORS, SHAPES, WORDS
from vlm_lab.data.scenes.world import TOP_VALUE, Bar, Scene

PLACE_MARGIN = 0.15  # of the image's side
HALVES = (("left", 0, 1), ("right", 0, -1), ("top", 1, 1), ("bottom", 1, -1))  # name, axis, direction
SIDES = (("left of", 0, 1), ("right of", 0, -1), ("above", 1, 1), ("below", 1, -1))
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
    """An object with a place: `name` as in a sentence ("the red object"), `short` as an answer ("red")."""

    name: str
    short: str
    x: float
    y: float

    def at(self, axis: int) -> float:
        return (self.x, self.y)[axis]

    def clearly_apart(self, other: "Named", axis: int, size: tuple[int, int]) -> bool:
        return abs(self.at(axis) - other.at(axis)) >= PLACE_MARGIN * size[axis]


def shape_by_color(scene: Scene, rng: Generator) -> Iterator[Fact]:
    if "color" in scene.named_by:
        for shape in shuffled(rng, scene.shapes):
            yield Fact("shape", ("looks", shape), shape.shape, SHAPES, {"color": shape.color})


def color_by_shape(scene: Scene, rng: Generator) -> Iterator[Fact]:
    if "shape" in scene.named_by:
        for shape in shuffled(rng, scene.shapes):
            yield Fact("color", ("looks", shape), shape.color, tuple(COLORS), {"thing": shape.shape})


def color_of_sign(scene: Scene, rng: Generator) -> Iterator[Fact]:
    alone = len(scene.signs) == 1
    for sign in shuffled(rng, scene.signs):
        name = "sign" if alone else f"sign with the {sign.what} {sign.text}"
        yield Fact("color", "sign" if alone else ("text", sign), sign.color, tuple(COLORS), {"thing": name})


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
        pool = {"number": _numbers(len(sign.text)), "letter": ALPHABET, "word": WORDS}[sign.what]
        name = "sign" if len(scene.signs) == 1 else f"{sign.color} sign"
        slots = {"what": sign.what, "sign": name}
        yield Fact("sign_text", ("text", sign), sign.text, pool, slots)


def label_of_bar(scene: Scene, rng: Generator) -> Iterator[Fact]:
    for which, bar in _extreme_bars(scene, rng):
        yield Fact("label_of_bar", which, bar.label, ALPHABET, {"which": which})


def value_of_bar(scene: Scene, rng: Generator) -> Iterator[Fact]:
    pool = tuple(str(value) for value in range(1, TOP_VALUE + 1))
    for bar in shuffled(rng, scene.chart.bars if scene.chart else ()):
        name = pick(rng, (f"bar {bar.label}", f"the {bar.color} bar"))
        yield Fact("value_of_bar", ("value", bar), str(bar.value), pool, {"bar": name})


def shape_in_half(scene: Scene, rng: Generator) -> Iterator[Fact]:
    """What shape is in one half of the picture, if one object is, and none is near the middle."""
    for half, axis, way in shuffled(rng, HALVES):
        offsets = [way * (scene.size[axis] / 2 - (shape.x, shape.y)[axis]) for shape in scene.shapes]
        there = [shape for shape, offset in zip(scene.shapes, offsets, strict=True) if offset > 0]
        if len(there) == 1 and min(map(abs, offsets)) >= PLACE_MARGIN * scene.size[axis] / 2:
            yield Fact("shape_in_half", ("looks", there[0]), there[0].shape, SHAPES, {"half": half})


def shape_beside(scene: Scene, rng: Generator) -> Iterator[Fact]:
    """What shape is left of, right of, above or below another object, where one object alone is."""
    things = _shapes_by(scene, "color") if "color" in scene.named_by else []
    for anchor, (side, axis, way) in shuffled(rng, tuple(product(things, SIDES))):
        pairs = zip(things, scene.shapes, strict=True)
        there = [pair for pair in pairs if way * (anchor.at(axis) - pair[0].at(axis)) > 0]
        if len(there) == 1 and there[0][0].clearly_apart(anchor, axis, scene.size):
            slots = {"side": side, "b": anchor.name}
            yield Fact("shape_beside", ("looks", there[0][1]), there[0][1].shape, SHAPES, slots)


def left_right(scene: Scene, rng: Generator) -> Iterator[Fact]:
    for a, b in permutations(shuffled(rng, _named_shapes(scene)), 2):
        if a.clearly_apart(b, 0, scene.size):
            answer = "left" if a.x < b.x else "right"
            yield Fact("left_right", ("x", frozenset((a, b))), answer, ("left", "right"), {"a": a.name, "b": b.name})


def above_below(scene: Scene, rng: Generator) -> Iterator[Fact]:
    for a, b in permutations(shuffled(rng, _named_shapes(scene)), 2):
        if a.clearly_apart(b, 1, scene.size):
            answer = "above" if a.y < b.y else "below"
            yield Fact("above_below", ("y", frozenset((a, b))), answer, ("above", "below"), {"a": a.name, "b": b.name})


def taller_shorter(scene: Scene, rng: Generator) -> Iterator[Fact]:
    for a, b in permutations(shuffled(rng, scene.chart.bars if scene.chart else ()), 2):
        answer = "taller" if a.value > b.value else "shorter"
        slots = {"a": f"the {a.color} bar", "b": f"the {b.color} bar"}
        yield Fact("taller_shorter", ("height", frozenset((a, b))), answer, ("taller", "shorter"), slots)


def closer(scene: Scene, rng: Generator) -> Iterator[Fact]:
    """Which of two shapes is closer to a third."""
    for to, a, b in permutations(shuffled(rng, _named_shapes(scene)), 3):
        near, far = sorted((a, b), key=lambda thing: _squared_distance(thing, to))
        if _squared_distance(far, to) >= DISTANCE_RATIO**2 * _squared_distance(near, to):
            slots = {"to": to.name, "a": a.name, "b": b.name}
            yield Fact("closer", ("closer", to, frozenset((a, b))), near.short, (a.short, b.short), slots)


def nearer(scene: Scene, rng: Generator) -> Iterator[Fact]:
    """Which of two overlapping shapes is nearer to the viewer, or farther away."""
    things = _named_shapes(scene)
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


def _named_shapes(scene: Scene) -> list[Named]:
    """The shapes in drawing order, all named by shape, which has to be recognized, or by color where shapes repeat."""
    return _shapes_by(scene, "shape" if "shape" in scene.named_by else "color")


def _shapes_by(scene: Scene, attribute: str) -> list[Named]:
    if attribute == "color":
        return [Named(f"the {shape.color} object", shape.color, shape.x, shape.y) for shape in scene.shapes]
    return [Named(f"the {shape.shape}", shape.shape, shape.x, shape.y) for shape in scene.shapes]


def _squared_distance(a: Named, b: Named) -> float:
    return (a.x - b.x) ** 2 + (a.y - b.y) ** 2


@cache
def _numbers(digits: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(10 ** (digits - 1), 10**digits))
