"""Questions that need several pictures: `compare(seed, split, index) -> Puzzle`, two to four pictures and one fact.

Composed answers first, like single scenes: which picture it is, how many there are in all, what changes, is drawn
uniformly, and pictures are made so that it is true. The pictures of a puzzle are exchangeable: neither the wording nor
their number says more than `1 / len(pool)`. Most puzzles need several pictures to be looked at together; `which_image`
needs each to be understood by itself. A picture is named by its ordinal ("second").
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from numpy.random import Generator

from vlm_lab.data.scenes.facts import Fact
from vlm_lab.data.scenes.layout import RADII, grid_centers, image_size, pick, radius, some
from vlm_lab.data.scenes.vocabulary import BACKGROUNDS, COLORS, SHAPES, plural
from vlm_lab.data.scenes.world import Scene, Shape, stream

PICTURES = 4  # at most
ORDINALS = ("first", "second", "third", "fourth")
TOTALS = (2, 3, 4, 5, 6)
CHANGES = ("color", "shape", "size", "place")
LOOKS = tuple(product(COLORS, SHAPES))

WORDINGS: dict[str, tuple[str, ...]] = {
    "which_image": ("In which image is there a {look}?", "Which image shows a {look}?"),
    "same_look": ("Is the {kind} of the object the same in both images?", "Do both objects have the same {kind}?"),
    "count_in_all": ("How many {things} are there in all images together?", "In all the images, how many {things}?"),
    "what_changed": (
        "What is different in the second image: the color, the shape, the size or the place of an object?",
        "One object differs between the images. Is it in color, shape, size or place?",
    ),
    "only_in": (
        "What color is the object that only the {which} image has?",
        "Which color is only in the {which} image?",
    ),
    "odd_one": (
        "In which image does the object differ in {kind} from the others?",
        "One image shows another {kind} than the rest. Which one?",
    ),
    "most_objects": ("Which image has the {most} objects?", "In which image are the {most} objects?"),
}

Look = tuple[str, str]  # color, shape


@dataclass(frozen=True)
class Puzzle:
    """Pictures in order, and what is asked about them."""

    scenes: tuple[Scene, ...]
    fact: Fact


@lru_cache(maxsize=64)  # its pictures are drawn one by one
def compare(seed: int, split: str, index: int) -> Puzzle:
    """Comparison number `index`; the templates take turns."""
    makers = tuple(_MAKERS.values())
    return makers[index % len(makers)](stream(seed, split, index, "comparison"))


def compared_picture(seed: int, split: str, number: int) -> Scene | None:
    """Picture `number % PICTURES` of comparison `number // PICTURES`, if that one has so many: for `ImageCache`."""
    index, place = divmod(number, PICTURES)
    scenes = compare(seed, split, index).scenes
    return scenes[place] if place < len(scenes) else None


def _which_image(rng: Generator) -> Puzzle:
    """The others share a color or a shape with the object that is looked for."""
    n = _number_of_pictures(rng)
    color, shape = target = pick(rng, LOOKS)
    alike = [look for look in LOOKS if (look[0] == color) != (look[1] == shape)]
    looks = [some(rng, alike, int(rng.integers(1, 4))) for _ in range(n)]
    place = int(rng.integers(n))
    looks[place][0] = target
    slots = {"look": f"{color} {shape}"}
    return Puzzle(_pictures(rng, looks), Fact("which_image", "", ORDINALS[place], ORDINALS[:n], slots))


def _same_look(rng: Generator) -> Puzzle:
    """What is not asked about is the same or not by another toss of a coin."""
    axis, same, other_same = (int(rng.integers(2)) for _ in range(3))
    keep = (same, other_same) if axis == 0 else (other_same, same)
    first = pick(rng, LOOKS)
    second = tuple(
        _other(rng, names, old, kept) for names, old, kept in zip((COLORS, SHAPES), first, keep, strict=True)
    )
    fact = Fact("same_look", "", ("no", "yes")[same], ("no", "yes"), {"kind": ("color", "shape")[axis]})
    return Puzzle(_pictures(rng, [[first], [(second[0], second[1])]]), fact)


def _count_in_all(rng: Generator) -> Puzzle:
    """Every picture has one or two other objects besides, so none is empty."""
    n, total, axis = _number_of_pictures(rng), pick(rng, TOTALS), int(rng.integers(2))
    counted = pick(rng, (tuple(COLORS), SHAPES)[axis])
    those = [look for look in LOOKS if look[axis] == counted]
    others = [look for look in LOOKS if look[axis] != counted]
    looks = [some(rng, others, int(rng.integers(1, 3))) for _ in range(n)]
    for place in rng.integers(n, size=total).tolist():
        looks[place].append(pick(rng, those))
    things = f"{counted} objects" if axis == 0 else plural(counted)
    fact = Fact("count_in_all", "", str(total), tuple(map(str, TOTALS)), {"things": things})
    return Puzzle(_pictures(rng, looks), fact)


def _what_changed(rng: Generator) -> Puzzle:
    """Two or three objects, of which one is another color, shape or size, or elsewhere, in the second picture."""
    n, change = int(rng.integers(2, 4)), pick(rng, CHANGES)
    colors, shapes, size = some(rng, COLORS, n + 1), some(rng, SHAPES, n + 1), image_size(rng)
    scales = [pick(rng, ("small", "large")), *(pick(rng, tuple(RADII)) for _ in range(n - 1))]
    scene = _picture(rng, size, list(zip(colors[1:], shapes[1:], strict=True)), scales, spare=1)
    *kept, spare = scene.shapes
    scale = "large" if scales[0] == "small" else "small"
    altered = {
        "color": replace(kept[0], color=colors[0]),
        "shape": replace(kept[0], shape=shapes[0]),
        "size": replace(kept[0], scale=scale, r=radius(scale, size, len(scene.shapes))),
        "place": replace(kept[0], x=spare.x, y=spare.y),
    }
    scenes = (replace(scene, shapes=tuple(kept)), replace(scene, shapes=(altered[change], *kept[1:])))
    return Puzzle(scenes, Fact("what_changed", "", change, CHANGES))


def _only_in(rng: Generator) -> Puzzle:
    """Three to five objects of different colors, of which one is missing in one of the two pictures."""
    n, place = int(rng.integers(3, 6)), int(rng.integers(2))
    looks = list(zip(some(rng, COLORS, n), some(rng, SHAPES, n), strict=True))
    full = _picture(rng, image_size(rng), looks)
    rest = replace(full, shapes=full.shapes[1:])
    scenes = (full, rest) if place == 0 else (rest, full)
    return Puzzle(scenes, Fact("only_in", "", looks[0][0], tuple(COLORS), {"which": ORDINALS[place]}))


def _odd_one(rng: Generator) -> Puzzle:
    """Three or four pictures of one object each; the colors are all the same but one, or the shapes are."""
    n, axis = int(rng.integers(3, 5)), int(rng.integers(2))
    look, place = pick(rng, LOOKS), int(rng.integers(n))
    odd = (_other(rng, COLORS, look[0], axis == 1), _other(rng, SHAPES, look[1], axis == 0))
    looks = [[odd if number == place else look] for number in range(n)]
    fact = Fact("odd_one", "", ORDINALS[place], ORDINALS[:n], {"kind": ("color", "shape")[axis]})
    return Puzzle(_pictures(rng, looks), fact)


def _most_objects(rng: Generator) -> Puzzle:
    """At least two more, or two fewer, than in any other picture."""
    n, most = _number_of_pictures(rng), pick(rng, ("most", "fewest"))
    counts = [int(rng.integers(1, 4)) for _ in range(n)]  # when the fewest are asked for, counted down from seven
    place = int(rng.integers(n))
    counts[place] = max(counts[:place] + counts[place + 1 :]) + 2
    looks = [some(rng, LOOKS, count if most == "most" else 7 - count) for count in counts]
    fact = Fact("most_objects", "", ORDINALS[place], ORDINALS[:n], {"most": most})
    return Puzzle(_pictures(rng, looks), fact)


def _number_of_pictures(rng: Generator) -> int:
    return int(rng.integers(2, PICTURES + 1))


def _other(rng: Generator, names: Iterable[str], old: str, kept: bool | int) -> str:
    return old if kept else pick(rng, [name for name in names if name != old])


def _pictures(rng: Generator, looks: Sequence[Sequence[Look]]) -> tuple[Scene, ...]:
    """One picture per list of looks, each of its own size and background."""
    return tuple(_picture(rng, image_size(rng), each) for each in looks)


def _picture(
    rng: Generator, size: tuple[int, int], looks: Sequence[Look], scales: Sequence[str] | None = None, spare: int = 0
) -> Scene:
    """Objects that do not overlap, of random scales unless given; `spare` copies of the first one elsewhere, last."""
    scales = scales or [pick(rng, tuple(RADII)) for _ in looks]
    looks, scales = [*looks, *[looks[0]] * spare], [*scales, *["large"] * spare]
    radii = [radius(scale, size, len(looks)) for scale in scales]
    room = [max(radii)] * len(radii) if spare else radii
    centers = grid_centers(rng, size, room)
    things = zip(looks, scales, centers, radii, strict=True)
    shapes = tuple(Shape(*look, scale, *center, r) for look, scale, center, r in things)
    return Scene(size, "comparison", pick(rng, tuple(BACKGROUNDS)), shapes)


_MAKERS: dict[str, Callable[[Generator], Puzzle]] = {
    "which_image": _which_image,
    "same_look": _same_look,
    "count_in_all": _count_in_all,
    "what_changed": _what_changed,
    "only_in": _only_in,
    "odd_one": _odd_one,
    "most_objects": _most_objects,
}
