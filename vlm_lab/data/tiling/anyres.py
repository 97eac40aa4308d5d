"""AnyRes: the whole image small, and a canvas of tiles that follows its aspect ratio.

Sources: LLaVA-NeXT (blog of 2024-01-30, `llava/mm_utils.py`) and LLaVA-OneVision (arXiv 2408.03326, section 3.2;
LLaVA-VL/LLaVA-NeXT, "anyres_max_9" with "spatial_unpad"). The tiles' tokens become one raster; what the black margins
gave is cut off and every row ends in a learned newline. Where paper and code differ the code is followed: the cap
counts neither base view nor newlines, applies to the stitched map and tolerates 21% more; several images are padded
with the mean colour, which is not cut off again; a video has one newline, at its end.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from vlm_lab.batch import Block, Grid, Layout, unpadded
from vlm_lab.data.tiling.base import Eye, Size, Tiling, View, single
from vlm_lab.data.tiling.whole import BICUBIC, cut, pad, squash

SLACK = 1.1  # the map is scaled down only if its side exceeds the cap's by more than this


class AnyRes(Tiling):
    """LLaVA-NeXT. `canvases`: the (rows, columns) of views that are offered; a tie goes to the first in the list."""

    newline = True
    stitches = True

    def __init__(self, canvases: Sequence[Sequence[int]]) -> None:
        self.canvases = [(rows, columns) for rows, columns in canvases]

    def check(self, view: View, encoders: int) -> None:
        rows, columns = view.grid
        if rows != columns:
            name = type(self).__name__
            raise ValueError(f"tiling {name} stitches square maps, but the connector gives {rows} x {columns} tokens")

    def layout(self, size: Size, view: View) -> Layout:
        rows, columns = best_canvas(size, self.canvases, view.side)
        offset, crop = unpadded(size, (rows * view.grid[0], columns * view.grid[1]))
        tiles = Block((rows, columns), offset, crop, self.capped(crop, view.grid), "row")
        return Layout((single(view), tiles))

    def capped(self, size: Grid, grid: Grid) -> Grid:
        return size

    def render(self, image: Image.Image, layout: Layout, eye: Eye) -> list[Image.Image]:
        rows, columns = layout.blocks[1].tiles
        canvas = letterbox(image, (columns * eye.side, rows * eye.side))
        return [squash(image, eye.side), *cut(canvas, rows, columns, eye.side)]


class AnyResMax(AnyRes):
    """LLaVA-OneVision. Canvases of 1 to `largest` rows and columns; `cap`: the tiles' tokens, in views.

    One image is tiled; each of several is one padded view. Videos: at most `frames` frames, the sides of each map
    divided by `pool`, rounded up.
    """

    rescales = True
    videos = True

    def __init__(self, largest: int, cap: int, frames: int, pool: int = 2) -> None:
        span = range(1, largest + 1)
        super().__init__([(rows, columns) for columns in span for rows in span])
        self.cap, self.frames, self.pool = cap, frames, pool

    def layouts(self, sizes: Sequence[Size], view: View) -> list[Layout]:
        if len(sizes) == 1:
            return [self.layout(sizes[0], view)]
        return [Layout((replace(single(view), newline="end"),)) for _ in sizes]

    def capped(self, size: Grid, grid: Grid) -> Grid:
        (rows, columns), (h, w) = size, grid
        times = math.sqrt(rows * columns / (self.cap * h * w))
        if times <= SLACK:
            return size
        return max(1, int(rows // times)), max(1, int(columns // times))  # the code has no max, and fails at zero

    def video(self, frames: int, view: View) -> Layout:
        h, w = view.grid
        frame = replace(single(view), size=(-(-h // self.pool), -(-w // self.pool)))
        return Layout((*[frame] * (min(frames, self.frames) - 1), replace(frame, newline="end")))

    def render(self, image: Image.Image, layout: Layout, eye: Eye) -> list[Image.Image]:
        if len(layout.blocks) == 1:
            return [squash(pad(image, eye.mean), eye.side)]
        return super().render(image, layout, eye)


def best_canvas(size: Size, canvases: Sequence[Grid], side: int) -> Grid:
    """The canvas that shows the most pixels of the image, never counting more than it has; then the smallest."""

    def merit(canvas: Grid) -> tuple[int, int]:
        height, width = canvas[0] * side, canvas[1] * side
        scale = min(width / size[0], height / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return shown, shown - height * width

    return max(canvases, key=merit)


def letterbox(image: Image.Image, size: Size) -> Image.Image:
    """Resized to fit into `size`, in the middle of a black canvas."""
    (width, height), x, y = size, size[0] / image.width, size[1] / image.height
    if x < y:
        fitted = image.resize((width, min(math.ceil(image.height * x), height)), BICUBIC)
    else:
        fitted = image.resize((min(math.ceil(image.width * y), width), height), BICUBIC)
    canvas = Image.new("RGB", size)
    canvas.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
    return canvas
