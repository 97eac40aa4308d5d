"""Short videos: `clip(seed, split, index) -> Puzzle`, four to eight frames and one fact that no single frame tells.

Composed answers first, like single scenes. A tiling may show the model fewer frames than there are, evenly spaced
(data/video.py). So whatever happens in a clip happens between two of four such frames (`moments`): four frames are
enough to answer every question, and what is seen in the wrong order is at chance. Things move in straight lines.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise, permutations

from numpy.random import Generator

from vlm_lab.data.scenes.comparisons import LOOKS, Puzzle
from vlm_lab.data.scenes.facts import Fact
from vlm_lab.data.scenes.layout import Box, grid_centers, image_size, pick, shuffled, some, split_box
from vlm_lab.data.scenes.vocabulary import BACKGROUNDS, COLORS, SHAPES
from vlm_lab.data.scenes.world import Scene, Shape, stream

FRAMES = 8  # at most
MOMENTS = 4
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
NUMBERS = (1, 2, 3, 4, 5)

WORDINGS: dict[str, tuple[str, ...]] = {
    "direction": (
        "In which direction does the {thing} move?",
        "Which way does the {thing} move: left, right, up or down?",
    ),
    "growth": ("Does the {thing} grow or shrink?", "Is the {thing} growing or shrinking: does it grow or shrink?"),
    "appears": (
        "What color is the object that appears {when}?",
        "What is the color of the object that appears {when}?",
    ),
    "order": (
        "In which order do the {a}, the {b} and the {c} object appear?",
        "Put in order of appearance: {a}, {b}, {c}.",
    ),
    "how_many": ("How many different objects appear in the video?", "How many different objects does the video show?"),
}


@lru_cache(maxsize=64)  # its frames are drawn one by one
def clip(seed: int, split: str, index: int) -> Puzzle:
    """Clip number `index`; the templates take turns."""
    makers = tuple(_MAKERS.values())
    return makers[index % len(makers)](stream(seed, split, index, "clip"))


def clip_frame(seed: int, split: str, number: int) -> Scene | None:
    """Frame `number % FRAMES` of clip `number // FRAMES`, if that one has so many: for `ImageCache`."""
    index, place = divmod(number, FRAMES)
    scenes = clip(seed, split, index).scenes
    return scenes[place] if place < len(scenes) else None


def moments(rng: Generator, frames: int) -> list[int]:
    """The first frame, then one random frame between each two neighbours of `MOMENTS` evenly spaced ones.

    What begins at one of them is seen from the next evenly spaced frame on, and before what begins at a later one.
    """
    spaced = [number * (frames - 1) // (MOMENTS - 1) for number in range(MOMENTS)]
    return [0, *(int(rng.integers(before + 1, here + 1)) for before, here in pairwise(spaced))]


def _direction(rng: Generator) -> Puzzle:
    """One or two objects, each moving along its own part of the picture in its own direction."""
    way = pick(rng, tuple(WAYS))
    looks, size, boxes = _actors(rng)
    ways = [way, pick(rng, tuple(WAYS))]
    frames = range(_number_of_frames(rng))
    paths = [_path(rng, box, WAYS[each], len(frames)) for box, each in zip(boxes, ways, strict=False)]
    shown = [[Shape(*look, "medium", *path[t]) for look, path in zip(looks, paths, strict=False)] for t in frames]
    return _puzzle(rng, size, shown, Fact("direction", "", way, tuple(WAYS), {"thing": " ".join(looks[0])}))


def _path(rng: Generator, box: Box, step: tuple[int, int], frames: int) -> list[tuple[int, int, int]]:
    """(x, y, radius) per frame: three quarters of the free way along the box."""
    width, height = box[2] - box[0], box[3] - box[1]
    r = min(width, height) * (0.2 + 0.04 * rng.random())
    free = [width - 2 * r, height - 2 * r]
    low = [box[axis] + r + rng.random() * free[axis] * (0.25 if step[axis] else 1) for axis in (0, 1)]
    out = []
    for t in range(frames):
        done = [t / (frames - 1) if way > 0 else 1 - t / (frames - 1) for way in step]
        x, y = (low[axis] + abs(step[axis]) * done[axis] * 0.75 * free[axis] for axis in (0, 1))
        out.append((round(x), round(y), round(r)))
    return out


def _growth(rng: Generator) -> Puzzle:
    """One or two objects, each growing or shrinking to or from less than half its radius."""
    answer = pick(rng, ("grow", "shrink"))
    looks, size, boxes = _actors(rng)
    count = _number_of_frames(rng)
    shown: list[list[Shape]] = [[] for _ in range(count)]
    for look, box, how in zip(looks, boxes, (answer, pick(rng, ("grow", "shrink"))), strict=False):
        side = min(box[2] - box[0], box[3] - box[1])
        x, y = round((box[0] + box[2]) / 2), round((box[1] + box[3]) / 2)
        for t, shapes in enumerate(shown):
            share = t / (count - 1) if how == "grow" else 1 - t / (count - 1)
            shapes.append(Shape(*look, "medium", x, y, round(side * (0.16 + 0.26 * share))))
    fact = Fact("growth", "", answer, ("grow", "shrink"), {"thing": " ".join(looks[0])})
    return _puzzle(rng, size, shown, fact)


def _appears(rng: Generator) -> Puzzle:
    """Three objects come one after the other, and stay."""
    when = int(rng.integers(2))
    looks, size, shown = _arrivals(rng)
    fact = Fact("appears", "", looks[-when][0], tuple(COLORS), {"when": ("first", "last")[when]})
    return _puzzle(rng, size, shown, fact)


def _order(rng: Generator) -> Puzzle:
    looks, size, shown = _arrivals(rng)
    colors = [color for color, _ in looks]
    a, b, c = shuffled(rng, colors)
    pool = tuple(", ".join(each) for each in permutations((a, b, c)))
    return _puzzle(rng, size, shown, Fact("order", "", ", ".join(colors), pool, {"a": a, "b": b, "c": c}))


def _arrivals(rng: Generator) -> tuple[list[tuple[str, str]], tuple[int, int], list[list[Shape]]]:
    """Looks in the order in which they come, the picture's size, and the shapes of every frame."""
    count, size = _number_of_frames(rng), image_size(rng)
    looks = _looks(rng, 3)
    starts = sorted(some(rng, moments(rng, count), 3))
    shapes = _standing(rng, size, looks)
    return looks, size, [[s for s, start in zip(shapes, starts, strict=True) if start <= t] for t in range(count)]


