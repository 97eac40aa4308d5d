"""Tilings: which views of an image go through the encoder, and how many visual tokens come back.

A tiling is a pure function of the image's size, so placeholders can be laid out before any pixel is decoded. It offers

    layout(size, grid) -> Layout         size (width, height) in pixels; grid (h, w) of the connector's tokens per view
    render(image, side, mean) -> views   one PIL image of side x side per view; `mean` is the encoder's mean colour
"""

from dataclasses import dataclass
from typing import Protocol

from PIL import Image

Size = tuple[int, int]
Grid = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """How one image enters the model: `views` encoder inputs, `num_tokens` placeholders."""

    views: int
    num_tokens: int


class Tiling(Protocol):
    def layout(self, size: Size, grid: Grid) -> Layout: ...

    def render(self, image: Image.Image, side: int, mean: tuple[float, float, float]) -> list[Image.Image]: ...


class Squash:
    """One view: the whole image resized to a square, aspect ratio not kept."""

    def layout(self, size: Size, grid: Grid) -> Layout:
        return Layout(1, grid[0] * grid[1])

    def render(self, image: Image.Image, side: int, mean: tuple[float, float, float]) -> list[Image.Image]:
        return [image.resize((side, side), Image.Resampling.BICUBIC)]


class Pad(Squash):
    """One view: the image centred on a square of the mean colour, then resized (LLaVA-1.5's `expand2square`)."""

    def render(self, image: Image.Image, side: int, mean: tuple[float, float, float]) -> list[Image.Image]:
        (width, height), longest = image.size, max(image.size)
        canvas = Image.new("RGB", (longest, longest), tuple(int(255 * channel) for channel in mean))
        canvas.paste(image, ((longest - width) // 2, (longest - height) // 2))
        return super().render(canvas, side, mean)
