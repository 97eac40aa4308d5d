"""Native aspect ratio: one view per image, of the image's own shape, padded only inside a batch.

Source: Idefics2 (arXiv 2405.02246) and transformers' `Idefics2ImageProcessor`. The views of a batch differ in size: the
loader pads them at the bottom and the right and sends their sizes along, and the encoder masks the padding
and spreads its positions over each view (vlm_lab/model/native.py). Only one encoder can do that, and only connectors
that keep one token per patch or resample to a row of latents: anything that mixes neighbours would mix in padding.
"""

from PIL import Image

from vlm_lab.batch import Block, Layout
from vlm_lab.data.tiling.base import Eye, Size, Tiling, View, single


class Native(Tiling):
    """Sides from `shortest` pixels to the encoder's side. An image within them keeps its size.

    As in the code, the aspect ratio is given up where both limits cannot be met (3000 x 500 becomes 980 x 378).
    `longest`: an upper limit below the encoder's side, as in the first stage of Idefics2's pretraining.
    """

    single_encoder = True
    any_shape = True

    def __init__(self, shortest: int, marker: str = "", longest: int | None = None) -> None:
        self.shortest, self.marker, self.longest = shortest, marker, longest

    def check(self, view: View, encoders: int) -> None:
        if encoders > 1:
            raise ValueError(f"tiling {type(self).__name__} takes one encoder, got {encoders}")
        if self.longest is not None and not self.shortest <= self.longest <= view.side:
            limits = f"from tiling.shortest = {self.shortest} to the encoder's {view.side} pixels"
            raise ValueError(f"tiling.longest = {self.longest}: needs to be {limits}")
        if not view.stride <= self.shortest <= view.side:
            limits = f"from one patch of {view.stride} to the encoder's {view.side} pixels"
            raise ValueError(f"tiling.shortest = {self.shortest}: needs to be {limits}")
        if view.grid[0] != 1 and view.grid != patches((view.side, view.side), view):
            raise ValueError(
                f"tiling {type(self).__name__} needs a connector with one token per patch, or a resampler;"
                f" this one makes {view.grid[0]} x {view.grid[1]} tokens of {view.side // view.stride} patches a side"
            )

    def layout(self, size: Size, view: View) -> Layout:
        return Layout((self.block(size, view),))

    def block(self, size: Size, view: View) -> Block:
        if view.grid != patches((view.side, view.side), view):  # a resampler: as many tokens whatever the size
            return single(view)
        real = patches(self.fit(size, view.side), view)
        return Block((1, 1), (0, 0), real, real)

    def fit(self, size: Size, side: int) -> Size:
        (width, height), ratio, longest = size, size[0] / size[1], self.longest or side
        if max(size) > longest:
            width, height = (longest, int(longest / ratio)) if width >= height else (int(longest * ratio), longest)
        return max(width, self.shortest), max(height, self.shortest)

    def render(self, image: Image.Image, layout: Layout, eye: Eye) -> list[Image.Image]:
        return [self.resize(image, eye)]

    def resize(self, image: Image.Image, eye: Eye) -> Image.Image:
        return image.resize(self.fit(image.size, eye.side), Image.Resampling.BILINEAR)


def patches(size: Size, view: View) -> tuple[int, int]:
    """(rows, columns) of whole patches; what is left over at the bottom and the right is not seen."""
    return size[1] // view.stride, size[0] // view.stride
