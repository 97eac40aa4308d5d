"""Composes scenes answers first: `compose(seed, split, index) -> Scene`.

What will be asked (how many circles, the value of a bar, what is nearer) is drawn uniformly, and the scene is built so
that it is true. The rest follows from symmetry: colors, shapes, places and orders are exchangeable, so no question's
wording says anything about its answer. Nothing here is rejected or retried; layouts are built to fit.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.random import Generator

from vlm_lab.data.scenes.layout import (
    RADII,
    ROOMY,
    Box,
    grid_centers,
    image_size,
    pick,
    place,
    radius,
    shuffled,
    some,
    split_box,
)
from vlm_lab.data.scenes.vocabulary import ALPHABET, BACKGROUNDS, COLORS, SHAPES, WORDS, plural
from vlm_lab.data.scenes.world import (
    FONTS,
    KINDS,
    TOP_VALUE,
    Bar,
    Chart,
    Scene,
    Shape,
    Sign,
    block_kinds,
    em_width,
    stream,
)

COUNTED = (1, 2, 3, 4)  # how many of one shape or one color
TOTALS = (2, 3, 4, 5)  # how many objects in all
BARS = (2, 3, 4)
# How far a shape surely reaches sideways from its center, in radii: what makes two shapes overlap for certain.
REACH = {"circle": 1.0, "square": 0.88, "triangle": 0.52, "star": 0.6, "cross": 0.95, "heart": 0.8}
SIGN_LAYOUTS = (
    *(("sign",),) * 6,
    *(("sign", "sign"),) * 2,
    ("sign", "shape"),
    ("sign", "shape shape"),
    ("sign sign", "shape"),
)
WRITTEN = {"letter": 0.84, "word": 0.08, "number": 0.08}  # shares; a toy can learn to read the letters
THICK = ("DejaVuSans-Bold", "DejaVuSansMono-Bold")


def compose(seed: int, split: str, index: int) -> Scene:
    block, place = divmod(index, len(KINDS))
    return _COMPOSERS[block_kinds(seed, split, block)[place]](stream(seed, split, index, "scene"))


def _alone(rng: Generator) -> Scene:
    """One large object, clearly to one side and clearly above or below the middle."""
    size = image_size(rng)
    r = round(min(size) * (0.23 + 0.09 * rng.random()))
    x, y = (_off_center(rng, side, r) for side in size)
    look = (pick(rng, tuple(COLORS)), pick(rng, SHAPES))
    return Scene(size, "alone", pick(rng, tuple(BACKGROUNDS)), (Shape(*look, "large", x, y, r),))


def _off_center(rng: Generator, side: int, r: int) -> int:
    """A place on either half of `side`, 20 to 30 % of it from the middle, or at the edge: the shape stays inside."""
    offset = min(side * (0.2 + 0.1 * rng.random()), side / 2 - r)
    return round(side / 2 + pick(rng, (-1, 1)) * offset)


def _two(rng: Generator) -> Scene:
    """Two large objects, one beside or below the other."""
    size = image_size(rng)
    looks = zip(some(rng, COLORS, 2), some(rng, SHAPES, 2), strict=True)
    shapes: list[Shape] = []
    for look, box in zip(looks, split_box((0, 0, *size), 2, size[0] > size[1]), strict=True):
        r = round((0.4 + 0.08 * rng.random()) * min(box[2] - box[0], box[3] - box[1]))
        shapes.append(Shape(*look, "large", *place(rng, box, r, r), r))
    return Scene(size, "two", pick(rng, tuple(BACKGROUNDS)), tuple(shapes))


def _objects(rng: Generator) -> Scene:
    size = image_size(rng)
    colors, shapes, named_by, count = _looks(rng)
    scales = [pick(rng, tuple(RADII)) for _ in colors]
    radii = [radius(scale, size, len(scales)) for scale in scales]
    centers = grid_centers(rng, size, radii)
    things = zip(colors, shapes, scales, centers, radii, strict=True)
    drawn = tuple(Shape(color, shape, scale, *center, r) for color, shape, scale, center, r in things)
    return Scene(size, "objects", pick(rng, tuple(BACKGROUNDS)), drawn, named_by=named_by, count=count)


def _looks(rng: Generator) -> tuple[list[str], list[str], tuple[str, ...], tuple[str, int]]:
    """Colors and shapes of the objects, what tells them apart, and what is counted and how many there are."""
    counted = pick(rng, ("objects", "shape", "color"))
    if counted == "objects":
        n = pick(rng, TOTALS)
        return some(rng, COLORS, n), some(rng, SHAPES, n), ("color", "shape"), ("objects", n)
    alike = pick(rng, COUNTED)
    n = int(rng.integers(max(alike, 2), ROOMY + 1))
    if counted == "shape":
        shapes = _alike(rng, SHAPES, alike, n)
        return some(rng, COLORS, n), shapes, ("color",), (plural(shapes[0]), alike)
    colors = _alike(rng, tuple(COLORS), alike, n)
    return colors, some(rng, SHAPES, n), ("shape",), (f"{colors[0]} objects", alike)


def _alike(rng: Generator, names: Sequence[str], alike: int, n: int) -> list[str]:
    """`n` names of which exactly the first `alike` are the same one."""
    focus = pick(rng, names)
    others = [name for name in names if name != focus]
    return [focus] * alike + [pick(rng, others) for _ in range(n - alike)]


def _depth(rng: Generator) -> Scene:
    """One or two overlapping pairs, the nearer one in front and often larger; perhaps an object by itself."""
    size = image_size(rng)
    regions = shuffled(rng, pick(rng, (("pair",), ("pair", "pair"), ("pair", "single"))))
    n = sum(2 if region == "pair" else 1 for region in regions)
    colors, names = some(rng, COLORS, n), some(rng, SHAPES, n)
    shapes: list[Shape] = []
    fronts: list[tuple[int, int]] = []
    for region, box in zip(regions, split_box((0, 0, *size), len(regions), size[0] > size[1]), strict=True):
        looks = [(colors.pop(), names.pop()) for _ in range(2 if region == "pair" else 1)]
        if region == "pair":
            fronts.append((len(shapes) + 1, len(shapes)))
        shapes += _pair(rng, box, *looks) if region == "pair" else _single(rng, box, *looks)
    return Scene(size, "depth", pick(rng, tuple(BACKGROUNDS)), tuple(shapes), fronts=tuple(fronts))


def _pair(rng: Generator, box: Box, far: tuple[str, str], near: tuple[str, str]) -> list[Shape]:
    """Two shapes side by side that surely overlap, the farther one first (it is drawn first)."""
    width, height = box[2] - box[0], box[3] - box[1]
    shrink = pick(rng, (1.0, 0.75, 0.6))
    r = min(width / (2 + 2 * shrink), height / 2.6) * (0.8 + 0.2 * rng.random())
    far_r = r * shrink
    apart = (REACH[near[1]] * r + REACH[far[1]] * far_r) * (0.78 + 0.12 * rng.random())
    half_width, side = (apart + r + far_r) / 2, pick(rng, (-1, 1))
    x, y = place(rng, box, half_width, r * 1.25)
    drop = r * 0.15 * (rng.random() - 0.5)
    scales = ("medium", "medium") if shrink == 1 else ("small", "large")
    behind = Shape(*far, scales[0], round(x - side * (half_width - far_r)), round(y - drop), round(far_r))
    before = Shape(*near, scales[1], round(x + side * (half_width - r)), round(y + drop), round(r))
    return [behind, before]


def _single(rng: Generator, box: Box, look: tuple[str, str]) -> list[Shape]:
    r = min(box[2] - box[0], box[3] - box[1]) * 0.25
    return [Shape(*look, "medium", *place(rng, box, r, r), round(r))]


def _text(rng: Generator) -> Scene:
    """One or two signs and up to two objects, in bands below or beside each other."""
    stacked = bool(rng.random() < 0.5)
    size = image_size(rng, wide=not stacked)
    bands = [shuffled(rng, band.split()) for band in shuffled(rng, pick(rng, SIGN_LAYOUTS))]
    colors, names, texts = some(rng, COLORS, 4), some(rng, SHAPES, 2), _texts(rng)
    signs: list[Sign] = []
    shapes: list[Shape] = []
    shares = [0.62 if band[0] == "sign" else 0.38 for band in bands]
    for band, strip in zip(bands, split_box((0, 0, *size), len(bands), not stacked, shares), strict=True):
        # Signs are wide, so two of them stand one below the other; two objects use the strip's longer side.
        beside = band[0] == "shape" and stacked
        for item, box in zip(band, split_box(strip, len(band), beside), strict=True):
            if item == "sign":
                signs.append(_sign(rng, box, colors.pop(), texts.pop()))
            else:
                shapes += _marker(rng, box, min(size), colors.pop(), names.pop())
    return Scene(size, "text", pick(rng, tuple(BACKGROUNDS)), tuple(shapes), tuple(signs))


def _marker(rng: Generator, box: Box, side: int, color: str, name: str) -> list[Shape]:
    scale = pick(rng, tuple(RADII))
    r = min(RADII[scale] * side / 2, (min(box[2] - box[0], box[3] - box[1]) - 4) / 2)
    return [Shape(color, name, scale, *place(rng, box, r, r), round(r))]


def _texts(rng: Generator) -> list[str]:
    """Two different ones."""
    letters, texts = shuffled(rng, ALPHABET), list[str]()
    writers: dict[str, Callable[[], str]] = {
        "letter": letters.pop,
        "word": partial(pick, rng, WORDS),
        "number": partial(_number, rng),
    }
    for what in rng.choice(list(WRITTEN), size=2, p=list(WRITTEN.values())):
        text = writers[what]()
        texts.append(letters.pop() if text in texts else text)
    return texts


def _sign(rng: Generator, box: Box, color: str, text: str) -> Sign:
    """A sign whose text mostly fills the box; some words and numbers are small print, which a low resolution loses."""
    fill = min((box[2] - box[0] - 4) / (em_width(text) + 0.3), (box[3] - box[1] - 4) / 1.16)
    scale = "large" if len(text) == 1 else pick(rng, ("large", "medium", "small"))
    px = {"large": fill * (0.9 + 0.1 * rng.random()), "medium": fill * 0.65, "small": 10 + 2 * rng.random()}[scale]
    px = int(min(fill, max(px, 10)))
    sign = Sign(color, text, pick(rng, THICK if len(text) == 1 else FONTS), scale, px, 0, 0)
    x, y = place(rng, box, *sign.half_size)
    return replace(sign, x=x, y=y)


def _number(rng: Generator) -> str:
    digits = int(rng.integers(1, 4))
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def _chart(rng: Generator) -> Scene:
    size = image_size(rng)
    n = pick(rng, BARS)
    looks = zip(some(rng, COLORS, n), some(rng, ALPHABET, n), _values(rng, n), strict=True)
    bars = tuple(Bar(*look) for look in looks)
    px = int(min(20, size[0] / n / 1.5, max(10, size[1] * (0.09 + 0.05 * rng.random()))))
    chart = Chart(bars, px, printed=bool(rng.random() < 0.5))
    return Scene(size, "chart", pick(rng, tuple(BACKGROUNDS)), chart=chart, named_by=("color",), count=("bars", n))


def _values(rng: Generator, n: int) -> list[int]:
    """`n` bar values at least 2 apart, each uniform on 1..9.

    They are chosen on a circle of nine values and turned by a random step: every turn is as likely, so each bar's value
    stays uniform although no two are close.
    """
    gaps = 2 + np.bincount(rng.integers(n, size=TOP_VALUE - 2 * n), minlength=n)
    turned = (np.cumsum(gaps) + rng.integers(TOP_VALUE)) % TOP_VALUE + 1
    return [int(value) for value in rng.permutation(turned)]


_COMPOSERS: dict[str, Callable[[Generator], Scene]] = {
    "alone": _alone,
    "two": _two,
    "objects": _objects,
    "depth": _depth,
    "text": _text,
    "chart": _chart,
}