def _how_many(rng: Generator) -> Puzzle:
    """Objects come and go, each seen in at least one of four evenly spaced frames."""
    number, count, size = pick(rng, NUMBERS), _number_of_frames(rng), image_size(rng)
    shapes = _standing(rng, size, _looks(rng, number))
    ends = [*moments(rng, count), count]
    spans = [sorted(some(rng, range(len(ends)), 2)) for _ in shapes]
    shown = [
        [shape for shape, (start, end) in zip(shapes, spans, strict=True) if ends[start] <= t < ends[end]]
        for t in range(count)
    ]
    return _puzzle(rng, size, shown, Fact("how_many", "", str(number), tuple(map(str, NUMBERS))))


def _number_of_frames(rng: Generator) -> int:
    return int(rng.integers(MOMENTS, FRAMES + 1))


def _actors(rng: Generator) -> tuple[list[tuple[str, str]], tuple[int, int], list[Box]]:
    """Looks of one or two objects, the picture's size, and a part of the picture for each."""
    number, size = int(rng.integers(1, 3)), image_size(rng)
    boxes = split_box((0, 0, *size), number, size[0] > size[1])
    return some(rng, LOOKS, number), size, shuffled(rng, boxes)


def _looks(rng: Generator, number: int) -> list[tuple[str, str]]:
    """Different colors and different shapes."""
    return list(zip(some(rng, COLORS, number), some(rng, SHAPES, number), strict=True))


def _standing(rng: Generator, size: tuple[int, int], looks: Sequence[tuple[str, str]]) -> list[Shape]:
    r = round(0.14 * min(size))
    centers = grid_centers(rng, size, [r] * len(looks))
    return [Shape(*look, "large", *center, r) for look, center in zip(looks, centers, strict=True)]


def _puzzle(rng: Generator, size: tuple[int, int], shown: Sequence[Sequence[Shape]], fact: Fact) -> Puzzle:
    background = pick(rng, tuple(BACKGROUNDS))
    return Puzzle(tuple(Scene(size, "clip", background, tuple(shapes)) for shapes in shown), fact)


_MAKERS: dict[str, Callable[[Generator], Puzzle]] = {
    "direction": _direction,
    "growth": _growth,
    "appears": _appears,
    "order": _order,
    "how_many": _how_many,
}
