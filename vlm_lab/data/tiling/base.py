"""What every tiling is, and the little that it is told about the model: an encoder's square, the connector's grid."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from vlm_lab.batch import Block, Grid, Layout

Size = tuple[int, int]  # (width, height) in pixels, as in PIL; a Grid is (rows, columns)


@dataclass(frozen=True)
class Eye:
    """An encoder: `side` of its square in pixels, its mean colour (RGB in 0..1), `stride` pixels per patch.

    Only tilings with views of other shapes look at the stride; `Native.check` refuses one that was left out.
    """

    side: int
    mean: tuple[float, float, float]
    stride: int = 1


@dataclass(frozen=True)
class View:
    """What one square view costs: `side` and `stride` of the first encoder, `grid` of the connector's tokens for it."""

    side: int
    stride: int
    grid: Grid


class Tiling:
    """Base of all tilings. Every encoder renders the same crops at its own side; the first one decides which."""

    marker = ""  # text before, between and after an image's runs of tokens; markers that would touch are one
    newline = False  # whether layouts hold newline embeddings
    single_encoder = False  # whether it can feed one encoder only
    any_shape = False  # whether its views have other shapes than the encoder's square
    stitches = False  # whether it needs a map of tokens per view
    rescales = False  # whether it may scale that map
    videos = False  # whether it has a rule for videos

    def check(self, view: View, encoders: int) -> None:
        """Raises ValueError if this tiling cannot feed `encoders` encoders and a connector with `view.grid`."""

    def layouts(self, sizes: Sequence[Size], view: View) -> list[Layout]:
        return [self.layout(size, view) for size in sizes]

    def layout(self, size: Size, view: View) -> Layout:
        """How one image of this size enters the model. Every tiling has its own."""
        raise NotImplementedError

    def video(self, frames: int, view: View) -> Layout:
        """One view per frame that is used; they are drawn uniformly and squashed."""
        raise ValueError(f"tiling {type(self).__name__} has no rule for videos (AnyResMax has)")

    def render(self, image: Image.Image, layout: Layout, eye: Eye) -> list[Image.Image]:
        """The views that `layout` counts, as one encoder sees them. Every tiling has its own."""
        raise NotImplementedError


def single(view: View) -> Block:
    """One view, all its tokens in reading order."""
    return Block((1, 1), (0, 0), view.grid, view.grid)
