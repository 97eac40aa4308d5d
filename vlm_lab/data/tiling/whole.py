"""One square view per image: squashed, padded or cropped to the encoder's square.

Sources: LLaVA-1.5 (`expand2square`) for padding, Cambrian-1 (arXiv 2406.16860, `unpad_image`) for cutting it off again,
CLIP's preprocessing for cropping. No tiles.
"""

from PIL import Image

from vlm_lab.batch import Block, Layout, unpadded
from vlm_lab.data.tiling.base import Eye, Size, Tiling, View, single

BICUBIC = Image.Resampling.BICUBIC


class Squash(Tiling):
    """The whole image resized to a square, aspect ratio not kept."""

    def layout(self, size: Size, view: View) -> Layout:
        return Layout((single(view),))

    def render(self, image: Image.Image, layout: Layout, eye: Eye) -> list[Image.Image]:
        return [squash(image, eye.side)]


class Pad(Squash):
    """The image centred on a square of the encoder's mean colour, then resized."""

    def render(self, image: Image.Image, layout: Layout, eye: Eye) -> list[Image.Image]:
        return [squash(pad(image, eye.mean), eye.side)]


class Unpad(Pad):
    """Cambrian-1: padded as `Pad`, but the padding's tokens are cut off again, and every row ends in a newline."""

    newline = True
    stitches = True

    def layout(self, size: Size, view: View) -> Layout:
        offset, crop = unpadded(size, view.grid)
        return Layout((Block((1, 1), offset, crop, crop, "row"),), padded=size)


class Crop(Squash):
    """The shorter side resized to the square's, the middle of the longer one kept."""

    def render(self, image: Image.Image, layout: Layout, eye: Eye) -> list[Image.Image]:
        (width, height), side = image.size, eye.side
        shortest = min(width, height)
        columns, rows = side * width // shortest, side * height // shortest
        left, top = (columns - side) // 2, (rows - side) // 2
        # Cut in the source's coordinates: the same pixels (but for rounding), and a 1 x 10000 image stays small.
        x, y = width / columns, height / rows
        box = (left * x, top * y, min((left + side) * x, width), min((top + side) * y, height))
        return [image.resize((side, side), BICUBIC, box)]


def squash(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), BICUBIC)


def pad(image: Image.Image, mean: tuple[float, float, float]) -> Image.Image:
    """The image in the middle of a square of colour `mean`."""
    (width, height), longest = image.size, max(image.size)
    canvas = Image.new("RGB", (longest, longest), tuple(int(255 * channel) for channel in mean))
    canvas.paste(image, ((longest - width) // 2, (longest - height) // 2))
    return canvas


def cut(image: Image.Image, rows: int, columns: int, side: int) -> list[Image.Image]:
    """Square tiles in reading order."""
    corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]
    return [image.crop((left, top, left + side, top + side)) for left, top in corners]
