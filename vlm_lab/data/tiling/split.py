"""A fixed split: crops beside the whole image, each encoded and written out on its own.

Sources: Idefics2 (arXiv 2405.02246, section 3.4, and transformers' `Idefics2ImageProcessor`) and Mini-Gemini's token
extension (arXiv 2403.18814, section 3.2, and dvlab-research/MGM). Crops are not stitched: their tokens follow each
other. Where paper and code differ the code is followed: Idefics2 crops before it resizes, so that each crop is fitted
on its own (the paper: crops are brought to the image's size).
"""

from PIL import Image

from vlm_lab.batch import Layout
from vlm_lab.data.tiling.base import Eye, Size, Tiling, View, single
from vlm_lab.data.tiling.native import Native
from vlm_lab.data.tiling.whole import cut, pad, squash

Box = tuple[int, int, int, int]


class Split4(Native):
    """Idefics2: the four quarters in reading order, then the whole image. `shortest` = the side gives square views."""

    def layout(self, size: Size, view: View) -> Layout:
        return Layout(tuple(self.block((right - left, low - top), view) for left, top, right, low in boxes(size)))

    def render(self, image: Image.Image, layout: Layout, eye: Eye) -> list[Image.Image]:
        return [self.resize(image.crop(box), eye) for box in boxes(image.size)]


class HD(Tiling):
    """Mini-Gemini-HD: the padded image, then `grid` x `grid` crops of its enlarged copy, in reading order.

    MGM encodes the sharp image once and cuts its feature map; here every encoder sees each crop by itself. MGM also
    shrinks the sharp tensor for the first encoder, without antialiasing; here each view comes from the image.
    """

    def __init__(self, grid: int) -> None:
        self.grid = grid

    def layout(self, size: Size, view: View) -> Layout:
        return Layout((single(view),) * (1 + self.grid**2))

    def render(self, image: Image.Image, layout: Layout, eye: Eye) -> list[Image.Image]:
        square = pad(image, eye.mean)
        large = squash(square, self.grid * eye.side)
        return [squash(square, eye.side), *cut(large, self.grid, self.grid, eye.side)]


def boxes(size: Size) -> list[Box]:
    """(left, top, right, bottom) of the four quarters and of the whole; an image one pixel wide has no empty ones."""
    width, height = size
    across = ((0, max(1, width // 2)), (width // 2, width))
    down = ((0, max(1, height // 2)), (height // 2, height))
    quarters = [(left, top, right, bottom) for top, bottom in down for left, right in across]
    return [*quarters, (0, 0, width, height)]
