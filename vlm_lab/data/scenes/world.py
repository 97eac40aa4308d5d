"""What a scene can hold: the records `Scene`, `Shape`, `Sign`, `Chart`, and the random streams behind them.

A scene is a pure function of (seed, split, index): `compose.compose` makes it, `draw.render` makes pixels of it,
`questions.py` and `captions.py` talk about it. Positions are whole pixels from plain arithmetic (no font metrics, no
libm), so a scene is the same on every machine. This file chooses nothing and draws nothing.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

# Raise it when any record or picture changes: it is part of fingerprints and of cache file names.
WORLD_VERSION = 7

SPLITS = ("train", "val")
# Every run of thirteen scenes (a block) holds this mix, in random order: any stretch of a split has every kind.
KINDS = (*("alone",) * 3, *("two",) * 3, "objects", "depth", *("text",) * 4, "chart")
STREAMS = ("scene", "kinds", "caption", "question", "comparison", "clip", "wording", "document", "text")

FONTS = ("Pillow", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono-Bold")
TOP_VALUE = 9  # bars are worth 1 to 9


@dataclass(frozen=True)
class Shape:
    """A colored shape of radius `r` around (x, y), in pixels."""

    color: str
    shape: str
    scale: str
    x: int
    y: int
    r: int


@dataclass(frozen=True)
class Sign:
    """A colored plate around (x, y) with a word, a letter or a number set in a font of `px` pixels per em."""

    color: str
    text: str
    font: str
    scale: str
    px: int
    x: int
    y: int

    @property
    def what(self) -> str:
        """What is written on it: number, letter or word."""
        return "number" if self.text.isdigit() else "letter" if len(self.text) == 1 else "word"

    @property
    def half_size(self) -> tuple[int, int]:
        """Half width and half height of the plate, in pixels."""
        return round(self.px * (em_width(self.text) + 0.3) / 2), round(self.px * 0.58)


@dataclass(frozen=True)
class Bar:
    color: str
    label: str
    value: int


@dataclass(frozen=True)
class Chart:
    """Bars from left to right. `printed`: values stand above the bars; else an axis with grid lines tells them."""

    bars: tuple[Bar, ...]
    px: int
    printed: bool


@dataclass(frozen=True)
class Scene:
    """One picture's content.

    `shapes` are in drawing order. `fronts` are (nearer, farther) indices of shapes that overlap. `named_by` are the
    attributes that single out any one shape. `count` is (noun, number), the number being drawn uniformly.
    """

    size: tuple[int, int]
    kind: str
    background: str
    shapes: tuple[Shape, ...] = ()
    signs: tuple[Sign, ...] = ()
    chart: Chart | None = None
    fronts: tuple[tuple[int, int], ...] = ()
    named_by: tuple[str, ...] = ("color", "shape")
    count: tuple[str, int] | None = None


def stream(seed: int, split: str, index: int, purpose: str) -> Generator:
    """An independent random stream per (seed, split, index, purpose); nothing depends on any other index."""
    key = np.array([seed, SPLITS.index(split) << 60 | index], dtype=np.uint64)
    return Generator(np.random.Philox(key=key, counter=[0, 0, 0, STREAMS.index(purpose)]))


def block_kinds(seed: int, split: str, block: int) -> tuple[str, ...]:
    """The kinds of the scenes of a block, the first of which is number `block * len(KINDS)`."""
    return tuple(KINDS[i] for i in stream(seed, split, block, "kinds").permutation(len(KINDS)))


def em_width(text: str) -> float:
    """Upper estimate of a text's width in em, for every font of `FONTS` (a test holds it against the real metrics)."""
    return sum(1.08 if letter in "mw" else 0.75 for letter in text)
